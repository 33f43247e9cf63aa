"""The losses, selections and labelers that a YAML can name: one line each.

A new one is a class (for a loss, a function) in its room and a line here. What is special about it
stands in the line, so that nothing else compares names. The implementation is imported on first
use: reading a configuration loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True)
class Kind:
    """What all kinds have: where it is, as `module:name` within sera_plugin."""

    implementation: str

    def load(self) -> Any:
        """The class or function itself."""
        module, _, name = self.implementation.partition(":")
        return getattr(import_module(f"sera_plugin.{module}"), name)


@dataclass(frozen=True)
class LossKind(Kind):
    """A loss: a function (loss, chosen_rewards, rejected_rewards) -> (n,) losses.

    Attributes:
        beta: the default: the SeRA paper's where it has one, else that of the loss's own paper.
        reference_free: the reward is log pi alone, per token (paper Eq. 17).
        per_token: the reward is averaged over the completion's tokens, if `ipo_reduction` says so.
        label_smoothing: whether `dpo_label_smoothing` is read.
        target_margin: whether `simpo_gamma` and `cpo_alpha` are read.
        likelihood: whether the mean log-likelihood of prompt and chosen answer is part of it.
    """

    beta: float
    reference_free: bool = False
    per_token: Literal["always", "by_reduction", "never"] = "never"
    label_smoothing: Literal["required", "read", "never"] = "never"
    target_margin: bool = False
    likelihood: bool = False


LOSSES: Mapping[str, LossKind] = {
    "dpo": LossKind("model.losses:dpo", beta=0.2, label_smoothing="read"),
    "ipo": LossKind("model.losses:ipo", beta=1.0, per_token="by_reduction"),
    "slic": LossKind("model.losses:slic", beta=0.2),
    "robust": LossKind("model.losses:robust", beta=0.2, label_smoothing="required"),
    "simpo": LossKind(
        "model.losses:simpo", beta=2.0, reference_free=True, per_token="always", target_margin=True
    ),
    "kto_pair": LossKind("model.losses:kto_pair", beta=0.1),
    "orpo": LossKind(
        "model.losses:orpo", beta=0.1, reference_free=True, per_token="always", likelihood=True
    ),
}


def is_reference_free(loss: str) -> bool:
    """Whether the reward of a loss, SeRA's or the host's, is log pi alone (paper Eq. 17)."""
    return loss in LOSSES and LOSSES[loss].reference_free


@dataclass(frozen=True)
class SelectionKind(Kind):
    """How offline pairs are chosen: a subclass of `algorithm.selection.Selection`.

    Attributes:
        reads_ratio: whether `selection_ratio` says how many are kept.
        reads_scores: whether it ranks by a score of the dataset (`score_columns`).
        by_margin: whether it ranks by implicit-reward margins, so that length control applies.
        rejects: whether a pair that is not kept is judged to be worse than one that is.
        keeps: what it keeps of the N offline pairs, for a reader; `{ratio}` is selection_ratio.
    """

    keeps: str
    reads_ratio: bool = True
    reads_scores: bool = False
    by_margin: bool = False
    rejects: bool = True


SELECTIONS: Mapping[str, SelectionKind] = {
    "irm": SelectionKind(
        "algorithm.selection:ImplicitRewardMargin", keeps="{ratio:g} N", by_margin=True
    ),
    "reference_logp": SelectionKind(
        "algorithm.selection:ReferenceLogp", keeps="{ratio:g} N by reference_logp"
    ),
    "score": SelectionKind(
        "algorithm.selection:Score", keeps="{ratio:g} N by score", reads_scores=True
    ),
    "random": SelectionKind("algorithm.selection:Random", keeps="{ratio:g} N by random"),
    "all": SelectionKind("algorithm.selection:All", keeps="all pairs", reads_ratio=False),
    "curriculum": SelectionKind(
        "algorithm.selection:Curriculum",
        keeps="each prompt's t-th easiest pair",
        reads_ratio=False,
        reads_scores=True,
        rejects=False,
    ),
}


@dataclass(frozen=True)
class LabelerKind(Kind):
    """Who ranks candidates: a subclass of `algorithm.protocols.Labeler`.

    Attributes:
        ranks_by: for readers of a report.
        implicit: whether it ranks by implicit rewards: then it needs earlier policies' scores, and
            samples only from iteration 2 on.
        gives_rewards: whether its numbers measure something that length control can be taken off.
        adds_dataset_answer: whether the dataset's chosen answer is a candidate too; a prompt then
            gives one pair, and one sample is enough for it.
        setting: the key of the `sera:` block that it needs, and an example of its value.
    """

    ranks_by: str
    implicit: bool = False
    gives_rewards: bool = True
    adds_dataset_answer: bool = False
    setting: tuple[str, str] | None = None

    def first_iteration(self, selection_ratio: float) -> int:
        """The iteration from which a run selects and samples: 2, as in the paper.

        1 where no offline pairs are asked for (`selection_ratio: 0`) and whoever ranks the samples
        needs no earlier policy: the run is then on samples from its first step (SPIN, OAIF).
        """
        return 2 if selection_ratio or self.implicit else 1


LABELERS: Mapping[str, LabelerKind] = {
    "implicit": LabelerKind(
        "labeling.labelers:ImplicitReward", ranks_by="its implicit reward", implicit=True
    ),
    "reward_model": LabelerKind(
        "labeling.labelers:Judged",
        ranks_by="the reward model",
        setting=("reward_model", "./my-model"),
    ),
    "judge": LabelerKind(
        "labeling.labelers:Judged", ranks_by="the judge", setting=("judge", "{base_url: ...}")
    ),
    "self_judge": LabelerKind("labeling.labelers:SelfJudge", ranks_by="its own verdict in words"),
    "spin": LabelerKind(
        "labeling.labelers:Spin",
        ranks_by="the dataset",
        gives_rewards=False,
        adds_dataset_answer=True,
    ),
}
