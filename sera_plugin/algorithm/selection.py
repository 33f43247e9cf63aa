"""Which pairs an iteration trains on: the first of a ranking, and candidates paired by reward.

`ImplicitRewardMargin` is the paper's selection of offline pairs; each of the others is a system
that it is compared with. `config.kinds.SELECTIONS` names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.rewards import FloatArray, require_finite

if TYPE_CHECKING:
    from sera_plugin.algorithm.method import Method


def select_largest(margins: npt.ArrayLike, count: int) -> npt.NDArray[np.bool_]:
    """(n,) bool: the `count` pairs with the largest margin (paper Algorithm 1, lines 5 and 8).

    Margins may be negative: a pair on which the policy disagrees with its label least is still
    kept when the ratio asks for it. Equal margins are kept in row order; a count of more than n
    keeps all.

    Raises:
        ValueError: naming the first row whose margin is not finite.
    """
    values = np.asarray(margins, dtype=np.float64)
    require_finite(values, "margin", np.arange(len(values)))
    selected = np.zeros(values.shape, dtype=bool)
    selected[np.argsort(-values, kind="stable")[: max(count, 0)]] = True
    return selected


class Selection:
    """How the offline pairs of an iteration are chosen.

    Raises:
        ValueError: if the dataset cannot be ranked in this way.
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    def count(self, iteration: int) -> int:
        """How many iteration t keeps: N before selection begins, k = round(ratio N) from then."""
        method = self.method
        selects = iteration >= method.config.first_iteration
        return round(method.config.selection_ratio * method.total) if selects else method.total

    def priority(self, iteration: int, margin: FloatArray | None, gap: FloatArray) -> FloatArray:
        """(N,) numbers; the pairs with the largest are kept, equal ones in row order.

        `margin` are implicit-reward margins less what length control takes, None in iteration 1;
        `gap` is log pi_{t-1} of chosen less that of rejected, per token where the loss is.
        """
        return np.zeros(self.method.total)


class ImplicitRewardMargin(Selection):
    """Implicit reward margins: SeRA, Algorithm 1, line 5."""

    def priority(self, iteration: int, margin: FloatArray | None, gap: FloatArray) -> FloatArray:
        return np.zeros(self.method.total) if margin is None else margin


class ReferenceLogp(Selection):
    """The reference's own log-probabilities (Pattnaik et al. 2024)."""

    def priority(self, iteration: int, margin: FloatArray | None, gap: FloatArray) -> FloatArray:
        return gap


class Score(Selection):
    """The gap of the dataset's scores: with GPT-4's, the paper's GPT-4 selection."""

    def priority(self, iteration: int, margin: FloatArray | None, gap: FloatArray) -> FloatArray:
        found = self.method.annotations.score_gap
        assert found is not None
        return found


class Random(Selection):
    """Any pairs, other ones each iteration; the same for the same seed."""

    def priority(self, iteration: int, margin: FloatArray | None, gap: FloatArray) -> FloatArray:
        return np.random.default_rng((self.method.seed, iteration)).random(self.method.total)


class All(Selection):
    """Every pair, every iteration: iterative DPO."""

    def count(self, iteration: int) -> int:
        return self.method.total


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
        return int((self._turn == iteration).sum())

    def priority(self, iteration: int, margin: FloatArray | None, gap: FloatArray) -> FloatArray:
        return (self._turn == iteration).astype(np.float64)


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs found among all prompts' candidates. Arrays are (pairs,), in prompt order."""

    prompt: npt.NDArray[np.int64]  # index of the prompt
    chosen: npt.NDArray[np.int32]  # index of the candidate within the prompt
    rejected: npt.NDArray[np.int32]
    margin: FloatArray  # reward of chosen less that of rejected, > 0
    duplicates: int  # candidates that repeat an earlier one of their prompt token for token
    ties: int  # pairs not made because both rewards were equal
    too_few: int  # prompts with fewer than two distinct candidates that have a reward
    unranked: int  # candidates without a reward (NaN), which are in no pair


def pair_candidates(
    candidates: npt.ArrayLike, rewards: npt.ArrayLike, pairs_per_prompt: int = 1
) -> CandidatePairs:
    """Pair best with worst, second with second last, and so on (paper Algorithm 1, line 7).

    Equal rewards give no pair; fewer than two distinct candidates give none.

    Args:
        candidates: (prompts, R) numbers, equal within a prompt where the token ids are
            (`TokenColumn.numbered`). Identical candidates count once (the first stands for them).
        rewards: (prompts, R); NaN where whoever ranks them could not.
        pairs_per_prompt: at most this many nested pairs a prompt; one is the paper's default.

    Raises:
        ValueError: naming the prompt of a reward that is infinite.
    """
    answers, reward = np.asarray(candidates), np.asarray(rewards, dtype=np.float64)
    unknown = np.isnan(reward)
    prompts = np.repeat(np.arange(len(reward)), reward.shape[1])
    require_finite(np.where(unknown, 0, reward).ravel(), "reward of a candidate", prompts)
    repeats = np.zeros(reward.shape, dtype=bool)
    for index in range(1, reward.shape[1]):
        earlier, this = answers[:, :index], answers[:, index : index + 1]
        repeats[:, index] = (earlier == this).any(axis=1)
    left_out = repeats | unknown
    distinct = reward.shape[1] - left_out.sum(axis=1, keepdims=True)
    # Best first, equal ones in their order, those that are left out behind all others.
    ranked = np.argsort(np.where(left_out, np.inf, -reward), axis=1, kind="stable")
    rank = np.arange(min(pairs_per_prompt, reward.shape[1] // 2))
    possible = rank < distinct // 2
    best = ranked[:, : len(rank)]
    worst = np.take_along_axis(ranked, np.maximum(distinct - 1 - rank, 0), axis=1)
    highest, lowest = (np.take_along_axis(reward, side, axis=1) for side in (best, worst))
    made = possible & (highest > lowest)
    return CandidatePairs(
        prompt=np.nonzero(made)[0],
        chosen=best[made].astype(np.int32),
        rejected=worst[made].astype(np.int32),
        margin=highest[made] - lowest[made],
        duplicates=int(repeats.sum()),
        ties=int((possible & ~made).sum()),
        too_few=int((distinct < 2).sum()),
        unranked=int(unknown.sum()),
    )
