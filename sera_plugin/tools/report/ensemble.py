"""What the reward ensemble (gamma) changed: selection again without it, from what was recorded."""

from __future__ import annotations

from typing import Any

import numpy as np

from sera_plugin.algorithm.pairing import pair_candidates
from sera_plugin.algorithm.rewards import (
    FloatArray,
    implicit_reward,
    reward_weights,
)
from sera_plugin.algorithm.selection import select_largest
from sera_plugin.algorithm.summary import jaccard
from sera_plugin.config.kinds import is_reference_free
from sera_plugin.tools.report.data import SIDES, Iteration, Run


def margins_without_ensemble(run: Run, one: Iteration) -> FloatArray | None:
    """Iteration t's offline margins with gamma = 0; None where the ensemble plays no part."""
    gamma = run.settings.get("gamma", 0)
    if one.number < 3 or not gamma or one.margin is None:
        return None
    if "priority" in (one.offline or {}):
        return None  # selection looked at something else
    rewards = [run.reward(one.number, side, gamma=0.0) for side in SIDES]
    if rewards[0] is None or rewards[1] is None:
        return None
    return rewards[0] - rewards[1]


def ensemble(run: Run, one: Iteration) -> dict[str, Any] | None:
    """How many offline pairs the ensemble (gamma) has exchanged for others."""
    margin, selected = margins_without_ensemble(run, one), one.selected
    if margin is None or selected is None or not selected.any():
        return None
    without = select_largest(margin, int(selected.sum()))
    changed = int((selected & ~without).sum())
    return {
        "exchanged": changed,
        "kept": int(selected.sum()),
        "jaccard": jaccard(selected, without),
    }


def bootstrapped_ensemble(run: Run, one: Iteration) -> dict[str, Any] | None:
    """How many of the sampled pairs kept are others than with gamma = 0."""
    candidates, pairs = one.candidates, one.bootstrapped
    gamma = run.settings.get("gamma", 0)
    if candidates is None or pairs is None or one.number < 3 or not gamma:
        return None
    if not run.implicit or run.settings.get("length_control", "none") != "none":
        return None  # the pairs were ranked by something else
    count = int(run.settings["candidates"])
    if len(candidates.row) % count:
        return None
    weights = reward_weights(one.number, 0.0, is_reference_free(run.description["loss"]))
    lengths = candidates.lengths if run.description["per_token"] else None
    reward = implicit_reward(candidates.logps.T[: len(weights)], weights, lengths)
    found = pair_candidates(
        candidates.identity.reshape(-1, count),
        reward.reshape(-1, count),
        max(1, int(np.ceil(run.settings["bootstrap_ratio"]))),
    )
    kept = int(pairs["selected"].sum())
    best = select_largest(found.margin, kept)
    names = ("row", "chosen_candidate", "rejected_candidate")
    now = set(zip(*(pairs[name][pairs["selected"]].tolist() for name in names), strict=True))
    rows = candidates.row[found.prompt * count]
    without = set(
        zip(
            *(values[best].tolist() for values in (rows, found.chosen, found.rejected)), strict=True
        )
    )
    return {"exchanged": len(now - without), "kept": kept}
