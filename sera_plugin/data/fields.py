"""Which of a row's own fields became its texts, and whether they held text.

Most of the host's strategies format fields into strings, and formatting never fails: a missing
answer becomes "None", a number "5", a list its Python notation, and an empty answer leaves a turn
that only ends. All of them look like text afterwards. What became of a field is found by putting
something else in its place and transforming the row again; that happens only where a field looks
suspicious, so that ordinary rows are transformed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from sera_plugin.data.texts import RowError, visible

TEXTS = ("prompt", "chosen", "rejected")
Transform = Callable[[dict[str, Any]], Mapping[str, Any]]
Path = tuple[str | int, ...]

_MARK = "sera-mark-91c2"
_ANSWERS = frozenset(TEXTS[1:])
#: Fields that may be empty, whatever the configuration calls them.
SYSTEM = ("system", "system_prompt")
#: Where a message has what is said; whatever else it has may be empty.
_SAID = ("content", "value", "text", "answer")


def check_fields(
    row: Mapping[str, Any],
    texts: Mapping[str, str],
    transform: Transform,
    templated: bool,
    optional: Collection[str] = SYSTEM,
) -> None:
    """Refuse a row whose prompt, chosen or rejected was made from something that is not text.

    Args:
        row: the raw row, as it was before the transform.
        texts: what the transform made of it.
        transform: the transform; called again on changed copies of suspicious rows.
        templated: the prompt went through a chat template; what is empty in it was judged there.
        optional: fields that may be empty as far as they are part of the prompt.

    Raises:
        RowError: naming the field and what it holds.
    """
    leaves = list(_leaves(row))
    for path, value in leaves:
        if isinstance(value, str):
            continue
        written = str(value)
        if not any(written in text for text in texts.values()):
            continue
        # None becomes "", which takes the same branches: an optional field is then left out twice.
        other = _with(row, path, "" if value is None else _MARK, transform)
        if value is None:
            formatted = any(texts[key].count("None") > other[key].count("None") for key in other)
        else:
            formatted = any(_MARK in text for text in other.values())
        if formatted:
            raise RowError(f"field {_named(path)} is {_kind(value)}, not text")

    said = [path for path, value in leaves if isinstance(value, str) and visible(value)]
    for path, value in leaves:
        if not isinstance(value, str) or visible(value):
            continue
        reached = _reached(row, path, transform)
        empty = bool(reached & _ANSWERS)
        if "prompt" in reached and not templated and not _is_optional(row, path, optional):
            # A prompt may have empty parts, such as a context, as long as something else is asked.
            empty |= not any(
                "prompt" in _reached(row, other, transform)
                for other in said
                if not _is_optional(row, other, optional)
            )
        if empty:
            raise RowError(f"field {_named(path)} is empty")


def _leaves(row: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Every field of the row, and what the messages in them say."""
    for field, value in row.items():
        yield (field,), value
        held: list[tuple[Path, Any]] = [((field,), value)]
        if isinstance(value, list):
            held = [((field, index), message) for index, message in enumerate(value)]
        for path, message in held:
            if isinstance(message, Mapping) and not message.get("tool_calls"):
                yield from (((*path, key), message[key]) for key in _SAID if key in message)


def _with(
    row: Mapping[str, Any], path: Path, value: Any, transform: Transform
) -> Mapping[str, str]:
    """The texts of the row with another value at a path; none if it cannot be transformed."""
    changed = copy.deepcopy(dict(row))
    target: Any = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    try:
        result = transform(changed)
        return {key: result[key] for key in TEXTS if isinstance(result[key], str)}
    except Exception:  # whatever a strategy does to a value it did not expect
        return {}


def _reached(row: Mapping[str, Any], path: Path, transform: Transform) -> set[str]:
    """The texts in which the value at a path ends up."""
    other = _with(row, path, _MARK, transform)
    return {key for key, text in other.items() if _MARK in text}


def _is_optional(row: Mapping[str, Any], path: Path, optional: Collection[str]) -> bool:
    """Whether the path is a system prompt: a field of that name, or a message of that role."""
    if len(path) == 1:
        return path[0] in optional
    message: Any = row
    for key in path[:-1]:
        message = message[key]
    return "system" in (message.get("role"), message.get("from"))


def _named(path: Path) -> str:
    first, *rest = path
    return repr(str(first) + "".join(f"[{key!r}]" for key in rest))


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
