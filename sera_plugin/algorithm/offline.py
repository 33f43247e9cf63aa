"""The dataset's own pairs: their log-probabilities under each policy, and which are kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sera_plugin.algorithm.method import Iteration, Method, Pairs
from sera_plugin.algorithm.protocols import Scorer
from sera_plugin.algorithm.rewards import FloatArray, regressed_alpha, require_finite
from sera_plugin.algorithm.selection import select_largest
from sera_plugin.rundir.store import make_table

#: The two answers of a pair.
SIDES = ("chosen", "rejected")


def score_pairs(pairs: Pairs, policy: int, scorer: Scorer, phase: str) -> dict[str, FloatArray]:
    """log pi_policy of the chosen and rejected completions, (N,) each, in finite nats."""
    prompts = pairs.prompt_ids.joined(pairs.prompt_ids)
    both = scorer(policy, prompts, pairs.chosen_ids.joined(pairs.rejected_ids), phase)
    logps = {"chosen": both[: len(pairs)], "rejected": both[len(pairs) :]}
    for side, values in logps.items():
        require_finite(values, f"log-probability of {side}", np.arange(len(pairs)))
    return logps


def _columns(pairs: Pairs, logps: dict[str, FloatArray]) -> dict[str, Any]:
    lengths = {"chosen": pairs.chosen_ids.lengths, "rejected": pairs.rejected_ids.lengths}
    named = {f"{side}_length": values for side, values in lengths.items()}
    return named | {f"{side}_logp": values for side, values in logps.items()}


def score(it: Iteration) -> dict[str, FloatArray]:
    """log pi_{t-1} of the offline pairs: each policy scores them once (Algorithm 1, line 4)."""
    with it.phases.timed("score_offline"):
        return score_pairs(it.pairs, it.t - 1, it.scorer, "score_offline")


def select(it: Iteration, logps: dict[str, FloatArray]) -> pa.Table:
    """offline.parquet: rewards, margins and which pairs are kept (Algorithm 1, line 5).

    Earlier policies have scored the pairs; `logps` is what `score` gives.
    """
    method, pairs = it.method, it.pairs
    columns: dict[str, Any] = {"row": np.arange(len(pairs))}
    columns |= {"prompt_length": pairs.prompt_ids.lengths, **_columns(pairs, logps)}
    with it.phases.timed("select"):
        if it.t > 1:
            earlier = [it.scores(policy) for policy in method.reward_policies(it.t)[1:]]
            chosen, rejected = rewards(it, [columns, *earlier])
            columns |= {"chosen_reward": chosen, "rejected_reward": rejected}
            columns["margin"] = chosen - rejected
        columns |= _kept(it.t, method, columns)
    if method.annotations.swapped is not None:
        columns["swapped"] = method.annotations.swapped
    return make_table(columns)


def rewards(it: Iteration, scores: Sequence[Any]) -> list[FloatArray]:
    """Implicit rewards of chosen and rejected, (N,) each, from scores, newest policy first."""
    logps = [[np.asarray(one[f"{side}_logp"]) for one in scores] for side in SIDES]
    lengths = [np.asarray(scores[0][f"{side}_length"]) for side in SIDES]
    return [it.method.reward(logps[side], it.t, lengths[side]) for side in (0, 1)]


def _kept(t: int, method: Method, columns: dict[str, Any]) -> dict[str, Any]:
    """`selected`, and `priority` where pairs are not ranked by `margin` as it stands."""
    kept, margin = method.kept(t), columns.get("margin")
    if margin is None and kept == method.total:
        return {}
    controlled, alpha = margin, method.config.offline_length_control
    if margin is not None and alpha != "none":
        longer = columns["chosen_length"].astype(np.float64) - columns["rejected_length"]
        if alpha == "auto":
            alpha = regressed_alpha(margin[None], longer[None])
        controlled = margin - alpha * longer
    # As the loss reduces its reward: summed over tokens, or averaged.
    tokens = [columns[f"{side}_length"] if method.per_token else 1 for side in SIDES]
    gap = columns["chosen_logp"] / tokens[0] - columns["rejected_logp"] / tokens[1]
    priority = method.selection.priority(t, controlled, gap)
    found = {"selected": select_largest(priority, kept)}
    return found if priority is margin else {"priority": priority, **found}


def restore(it: Iteration, policies: Collection[int]) -> None:
    """Make the offline scores under earlier policies again where a file is missing or damaged.

    A table's rewards need the scores of the policies before: what is needed is found newest first
    and made oldest first.
    """
    needed, missing = set(policies), []
    for policy in range(it.t - 2, -1, -1):
        if policy in needed and it.at(policy + 1).read("offline") is None:
            missing.append(policy)
            needed |= {*it.method.reward_policies(policy + 1)[1:]}
    for policy in reversed(missing):
        earlier = it.at(policy + 1)
        earlier.keep("offline", select(earlier, score(earlier)))


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
            columns = {"row": np.arange(len(pairs)), **_columns(pairs, logps)}
            it.at(t).keep("evaluation", make_table(columns))
    reference = it.at(method.reference(it.t) + 1).table("evaluation")
    return {side: reference[f"{side}_logp"].to_numpy() for side in SIDES}
