"""Token ids back to the messages that a chat template was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sera_plugin.tools.report.reading import Run, Texts

Messages = list[dict[str, str]]
#: Stand for what was said while a template is looked at.
_SYSTEM, _FIRST, _ANSWER, _SECOND = (f"SERA-PLUGIN-TEXT-{number}" for number in range(4))


class Chat:
    """Undoes the chat template that a run's tokenizer has, where it has one that can be undone.

    What a template writes around the messages of a conversation is seen by rendering one; a prompt
    is then cut at it. The messages count as undone only if the template makes of them what the
    policy was given, to the character.
    """

    def __init__(self, run: Run, texts: Texts) -> None:
        self.texts = texts
        self._options: Mapping[str, Any] = run.config.get("chat_template_kwargs") or {}
        self._tokenizer: Any = None
        self._ways: list[tuple[str, ...]] = []
        if texts.tokenizer is None:
            return
        # A tokenizer of a kind that is not known here, or a template that raises, is none.
        with suppress(Exception):
            from transformers import AutoTokenizer

            directory = Path(texts.source).parent
            self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            for system in ([], [{"role": "system", "content": _SYSTEM}]):
                with suppress(Exception):  # one may know no system message
                    self._ways.append(self._around(system))

    def _render(self, messages: Messages) -> str:
        how = {**self._options, "tokenize": False, "add_generation_prompt": True}
        return self._bare(str(self._tokenizer.apply_chat_template(messages, **how)))

    def _bare(self, text: str) -> str:
        return text.removeprefix(getattr(self._tokenizer, "bos_token", None) or "")

    def _around(self, system: Messages) -> tuple[str, ...]:
        """What stands before, (after a system message), before an answer, after it, at the end."""
        said = [("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND)]
        rest = self._render([*system, *({"role": who, "content": text} for who, text in said)])
        found = []
        for text in (*(one["content"] for one in system), _FIRST, _ANSWER, _SECOND):
            before, there, rest = rest.partition(text)
            if not there:
                raise ValueError(f"the template does not write {text}")
            found.append(before)
        return (*found, rest)

    def prompt(self, ids: Sequence[int]) -> Messages | None:
        """The messages of a prompt; None where they are not known for certain."""
        text = self._bare(self.texts.exact(ids))
        for *opened, before_answer, after_answer, end in self._ways:
            if text.startswith(opened[0]) and text.endswith(end):
                inner = text[len(opened[0]) : len(text) - len(end)]
                with suppress(Exception):  # a template may raise anything
                    messages = self._cut(inner, opened[1:], before_answer, after_answer)
                    if self._render(messages) == text:
                        return messages
        return None

    def _cut(self, inner: str, after_system: list[str], before: str, after: str) -> Messages:
        found: Messages = []
        if after_system:
            said, _, inner = inner.partition(after_system[0])
            found.append({"role": "system", "content": said})
        while True:
            question, there, inner = inner.partition(before)
            found.append({"role": "user", "content": question})
            if not there:
                return found
            answer, _, inner = inner.partition(after)
            found.append({"role": "assistant", "content": answer})

    def completion(self, ids: Sequence[int]) -> Messages:
        """An answer as a message, without its end token."""
        return [{"role": "assistant", "content": self.texts.completion(ids)}]
