"""What may be shown and kept: text from elsewhere made printable, secrets left out."""

import json
import re
from typing import Any

MASK = "***"
_QUOTED_CHARACTERS = 60

#: Words that make a key a secret wherever they stand in it.
_SECRET = re.compile(r"apikey|authorization|credentials?|pass(phrase|wd|word)|secrets?")
#: A `..._token` with one of these before it is a piece of text that a tokenizer knows.
_TEXT = re.compile(r"audio|bos|cls|end|eo[ist]|image|mask|pad|sep|special|start|stop|unk|video")
#: A `..._key` with one of these before it names a field or an experiment.
_NAME = re.compile(r"column|experiment|field|group|property|sort|split|thinking")
#: Before the host of a URL, or of a value that is nothing but `user:password@host...`.
_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]+@|^[^\s/?#:@]+:[^\s/?#@]+@(?=\S+$)")
#: From the `?` or `#` of a URL on. Signatures and tokens stand there, under many names.
_QUERY = re.compile(r"(://[^\s?#]*[?#])\S+")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: str) -> str:
    """One line of text whose characters all show, so that no terminal obeys any of them.

    Colours are left out. What `str.isprintable` calls unprintable is escaped (`\\x1b`): control
    characters, line ends among them, and format characters that reorder or hide others.
    """
    return "".join(
        one if one.isprintable() or one == "\t" else one.encode("unicode_escape").decode()
        for one in _COLOUR.sub("", text)
    )


def quoted(value: object, limit: int = _QUOTED_CHARACTERS) -> str:
    """A value of the user's as a message shows it: escaped, on one line, cut, without secrets."""
    try:
        if isinstance(value, str):
            # Before anything is cut: half of a URL shows no longer what is secret in it.
            text = ascii(without_credentials(value)[: 4 * limit])
        else:
            text = without_credentials(ascii(public(value)))
    except Exception:  # a value of a class of its own may refuse to be shown
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}..."


def plain(text: str, limit: int = _QUOTED_CHARACTERS) -> str:
    """The same of text that stands in a sentence without quotes."""
    shown = "".join(
        one if " " <= one <= "~" else one.encode("unicode_escape").decode()
        for one in without_credentials(text)[: 4 * limit]
    )
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def as_written(value: object) -> str:
    """A value as a YAML has it: text without quotes, `true`, `null`; escaped and cut."""
    if isinstance(value, str):
        return plain(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else quoted(value)


def without_credentials(text: str) -> str:
    """Text with `user:password@` of a URL masked, and its query, which may be signed."""
    return _QUERY.sub(rf"\1{MASK}", _CREDENTIALS.sub(f"{MASK}@", text))


def without_secret(text: str, secret: str) -> str:
    """Text without a secret, also as Python's and JSON's quotes would spell it."""
    for spelled in {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]} - {""}:
        text = text.replace(spelled, MASK)
    return text


def is_secret(key: str) -> bool:
    """Whether a configuration key names a secret (`api_key`, `hub_token`, `Authorization`)."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower())
    *_, before, last = ["", "", *words]
    return (
        any(map(_SECRET.fullmatch, words))
        or (last == "token" and not _TEXT.fullmatch(before))
        or (last == "key" and not _NAME.fullmatch(before))
    )


def public(value: Any) -> Any:
    """A configuration that can be kept and shown: without secrets, at any depth.

    Booleans are settings whatever their key says (`hf_use_auth_token: true`).

    Args:
        value: mappings, lists and plain values, as JSON has them.
    """
    if isinstance(value, dict):
        return {
            key: public(inner)
            for key, inner in value.items()
            if inner is None or isinstance(inner, bool) or not is_secret(str(key))
        }
    if isinstance(value, (list, tuple)):
        shown = [public(inner) for inner in value]
        return shown if isinstance(value, list) else tuple(shown)
    return without_credentials(value) if isinstance(value, str) else value
