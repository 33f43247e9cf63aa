"""What is asked and what is a good answer: letters, fillers and (in `language`) a real model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sera_plugin.tools.demo.world import FILLERS, make_prompt, true_reward

if TYPE_CHECKING:
    from benchmarks.claims.world import Answer, World

FloatArray = npt.NDArray[np.float64]


class Letters:
    """Sort six letters: the demo's task and model, trained from scratch for every seed."""

    #: Answers to each labelled prompt: two to compare, and two more for a curriculum's pairs.
    answers = 4
    #: How prompt and answer become text, in the words of the host's YAML.
    prompt_format = "<s> <|user|> {prompt} <|assistant|>"
    answer_format = " {%s}"
    #: Lines of YAML that every run has.
    host: Mapping[str, Any] = {"sequence_len": 64}

    def prompts(self, random: Random, count: int, taken: Collection[str] = ()) -> list[str]:
        """Some prompts, none of those `taken` where there are not endlessly many."""
        return [make_prompt(random) for _ in range(count)]

    def parts(self, prompt: str, text: str) -> dict[str, float]:
        """What the true reward is made of, 0 to 1 each."""
        return {"sorting": true_reward(prompt, text)}

    def reward(self, prompt: str, text: str) -> float:
        """How good an answer is, 0 to 1."""
        return self.parts(prompt, text)["sorting"]

    def make_base(self, directory: Path, world: World, seed: int, model: Path | None) -> None:
        """Put the model that every run starts from into a directory."""
        from sera_plugin.tools.demo.base_model import train_base_model

        train_base_model(directory, steps=world.base_steps, seed=seed)

    def load(self, directory: Path) -> tuple[Any, Any]:
        """Model and tokenizer of a policy."""
        from sera_plugin.tools.demo.base_model import load_model

        return load_model(directory)

    def answer(
        self, model: Any, tokenizer: Any, prompts: Sequence[str], world: World, seed: int
    ) -> list[str]:
        """One answer to each prompt at temperature 1, all in one batch."""
        from sera_plugin.tools.demo.base_model import respond

        return respond(
            model,
            tokenizer,
            prompts,
            max_new_tokens=world.new_tokens,
            batch_size=len(prompts),
            seed=seed,
        )

    def is_whole(self, tokenizer: Any, text: str, world: World) -> bool:
        """Whether an answer ended by itself and can be shown to somebody who judges."""
        return True

    def compared(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """The two of the answers to one prompt that make its pair."""
        return answers[:2]

    def logps(
        self, model: Any, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]
    ) -> FloatArray:
        """(n,) log pi of each answer, its end included, in nats."""
        import torch

        before = [self.prompt_format.format(prompt=prompt) for prompt in prompts]
        whole = [
            f"{start} {text}{tokenizer.eos_token}"
            for start, text in zip(before, texts, strict=True)
        ]
        batch = tokenizer(whole, return_tensors="pt", padding=True, add_special_tokens=False)
        ids, mask = batch["input_ids"], batch["attention_mask"].clone()
        # Prompts are equally long.
        mask[:, : len(before[0].split())] = 0
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
        each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        summed: FloatArray = (each * mask[:, 1:]).sum(-1).double().numpy()
        return summed

    def tokens(self, tokenizer: Any, texts: Sequence[str]) -> FloatArray:
        """(n,) tokens of each answer, its end included."""
        ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return np.array([len(one) + 1 for one in ids], dtype=np.float64)

    def prompt_of(self, text: str) -> str:
        """The prompt in a prompt that was decoded without its special tokens."""
        return text


class Fillers(Letters):
    """The same prompts and model, but two filler words are worth more than the right order.

    So the truth disagrees with likelihood, which the base model's training has given to sorted
    letters, and longer answers are better only up to two words more.
    """

    def parts(self, prompt: str, text: str) -> dict[str, float]:
        fillers = sum(word in FILLERS for word in text.split())
        return {
            "sorting": true_reward(prompt, text),
            "fillers": max(0.0, 1.0 - abs(fillers - 2) / 2),
        }

    def reward(self, prompt: str, text: str) -> float:
        parts = self.parts(prompt, text)
        return 0.4 * parts["sorting"] + 0.6 * parts["fillers"]


@cache
def task_of(name: str) -> Letters:
    """The task of a world.

    Raises:
        KeyError: if there is none of that name.
    """
    from benchmarks.claims.language import Language

    return {"letters": Letters, "fillers": Fillers, "language": Language}[name]()
