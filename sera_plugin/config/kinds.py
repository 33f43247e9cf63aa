"""The losses, selections and labelers that a YAML can name: one line each.

A new one is a class (for a loss, a function) in the module of its sort and a line here. What is
special about it stands in the line, so that nothing else compares names. The implementation is
imported on first use: reading a configuration loads no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Kind:
    """What all kinds have: the name of what implements it, in the module of its sort."""

    implementation: str
    module: ClassVar[str]

    def load(self) -> Any:
        """The class or function itself."""
        return getattr(import_module(f"sera_plugin.{self.module}"), self.implementation)


@dataclass(frozen=True)
class LossKind(Kind):
    """A loss: a function (loss, chosen_rewards, rejected_rewards) -> (n,) losses."""

    module = "model.losses"
    #: The default: the SeRA paper's where it has one, else that of the loss's own paper.
    beta: float
    #: The reward is log pi alone, per token (paper Eq. 17).
    reference_free: bool = False
    #: The reward is averaged over the completion's tokens, if `ipo_reduction` says so.
    per_token: Literal["always", "by_reduction", "never"] = "never"
    #: Whether `dpo_label_smoothing` is read.
    label_smoothing: Literal["required", "read", "never"] = "never"
    #: Whether `simpo_gamma` and `cpo_alpha` are read.
    target_margin: bool = False
    #: Whether the mean log-likelihood of prompt and chosen answer is part of it.
    likelihood: bool = False


_FREE: dict[str, Any] = {"reference_free": True, "per_token": "always"}
LOSSES: Mapping[str, LossKind] = {
    "dpo": LossKind("dpo", beta=0.2, label_smoothing="read"),
    "ipo": LossKind("ipo", beta=1.0, per_token="by_reduction"),
    "slic": LossKind("slic", beta=0.2),
    "robust": LossKind("robust", beta=0.2, label_smoothing="required"),
    "simpo": LossKind("simpo", beta=2.0, **_FREE, target_margin=True),
    "kto_pair": LossKind("kto_pair", beta=0.1),
    "orpo": LossKind("orpo", beta=0.1, **_FREE, likelihood=True),
}


def is_reference_free(loss: str) -> bool:
    """Whether the reward of a loss, SeRA's or the host's, is log pi alone (paper Eq. 17)."""
    return loss in LOSSES and LOSSES[loss].reference_free


@dataclass(frozen=True)
class SelectionKind(Kind):
    """How offline pairs are chosen: a subclass of `algorithm.selection.Selection`."""

    module = "algorithm.selection"
    #: What it keeps of the offline pairs, for a reader; `{ratio}` is selection_ratio.
    keeps: str
    #: Whether `selection_ratio` says how many are kept.
    reads_ratio: bool = True
    #: Whether it ranks by a score of the dataset (`score_columns`).
    reads_scores: bool = False
    #: Whether it ranks by implicit-reward margins, so that length control applies.
    by_margin: bool = False
    #: Whether a pair that is not kept is judged to be worse than one that is.
    rejects: bool = True


_BY_PROMPT: dict[str, Any] = {"reads_ratio": False, "reads_scores": True, "rejects": False}
SELECTIONS: Mapping[str, SelectionKind] = {
    "irm": SelectionKind(
        "ImplicitRewardMargin", "{ratio:g} of the pairs (the largest margins)", by_margin=True
    ),
    "reference_logp": SelectionKind("ReferenceLogp", "{ratio:g} of the pairs (by reference_logp)"),
    "score": SelectionKind("Score", "{ratio:g} of the pairs (by score)", reads_scores=True),
    "random": SelectionKind("Random", "{ratio:g} of the pairs (at random)"),
    "all": SelectionKind("All", "all pairs", reads_ratio=False),
    "curriculum": SelectionKind("Curriculum", "each prompt's t-th easiest pair", **_BY_PROMPT),
}


@dataclass(frozen=True)
class LabelerKind(Kind):
    """Who ranks candidates: a subclass of `algorithm.method.Labeler`."""

    module = "labeling.labelers"
    #: For readers of a report.
    ranks_by: str
    #: Whether it ranks by implicit rewards: then it needs earlier policies' scores, and samples
    #: only from iteration 2 on.
    implicit: bool = False
    #: Whether its numbers measure something that length control can be taken off.
    gives_rewards: bool = True
    #: Whether the dataset's chosen answer is a candidate too; a prompt then gives one pair, and one
    #: sample is enough for it.
    adds_dataset_answer: bool = False
    #: Whether it gives each answer a number that can be a feature of the fitted reward.
    scores: bool = False
    #: Whether it may take `score_columns` of an answer's row.
    reads_columns: bool = False
    #: Whether it is several, whose scores the labels of held-out pairs weigh.
    mixed: bool = False
    #: The key of the `sera:` block that it needs, and an example of its value.
    setting: tuple[str, str] | None = None

    def first_iteration(self, selection_ratio: float) -> int:
        """The iteration from which a run selects and samples: 2, as in the paper.

        1 where no offline pairs are asked for (`selection_ratio: 0`) and whoever ranks the samples
        needs no earlier policy: the run is then on samples from its first step (SPIN, OAIF).
        """
        return 2 if selection_ratio or self.implicit else 1


_OF_DATASET: dict[str, Any] = {"gives_rewards": False, "adds_dataset_answer": True}
LABELERS: Mapping[str, LabelerKind] = {
    "implicit": LabelerKind("ImplicitReward", "its implicit reward", implicit=True),
    "reward_model": LabelerKind(
        "Judged", "the reward model", scores=True, setting=("reward_model", "./my-model")
    ),
    "judge": LabelerKind("Judged", "the judge", scores=True, setting=("judge", "{base_url: ...}")),
    "function": LabelerKind(
        "Judged",
        "the function",
        scores=True,
        reads_columns=True,
        setting=("function", "checks.py:score"),
    ),
    "self_judge": LabelerKind("SelfJudge", "its own verdict in words"),
    "spin": LabelerKind("Spin", "the dataset", **_OF_DATASET),
}
_MIXED = LabelerKind(
    "Mixed", "its implicit reward and the scores of others", implicit=True, mixed=True
)


def labeler_kind(labeler: str | Sequence[str]) -> LabelerKind:
    """The facts about what `sera.labeler` names: one, or a list of those that are mixed."""
    return LABELERS[labeler] if isinstance(labeler, str) else _MIXED


def labeler_name(labeler: str | Sequence[str]) -> str:
    """The same for a reader."""
    return labeler if isinstance(labeler, str) else " + ".join(labeler)
