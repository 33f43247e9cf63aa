"""Which offline pairs an iteration trains on: a ranking, and how many of its first are kept.

`irm` is the paper's; each of the others is a system that it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True)
class Selection:
    """How the offline pairs of an iteration are chosen.

    Attributes:
        priority: gives every pair a number; the largest are kept, equal ones in row order.
        count: how many iteration t keeps.
    """

    priority: Callable[[Offline], FloatArray]
    count: Callable[[int], int]


@dataclass(frozen=True)
class Question:
    """What a selection is made from, before the run begins.

    Attributes:
        total: N.
        kept: k, how many the ratio asks for.
        first: the iteration from which pairs are selected; before it all are kept.
        iterations: T.
        seed: the run's.
        score_gap: (N,) the dataset's score of chosen less that of rejected, where it is asked for.
        prompts: (N,) numbers, equal where the prompts are, where they are asked for.
    """

    total: int
    kept: int
    first: int = 2
    iterations: int = 1
    seed: int = 0
    score_gap: FloatArray | None = None
    prompts: npt.NDArray[np.integer] | None = None

    def by_ratio(self, iteration: int) -> int:
        """N before selection begins, k from then on."""
        return self.total if iteration < self.first else self.kept


def _irm(asked: Question) -> Selection:
    """Implicit reward margins: SeRA, Algorithm 1, line 5."""

    def margin(pairs: Offline) -> FloatArray:
        return np.zeros(asked.total) if pairs.margin is None else pairs.margin

    return Selection(margin, asked.by_ratio)


def _reference_logp(asked: Question) -> Selection:
    """The reference's own log-probabilities (Pattnaik et al. 2024)."""
    return Selection(lambda pairs: pairs.reference_gap, asked.by_ratio)


def _score(asked: Question) -> Selection:
    """The gap of the dataset's scores: with GPT-4's, the paper's GPT-4 selection."""
    gap = asked.score_gap
    assert gap is not None
    return Selection(lambda pairs: gap, asked.by_ratio)


def _random(asked: Question) -> Selection:
    """Any pairs, other ones each iteration; the same for the same seed."""

    def draw(pairs: Offline) -> FloatArray:
        return np.random.default_rng((asked.seed, pairs.iteration)).random(asked.total)

    return Selection(draw, asked.by_ratio)


def _all(asked: Question) -> Selection:
    """Every pair, every iteration: iterative DPO."""
    return Selection(lambda pairs: np.zeros(asked.total), lambda iteration: asked.total)


def _curriculum(asked: Question) -> Selection:
    """Iteration t trains on each prompt's t-th easiest pair (Curri-DPO, Pattnaik et al. 2024).

    Easiest is where the scores of chosen and rejected are furthest apart.
    """
    gap, prompts = asked.score_gap, asked.prompts
    assert gap is not None
    assert prompts is not None
    order = np.lexsort((-gap, prompts))
    begins = np.flatnonzero(np.diff(prompts[order], prepend=-1))
    sizes = np.diff([*begins, asked.total])
    turn = np.empty(asked.total, dtype=np.int64)
    turn[order] = np.arange(asked.total) - np.repeat(begins, sizes) + 1
    if asked.iterations > turn.max():
        raise ValueError(
            f"num_epochs: {asked.iterations} with sera.selection: curriculum needs a prompt with "
            f"that many pairs, but none has more than {turn.max()}. Set num_epochs to "
            f"{turn.max()}, or give a row for every pair of a prompt's answers."
        )
    return Selection(
        lambda pairs: (turn == pairs.iteration).astype(np.float64),
        lambda iteration: int((turn == iteration).sum()),
    )


#: `sera.selection` by name.
SELECTIONS: Mapping[str, Callable[[Question], Selection]] = {
    "irm": _irm,
    "reference_logp": _reference_logp,
    "score": _score,
    "random": _random,
    "all": _all,
    "curriculum": _curriculum,
}
#: Those that read the dataset's scores.
BY_SCORE = frozenset({"score", "curriculum"})
