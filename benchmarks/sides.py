"""The two ways to get log-probabilities of offline pairs: TRL's and ours, on the same rows."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from benchmarks.harness import Setup
from benchmarks.workload import ANSWER_FORMAT, PROMPT_FORMAT, load_model
from sera_plugin.model.budget import scoring_budget
from sera_plugin.model.scoring import score_sequences

#: What TRL takes unless told otherwise (`precompute_ref_batch_size` unset).
DEFAULT_BATCH = int(DPOConfig.__dataclass_fields__["per_device_train_batch_size"].default)


class LaterDPOTrainer(DPOTrainer):
    """TRL's trainer with its reference pass put off until it is asked for, as often as wanted."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset


class Sides:
    """One model and one set of rows, scored by either side.

    Attributes:
        tokens: of all prompts with all completions, without padding: what TRL needs scored.
    """

    def __init__(
        self, setup: Setup, directory: Path, rows: list[dict[str, str]], longest: int
    ) -> None:
        model, tokenizer = load_model(setup, directory)
        texts = [
            {
                "prompt": PROMPT_FORMAT.format(row["prompt"]),
                "chosen": ANSWER_FORMAT.format(row["chosen"]),
                "rejected": ANSWER_FORMAT.format(row["rejected"]),
            }
            for row in rows
        ]
        self.trainer = LaterDPOTrainer(
            model,
            args=DPOConfig(
                output_dir=str(setup.directory / "trl"),
                precompute_ref_log_probs=True,
                max_length=longest,
                use_cpu=setup.device == "cpu",
                bf16=setup.device == "cuda",
                disable_tqdm=True,
                report_to=[],
            ),
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
        )
        self.model = self.trainer.model
        self.pad_id = int(tokenizer.pad_token_id)
        self.data = self.trainer.train_dataset
        self.sequence_len = longest
        self.device = setup.device
        self.prompts = self._column("prompt_ids")
        self.completions = [
            [ids[: longest - len(prompt)] for prompt, ids in zip(self.prompts, found, strict=True)]
            for found in (self._column("chosen_ids"), self._column("rejected_ids"))
        ]
        self.tokens = sum(
            len(prompt) + len(ids)
            for found in self.completions
            for prompt, ids in zip(self.prompts, found, strict=True)
        )

    def _column(self, name: str) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.int32) for ids in self.data[name]]

    def theirs(self, batch_size: int) -> np.ndarray:
        """(2n,) TRL's `_precompute_ref_logps`, chosen before rejected, in nats."""
        # TRL keeps results by the data's fingerprint and would not compute them again.
        data = Dataset(self.data.data, fingerprint=os.urandom(8).hex())
        found = DPOTrainer._precompute_ref_logps(self.trainer, data, "train", batch_size)
        return np.concatenate([found["ref_chosen_logps"][:], found["ref_rejected_logps"][:]])

    def ours(self) -> np.ndarray:
        """(2n,) what a run does to score its offline pairs, in the same order, in nats."""
        return score_sequences(
            self.model,
            self.prompts * 2,
            self.completions[0] + self.completions[1],
            pad_id=self.pad_id,
            budget=scoring_budget(self.model, self.model.device, self.sequence_len),
            autocast=self.autocast,
        )

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        if self.device == "cpu":
            return nullcontext
        return lambda: torch.autocast("cuda", torch.bfloat16)
