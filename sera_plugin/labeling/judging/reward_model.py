"""A reward model as a judge: a sequence-classification model on this machine, with one output."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sera_plugin.algorithm.method import Room, no_room
from sera_plugin.labeling.judging import Answered, JudgeFailed, ScoringJudge
from sera_plugin.model.budget import TokenBudget, batches_by_length, plan_tokens
from sera_plugin.rundir.journal import Journal, key_of

#: Tokens of a forward pass on a CPU; bytes that one needs on a GPU beside the weights.
_ON_CPU, BYTES_PER_TOKEN = 8_192, 2**20


class RewardModelJudge(ScoringJudge):
    """Scores question and answer, rendered by the model's chat template, with its one logit.

    The directory has weights (safetensors), configuration and tokenizer; nothing in it is run.
    While answers are scored the model is on the accelerator, in memory that `room` has made free.
    """

    def __init__(self, directory: Path, journal: Journal, room: Room = no_room) -> None:
        files = sorted(path for path in directory.iterdir() if path.is_file())
        stamps = [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files]
        super().__init__(str(directory), {"reward_model": str(directory)})
        self._journal, self._room = journal, room
        self._identity = key_of("reward-model", str(directory.resolve()), stamps)
        safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, **safe)
            self._tokenizer.get_chat_template()  # raises without one
            self._model = AutoModelForSequenceClassification.from_pretrained(
                directory, dtype="auto", use_safetensors=True, **safe
            )
        except Exception as error:  # libraries raise whatever they like
            raise ValueError(f"{directory} cannot be loaded as a reward model: {error}") from error
        self._model.eval()
        if self._model.config.num_labels != 1:
            raise ValueError(
                f"{directory} has {self._model.config.num_labels} outputs. A reward model has one "
                "(num_labels: 1 in its config.json)."
            )
        config = self._model.config.get_text_config()
        pad = config.pad_token_id
        self._pad = self._tokenizer.pad_token_id if pad is None else pad
        if self._pad is None:
            raise ValueError(
                f"{directory} has no padding token, without which answers cannot be scored "
                "together. Set pad_token_id in its config.json."
            )
        config.pad_token_id = self._pad  # by it the model tells where a sequence ends
        self._longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """See `ScoringJudge.score`."""
        keys = [key_of(self._identity, one.question, one.answer) for one in answers]
        tokens: dict[int, list[int]] = {}
        for index, one in enumerate(answers):
            if (found := self._journal.get(keys[index], score=float)) is not None:
                self.usage.cached.count += 1
                yield index, found["score"]
            elif len(ids := self._tokens(one)) <= self._longest:
                tokens[index] = ids
            else:
                self.usage.refused += 1
                yield index, None
        left, lengths = list(tokens), list(map(len, tokens.values()))
        if not left:
            return
        planned = plan_tokens(self._device, BYTES_PER_TOKEN, max(lengths), _ON_CPU)
        batches = list(batches_by_length(lengths, planned))

        def scores_of(batch: list[int]) -> list[float]:
            return self._scores([torch.tensor(tokens[left[place]]) for place in batch])

        with self._on_device(planned * BYTES_PER_TOKEN):
            budget = TokenBudget(planned, "judging", self._device)
            for batch, scores in budget.run(batches, lengths, scores_of):
                for place, score in zip(batch, scores, strict=True):
                    if not math.isfinite(score):
                        raise JudgeFailed(
                            f"{self.name} scores an answer {score}. Its weights are damaged, or "
                            f"too large for {self._model.dtype}."
                        )
                    self._journal.add(keys[left[place]], {"score": score})
                    self.usage.asked.count += 1
                    self.usage.asked.prompt_tokens += lengths[place]
                    yield left[place], score

    @contextmanager
    def _on_device(self, passing: int) -> Iterator[None]:
        """The model is where it computes, with so many bytes beside it for a pass."""
        with self._room(self._model.get_memory_footprint() + passing):
            try:
                self._model.to(self._device)
                yield
            finally:
                self._model.to("cpu")  # before anything that has waited comes back

    def _tokens(self, one: Answered) -> list[int]:
        said = {"user": one.question, "assistant": one.answer}
        turns = [{"role": role, "content": text} for role, text in said.items()]
        tokenizer: Any = self._tokenizer
        return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))

    @torch.no_grad()
    def _scores(self, lines: list[torch.Tensor]) -> list[float]:
        ids = pad_sequence(lines, batch_first=True, padding_value=self._pad).to(self._device)
        mask = pad_sequence([torch.ones_like(line) for line in lines], batch_first=True)
        output: Any = self._model(input_ids=ids, attention_mask=mask.to(self._device))
        return list(output.logits[:, 0].float().cpu().tolist())
