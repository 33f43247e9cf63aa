"""Which pairs an iteration trains on: the first of a ranking, and candidates paired by reward.

`ImplicitRewardMargin` is the paper's selection of offline pairs; each of the others is a system
that it is compared with (`config.kinds.SELECTIONS` names them), and may read what a dataset says of
its pairs beside their texts. Labels are swapped on purpose for the paper's robustness experiment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.rewards import FloatArray, require_finite
from sera_plugin.config.kinds import SELECTIONS
from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir.tokens import TokenColumn

if TYPE_CHECKING:
    from sera_plugin.algorithm.method import Method

BoolArray = npt.NDArray[np.bool_]
#: (N,) values each, by name.
Columns = Mapping[str, Sequence[Any]]


def select_largest(margins: npt.ArrayLike, count: int) -> BoolArray:
    """(n,) bool: the `count` pairs with the largest margin (paper Algorithm 1, lines 5 and 8).

    Also negative ones, if so many are asked for; equal ones in row order. A margin that is not
    finite is a ValueError that names its row.
    """
    values = np.asarray(margins, dtype=np.float64)
    require_finite(values, "margin", np.arange(len(values)))
    selected = np.zeros(values.shape, dtype=bool)
    selected[np.argsort(-values, kind="stable")[: max(count, 0)]] = True
    return selected


class Selection:
    """How the offline pairs of an iteration are chosen; ValueError where a dataset lacks it."""

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

    Candidates are (prompts, R) numbers, equal within a prompt where the token ids are
    (`TokenColumn.numbered`); identical ones count once, the first for all. Rewards are (prompts,
    R), NaN where there is none; an infinite one is a ValueError that names its prompt. A prompt
    gives at most `pairs_per_prompt` nested pairs (the paper: one), none of equal rewards.
    """
    answers, reward = np.asarray(candidates), np.asarray(rewards, dtype=np.float64)
    unknown = np.isnan(reward)
    prompts = np.broadcast_to(np.arange(len(reward))[:, None], reward.shape)
    require_finite(reward[~unknown], "reward of a candidate", prompts[~unknown])
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


# ------------------------------------------------------------------ what a dataset says of pairs


@dataclass(frozen=True)
class Annotations:
    """What a dataset says of its pairs beside their texts, where selection reads it; (N,) each."""

    score_gap: FloatArray | None = None  # the dataset's score of chosen less that of rejected
    prompts: npt.NDArray[np.int32] | None = None  # numbers, equal where the prompts are
    swapped: BoolArray | None = None  # which had their answers swapped on purpose


def annotate(
    config: SeraConfig, prompt_ids: TokenColumn, columns: Columns, swapped: BoolArray | None
) -> Annotations:
    """What the configuration's selection needs to know of the N offline pairs.

    `columns` are those of `score_columns`, as `swap` leaves them; `swapped` is None without noise.
    A score that a selection needs and a row lacks is a ValueError.
    """
    if not SELECTIONS[config.selection].reads_scores:
        return Annotations(swapped=swapped)
    prompts = prompt_ids.numbered(len(prompt_ids)).ravel()
    return Annotations(score_gap(columns, swapped), prompts, swapped)


def by_side(names: Sequence[str]) -> dict[str, str]:
    """Columns that say something of one answer: the chosen one's name to the rejected one's.

    `score_chosen` and `score_rejected` are one score of two answers.
    """
    other = {name: name.replace("chosen", "rejected") for name in names}
    return {name: side for name, side in other.items() if side != name and side in names}


def score_gap(columns: Columns, swapped: BoolArray | None = None) -> FloatArray:
    """(N,) score of chosen less that of rejected, by the first column that has numbers.

    A column that is a gap turns its sign where `swapped`; two columns of a score have been swapped.
    No such column, or a row of it without a number, is a ValueError.
    """
    rejected = by_side(list(columns))
    for name, values in columns.items():
        if name in rejected.values() or not any(map(_is_number, values)):
            continue
        gap = _numbers(name, values)
        if name in rejected:
            return gap - _numbers(rejected[name], columns[rejected[name]])
        return gap if swapped is None else np.where(swapped, -gap, gap)
    raise ValueError(
        f"sera.score_columns: {', '.join(map(quoted, columns))} has no numbers to select by. Name "
        "a score of each answer, such as [score_chosen, score_rejected]."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(name: str, values: Sequence[Any]) -> FloatArray:
    for row, value in enumerate(values):
        if not _is_number(value) or not np.isfinite(value):
            raise ValueError(
                f"column {quoted(name)} is {quoted(value)} in row {row}, and sera.selection ranks "
                "by it. Give every row a number, or leave such rows out of the dataset."
            )
    return np.asarray(values, dtype=np.float64)


def swapped_rows(total: int, share: float, seed: int) -> BoolArray:
    """(N,) bool: round(share N) rows at random, the same for the same seed."""
    order = np.random.default_rng((seed, total)).permutation(total)
    return np.isin(np.arange(total), order[: round(share * total)])


def swap(columns: Columns, swapped: BoolArray) -> dict[str, Sequence[Any]]:
    """The columns with what belongs to an answer on the other side where `swapped`, (N,)."""
    found = dict(columns)
    for pair in by_side(list(columns)).items():
        for one, other in (pair, pair[::-1]):
            both = zip(columns[one], columns[other], swapped, strict=True)
            found[one] = [there if turned else here for here, there, turned in both]
    return found
