"""Completions that the host cuts out of a rendered chat template, and what they should be.

The host's `chat_template.*` strategies render an answer after a dummy user message and then search
the answer's text in the whole rendering (axolotl 0.19, prompt_strategies/dpo/chat_template.py). An
answer such as "user" is found in the turn's header first, and one that the template trims is not
found at all, which leaves only the last character of the end-of-turn text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.data.texts import EMPTY, TEXTS, RowError, visible

Message = Mapping[str, Any]

#: The user message that the host puts before an answer.
_DUMMY = {"role": "user", "content": "[[dummy_message]]"}
_PROBE = "sera-probe-7f3a"
_CHANGED = "the chat template does not render the answer as it is"
_ANSWER_ROLES = ("assistant", "model")
_ROLES = frozenset({*_ANSWER_ROLES, "system", "developer", "user", "tool", "function", "ipython"})


@lru_cache(maxsize=64)
def _surroundings(tokenizer: Any, role: str, template: str | None) -> tuple[str, str]:
    """What a chat template writes before and after an answer, the end trimmed."""
    rendered: str = tokenizer.apply_chat_template(
        [_DUMMY, {"role": role, "content": _PROBE}],
        add_generation_prompt=False,
        tokenize=False,
        chat_template=template,
    )
    before, _, behind = rendered.partition(_PROBE)
    return before, behind.rstrip()


class AnswerRecorder:
    """Watches the chat templates that a host strategy renders for one row.

    The answers that it renders after the dummy message `completions` cuts out by position.
    """

    def __init__(self, tokenizer: Any) -> None:
        #: Whether the strategy rendered anything.
        self.used = False
        self._original = tokenizer
        self._answers: list[tuple[Message, str, Any]] = []

    def recording(self) -> Any:
        """A copy of the tokenizer for the strategy, which records."""
        recording = copy.copy(self._original)
        recording.apply_chat_template = self._apply_chat_template
        return recording

    def _apply_chat_template(self, conversation: Any, *args: Any, **options: Any) -> Any:
        if args or options.get("tokenize", True) or not _is_conversation(conversation):
            return self._original.apply_chat_template(conversation, *args, **options)
        self.used = True
        rendered = _render(self._original, conversation, **options)
        if len(conversation) == 2 and conversation[0].get("content") == _DUMMY["content"]:
            template = options.get("chat_template") or self._original.chat_template
            self._answers.append((conversation[1], rendered, template))
        return rendered

    def completions(self) -> list[str]:
        """Answer and end of turn for each answer that was rendered, in the host's order.

        Raises:
            RowError: for an answer that is empty, or that the template does not render as it is.
        """
        return [self._completion(*answer) for answer in self._answers]

    def _completion(self, answer: Message, rendered: str, template: Any) -> str:
        _check_answer(answer)
        before, end = _surroundings(self._original, answer["role"], template)
        if not rendered.startswith(before):
            # A template that writes reasoning and answer in two places, for example.
            before = self._original.apply_chat_template(
                [_DUMMY], add_generation_prompt=True, chat_template=template, tokenize=False
            )
        completion = rendered[len(before) :].rstrip()
        if not rendered.startswith(before) or not completion.endswith(end):
            raise RowError(_CHANGED)
        _check_whole(answer, completion)
        return completion


def row_texts(row: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """A row's prompt, chosen and rejected as text; messages go through the chat template.

    Raises:
        RowError: for values that are neither text nor messages, or that the template cannot
            render.
    """
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


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(message, Mapping) for message in value)
    )


def _without_blanks(message: Message) -> dict[str, Any]:
    """A message without keys that say nothing: a table has all keys in all rows (`tool_calls: []`),
    and templates look whether one is there."""
    return {
        key: value for key, value in message.items() if key == "content" or value not in (None, [])
    }


def _content(message: Message) -> list[str]:
    """The texts in a message; templates render anything else as if it were text, or as nothing."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return []
    parts = [content]
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        parts = [part.get("text") for part in content]
    found = [part for part in parts if isinstance(part, str)]
    if len(found) < len(parts):
        raise RowError("a message's content is null or not text")
    return found


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
        raise RowError(
            f"chosen or rejected has the role {quoted(answer.get('role'))}, not assistant"
        )
    if not answer.get("tool_calls") and not any(map(visible, _content(answer))):
        raise RowError(EMPTY)


def _check_whole(answer: Message, completion: str) -> None:
    """Templates may trim an answer, or have a place for tool calls or none."""
    calls = [call.get("function") or call for call in answer.get("tool_calls") or ()]
    if not _has(completion, [*_content(answer), *(str(call.get("name")) for call in calls)]):
        raise RowError(_CHANGED)
