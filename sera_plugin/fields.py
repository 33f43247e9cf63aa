"""Which of a row's own fields became its texts, and whether they held text.

Most of the host's strategies format fields into strings, and formatting never fails: a missing
answer becomes "None", a number "5", a list its Python notation, and an empty answer leaves a turn
that only ends. All of them look like text afterwards. What became of a field is found by putting
something else in its place and transforming the row again; that happens only where a field looks
suspicious, so that ordinary rows are transformed once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from sera_plugin.texts import RowError, visible

TEXTS = ("prompt", "chosen", "rejected")
Transform = Callable[[dict[str, Any]], Mapping[str, Any]]
Path = tuple[str | int, ...]

_MARK = "sera-mark-91c2"
_ANSWERS = frozenset(TEXTS[1:])
#: Fields that may be empty, and those that name who speaks.
_OPTIONAL = "system"
_ROLES = frozenset({"role", "from"})
_DEPTH = 5


class Reads(dict[str, Any]):
    """A row that remembers which of its fields a transform looked at."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)


def check_fields(
    row: Mapping[str, Any], read: Collection[str], texts: Mapping[str, str], transform: Transform
) -> None:
    """Refuse a row whose prompt, chosen or rejected was made from something that is no text.

    Args:
        row: the raw row, as it was before the transform.
        read: the fields that the transform looked at.
        texts: what it made of them.
        transform: the transform; called again on changed copies of suspicious rows.

    Raises:
        RowError: naming the field and what it holds.
    """
    used = {key: value for key, value in row.items() if key in read}
    leaves = list(_leaves(used))
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
    for path, value in leaves:
        if not isinstance(value, str) or visible(value) or _is_optional(row, path):
            continue
        reached = _reached(row, path, transform)
        if reached & _ANSWERS or ("prompt" in reached and not _said(row, leaves, transform)):
            raise RowError(f"field {_named(path)} is empty")


def _said(row: Mapping[str, Any], leaves: list[tuple[Path, Any]], transform: Transform) -> bool:
    """Whether the prompt has any text from the row beside an optional field."""
    return any(
        "prompt" in _reached(row, path, transform)
        for path, value in leaves
        if isinstance(value, str)
        and visible(value)
        and path[-1] not in _ROLES
        and not _is_optional(row, path)
    )


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value in the row, the containers first."""
    if path:
        yield path, value
    if len(path) == _DEPTH:
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from _leaves(inner, (*path, key))


def _with(
    row: Mapping[str, Any], path: Path, value: Any, transform: Transform
) -> Mapping[str, str]:
    """The texts of the row with another value at a path; none if it cannot be transformed."""
    changed = dict(row)
    target: Any = changed
    for key in path[:-1]:
        target[key] = target[key].copy()
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


def _is_optional(row: Mapping[str, Any], path: Path) -> bool:
    """Whether the path is a system prompt: a field of that name, or a message of that role."""
    if any(_OPTIONAL in str(key).lower() for key in path):
        return True
    holder: Any = row
    for key in path[:-1]:
        holder = holder[key]
    return isinstance(holder, Mapping) and any(holder.get(key) == _OPTIONAL for key in _ROLES)


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
