"""A raw row to prompt, chosen and rejected text, or to a note about what is wrong with it.

The note stays in the row's place through shuffling, merging and the host's files, up to
`dataset.prepare_rows`, which drops the row and names it: a strategy's transform raises without a
row number, or not at all.

Most of the host's strategies format fields into strings, and formatting never fails: a missing
answer becomes "None", a number "5", and an empty answer leaves a turn that only ends. What became
of a field is found by putting something else in its place and transforming the row again; that
happens only where a field looks suspicious, so that ordinary rows are transformed once.

What a row says and its text does not is found in the same way, by `marks`, in every row.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sera_plugin.config.quoting import plain, quoted
from sera_plugin.data.conversations import KWARGS, ChangedError, ChatTemplate, MessageReader
from sera_plugin.data.marks import Leaf, Marks, Path
from sera_plugin.data.text import EMPTY, TEXTS, RowError, encodable, visible

#: Fields that may be empty, whatever the configuration calls them.
SYSTEM = ("system", "system_prompt")

#: What is wrong with a row ("" if nothing), the dataset it comes from, its place there from 0, and
#: what it has that its text does not need, separated by commas. How many rows with a label it has
#: been made from, see `unpaired`: 0 for a row that is a pair itself.
PROBLEM, SOURCE, ROW, ASIDE = "sera_problem", "sera_source", "sera_row", "sera_aside"
LABELLED = "sera_labelled"

#: Raise it with what the guard makes of a row: prepared data of another version is prepared anew.
GUARD_VERSION = 7

_PROBE = "sera-probe-7f3a"  # found again where it ends up
#: Where a message has what is said; whatever else it has may be empty.
_SAID = ("content", "value", "text", "answer")
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
_KINDS |= {dict: "an object", type(None): "null"}


def as_it_is(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transform of rows that a strategy has mapped in a way of its own."""
    return row


@dataclass
class GuardedTransform:
    """A strategy's transform that never raises; sent to worker processes by the host."""

    #: From a raw row to prompt, chosen and rejected: text, or messages for the template.
    transform: Callable[..., Any]
    source: str  # the dataset's name in messages
    kept: tuple[str, ...] = ()  # columns of the raw rows to keep; all others have done their work
    optional: tuple[str, ...] = SYSTEM  # fields that may be empty
    template: ChatTemplate = field(default_factory=ChatTemplate)
    version: int = GUARD_VERSION  # the host names cached results by the attributes

    def __call__(self, row: Mapping[str, Any], index: int, tokenizer: Any = None) -> dict[str, Any]:
        """The row as text, or a placeholder that says what is wrong with it."""
        texts, problem, aside = dict.fromkeys(TEXTS, "-"), "", ""
        try:
            texts, aside = self._texts(dict(row), tokenizer)
        except RowError as error:
            problem = str(error)
        except Exception as error:  # a strategy may raise anything on a row it did not expect
            problem = _cause(error, row)
        kept = {key: row[key] for key in self.kept}
        note = {PROBLEM: problem, SOURCE: self.source, ROW: index, ASIDE: aside, LABELLED: 0}
        return {**kept, **texts, **note}

    def _texts(self, row: dict[str, Any], tokenizer: Any) -> tuple[dict[str, str], str]:
        """The row's texts, and what it has beside them."""
        reads_tokenizer = "tokenizer" in inspect.signature(self.transform).parameters
        options = {"tokenizer": tokenizer} if reads_tokenizer else {}
        is_text = True

        def transform(row: dict[str, Any]) -> dict[str, str]:
            nonlocal is_text
            result = self.transform(row, **options)
            if not isinstance(result, Mapping):
                raise RowError(f"the strategy returned {type(result).__name__} for it")
            texts: list[Any] = [result.get(key) for key in TEXTS]
            is_text = all(isinstance(one, str) for one in texts)
            texts = texts if is_text else self.template.texts(result, tokenizer)
            return dict(zip(TEXTS, texts, strict=True))

        texts = transform(copy.deepcopy(row))
        if is_text:
            _check_fields(row, texts, transform, self.optional)
        if not texts["prompt"] or not all(map(visible, texts.values())):
            raise RowError(EMPTY)
        if not all(map(encodable, texts.values())):
            raise RowError("not valid Unicode: half of a surrogate pair")
        lost = self._lost(row, texts, transform)
        if is_text and row.get(KWARGS):
            lost.insert(0, Leaf((KWARGS,), None, "", content=True))
        for leaf in lost:
            if leaf.content:
                raise RowError(f"{leaf} reaches no text: the type or the template does not read it")
        return texts, ", ".join(sorted({str(leaf.path[0]) for leaf in lost}))

    def _lost(
        self,
        row: Mapping[str, Any],
        texts: Mapping[str, str],
        transform: Callable[[dict[str, Any]], Mapping[str, str]],
    ) -> list[Leaf]:
        """What the row says and its texts do not, except the columns that are kept beside them."""
        reader = self.transform if isinstance(self.transform, MessageReader) else None
        marks = Marks(reader.names["role"], reader.tools, reader.columns) if reader else Marks()
        marked = marks.marked(row, but=(*self.kept, KWARGS))
        try:
            return marks.lost(transform(marked).values())
        except ChangedError:
            raise
        except Exception:  # a strategy or a template may compare what has a mark now
            return [
                one for one in marks.leaves if not any(str(one.value) in t for t in texts.values())
            ]


