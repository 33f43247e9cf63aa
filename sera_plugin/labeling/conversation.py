"""Prompts and answers as the texts they were, for whoever ranks by reading."""

from __future__ import annotations

from typing import Any

from sera_plugin.rundir.tokens import IntArray

_PLACE = "SERA-PLUGIN-USER-TEXT"


class Conversation:
    """Token ids back to text, without the chat template (if there is one) around it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = [token for token in tokenizer.all_special_tokens if token]
        #: What the chat template puts before and after a single question.
        self._around: tuple[str, str] | None = None
        if getattr(tokenizer, "chat_template", None):
            before, found, behind = self._templated(_PLACE).partition(_PLACE)
            self._around = (self._without_bos(before), behind) if found else None

    def _templated(self, question: str) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return text

    def _without_bos(self, text: str) -> str:
        return text.removeprefix(self.tokenizer.bos_token or "")

    def question(self, prompt_ids: IntArray) -> str:
        """What the user said: one question as it was, or a longer conversation as the policy sees
        it, special tokens left out."""
        text = self._without_bos(self.tokenizer.decode(prompt_ids, skip_special_tokens=False))
        if self._around is not None:
            before, behind = self._around
            if text.startswith(before) and text.endswith(behind):
                inner = text[len(before) : len(text) - len(behind)]
                if not any(token in inner for token in self._special):
                    return inner
        return self.answer(prompt_ids)

    def answer(self, token_ids: IntArray) -> str:
        """An answer's text."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    def prompt(self, question: str) -> list[int]:
        """A question as the policy is asked it: token ids, ready for its answer."""
        if self._around is None:
            ids: list[int] = self.tokenizer(question)["input_ids"]
        else:
            text = self._templated(question)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
