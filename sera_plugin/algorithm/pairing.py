"""Which candidates to pair: a prompt's samples ranked by their implicit reward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.rewards import require_finite


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs found among all prompts' candidates. Arrays are (pairs,), in prompt order.

    Attributes:
        prompt: index of the prompt.
        chosen, rejected: indices of the candidates within the prompt.
        margin: reward of chosen minus reward of rejected, nats (per token for some losses), > 0.
        duplicates: candidates that repeat an earlier one of their prompt token for token.
        ties: pairs not made because both rewards were equal.
        unranked: candidates without a reward (NaN), which are in no pair.
        too_few: prompts with fewer than two distinct candidates that have a reward.
    """

    prompt: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int32]
    rejected: npt.NDArray[np.int32]
    margin: npt.NDArray[np.float64]
    duplicates: int
    ties: int
    too_few: int
    unranked: int


def pair_candidates(
    candidates: npt.ArrayLike, rewards: npt.ArrayLike, pairs_per_prompt: int = 1
) -> CandidatePairs:
    """Pair best with worst, second with second last, and so on (paper Algorithm 1, line 7).

    Args:
        candidates: (prompts, R) numbers, equal within a prompt where the token ids are
            (`TokenColumn.numbered`). Identical candidates count once (the first stands for them).
        rewards: (prompts, R) rewards of the candidates; NaN where whoever ranks them could not.
        pairs_per_prompt: at most this many nested pairs a prompt; one is the paper's default.

    Returns:
        The pairs. Equal rewards give none; fewer than two distinct candidates give none.

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
