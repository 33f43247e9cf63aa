"""What may be shown: text from elsewhere made printable, without secrets."""

import json
import re
from itertools import islice
from typing import Any

from sera_plugin.config.credentials import MASK, public, without_credentials

_QUOTED_CHARACTERS = 60
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
#: What Markdown, HTML or a page of formulas would obey, and the dot of an address without a scheme.
_OBEYED = re.compile(r"[^\w\s.,;?%='\"+-]|_|(?<=www)\.", re.ASCII | re.IGNORECASE)


def printable(text: str) -> str:
    """One line of text whose characters all show, so that no terminal obeys any of them.

    Colours are left out. What `str.isprintable` calls unprintable is escaped (`\\x1b`): control
    characters, line ends among them, and format characters that reorder or hide others.
    """
    return "".join(
        one if one.isprintable() or one == "\t" else one.encode("unicode_escape").decode()
        for one in _COLOUR.sub("", text)
    )


def in_markdown(text: object, limit: int) -> str:
    """At most `limit` characters as one line of Markdown, such as a table's cell, that reads as
    they stand: no part of them is markup, an address, or hidden."""
    text = str(text)
    cut = f" [... {len(text) - limit:,} more characters]" if len(text) > limit else ""
    lines = [printable(line) for line in text[:limit].split("\n")]
    return "<br>".join(_OBEYED.sub(_reference, line) for line in lines) + cut


def _reference(found: re.Match[str]) -> str:
    # Letters of other scripts obey nobody, and are read where the file itself is.
    return found[0] if ord(found[0]) > 127 else f"&#{ord(found[0])};"


def quoted(value: object, limit: int = _QUOTED_CHARACTERS) -> str:
    """A value of the user's as a message shows it: escaped, on one line, cut, without secrets."""
    try:
        if isinstance(value, str):
            # Before the text is cut to what shows: half of a URL does not tell its secrets.
            text = ascii(without_credentials(_beginning(value, limit))[: 4 * limit])
        else:
            text = without_credentials(ascii(public(_beginning(value, limit))))
    except Exception:  # a value of a class of its own may refuse to be shown
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}..."


def _beginning(value: Any, limit: int) -> Any:
    """Of a value what may show in `limit` characters, and more: the rest takes time only."""
    if isinstance(value, str):
        return value[: 100 * limit]
    if isinstance(value, dict):
        return {key: _beginning(one, limit) for key, one in islice(value.items(), limit)}
    if isinstance(value, (list, tuple)):
        return type(value)([_beginning(one, limit) for one in value[:limit]])
    return value


def plain(text: str, limit: int = _QUOTED_CHARACTERS) -> str:
    """The same of text that stands in a sentence without quotes."""
    shown = "".join(
        one if " " <= one <= "~" else one.encode("unicode_escape").decode()
        for one in without_credentials(_beginning(text, limit))[: 4 * limit]
    )
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def as_written(value: object) -> str:
    """A value as a YAML has it: text without quotes, `true`, `null`; escaped and cut."""
    if isinstance(value, str):
        return plain(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else quoted(value)


def without_secret(text: str, secret: str) -> str:
    """Text without a secret, also as Python's and JSON's quotes would spell it."""
    for spelled in {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]} - {""}:
        text = text.replace(spelled, MASK)
    return text
