"""By how much rounding moves a margin: a few pairs scored again, in other batches.

In low precision a log-probability depends on what shares its batch, and a margin is a difference
of four or six of them. Errors of one pair under two policies are alike and cancel in part, so the
noise of a margin is taken from margins, not from log-probabilities.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.method import Iteration
from sera_plugin.algorithm.rewards import implicit_reward
from sera_plugin.algorithm.trust import SIDES, reward_of
from sera_plugin.config.kinds import SELECTIONS

#: Pairs that are scored again: a root mean square of so many is known to about a sixth.
FEW = 16


def _few(it: Iteration) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, len(it.pairs) - 1, FEW).astype(np.int64))


def score_again(it: Iteration) -> dict[str, list[float]]:
    """Nats by which log pi_{t-1} moves, of `FEW` pairs' answers by side, evenly over the dataset.

    Each side is scored by itself: in other batches than before, and with no prompt shared.
    """
    rows = _few(it)
    prompts, before, moved = it.pairs.prompt_ids.take(rows), it.table("offline"), {}
    with it.phases.timed("score_again"):
        for side in SIDES:
            answers = getattr(it.pairs, f"{side}_ids").take(rows)
            again = it.scorer(it.t - 1, prompts, answers, "score_again")
            moved[side] = (again - before[f"{side}_logp"].to_numpy()[rows]).tolist()
    return moved


def margin_noise(it: Iteration, moved: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The noise of iteration t's margins, t >= 2; empty where a policy's is not known.

    `moved` are `score_again` of `method.reward_policies(t)`. Returns `margin`, the root mean square
    of what the few pairs' margins move by, in the margins' unit, and `within`, the share of all
    pairs that are nearer than that to the cut between kept and dropped, if margins decide it.
    """
    offline, method = it.table("offline"), it.method
    rows = _few(it)
    if any(len(one.get(side, ())) != len(rows) for one in moved for side in SIDES):
        return {}
    chosen, rejected = (
        implicit_reward(
            np.array([one[side] for one in moved]),
            tuple(reward_of(it).weights),
            offline[f"{side}_length"].to_numpy()[rows] if method.per_token else None,
        )
        for side in SIDES
    )
    noise = float(np.sqrt(((chosen - rejected) ** 2).mean()))
    found = {"margin": noise}
    kept = offline["selected"].to_numpy(zero_copy_only=False)
    if SELECTIONS[method.config.selection].by_margin and 0 < kept.sum() < len(kept):
        ranked = "priority" if "priority" in offline.column_names else "margin"
        values = offline[ranked].to_numpy()
        cut = (values[kept].min() + values[~kept].max()) / 2
        found["within"] = float((np.abs(values - cut) < noise).mean())
    return found
