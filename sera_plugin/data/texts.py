"""What counts as text in a preference row, and whether its texts were made of nothing else.

Most of the host's strategies format fields into strings, and formatting never fails: a missing
answer becomes "None", a number "5", and an empty answer leaves a turn that only ends. What became
of a field is found by putting something else in its place and transforming the row again; that
happens only where a field looks suspicious, so that ordinary rows are transformed once.
"""

from __future__ import annotations

import copy
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

TEXTS = ("prompt", "chosen", "rejected")
#: Fields that may be empty, whatever the configuration calls them.
SYSTEM = ("system", "system_prompt")
EMPTY = "empty prompt, chosen or rejected"

Path = tuple[str | int, ...]

_MARK = "sera-mark-91c2"
#: Where a message has what is said; whatever else it has may be empty.
_SAID = ("content", "value", "text", "answer")
_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
_KINDS |= {list: "a list", dict: "an object"}
#: Characters that text may contain but seldom means to: controls, zero-width space and byte order
#: mark, direction overrides, the replacement character of a wrong decoding, piles of accents.
_ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ufffd]"
    "|[\u0300-\u036f\u1ab0-\u1aff\u20d0-\u20ff]{9,}"
)


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


def visible(text: str) -> bool:
    """Whether there is anything to read: not only white space and zero-width characters."""
    return any(not one.isspace() and unicodedata.category(one) not in ("Cc", "Cf") for one in text)


def encodable(text: str) -> bool:
    """Whether the text is valid Unicode. A JSON escape such as \\ud800 alone is not."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def odd(text: str) -> bool:
    """Whether the text has characters that are worth a second look (see docs/data.md)."""
    return _ODD.search(text) is not None


def check_fields(
    row: Mapping[str, Any],
    texts: Mapping[str, str],
    transform: Callable[[dict[str, Any]], Mapping[str, Any]],
    templated: bool,
    optional: Collection[str] = SYSTEM,
) -> None:
    """Refuse a row whose `texts` the transform made from something that is not text.

    The transform is called again on changed copies of suspicious rows. `templated`: the prompt
    went through a chat template, and what is empty in it was judged there. `optional` fields may be
    empty as far as they are part of the prompt. RowError names the field and what it holds.
    """

    def texts_with(path: Path, value: Any) -> Mapping[str, str]:
        """What is made of the row with another value there; nothing if it cannot be."""
        changed = copy.deepcopy(dict(row))
        _message(changed, path)[path[-1]] = value
        try:
            made = transform(changed)
            return {key: made[key] for key in TEXTS if isinstance(made[key], str)}
        except Exception:  # whatever a strategy does to a value it did not expect
            return {}

    def reached(path: Path) -> set[str]:
        """The texts in which the value there ends up."""
        return {key for key, text in texts_with(path, _MARK).items() if _MARK in text}

    def is_optional(path: Path) -> bool:
        """Whether it is a system prompt: a field of that name, or in a message of that role."""
        if len(path) == 1:
            return path[0] in optional
        message = _message(row, path)
        return "system" in (message.get("role"), message.get("from"))

    said: list[Path] = []
    blank: list[Path] = []
    for path, value in _fields(row):
        if isinstance(value, str):
            (said if visible(value) else blank).append(path)
            continue
        if not any(str(value) in text for text in texts.values()):
            continue
        if value is None:
            # "" takes the same branches as None: an optional field is then left out twice.
            other = texts_with(path, "")
            formatted = any(texts[key].count("None") > other[key].count("None") for key in other)
        else:
            formatted = bool(reached(path))
        if formatted:
            kind = _KINDS.get(type(value), f"a {type(value).__name__}")
            raise RowError(f"field {_named(path)} is {kind}, not text")

    for path in blank:
        where = reached(path)
        empty = not where.isdisjoint(("chosen", "rejected"))
        if "prompt" in where and not templated and not is_optional(path):
            # A prompt may have empty parts, such as a context, as long as something else is asked.
            empty |= not any("prompt" in reached(p) for p in said if not is_optional(p))
        if empty:
            raise RowError(f"field {_named(path)} is empty")


def _fields(row: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Every field of the row, and what the messages in them say."""
    for field, value in row.items():
        yield (field,), value
        held: list[tuple[Path, Any]] = [((field,), value)]
        if isinstance(value, list):
            held = [((field, index), message) for index, message in enumerate(value)]
        for path, message in held:
            if isinstance(message, Mapping) and not message.get("tool_calls"):
                yield from (((*path, key), message[key]) for key in _SAID if key in message)


def _message(row: Any, path: Path) -> Any:
    """What a path's last step is taken in."""
    for key in path[:-1]:
        row = row[key]
    return row


def _named(path: Path) -> str:
    return repr(str(path[0]) + "".join(f"[{key!r}]" for key in path[1:]))
