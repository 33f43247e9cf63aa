"""Rows of messages to prompt, chosen and rejected text, through a chat template.

Two steps, and the same ones whatever `type:` a dataset has. `MessageReader` takes the messages out
of a raw row as the host's `chat_template.*` types name its fields; rows without a type have them
already. `ChatTemplate` renders prompt and answer together, once for each answer, and cuts: what it
writes is the prompt and the completion, with nothing between them and nothing left out.

The host renders an answer alone, after a dummy message, takes only role and content of a message,
and reads neither `tools` nor `chat_template_kwargs` (axolotl 0.19, prompt_strategies/dpo). TRL
reads both (trl 1.9, DPOTrainer.tokenize_fn), and so does this.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jinja2 import Environment

from sera_plugin.config.quoting import quoted
from sera_plugin.data.marks import from_json
from sera_plugin.data.text import EMPTY, TEXTS, RowError, visible

Message = Mapping[str, Any]
TOOLS, KWARGS = "tools", "chat_template_kwargs"

ANSWER_ROLES = ("assistant", "model")
_ROLES = frozenset({*ANSWER_ROLES, "system", "developer", "user", "tool", "function", "ipython"})
_TOOL_ROLES = ("tool", "function", "ipython")
#: What stands around a thought, and all of it: templates write white space of their own there.
_THOUGHT = re.compile(r"</?think(?:ing)?>")
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
#: Variables with which templates turn thinking off and on, most common first.
_THINKING = [(name, on) for on in (False, True) for name in ("enable_thinking", "thinking")]


def is_conversation(value: Any) -> bool:
    """Whether it is a list of messages."""
    messages = isinstance(value, Sequence) and bool(value)
    return messages and all(isinstance(message, Mapping) for message in value)


@dataclass(frozen=True)
class MessageReader:
    """The host's `chat_template.default` and `chat_template.argilla_chat`: a raw row to messages.

    `names` are what a dataset calls the keys of its messages, `roles` what it calls each role, and
    `messages` is the column with the prompt; without one both answers have it before them.
    """

    messages: str | None
    chosen: str
    rejected: str
    tools: str
    names: Mapping[str, str]
    roles: Mapping[str, str]

    @property
    def columns(self) -> list[str]:
        """Where its messages are in a raw row."""
        return [one for one in (self.messages, self.chosen, self.rejected) if one is not None]

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Messages in the columns of TRL. KeyError names a field or a role that is not there."""
        columns = {"chosen": row[self.chosen], "rejected": row[self.rejected]}
        if self.messages is not None:
            columns["prompt"] = row[self.messages]
        read = {key: self._messages(value, key) for key, value in columns.items()}
        return {**read, TOOLS: row.get(self.tools), KWARGS: row.get(KWARGS)}

    def _messages(self, value: Any, column: str) -> Any:
        if isinstance(value, str) and self.messages is not None:
            role = "user" if column == "prompt" else "assistant"
            return [{"role": role, "content": value}]
        value = [value] if isinstance(value, Mapping) and self.messages is not None else value
        return [self._message(one) for one in value] if is_conversation(value) else value

    def _message(self, message: Message) -> dict[str, Any]:
        theirs = self.names.values()
        read = {key: value for key, value in message.items() if key not in theirs}
        read |= {key: message[name] for key, name in self.names.items() if name in message}
        role = message[self.names["role"]]
        if not read.get("tool_calls"):
            message[self.names["content"]]
        return {**read, "role": self.roles[role]}


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template (None: the tokenizer's own) and its `chat_template_kwargs` for all rows."""

    text: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def texts(self, row: Mapping[str, Any], tokenizer: Any) -> list[str]:
        """A row's prompt, chosen and rejected as text.

        Raises:
            RowError: for a row that is no preference pair, or of which the template leaves
                something out.
        """
        kwargs = {k: v for k, v in _held(row, KWARGS, Mapping, {}).items() if v is not None}
        for key in kwargs:
            if not self.reads(key, tokenizer):
                raise RowError(f"the chat template reads no {quoted(key)} of {KWARGS}")
        options = {**self.kwargs, **kwargs}
        try:
            return self._pair_as_text(row, tokenizer, options, opened=True)
        except RowError:
            raise
        except Exception:  # a template may raise anything
            # A few, such as DeepSeek's, join arguments to text and need them as they are written.
            with contextlib.suppress(Exception):
                return self._pair_as_text(row, tokenizer, options, opened=False)
            raise

    def _pair_as_text(
        self, row: Mapping[str, Any], tokenizer: Any, options: dict[str, Any], opened: bool
    ) -> list[str]:
        """With what is written as JSON, in calls and tools, `opened` to objects or as it is."""
        messages, *answers = _pair(row, opened)
        if tools := _held(row, TOOLS, Sequence, ()):
            options = {**options, TOOLS: [_filled(tool, "parameters", opened) for tool in tools]}
        try:
            return self._cut(messages, answers, tokenizer, options)
        except _DiffersError as error:
            remedy = self._remedy(messages, answers, tokenizer, options)
            raise RowError(f"{error}; {remedy}") from None

    def reads(self, variable: str, tokenizer: Any) -> bool:
        """Whether the template has a variable of that name."""
        return variable in _names(str(self.text or tokenizer.chat_template))

    def _cut(
        self,
        messages: list[dict[str, Any]],
        answers: Sequence[dict[str, Any]],
        tokenizer: Any,
        options: Mapping[str, Any],
    ) -> list[str]:
        def render(conversation: Sequence[Message], **more: Any) -> str:
            how = {"tokenize": False, "chat_template": self.text, **options, **more}
            return str(tokenizer.apply_chat_template(conversation, **how))

        prompt = render(messages, add_generation_prompt=True)
        for message in messages:
            _check_rendered(message, prompt)
        wholes = [render([*messages, answer], add_generation_prompt=False) for answer in answers]
        common = _common(prompt, *wholes)
        if prompt[len(common) :].strip():
            raise _DiffersError(
                "the chat template renders the prompt differently once the answer follows"
            )
        completions = [whole[len(common) :].rstrip() for whole in wholes]
        for answer, whole, completion in zip(answers, wholes, completions, strict=True):
            if not _has(completion, answer):
                # What an answer begins with may be in the prompt, such as an opened thought.
                before = _common(common, render(messages, add_generation_prompt=False))
                if not _has(whole[len(before) :], answer):
                    raise ChangedError("the chat template does not render the answer as it is")
        return [common, *completions]

    def _remedy(
        self,
        messages: list[dict[str, Any]],
        answers: Sequence[dict[str, Any]],
        tokenizer: Any,
        options: Mapping[str, Any],
    ) -> str:
        """A setting with which the template renders this row's prompt alike, if there is one."""
        for name, on in _THINKING:
            if self.reads(name, tokenizer):
                with contextlib.suppress(Exception):  # a template may raise anything
                    self._cut(messages, answers, tokenizer, {**options, name: on})
                    return f"set {KWARGS}: {{{name}: {str(on).lower()}}}"
        return "set chat_template to one that does not, such as chatml"


@lru_cache(maxsize=64)
def _names(template: str) -> frozenset[str]:
    """Every name in the code of a template, whatever tags of its own it has."""
    tokens = Environment(autoescape=True).lex(template)
    return frozenset(said for _, kind, said in tokens if kind == "name")


def _common(*texts: str) -> str:
    """What all texts begin with."""
    shortest = min(texts, key=len)
    for place, character in enumerate(shortest):
        if any(text[place] != character for text in texts):
            return shortest[:place]
    return shortest


class ChangedError(RowError):
    """The template writes something of a message otherwise, or not at all."""


class _DiffersError(RowError):
    """The generation prompt is not what the template writes before the answer."""


def _pair(
    row: Mapping[str, Any], opened: bool
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The prompt's messages and the two answers, one message each."""
    found = {key: row.get(key) for key in TEXTS}
    # Without a prompt, both answers have it before them.
    if not all(is_conversation(found[key]) for key in TEXTS if key in row or key != "prompt"):
        kinds = ", ".join(type(value).__name__ for value in found.values())
        raise RowError(f"prompt, chosen, rejected must all be text or all messages, not {kinds}")
    prompt, *sides = (
        [_without_blanks(message, opened) for message in value or ()] for value in found.values()
    )
    for message in (*prompt, *sides[0], *sides[1]):
        _content(message)
    sides = [_after(prompt, side) for side in sides]
    histories = [side[:-1] for side in sides]
    if histories[0] != histories[1]:
        raise RowError(
            "chosen or rejected has several messages; a completion is one turn"
            if not all(histories)
            else "chosen and rejected answer different histories"
        )
    if histories[0] and _roles(prompt[-1:]) == _roles(histories[0][:1]) == ["user"]:
        raise RowError("the prompt ends with one question, and the answers begin with another")
    prompt += histories[0]
    if not prompt:
        raise RowError(EMPTY)
    for message in prompt:
        if message.get("role") not in _ROLES:
            raise RowError(f"unknown role {quoted(message.get('role'))} in the prompt")
    for side in sides:
        _check_answer(side[-1])
    return prompt, sides[0][-1], sides[1][-1]


def _after(prompt: list[dict[str, Any]], side: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What follows the prompt in a conversation that may repeat it, or the end of it."""
    if prompt and side == prompt[: len(side)]:
        raise RowError("the prompt holds the answer already")
    history = side[:-1]
    if prompt and history[: len(prompt)] == prompt:
        return side[len(prompt) :]
    return side[-1:] if history and prompt[-len(history) :] == history else side


def _roles(messages: Sequence[Message]) -> list[Any]:
    return [message.get("role") for message in messages]


def _without_blanks(message: Message, opened: bool) -> dict[str, Any]:
    """A table has all keys in all rows (`tool_calls: []`); templates look whether one is there."""
    blank: tuple[Any, ...] = (None, [])
    kept = {key: said for key, said in message.items() if key == "content" or said not in blank}
    if kept.get("tool_calls"):
        kept["tool_calls"] = [_filled(call, "arguments", opened) for call in kept["tool_calls"]]
    return kept


def _without_nulls(value: Any) -> Any:
    """The same of what is nested: a table gives every call the arguments of all others."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _held(row: Mapping[str, Any], column: str, kind: Any, default: Any) -> Any:
    """What a column of TRL's holds, which may be written as JSON; `default` where it is empty."""
    value = row.get(column)
    value = from_json(value) if isinstance(value, str) else value
    if value and (isinstance(value, str) or not isinstance(value, kind)):
        raise RowError(f"column {column!r} is {quoted(value)}, not {_KINDS[kind]}")
    return value or default


_KINDS = {Mapping: "an object", Sequence: "a list of tools"}


def _filled(value: Any, key: str, opened: bool) -> Any:
    """A tool, or a call of one, without nulls, and with an object below `key` if `opened`: what
    most templates expect, and may be written as JSON there."""
    value = _without_nulls(value)
    inner = value.get("function", value) if isinstance(value, dict) else None
    if opened and isinstance(inner, dict) and isinstance(inner.get(key), str):
        inner[key] = from_json(inner[key])
    return value


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


def _has(completion: str, answer: Message) -> bool:
    """Whether all that an answer says is there; templates trim texts, and may know no calls."""
    calls = [call.get("function") or call for call in answer.get("tool_calls") or ()]
    names = [str(call.get("name")) for call in calls]
    pieces = [piece for text in _content(answer) for piece in _THOUGHT.split(text)]
    return all(one.strip() in completion for one in (*names, *pieces)) and not _quotes(
        completion, answer
    )


def _check_rendered(message: Message, text: str) -> None:
    """RowError for a message of the prompt that is not in its text as it is, its ends trimmed.

    What was thought before an earlier answer is the template's to leave out, and what a tool gives
    the template's to write in another form.
    """
    parts = _content(message)
    if message.get("role") == "user" and not any(map(visible, parts)):
        raise RowError("a user message is empty")
    pieces = [piece for part in parts for piece in _THOUGHTS.split(part)]
    is_there = all(piece.strip() in text for piece in pieces)
    if (message.get("role") in _TOOL_ROLES or is_there) and not _quotes(text, message):
        return
    if isinstance(message.get("content"), list):
        raise ChangedError("the chat template does not render a message that has parts")
    role = quoted(message.get("role"))
    raise ChangedError(f"the chat template changes or leaves out a message of {role}")


def _quotes(text: str, message: Message) -> bool:
    """Whether a message in parts is written as Python or JSON writes a list."""
    parts = message.get("content")
    return isinstance(parts, list) and (
        str(parts) in text or json.dumps(parts, ensure_ascii=False) in text
    )


def _check_answer(answer: Message) -> None:
    if answer.get("role") not in ANSWER_ROLES:
        role = quoted(answer.get("role"))
        raise RowError(f"chosen or rejected has the role {role}, not assistant")
    if not answer.get("tool_calls") and not any(map(visible, _content(answer))):
        raise RowError(EMPTY)
