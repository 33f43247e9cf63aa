"""The dataset's own pairs: their log-probabilities under each policy, and which are kept."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.algorithm.iteration import Iteration
from sera_plugin.algorithm.length_control import regressed_alpha
from sera_plugin.algorithm.method import Method, Pairs
from sera_plugin.algorithm.protocols import Scorer
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.selection import Offline, select_largest
from sera_plugin.rundir.store import make_table

#: The two answers of a pair.
SIDES = ("chosen", "rejected")


def score_pairs(pairs: Pairs, policy: int, scorer: Scorer, phase: str) -> dict[str, FloatArray]:
    """log pi_policy of the chosen and rejected completions, (N,) each, in nats.

    Raises:
        ValueError: naming the first row whose log-probability is not finite.
    """
    both = scorer(
        policy,
        pairs.prompt_ids.joined(pairs.prompt_ids),
        pairs.chosen_ids.joined(pairs.rejected_ids),
        phase,
    )
    logps = {"chosen": both[: len(pairs)], "rejected": both[len(pairs) :]}
    for side, values in logps.items():
        require_finite(values, f"log-probability of {side}", np.arange(len(pairs)))
    return logps


def score(it: Iteration) -> dict[str, FloatArray]:
    """log pi_{t-1} of the offline pairs: each policy scores them once (Algorithm 1, line 4)."""
    with it.phases.timed("score_offline"):
        return score_pairs(it.pairs, it.t - 1, it.scorer, "score_offline")


def select(it: Iteration, logps: dict[str, FloatArray]) -> pa.Table:
    """offline.parquet: rewards, margins and which pairs are kept (Algorithm 1, line 5).

    Args:
        it: the iteration; its earlier policies have scored the pairs.
        logps: as `score` gives them.

    Raises:
        ValueError: naming the first row whose margin is not finite.
    """
    method, pairs = it.method, it.pairs
    columns: dict[str, Any] = {
        "row": np.arange(len(pairs)),
        "prompt_length": pairs.prompt_ids.lengths,
        "chosen_length": pairs.chosen_ids.lengths,
        "rejected_length": pairs.rejected_ids.lengths,
        "chosen_logp": logps["chosen"],
        "rejected_logp": logps["rejected"],
    }
    with it.phases.timed("select"):
        if it.t > 1:
            earlier = [it.scores(policy) for policy in method.reward_policies(it.t)[1:]]
            for side in SIDES:
                columns[f"{side}_reward"] = method.reward(
                    [logps[side], *(each[f"{side}_logp"].to_numpy() for each in earlier)],
                    it.t,
                    columns[f"{side}_length"],
                )
            columns["margin"] = columns["chosen_reward"] - columns["rejected_reward"]
        columns |= _kept(it.t, method, columns)
    if method.annotations.swapped is not None:
        columns["swapped"] = method.annotations.swapped
    return make_table(columns)


def _kept(t: int, method: Method, columns: dict[str, Any]) -> dict[str, Any]:
    """`selected`, and `priority` where pairs are not ranked by `margin` as it stands."""
    kept, margin = method.kept(t), columns.get("margin")
    if margin is None and kept == method.total:
        return {}
    lengths = {side: columns[f"{side}_length"] for side in SIDES}
    controlled = margin
    if margin is not None and method.config.offline_length_control != "none":
        longer = (lengths["chosen"] - lengths["rejected"]).astype(np.float64)
        controlled = margin - offline_alpha(method, margin, longer) * longer
    chosen, rejected = (method.reduced(columns[f"{side}_logp"], lengths[side]) for side in SIDES)
    priority = method.selection.priority(Offline(t, controlled, chosen - rejected))
    found = {"selected": select_largest(priority, kept)}
    return found if priority is margin else {"priority": priority, **found}


def offline_alpha(method: Method, margin: FloatArray, longer: FloatArray) -> float:
    """What length control takes off a margin, in nats per token.

    Args:
        margin: (N,) margins.
        longer: (N,) tokens of chosen less those of rejected.
    """
    setting = method.config.offline_length_control
    return regressed_alpha(margin[None], longer[None]) if setting == "auto" else float(setting)


def restore(it: Iteration, policies: Collection[int]) -> None:
    """Make the offline scores under earlier policies again where a file is missing or damaged.

    Oldest first: a table's rewards need the scores of the policies before.
    """
    missing: set[int] = set()
    unchecked = [policy + 1 for policy in policies]
    while unchecked:
        t = unchecked.pop()
        if t < it.t and t not in missing and it.at(t).read("offline") is None:
            missing.add(t)
            unchecked += [policy + 1 for policy in it.method.reward_policies(t)]
    for t in sorted(missing):
        earlier = it.at(t)
        earlier.once("offline", lambda at=earlier: select(at, score(at)))  # type: ignore[misc]


def score_held_out(it: Iteration) -> dict[str, FloatArray]:
    """The held-out pairs' log-probabilities under iteration t's reference, (M,) each.

    Every policy that the iteration's reward needs scores them once (evaluation.parquet).
    """
    pairs, method = it.held_out, it.method
    assert pairs is not None
    for t in range(max(1, method.oldest_policy(it.t) + 1), it.t + 1):
        if it.at(t).read("evaluation") is None:
            with it.phases.timed("score_evaluation"):
                logps = score_pairs(pairs, t - 1, it.scorer, "score_evaluation")
            columns = {
                "row": np.arange(len(pairs)),
                "chosen_length": pairs.chosen_ids.lengths,
                "rejected_length": pairs.rejected_ids.lengths,
                "chosen_logp": logps["chosen"],
                "rejected_logp": logps["rejected"],
            }
            it.at(t).once("evaluation", lambda made=columns: make_table(made))  # type: ignore[misc]
    reference = it.at(method.reference(it.t) + 1).table("evaluation")
    return {side: reference[f"{side}_logp"].to_numpy() for side in SIDES}


def require_finite(values: FloatArray, what: str, rows: npt.NDArray[Any]) -> None:
    """Refuse log-probabilities that are not finite.

    Args:
        values: (n,) nats.
        what: whose they are, for the message.
        rows: (n,) the row of each.

    Raises:
        ValueError: naming the first such row.
    """
    broken = np.flatnonzero(~np.isfinite(values))
    if broken.size:
        raise ValueError(
            f"the {what} in row {rows[broken[0]]} is {values[broken[0]]} ({broken.size} such "
            "values). The policy has diverged or overflows: lower learning_rate, or train with "
            "bf16 or float32 instead of fp16."
        )
