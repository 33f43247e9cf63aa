"""A raw row to prompt, chosen and rejected text, or to a note about what is wrong with it.

The note stays in the row's place through shuffling, merging and the host's files, up to
`dataset.prepare_rows`, which drops the row and names it: a strategy's transform raises without a
row number, or not at all.

Most of the host's strategies format fields into strings, and formatting never fails: a missing
answer becomes "None", a number "5", and an empty answer leaves a turn that only ends. What became
of a field is found by putting something else in its place and transforming the row again; that
happens only where a field looks suspicious, so that ordinary rows are transformed once.

The host's `chat_template.*` strategies render an answer after a dummy user message and then search
the answer's text in the whole rendering (axolotl 0.19, prompt_strategies/dpo/chat_template.py). An
answer such as "user" is found in the turn's header first, and one that the template trims not at
all. They are cut out by place here.
"""

import copy
import inspect
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from sera_plugin.config.quoting import plain, quoted

Message = Mapping[str, Any]
Path = tuple[str | int, ...]

TEXTS = ("prompt", "chosen", "rejected")
#: Fields that may be empty, whatever the configuration calls them.
SYSTEM = ("system", "system_prompt")
EMPTY = "empty prompt, chosen or rejected"

#: What is wrong with a row ("" if nothing), the dataset it comes from, its place there from 0.
PROBLEM, SOURCE, ROW = "sera_problem", "sera_source", "sera_row"

#: Raise it with what the guard makes of a row: prepared data of another version is prepared anew.
GUARD_VERSION = 3

#: The user message that the host puts before an answer.
_DUMMY = {"role": "user", "content": "[[dummy_message]]"}
_PROBE = "sera-probe-7f3a"  # found again where it ends up
_CHANGED = "the chat template does not render the answer as it is"
_ANSWER_ROLES = ("assistant", "model")
_ROLES = frozenset({*_ANSWER_ROLES, "system", "developer", "user", "tool", "function", "ipython"})
#: Where a message has what is said; whatever else it has may be empty.
_SAID = ("content", "value", "text", "answer")
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
_KINDS |= {dict: "an object", type(None): "null"}


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


def visible(text: str) -> bool:
    """Whether there is anything to read: not only white space and zero-width characters."""
    return any(not one.isspace() and unicodedata.category(one) not in ("Cc", "Cf") for one in text)


def encodable(text: str) -> bool:
    """Whether the text is valid Unicode. A JSON escape such as \\ud800 alone is not."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def as_it_is(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transform of rows that a strategy has mapped in a way of its own."""
    return row


