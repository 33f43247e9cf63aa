"""Which candidates to pair: a prompt's samples ranked by their implicit reward."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs found among all prompts' candidates. Arrays are (pairs,), in prompt order.

    Attributes:
        prompt: index of the prompt.
        chosen, rejected: indices of the candidates within the prompt.
        margin: reward of chosen minus reward of rejected, nats (per token for some losses), > 0.
        duplicates: candidates that repeat an earlier one of their prompt token for token.
        ties: pairs not made because both rewards were equal.
        too_few: prompts with fewer than two distinct candidates.
    """

    prompt: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int32]
    rejected: npt.NDArray[np.int32]
    margin: npt.NDArray[np.float64]
    duplicates: int
    ties: int
    too_few: int


def pair_candidates(
    candidates: Sequence[Sequence[Hashable]],
    rewards: Sequence[npt.ArrayLike],
    pairs_per_prompt: int = 1,
) -> CandidatePairs:
    """Pair best with worst, second with second last, and so on (paper Algorithm 1, line 7).

    Args:
        candidates: per prompt its candidates, in any form that compares equal when the token ids
            do. Identical candidates count once (the first stands for them).
        rewards: per prompt the (R,) rewards of its candidates.
        pairs_per_prompt: at most this many nested pairs a prompt; one is the paper's default.

    Returns:
        The pairs. Equal rewards give none; fewer than two distinct candidates give none.

    Raises:
        ValueError: naming prompt and candidate of a reward that is not finite.
    """
    prompts: list[int] = []
    chosen: list[int] = []
    rejected: list[int] = []
    margins: list[float] = []
    duplicates = ties = too_few = 0
    for prompt, (answers, values) in enumerate(zip(candidates, rewards, strict=True)):
        reward = np.asarray(values, dtype=np.float64)
        if not np.isfinite(reward).all():
            broken = int(np.flatnonzero(~np.isfinite(reward))[0])
            raise ValueError(
                f"the reward of candidate {broken} of prompt {prompt} is {reward[broken]}: the "
                "policy's log-probabilities are not finite. Lower learning_rate, or train with "
                "bf16 or float32 instead of fp16."
            )
        first: dict[Hashable, int] = {}
        for index, answer in enumerate(answers):
            first.setdefault(answer, index)
        distinct = list(first.values())
        duplicates += len(answers) - len(distinct)
        if len(distinct) < 2:
            too_few += 1
            continue
        ranked = sorted(distinct, key=lambda index: (-reward[index], index))
        for rank in range(min(pairs_per_prompt, len(ranked) // 2)):
            best, worst = ranked[rank], ranked[-1 - rank]
            if reward[best] == reward[worst]:
                ties += 1
                continue
            prompts.append(prompt)
            chosen.append(best)
            rejected.append(worst)
            margins.append(float(reward[best] - reward[worst]))
    return CandidatePairs(
        prompt=np.asarray(prompts, dtype=np.int64),
        chosen=np.asarray(chosen, dtype=np.int32),
        rejected=np.asarray(rejected, dtype=np.int32),
        margin=np.asarray(margins, dtype=np.float64),
        duplicates=duplicates,
        ties=ties,
        too_few=too_few,
    )
