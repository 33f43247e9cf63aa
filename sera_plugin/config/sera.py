"""The `sera:` block of an Axolotl configuration.

The block is parsed once, into a frozen type. The defaults are the paper's values but for those of
`AS_PUBLISHED`. The configuration reference (docs/configuration.md) and the schema for editors are
generated from this file.
"""

from __future__ import annotations

import math
import os
import shutil
from typing import Any, Literal, TypeAlias, get_args, get_origin

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from sera_plugin.config.block import Block, JudgeConfig, address, repository
from sera_plugin.config.kinds import (
    LABELERS,
    LOSSES,
    SELECTIONS,
    is_reference_free,
    labeler_kind,
)
from sera_plugin.config.labelers import (
    FunctionConfig,
    known_labelers,
    mixed,
    require_candidates,
    require_labels,
    require_sampled,
    require_settings,
)
from sera_plugin.config.quoting import plain, quoted

#: SeRA as its paper has it: Eq. 7, every sampled pair, the last policy.
AS_PUBLISHED = {"reward": "paper", "trust": "warn", "keep": "last"}
#: Loss types of the host's DPO trainer whose reward is averaged over the completion's tokens.
PER_TOKEN_HOST_LOSSES = frozenset({"ipo", "sigmoid_norm"})

#: What the pairs are kept as, beside columns that begin with `sera_`.
_OUR_COLUMNS = frozenset(
    {"row", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"}
)

LossName: TypeAlias = Literal[tuple(LOSSES)]  # type: ignore[valid-type]
SelectionName: TypeAlias = Literal[tuple(SELECTIONS)]  # type: ignore[valid-type]
LabelerName: TypeAlias = Literal[tuple(LABELERS)]  # type: ignore[valid-type]
_Prompts: TypeAlias = dict[str, Any] | list[dict[str, Any]] | None


class SeraConfig(Block):
    """Everything inside `sera:`."""

    selection_ratio: float = Field(0.7, ge=0.0, le=1.0)
    """k / N: the share of the N offline pairs kept from iteration 2 on, largest implicit-reward
    margin first. 1 keeps all. 0 keeps none, and a labeler that needs no earlier policy (any but
    `implicit`) then samples for iteration 1 too."""
    bootstrap_ratio: float = Field(0.3, ge=0.0, le=32.0)
    """k~ / N: how many pairs sampled from the current policy are added from iteration 2 on,
    relative to N. May exceed 1 (the paper's best-SeRA uses 2.0): a prompt gives up to candidates //
    2 disjoint pairs. 0 turns sampling off."""
    selection: SelectionName = "irm"
    """What offline pairs are ranked by. `irm` is SeRA's implicit reward margin, `reference_logp`
    how much likelier theta_{t-1} makes chosen than rejected, `score` the gap of a score in the
    dataset (see `score_columns`), `random` a seeded draw. `all` keeps every pair, and `curriculum`
    trains iteration t on each prompt's t-th easiest pair by score; neither reads `selection_ratio`.
    See systems.md."""
    labeler: LabelerName | tuple[LabelerName, ...] = "implicit"
    """Who ranks a prompt's samples. `implicit` is SeRA's implicit reward, `reward_model` the model
    that `reward_model` names, `judge` the endpoint under `judge`, `function` your own code,
    `self_judge` the policy itself in words, `spin` takes the dataset's chosen answer for the best
    and the samples for worse. See systems.md. A list, such as `[implicit, function]`, makes the
    scores of the others features of the fitted reward; see judges.md."""
    reference: Literal["previous", "initial"] = "previous"
    """The loss's reference: theta_{t-1}, the policy that the iteration starts from, or theta_0, the
    one that the run started from."""
    length_control: Literal["none", "auto"] | float = "none"
    """What is taken off the rewards of samples per token before they are paired: a number (nats;
    with another labeler than `implicit`, of what that ranks by), or `auto` for the one with which
    chosen and rejected samples are equally long on average (DICE). `none` is the paper."""
    offline_length_control: Literal["none", "auto"] | float = "none"
    """The same for the margins that `selection: irm` ranks by. `auto` takes what the margin's
    regression on the difference in length gives."""
    label_noise: float = Field(0.0, ge=0.0, le=1.0)
    """Swap chosen and rejected of this share of the offline pairs, at random by `seed`, and record
    which: an experiment on how many of them selection drops."""
    reward_model: str | None = None
    """For `labeler: reward_model`: a local sequence classification model with one label and a chat
    template. Loaded for the phase alone."""
    judge: JudgeConfig | None = None
    """For `labeler: judge`: an OpenAI-compatible endpoint, with the keys of judges.md (`base_url`,
    `model`, `api_key_env`, ...). Every two different samples of a prompt are compared, in both
    orders. What it said is kept in the run directory and not asked again."""
    function: FunctionConfig | None = None
    """For `labeler: function`: `checks.py:score`, or a block with `call`, `timeout` and
    `processes`. It takes question, answer and columns of `score_columns`, and gives a number; see
    judges.md."""
    gamma: float = Field(0.3, ge=0.0, le=1.0)
    """Reward ensemble (Eq. 7): the weight of the previous iteration's implicit reward, from
    iteration 3 on. 0 turns the ensemble off. A fitted reward stays near this mixture only as far as
    the labels leave it open."""
    reward: Literal["fitted", "paper"] = "fitted"
    """What offline pairs and samples are ranked by. `fitted` gives the policies' log-probabilities
    and the answer's length the weights that the labels of the held-out pairs fit, and leaves
    samples unranked that are longer or less likely than the data's answers. `paper` is Eq. 7."""
    held_out: float | None = Field(None, ge=0)
    """Pairs that no iteration trains on, drawn by `seed`, for `reward: fitted` and `keep: best`: a
    number, or a share below 1. Unset: those of `val_set_size` or `test_datasets`, else 5 %, at
    least 100 and at most 2,000, but no more than a tenth of the pairs."""
    trust: Literal["act", "warn"] = "act"
    """What becomes of an iteration whose reward ranks held-out pairs no better than a coin, or
    ranks the policy's own samples above the good answers of the data. `act` keeps all offline pairs
    and takes no samples, as iterative DPO does; `warn` only says so."""
    loss: LossName = "dpo"
    """The direct alignment loss. `dpo` with `dpo_label_smoothing` is cDPO; `robust` (rDPO) needs
    `dpo_label_smoothing`; `simpo` reads `simpo_gamma` and `cpo_alpha`, both 0 unless set; `orpo`
    takes beta for its lambda. For any other loss type of the host's DPO trainer set `dpo_loss_type`
    and leave this out."""
    ipo_reduction: Literal["mean", "sum"] = "mean"
    """How IPO's reward is reduced over a completion's tokens: `mean` is the host's (TRL's)
    convention, `sum` is the paper's Eq. 9. The margin follows."""
    candidates: int = Field(4, ge=1, le=64)
    """R: how many candidates are sampled per prompt. One is enough for `labeler: spin`, any other
    needs two."""
    prompts: tuple[dict[str, Any], ...] = ()
    """Prompts without answers, to be sampled beside those of the pairs: an entry like those of
    `datasets`, or a list of them. `field_messages` names the column with the prompt (text or
    messages); how it is read is taken from the first of `datasets` unless the entry says it. N and
    the ratios stay those of the pairs. See data.md."""
    temperature: float = Field(0.7, gt=0.0, le=10.0)
    """Sampling temperature of the candidates."""
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    """Nucleus sampling of the candidates."""
    max_new_tokens: int = Field(512, ge=1, le=1_000_000)
    """Longest candidate in tokens, its end token included. Prompt and candidate together never
    exceed `sequence_len`."""
    sampler: Literal["auto", "vllm", "vllm-server", "transformers"] = "auto"
    """What samples the candidates. `vllm` starts vLLM in a child process for each sampling phase;
    `vllm-server` uses a running `vllm serve` at `vllm.host` and `vllm.port` (adapters only);
    `transformers` runs inside the training process. `auto` takes `vllm` where it can be imported
    and serves this kind of policy, else `transformers`, and says why."""
    servers: tuple[str, ...] = ()
    """Addresses of several running `vllm serve`, such as `[http://gpu1:8000, http://gpu2:8000]`,
    that share the prompts: each takes the next one when it has a place free. Unset: the one at
    `vllm.host` and `vllm.port`. With them, `sampler: auto` is `vllm-server`."""
    vllm_python: str | None = None
    """Python interpreter of the environment that has vLLM, such as `~/vllm/bin/python`. Unset: the
    one that trains."""
    restart_optimizer: bool = True
    """Start every iteration with fresh optimizer state and its own warm-up and learning-rate
    schedule. `false` runs one schedule over all iterations."""
    keep_policies: bool = False
    """Full fine-tuning only: keep the weights of every policy in the run directory. Otherwise those
    that no later iteration needs are removed. Adapters are small and always kept."""
    keep: Literal["best", "last"] = "best"
    """Which policy training leaves in `output_dir`: `last`, that of the last iteration, or `best`:
    an earlier one if it is clearly better on the held-out pairs (method.md), decided after each
    iteration. Training then ends when two iterations in a row have brought only worse ones. Without
    held-out pairs `best` is `last`."""
    push_to_hub: str | None = None
    """Push the run to this repository of the Hugging Face hub after training, `user/name`: as
    `axolotl sera push` does, private if it is new, and the pairs to `user/name-pairs`. A push that
    fails does not fail the run. See sharing.md."""
    bad_rows: Literal["drop", "raise"] = "drop"
    """Rows that cannot be used (empty or null fields, wrong types, chosen equal to rejected, ...;
    see data.md): `drop` leaves them out, with a warning that counts and names them; `raise` stops
    the run, with an error that does. Rows that are only too long follow the host's
    `excess_length_strategy`."""
    score_columns: tuple[str, ...] = ()
    """Columns of the dataset (scores, sources, anything per pair) to copy to `dataset.parquet` for
    later analysis. `selection: score` and `curriculum` rank by the first that has numbers: by the
    gap of two columns whose names differ in `chosen` and `rejected`, or by a column that is a gap.
    Nothing else trains by them."""

    @property
    def per_token(self) -> bool:
        """Whether `loss` averages its reward over the completion's tokens."""
        kind = LOSSES[self.loss].per_token
        return kind == "always" or (kind == "by_reduction" and self.ipo_reduction == "mean")

    @property
    def ranks_by_reward(self) -> bool:
        """Whether pairs are selected or samples ranked by the implicit reward."""
        ranks_samples = labeler_kind(self.labeler).implicit and self.bootstrap_ratio > 0
        return self.selects_by_reward or ranks_samples

    @property
    def selects_by_reward(self) -> bool:
        """Whether the implicit reward decides which offline pairs are kept."""
        return SELECTIONS[self.selection].by_margin and 0 < self.selection_ratio < 1

    @property
    def first_iteration(self) -> int:
        """The iteration from which pairs are selected and sampled."""
        return labeler_kind(self.labeler).first_iteration(self.selection_ratio)

    @property
    def labelers(self) -> tuple[str, ...]:
        """All that `labeler` names."""
        return (self.labeler,) if isinstance(self.labeler, str) else self.labeler

    @property
    def pairs_per_prompt(self) -> int:
        """Pairs a prompt must be able to give so that bootstrap_ratio x N pairs can exist."""
        return max(1, math.ceil(self.bootstrap_ratio))

    def pairs_held_out(self, total: int) -> int:
        """How many of the dataset's pairs are set aside; see `held_out`."""
        asked = self.held_out
        if asked is None:
            fits = self.reward == "fitted" and self.ranks_by_reward
            used = fits or self.keep == "best"
            asked = min(max(100, total // 20), 2_000, total // 10) if used else 0
        return round(asked * total) if asked < 1 else min(int(asked), total)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: object, key: ValidationInfo) -> object:
        kind = cls.model_fields[str(key.field_name)].annotation
        if isinstance(value, bool) and {float, int} & {kind, *get_args(kind)}:
            raise ValueError(f"{value} is not a number. Set one, or remove the key.")
        if isinstance(value, str) and get_origin(kind) is tuple and key.field_name != "prompts":
            raise ValueError(f"{quoted(value)} is no list. Write [{plain(value)}].")
        return value

    @field_validator("labeler", mode="before")
    @classmethod
    def _is_known(cls, value: object) -> object:
        return known_labelers(value)

    @field_validator("prompts", mode="before", json_schema_input_type=_Prompts)
    @classmethod
    def _is_list(cls, value: object) -> object:
        several = isinstance(value, (list, tuple))
        entries: Any = value if several else () if value is None else [value]
        for text in (one for one in entries if isinstance(one, str)):
            raise ValueError(f"{quoted(text)} is no entry. Write `- path: {plain(text)}` below it.")
        return entries

    @field_validator("judge", mode="before")
    @classmethod
    def _hides_secrets(cls, block: object) -> object:
        return JudgeConfig.parse(block, "") if isinstance(block, dict) else block

    @field_validator("function", mode="before", json_schema_input_type=str | FunctionConfig | None)
    @classmethod
    def _is_call(cls, value: object) -> object:
        return FunctionConfig.read(value)

    @field_validator("labeler", mode="after")
    @classmethod
    def _mixes(cls, named: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return named if isinstance(named, str) else mixed(named)

    @field_validator("servers")
    @classmethod
    def _checks_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        found: dict[tuple[str | None, int, str], str] = {}
        for url in urls:
            parts = address(url, "http://127.0.0.1:8000", "VLLM_API_KEY")
            path = parts.path.rstrip("/").removesuffix("/v1")
            port = parts.port or (443 if parts.scheme == "https" else 80)
            if (parts.hostname, port, path) in found:
                raise ValueError(f"{quoted(url)} stands there twice. Remove one of them.")
            found[parts.hostname, port, path] = f"{parts.scheme}://{parts.netloc}{path}"
        return tuple(found.values())

    @field_validator("push_to_hub")
    @classmethod
    def _is_a_repository(cls, name: str | None) -> str | None:
        return None if name is None else repository(name)

    @field_validator("vllm_python")
    @classmethod
    def _runs(cls, value: str | None) -> str | None:
        if value is None:
            return None
        found = shutil.which(os.path.expanduser(value))
        if found is None:
            raise ValueError(
                f"{quoted(value)} is not a program that can be run here. Name the Python of an "
                "environment that has vLLM, for example ~/vllm/bin/python."
            )
        return os.path.abspath(found)

    @model_validator(mode="before")
    @classmethod
    def _follows_from_others(cls, block: Any) -> Any:
        if isinstance(block, dict):
            kind = SELECTIONS.get(str(block.get("selection")))
            if kind is not None and not kind.reads_ratio:
                block = {"selection_ratio": 1.0, **block}
            if block.get("servers") and block.get("sampler", "auto") == "auto":
                block = {**block, "sampler": "vllm-server"}
        return block

    @model_validator(mode="after")
    def _contradicts_nothing(self) -> SeraConfig:
        """What of the block contradicts something else in it, and what to do."""
        labeler, selection = labeler_kind(self.labeler), SELECTIONS[self.selection]
        if labeler.mixed:
            require_labels(self)
        require_sampled(self, labeler)
        require_settings(self, labeler)
        ratio = self.bootstrap_ratio
        if ratio and not labeler.adds_dataset_answer:
            # With further prompts more may do, see `Method.pairs_per_prompt`.
            require_candidates(self, 1 if self.prompts else self.pairs_per_prompt)
        # A key, the value that does nothing, whether another is read, and what would read it.
        in_vain = (
            ("selection_ratio", 1, selection.reads_ratio, "selection", "irm"),
            ("offline_length_control", "none", selection.by_margin, "selection", "irm"),
            ("servers", (), self.sampler == "vllm-server", "sampler", "vllm-server"),
            ("reference", "previous", not is_reference_free(self.loss), "loss", "dpo"),
            ("ipo_reduction", "mean", LOSSES[self.loss].per_token == "by_reduction", "loss", "ipo"),
        )
        for key, neutral, is_read, other, reads in in_vain:
            if not is_read and getattr(self, key) != neutral:
                raise ValueError(
                    f"{key}: {getattr(self, key)} has no effect with {other}: "
                    f"{getattr(self, other)}. Remove {key}, or set {other} to {reads}."
                )
        if selection.reads_scores and not self.score_columns:
            raise ValueError(
                f"selection: {self.selection} ranks by a score of the dataset's, and none is "
                "named. Add for example score_columns: [score_chosen, score_rejected]."
            )
        if self.selection_ratio == 0 and ratio == 0:
            raise ValueError(
                "selection_ratio: 0 with bootstrap_ratio: 0 leaves nothing to train on from "
                "iteration 2 on. Raise one of them."
            )
        taken = [c for c in self.score_columns if c in _OUR_COLUMNS or c.startswith("sera_")]
        if taken:
            raise ValueError(
                f"score_columns: {', '.join(map(quoted, taken))} is what the pairs themselves are "
                "kept as. Rename it in the dataset or leave it out."
            )
        return self


class SeraArgs(BaseModel):
    """What the host merges into its own configuration schema."""

    sera: SeraConfig | None = Field(
        default=None, description="SeRA: selection and bootstrapping between epochs (`rl: sera`)."
    )
    sera_entries: str | None = Field(
        default=None,
        description="Not for a YAML: `datasets` as they were written, in JSON, for Ray's workers. "
        "They get a configuration whose validation has lost some of them.",
    )
