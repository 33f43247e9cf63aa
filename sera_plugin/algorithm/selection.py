"""Which offline pairs an iteration trains on: a ranking, and how many of its first are kept.

`ImplicitRewardMargin` is the paper's; each of the others is a system that it is compared with.
`config.kinds.SELECTIONS` names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sera_plugin.algorithm.method import Method

FloatArray = npt.NDArray[np.float64]


def select_largest(margins: npt.ArrayLike, count: int) -> npt.NDArray[np.bool_]:
    """Mark the `count` pairs with the largest margin (paper Algorithm 1, lines 5 and 8).

    Margins may be negative: a pair on which the policy disagrees with its label least is still
    kept when the ratio asks for it. Equal margins are kept in row order.

    Args:
        margins: (n,) margins in nats.
        count: how many to keep; more than n keeps all.

    Returns:
        (n,) bool, True where kept.

    Raises:
        ValueError: naming the first row whose margin is not finite.
    """
    values = np.asarray(margins, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(values))
    if broken.size:
        raise ValueError(
            f"the margin of row {broken[0]} is {values[broken[0]]} ({broken.size} such rows): the "
            "policy's log-probabilities are not finite. Lower learning_rate, or train with "
            "bf16 or float32 instead of fp16."
        )
    selected = np.zeros(values.shape, dtype=bool)
    selected[np.argsort(-values, kind="stable")[: max(count, 0)]] = True
    return selected


@dataclass(frozen=True)
class Offline:
    """What a ranking may look at: the N offline pairs in iteration t.

    Attributes:
        iteration: t, 1-based.
        margin: (N,) implicit-reward margins less what length control takes; None in iteration 1,
            which has no earlier policy to compare with.
        reference_gap: (N,) log pi_{t-1} of chosen less that of rejected, reduced over tokens as the
            loss reduces its reward.
    """

    iteration: int
    margin: FloatArray | None
    reference_gap: FloatArray


class Selection:
    """How the offline pairs of an iteration are chosen.

    Args:
        method: the run's constants.

    Raises:
        ValueError: if the dataset cannot be ranked in this way.
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    def count(self, iteration: int) -> int:
        """How many iteration t keeps: N before selection begins, k from then on."""
        method = self.method
        return method.total if iteration < method.first else method.kept_by_ratio

    def priority(self, pairs: Offline) -> FloatArray:
        """(N,) numbers; the pairs with the largest are kept, equal ones in row order."""
        raise NotImplementedError


class ImplicitRewardMargin(Selection):
    """Implicit reward margins: SeRA, Algorithm 1, line 5."""

    def priority(self, pairs: Offline) -> FloatArray:
        """See `Selection.priority`."""
        return np.zeros(self.method.total) if pairs.margin is None else pairs.margin


class ReferenceLogp(Selection):
    """The reference's own log-probabilities (Pattnaik et al. 2024)."""

    def priority(self, pairs: Offline) -> FloatArray:
        """See `Selection.priority`."""
        return pairs.reference_gap


class Score(Selection):
    """The gap of the dataset's scores: with GPT-4's, the paper's GPT-4 selection."""

    def priority(self, pairs: Offline) -> FloatArray:
        """See `Selection.priority`."""
        gap = self.method.annotations.score_gap
        assert gap is not None
        return gap


class Random(Selection):
    """Any pairs, other ones each iteration; the same for the same seed."""

    def priority(self, pairs: Offline) -> FloatArray:
        """See `Selection.priority`."""
        generator = np.random.default_rng((self.method.seed, pairs.iteration))
        return generator.random(self.method.total)


class All(Selection):
    """Every pair, every iteration: iterative DPO."""

    def count(self, iteration: int) -> int:
        """See `Selection.count`."""
        return self.method.total

    def priority(self, pairs: Offline) -> FloatArray:
        """See `Selection.priority`."""
        return np.zeros(self.method.total)


class Curriculum(Selection):
    """Iteration t trains on each prompt's t-th easiest pair (Curri-DPO, Pattnaik et al. 2024).

    Easiest is where the scores of chosen and rejected are furthest apart.
    """

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        gap, prompts = method.annotations.score_gap, method.annotations.prompts
        assert gap is not None
        assert prompts is not None
        order = np.lexsort((-gap, prompts))
        begins = np.flatnonzero(np.diff(prompts[order], prepend=-1))
        sizes = np.diff([*begins, method.total])
        turn = np.empty(method.total, dtype=np.int64)
        turn[order] = np.arange(method.total) - np.repeat(begins, sizes) + 1
        if method.iterations > turn.max():
            raise ValueError(
                f"num_epochs: {method.iterations} with sera.selection: "
                f"{method.config.selection} needs a prompt with that many pairs, but none has more "
                f"than {turn.max()}. Set num_epochs to {turn.max()}, or give a row for every pair "
                "of a prompt's answers."
            )
        self._turn = turn

    def count(self, iteration: int) -> int:
        """See `Selection.count`."""
        return int((self._turn == iteration).sum())

    def priority(self, pairs: Offline) -> FloatArray:
        """See `Selection.priority`."""
        return (self._turn == pairs.iteration).astype(np.float64)
