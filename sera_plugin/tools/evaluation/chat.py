"""How a model is asked and answers, in tokens: by its own template and with its own end."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from sera_plugin.data.dataset import IntArray, RowTokenizer, model_end_ids
from sera_plugin.tools.evaluation.answers import Conversation
from sera_plugin.tools.evaluation.models import Model

SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


class Chat:
    """A model's tokenizer and template, or a `prompt_format` in place of the template.

    `context` is the most tokens that it takes, None where it says none; `end_ids` end an answer,
    the first of them those that a run's own answers end with. A ValueError if there is nothing to
    ask it by.
    """

    def __init__(self, model: Model, prompt_format: str | None) -> None:
        self._model, self._format = model, prompt_format
        with named(model):
            self.tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, **SAFE)
            config = AutoConfig.from_pretrained(model.weights, **SAFE).get_text_config()
        if prompt_format is None and not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {model.name} ({model.tokenizer}) has no chat template, so how "
                "it is asked is not known. Give --prompt-format, such as 'Q: {prompt} A:'."
            )
        self.vocabulary = int(config.vocab_size)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        with suppress(OSError):  # a model may have no generation_config.json
            generation = GenerationConfig.from_pretrained(model.weights, local_files_only=True)
            config.generation_config = generation
        ends = [*model.end_ids, *self._turn_end(), *model_end_ids(config, self.tokenizer)]
        self._rows = RowTokenizer(self.tokenizer, ends)
        self.end_ids = tuple(self._rows.end_ids)
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.end_ids[0] if pad is None else pad

    def _turn_end(self) -> list[int]:
        """The special token that the chat template puts after an answer, if it puts one there."""
        if self._format is not None:
            return []
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "answer"}]
        how = {"tokenize": False, **self._model.template_kwargs}
        text: str = self.tokenizer.apply_chat_template(turns, **how)
        after = text.rpartition("answer")[2].strip()
        first = self.tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        return [token for token in first if token in self.tokenizer.all_special_ids]

    def prompt(self, conversation: Conversation) -> list[int]:
        """The token ids after which the model answers, as training has them."""
        return self._rows.prompt(self._text(conversation))

    def answered(self, question: str, answer: str) -> tuple[IntArray, IntArray]:
        """The token ids of a question and of an answer to it with its end, as training has them.

        A RowError for an answer that spells a token which ends it and has no other spelling.
        """
        text = self._text((question,))
        ids = self._rows.completion(text, answer)
        end = np.asarray(self.end_ids[:1], dtype=np.int32)
        completion = self._rows.finish(ids, self.end_ids)[0] if ids else end
        return np.asarray(self._rows.prompt(text), dtype=np.int32), completion

    def _text(self, conversation: Conversation) -> str:
        if self._format is None:
            roles = ("user", "assistant")
            turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(conversation)]
            how = {"add_generation_prompt": True, **self._model.template_kwargs, "tokenize": False}
            return str(self.tokenizer.apply_chat_template(turns, **how))
        if len(conversation) > 1:
            raise ValueError(
                "--prompt-format: prompts of several turns need the chat template of "
                f"{self._model.name}. Leave --prompt-format out."
            )
        return self._format.replace("{prompt}", conversation[0])


@contextmanager
def named(model: Model) -> Iterator[None]:
    """Say which model it is that cannot be loaded: libraries raise whatever they like."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{model.name} ({model.source}) cannot be loaded: {error}") from error
