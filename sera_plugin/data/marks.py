"""Whether what a row brings reaches its text.

Everything in a raw row that says something gets a mark: each message, each tool call with its
arguments, each tool, each column. The marked row goes the way of the row itself, and the marks are
looked for in what became of it. So no type of row and no template needs rules of its own.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]

#: Columns that say something whatever reads the row. Another may be a note about the row, such as
#: `id` or `score`, unless it holds messages and is not called what `_NOTES` are.
CONTENT = frozenset(
    [
        *("system", "system_prompt", "instruction", "input", "question", "prompt", "context"),
        *("history", "documents", "messages", "conversation", "conversations", "chosen"),
        *("rejected", "tools", "functions", "tool_calls", "function_call", "chat_template_kwargs"),
        *("image", "images", "video", "videos", "audio", "audios"),
    ]
)
#: Names of columns with what was asked of whoever made or judged the answers.
_NOTES = re.compile(r"meta|label|rating|raw|generation|annotat|judge", re.IGNORECASE)
#: What says something in a message. Another key may be a note about it, such as `weight`.
_SAID = frozenset(
    [
        *("content", "value", "text", "name", "tool_calls", "function_call", "documents"),
        *("reasoning_content", "reasoning", "thinking"),
    ]
)
_REASONING = ("reasoning_content", "reasoning", "thinking")
#: What something is, or which other it belongs to: templates look at these, and write few of them.
_ADDRESSES = frozenset({"role", "from", "type", "id", "tool_call_id", "index"})
_CALLS = ("tool_calls", "function_call")
_TOOLS = frozenset({"tools", "functions"})
#: What says something in the description of a tool, beside the names of its parameters. The rest
#: is types and lists of names, which templates look at.
_SCHEMA = frozenset({"name", "description", "parameters"})
_AS_JSON = frozenset({"arguments", "parameters"})
_NUMBERS = 7_310_000_000
_MARK = re.compile(r"sera\d+mark|731\d{7}")


@dataclass(frozen=True)
class Leaf:
    """A value of the row that says something, and the mark that it got."""

    path: Path  # the column first
    value: Any  # as the row has it
    mark: str
    content: bool  # it has to reach the text

    @property
    def words(self) -> str:
        """The value without its white space."""
        return "".join(str(self.value).split())

    def __str__(self) -> str:
        """What it is, in words that are the same for every row that has lost it."""
        column = f"column {self.path[0]!r}"
        keys = [key for key in self.path[1:] if isinstance(key, str)]
        if not keys or self.path[0] in _TOOLS:
            return column
        call = next((key for key in keys if key in _CALLS), None)
        return f"{call or keys[-1]!r} in {column}"


class Marks:
    """The marks of one row.

    `role` and `tools` are what it may call the role of a message and the column of tools, too, and
    `columns` are those that its messages are read from.
    """

    def __init__(
        self, role: str = "role", tools: str = "tools", columns: Iterable[str] = ()
    ) -> None:
        self.leaves: list[Leaf] = []
        self._roles = dict.fromkeys((role, "role", "from"))
        self._tools = _TOOLS | {tools}
        self._content = CONTENT | self._tools | set(columns)
        self._shared: dict[Any, str] = {}

    def marked(self, row: Mapping[str, Any], but: Collection[str] = ()) -> dict[str, Any]:
        """A copy of the row in which everything is marked, `but` some columns."""
        return {
            key: value if key in but else self._marked(value, (key,), key in self._content)
            for key, value in row.items()
        }

    def _marked(self, value: Any, path: Path, content: bool, last: bool = True) -> Any:
        if isinstance(value, str):
            held = from_json(value) if path[-1] in self._tools | _AS_JSON else value
            if isinstance(held, (list, dict)):
                return json.dumps(self._marked(held, path, content))
            says = bool(value.strip()) and not (len(path) == 1 and held is None)
            return value + self._new(path, value, content) if says else value
        if isinstance(value, Mapping):
            return dict(self._pairs(value, path, content, last))
        if isinstance(value, (list, tuple)):
            end = len(value) - 1
            return [
                self._marked(inner, (*path, place), content, place == end)
                for place, inner in enumerate(value)
            ]
        if isinstance(value, (int, float, type(None))):
            if "arguments" not in path or value is None or isinstance(value, bool):
                return value
            value = _NUMBERS + len(self.leaves)
        # Whatever else it is, such as the bytes of an image, is not found in a text.
        self.leaves.append(Leaf(path, value, str(value)[:80], content))
        return value

    def _pairs(
        self, value: Mapping[Any, Any], path: Path, content: bool, last: bool
    ) -> Iterator[tuple[Any, Any]]:
        """The marked keys and values of a message, a call, a tool, or any other object."""
        role = next((value[key] for key in self._roles if key in value), None)
        for key, inner in value.items():
            below, says = (*path, key), content
            if inner is None:  # a table has every key in every row
                yield key, inner
                continue
            if "arguments" in path or (path[0] in self._tools and path[-1] == "properties"):
                key = f"{key}{self._new(below, key, says)}"
            elif key in _ADDRESSES or key in self._roles:
                yield key, inner
                continue
            elif path[0] in self._tools:
                if key not in _SCHEMA and not _nests(inner):
                    yield key, inner
                    continue
            elif role is not None:
                says = key in _SAID and (content or not _NOTES.search(str(path[0])))
                # Its call has the name; what was thought before is for the template to leave out.
                says &= not (key == "name" and role in ("tool", "function"))
                says &= last or key not in _REASONING
            yield key, self._marked(inner, below, says)

    def _new(self, path: Path, value: Any, content: bool) -> str:
        """A mark; the same one for the same words at the same place of another column.

        A history may stand before both answers, and is one history as long as it is the same.
        """
        mark = f"sera{len(self.leaves)}mark"
        if len(path) > 1:
            mark = self._shared.setdefault((path[1:], value), mark)
        self.leaves.append(Leaf(path, value, mark, content))
        return mark

    def lost(self, texts: Iterable[str]) -> list[Leaf]:
        """What is in none of the texts that the marked row has become."""
        found = {mark for text in texts for mark in _MARK.findall(text)}
        arrived = [one for one in self.leaves if one.mark in found]
        columns = {one.path[0] for one in arrived}
        said = {(len(one.path) == 1, one.words) for one in arrived}

        def repeated(leaf: Leaf) -> bool:
            """A column may repeat what another says, such as `prompt` beside conversations."""
            unread = leaf.path[0] not in columns
            return (True, leaf.words) in said or (unread and (False, leaf.words) in said)

        return [
            one
            for one in self.leaves
            if one.mark not in found and ("arguments" in one.path or not repeated(one))
        ]


def _nests(value: Any) -> bool:
    """Whether it is an object, or a list of some."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(one, Mapping) for one in values)


def from_json(text: str) -> Any:
    """The list or object that a string holds as JSON, None for `null`, else the string."""
    if text.strip() == "null":
        return None
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