@dataclass
class GuardedTransform:
    """A strategy's transform that never raises; sent to worker processes by the host."""

    transform: Callable[..., Any]  # from a raw row to prompt, chosen and rejected
    source: str  # the dataset's name in messages
    kept: tuple[str, ...] = ()  # columns of the raw rows to keep; all others have done their work
    optional: tuple[str, ...] = SYSTEM  # fields that may be empty
    version: int = GUARD_VERSION  # the host names cached results by the attributes

    def __call__(self, row: Mapping[str, Any], index: int, tokenizer: Any = None) -> dict[str, Any]:
        """The row as text, or a placeholder that says what is wrong with it."""
        texts, problem = dict.fromkeys(TEXTS, "-"), ""
        try:
            texts = self._texts(dict(row), tokenizer)
        except RowError as error:
            problem = str(error)
        except Exception as error:  # a strategy may raise anything on a row it did not expect
            problem = _cause(error, row)
        kept = {key: row[key] for key in self.kept}
        return {**kept, **texts, PROBLEM: problem, SOURCE: self.source, ROW: index}

    def _texts(self, row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
        options: dict[str, Any] = {}
        seen: list[Any] = []
        if "tokenizer" in inspect.signature(self.transform).parameters:
            options["tokenizer"] = recording = copy.copy(tokenizer)
            recording.apply_chat_template = partial(_recorded, tokenizer, seen)

        def transform(row: dict[str, Any]) -> tuple[Any, dict[str, str]]:
            result = self.transform(row, **options)
            if not isinstance(result, Mapping):
                raise RowError(f"the strategy returned {type(result).__name__} for it")
            return result, dict(zip(TEXTS, _row_texts(result, tokenizer), strict=True))

        result, texts = transform(copy.deepcopy(row))
        answers = [
            _answer_text(tokenizer, conversation[1], *rendered)
            for conversation, *rendered in seen
            if len(conversation) == 2 and conversation[0].get("content") == _DUMMY["content"]
        ]
        if len(answers) == 2:
            texts["chosen"], texts["rejected"] = answers
        templated = bool(seen) or not isinstance(result["prompt"], str)
        _check_fields(row, texts, lambda row: transform(row)[1], templated, self.optional)
        if not texts["prompt"] or not all(map(visible, texts.values())):
            raise RowError(EMPTY)
        if not all(map(encodable, texts.values())):
            raise RowError("not valid Unicode: half of a surrogate pair")
        return texts


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
    templated: bool,
    optional: Sequence[str],
) -> None:
    """Refuse a row whose `texts` the transform made from something that is not text.

    `templated`: the prompt went through a chat template, and what is empty in it was judged there.
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


# ------------------------------------------------------------------ chat templates


def _recorded(original: Any, seen: list[Any], conversation: Any, *args: Any, **options: Any) -> Any:
    """Render as the original tokenizer does; note (conversation, text, template)."""
    if args or options.get("tokenize", True) or not _is_conversation(conversation):
        return original.apply_chat_template(conversation, *args, **options)
    text = _render(original, conversation, **options)
    seen.append((conversation, text, options.get("chat_template") or original.chat_template))
    return text


def _answer_text(tokenizer: Any, answer: Message, rendered: str, template: Any) -> str:
    """Answer and end of turn, out of what was rendered of it behind the dummy message."""
    _check_answer(answer)
    before, end = _surroundings(tokenizer, answer["role"], template)
    if not rendered.startswith(before):
        # A template that writes reasoning and answer in two places, for example.
        before = tokenizer.apply_chat_template(
            [_DUMMY], add_generation_prompt=True, chat_template=template, tokenize=False
        )
    completion = rendered[len(before) :].rstrip()
    if not rendered.startswith(before) or not completion.endswith(end):
        raise RowError(_CHANGED)
    _check_whole(answer, completion)
    return completion


@lru_cache(maxsize=64)
def _surroundings(tokenizer: Any, role: str, template: str | None) -> tuple[str, str]:
    """What a chat template writes before and after an answer, the end trimmed."""
    messages = [_DUMMY, {"role": role, "content": _PROBE}]
    options = {"add_generation_prompt": False, "tokenize": False, "chat_template": template}
    before, _, behind = tokenizer.apply_chat_template(messages, **options).partition(_PROBE)
    return before, behind.rstrip()


def _row_texts(row: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """A row's prompt, chosen and rejected as text; messages go through the chat template."""
    values: list[Any] = [row.get(key) for key in TEXTS]
    if all(isinstance(value, str) for value in values):
        return values
    if not all(map(_is_conversation, values)):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise RowError(f"prompt, chosen, rejected must all be text or all messages, not {kinds}")
    prompt, *answers = ([_without_blanks(message) for message in value] for value in values)
    for message in prompt:
        if message.get("role") not in _ROLES:
            raise RowError(f"unknown role {quoted(message.get('role'))} in the prompt")
    texts = [_render(tokenizer, prompt, add_generation_prompt=True, tokenize=False)]
    for answer in answers:
        if len(answer) != 1:
            raise RowError("chosen or rejected has several messages; a completion is one turn")
        _check_answer(answer[0])
        whole = _render(tokenizer, prompt + answer, tokenize=False)
        if not whole.startswith(texts[0]):
            raise RowError(
                "the chat template renders the prompt differently once the answer follows; "
                "`type: chat_template.default` renders each alone"
            )
        texts.append(whole[len(texts[0]) :].rstrip())
        _check_whole(answer[0], texts[-1])
    return texts


def _without_blanks(message: Message) -> dict[str, Any]:
    """A table has all keys in all rows (`tool_calls: []`); templates look whether one is there."""
    blank: tuple[Any, ...] = (None, [])
    return {key: said for key, said in message.items() if key == "content" or said not in blank}


def _is_conversation(value: Any) -> bool:
    messages = isinstance(value, Sequence) and bool(value)
    return messages and all(isinstance(message, Mapping) for message in value)


def _content(message: Message) -> list[str]:
    """The texts in a message; templates render anything else as if it were text, or as nothing."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return []
    parts: list[Any] = [content]
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        parts = [part.get("text") for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise RowError("a message's content is null or not text")
    return parts


def _has(rendered: str, parts: Iterable[str]) -> bool:
    """Whether all parts are there, white space aside."""
    squeezed = "".join(rendered.split())
    return all("".join(part.split()) in squeezed for part in parts)


def _render(tokenizer: Any, conversation: Sequence[Message], **options: Any) -> str:
    """A conversation as text; RowError for a message of which nothing is rendered."""
    contents = [_content(message) for message in conversation]
    text: str = tokenizer.apply_chat_template(conversation, **options)
    for message, parts in zip(conversation, contents, strict=True):
        if message.get("role") == "user" and not any(map(visible, parts)):
            raise RowError("a user message is empty")
        if isinstance(message.get("content"), list) and not _has(text, parts):
            raise RowError("the chat template does not render a message that has parts")
    return text


def _check_answer(answer: Message) -> None:
    if answer.get("role") not in _ANSWER_ROLES:
        role = quoted(answer.get("role"))
        raise RowError(f"chosen or rejected has the role {role}, not assistant")
    if not answer.get("tool_calls") and not any(map(visible, _content(answer))):
        raise RowError(EMPTY)


def _check_whole(answer: Message, completion: str) -> None:
    """Templates may trim an answer, or have a place for tool calls or none."""
    calls = [call.get("function") or call for call in answer.get("tool_calls") or ()]
    if not _has(completion, [*_content(answer), *(str(call.get("name")) for call in calls)]):
        raise RowError(_CHANGED)