def _cause(error: Exception, row: Mapping[str, Any]) -> str:
    """Why a strategy could not transform a row, in one line."""
    if isinstance(error, KeyError) and error.args and error.args[0] not in row:
        fields = ", ".join(map(quoted, list(row)[:8])) + (", ..." if len(row) > 8 else "")
        return f"no field or role {quoted(error.args[0])}; its fields are {fields}"
    null = [quoted(key) for key, value in row.items() if value is None]
    aside = f" (null: {', '.join(null[:5])})" if null else ""
    said = f"{type(error).__name__}: {plain(str(error), 120)}"
    return f"the host's strategy cannot read it: {said}{aside}"


# ------------------------------------------------------------------ fields


def _check_fields(
    row: Mapping[str, Any],
    texts: Mapping[str, str],
    transform: Callable[[dict[str, Any]], Mapping[str, str]],
    optional: Sequence[str],
) -> None:
    """Refuse a row whose `texts` the transform made from something that is not text.

    `optional` fields may be empty as far as they are part of the prompt.
    """

    def texts_with(path: Path, value: Any) -> Mapping[str, str]:
        """What is made of the row with another value there; nothing if it cannot be."""
        changed = copy.deepcopy(dict(row))
        _message(changed, path)[path[-1]] = value
        try:
            return transform(changed)
        except Exception:  # whatever a strategy does to a value it did not expect
            return {}

    def reached(path: Path) -> set[str]:
        """The texts in which the value there ends up."""
        return {key for key, text in texts_with(path, _PROBE).items() if _PROBE in text}

    def is_formatted(path: Path, value: Any) -> bool:
        if not any(str(value) in text for text in texts.values()):
            return False
        if value is not None:
            return bool(reached(path))
        # "" takes the same branches as None: an optional field is then left out twice.
        other = texts_with(path, "")
        return any(texts[key].count("None") > other[key].count("None") for key in other)

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
        elif is_formatted(path, value):
            kind = _KINDS.get(type(value), f"a {type(value).__name__}")
            raise RowError(f"field {_named(path)} is {kind}, not text")
    for path in blank:
        where = reached(path)
        empty = not where.isdisjoint(("chosen", "rejected"))
        if "prompt" in where and not is_optional(path):
            # A prompt may have empty parts, such as a context, as long as something else is asked.
            empty |= not any("prompt" in reached(p) for p in said if not is_optional(p))
        if empty:
            raise RowError(f"field {_named(path)} is empty")


def _fields(row: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Every field of the row, and what the messages in them say."""
    for column, value in row.items():
        yield (column,), value
        held: list[tuple[Path, Any]] = [((column,), value)]
        if isinstance(value, list):
            held = [((column, index), message) for index, message in enumerate(value)]
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
