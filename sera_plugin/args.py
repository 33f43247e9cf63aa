"""The `sera:` block of an Axolotl configuration.

Parsed once, into a frozen type. The defaults are the paper's values. The configuration reference
(docs/configuration.md) is generated from the descriptions below.
"""

from __future__ import annotations

import math
import os
import shutil
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sera_plugin.shown import quoted

#: The paper's beta (appendix on hyper-parameters), used when the YAML sets neither `rl_beta` nor
#: `trl.beta`. SimPO is not tuned there: 2.0 is the SimPO paper's own starting point.
DEFAULT_BETA = {"dpo": 0.2, "ipo": 1.0, "slic": 0.2, "robust": 0.2, "simpo": 2.0}

#: Loss types of the host's DPO trainer whose reward is averaged over the completion's tokens.
PER_TOKEN_HOST_LOSSES = frozenset({"ipo", "sigmoid_norm"})


class SeraConfig(BaseModel):
    """Everything inside `sera:`. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    selection_ratio: float = Field(
        0.7,
        ge=0.0,
        le=1.0,
        description="k / N: the share of the N offline pairs kept from iteration 2 on, largest "
        "implicit-reward margin first. 1 keeps all, 0 none.",
    )
    bootstrap_ratio: float = Field(
        0.3,
        ge=0.0,
        le=32.0,
        description="k~ / N: how many pairs sampled from the current policy are added from "
        "iteration 2 on, relative to N. May exceed 1 (the paper's best-SeRA uses 2.0): a prompt "
        "gives up to candidates // 2 disjoint pairs. 0 turns sampling off.",
    )
    gamma: float = Field(
        0.3,
        ge=0.0,
        le=1.0,
        description="Reward ensemble (Eq. 7): the weight of the previous iteration's implicit "
        "reward, from iteration 3 on. 0 turns the ensemble off.",
    )
    loss: Literal["dpo", "ipo", "slic", "robust", "simpo"] = Field(
        "dpo",
        description="The direct alignment loss. `dpo` with `dpo_label_smoothing` is cDPO; "
        "`robust` (rDPO) needs `dpo_label_smoothing`; `simpo` reads `simpo_gamma` and "
        "`cpo_alpha`, both 0 unless set. For any other loss type of the host's DPO trainer set "
        "`dpo_loss_type` and leave this out.",
    )
    ipo_reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="How IPO's reward is reduced over a completion's tokens: `mean` is the "
        "host's (TRL's) convention, `sum` is the paper's Eq. 9. The margin follows.",
    )
    candidates: int = Field(
        4,
        ge=2,
        le=64,
        description="R: how many candidates are sampled per prompt.",
    )
    temperature: float = Field(
        0.7, gt=0.0, le=10.0, description="Sampling temperature of the candidates."
    )
    top_p: float = Field(0.95, gt=0.0, le=1.0, description="Nucleus sampling of the candidates.")
    max_new_tokens: int = Field(
        512,
        ge=1,
        le=1_000_000,
        description="Longest candidate in tokens, its end token included. Prompt and candidate "
        "together never exceed `sequence_len`.",
    )
    sampler: Literal["auto", "vllm", "vllm-server", "transformers"] = Field(
        "auto",
        description="What samples the candidates. `vllm` starts vLLM in a child process for each "
        "sampling phase; `vllm-server` uses a running `vllm serve` at `vllm.host` and "
        "`vllm.port` (adapters only); `transformers` runs inside the training process. `auto` "
        "takes `vllm` where it can be imported and serves this kind of policy, else "
        "`transformers`, and says why.",
    )
    vllm_python: str | None = Field(
        None,
        description="Python interpreter of the environment that has vLLM, such as "
        "`~/vllm/bin/python`. Unset: the one that trains.",
    )
    restart_optimizer: bool = Field(
        True,
        description="Start every iteration with fresh optimizer state and its own warm-up and "
        "learning-rate schedule. `false` runs one schedule over all iterations.",
    )
    keep_policies: bool = Field(
        False,
        description="Full fine-tuning only: keep the weights of every policy in the run "
        "directory. Otherwise those that no later iteration needs are removed. Adapters are "
        "small and always kept.",
    )
    bad_rows: Literal["drop", "raise"] = Field(
        "drop",
        description="Rows that cannot be used (empty or null fields, wrong types, chosen equal to "
        "rejected, ...; see data.md): `drop` leaves them out, with a warning that counts and names "
        "them; `raise` stops the run, with an error that does. Rows that are only too long follow "
        "the host's `excess_length_strategy`.",
    )
    score_columns: tuple[str, ...] = Field(
        (),
        description="Columns of the dataset (scores, sources, anything per pair) to copy to "
        "`dataset.parquet` for later analysis. They never influence training.",
    )

    @property
    def pairs_per_prompt(self) -> int:
        """Pairs a prompt must be able to give so that bootstrap_ratio x N pairs can exist."""
        return max(1, math.ceil(self.bootstrap_ratio))

    @field_validator(
        "selection_ratio",
        "bootstrap_ratio",
        "gamma",
        "candidates",
        "temperature",
        "top_p",
        "max_new_tokens",
        mode="before",
    )
    @classmethod
    def _is_no_switch(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(f"{value} is not a number. Set one, or remove the key.")
        return value

    @model_validator(mode="after")
    def _enough_candidates(self) -> SeraConfig:
        if self.pairs_per_prompt > self.candidates // 2:
            raise ValueError(
                f"bootstrap_ratio: {self.bootstrap_ratio} needs {self.pairs_per_prompt} pairs per "
                f"prompt, but candidates: {self.candidates} gives at most "
                f"{self.candidates // 2}. Raise candidates to {2 * self.pairs_per_prompt} or "
                f"lower bootstrap_ratio to {self.candidates // 2}."
            )
        return self

    @field_validator("vllm_python")
    @classmethod
    def _runs(cls, value: str | None) -> str | None:
        if value is None:
            return None
        found = shutil.which(os.path.expanduser(value))
        if found is None:
            raise ValueError(
                f"{quoted(value)} is no program that can be run here. Name the Python of an "
                "environment that has vLLM, for example ~/vllm/bin/python."
            )
        return os.path.abspath(found)

    @model_validator(mode="after")
    def _trains_on_something(self) -> SeraConfig:
        if self.selection_ratio == 0 and self.bootstrap_ratio == 0:
            raise ValueError(
                "selection_ratio: 0 with bootstrap_ratio: 0 leaves nothing to train on from "
                "iteration 2 on. Raise one of them."
            )
        return self

    @model_validator(mode="after")
    def _score_columns_are_not_ours(self) -> SeraConfig:
        texts = ("prompt", "chosen", "rejected")
        ours = {"row", *texts, *(f"{name}_ids" for name in texts)}
        taken = [c for c in self.score_columns if c in ours or c.startswith("sera_")]
        if taken:
            raise ValueError(
                f"score_columns: {', '.join(map(quoted, taken))} is what the pairs themselves are "
                "kept as. Rename it in the dataset or leave it out."
            )
        return self

    @model_validator(mode="after")
    def _ipo_reduction_needs_ipo(self) -> SeraConfig:
        if self.ipo_reduction == "sum" and self.loss != "ipo":
            raise ValueError(
                f"ipo_reduction: {self.ipo_reduction} has no effect with loss: {self.loss}. "
                "Set loss: ipo or remove ipo_reduction."
            )
        return self


class SeraArgs(BaseModel):
    """What the host merges into its own configuration schema."""

    sera: SeraConfig | None = Field(
        default=None, description="SeRA: selection and bootstrapping between epochs (`rl: sera`)."
    )
