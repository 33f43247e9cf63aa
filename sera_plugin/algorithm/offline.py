"""Scoring the offline and the held-out pairs: once under each policy, and selecting by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.algorithm.length_control import regressed_alpha
from sera_plugin.algorithm.method import Method, Pairs, Phases
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.selection import Offline, select_largest
from sera_plugin.rundir.store import RunStore, make_table


class Scorer(Protocol):
    """log pi(completion | prompt) under any of the policies that are still at hand."""

    def __call__(
        self, policy: int, prompts: Sequence[Any], completions: Sequence[Any], phase: str
    ) -> FloatArray:
        """(n,) summed log-probabilities in nats under theta_policy."""
        ...


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


def offline_table(
    iteration: int, method: Method, pairs: Pairs, store: RunStore, scorer: Scorer, phases: Phases
) -> pa.Table:
    """Iteration t's offline.parquet: log pi_{t-1} of all pairs, and which of them are kept.

    Each policy scores the offline set once; earlier policies' values are read back.

    Raises:
        ValueError: naming the first row whose log-probability or margin is not finite.
    """
    table = store.read(iteration, "offline")
    if table is not None:
        return table
    with phases.timed("score_offline"):
        logps = score_pairs(pairs, iteration - 1, scorer, "score_offline")
    columns: dict[str, Any] = {
        "row": np.arange(len(pairs)),
        "prompt_length": pairs.prompt_ids.lengths,
        "chosen_length": pairs.chosen_ids.lengths,
        "rejected_length": pairs.rejected_ids.lengths,
        "chosen_logp": logps["chosen"],
        "rejected_logp": logps["rejected"],
    }
    if iteration > 1:
        earlier = [
            offline_table(iteration - back, method, pairs, store, scorer, phases)
            for back in range(1, len(method.weights(iteration)))
        ]
        with phases.timed("select"):
            for side in ("chosen", "rejected"):
                columns[f"{side}_reward"] = method.reward(
                    [logps[side], *(each[f"{side}_logp"].to_numpy() for each in earlier)],
                    iteration,
                    columns[f"{side}_length"],
                )
            columns["margin"] = columns["chosen_reward"] - columns["rejected_reward"]
    with phases.timed("select"):
        columns |= _selection(iteration, method, columns)
    if method.annotations.swapped is not None:
        columns["swapped"] = method.annotations.swapped
    table = make_table(columns)
    store.write(iteration, "offline", table)
    return table


def _selection(iteration: int, method: Method, columns: dict[str, Any]) -> dict[str, Any]:
    """`selected`, and `priority` where pairs are not ranked by `margin` as it stands."""
    kept = method.kept(iteration)
    margin = columns.get("margin")
    if margin is None and kept == method.total:
        return {}
    lengths = {side: columns[f"{side}_length"] for side in ("chosen", "rejected")}
    controlled = margin
    if margin is not None and method.config.offline_length_control != "none":
        longer = (lengths["chosen"] - lengths["rejected"]).astype(np.float64)
        controlled = margin - offline_alpha(method, margin, longer) * longer
    gap = method.reduced(columns["chosen_logp"], lengths["chosen"]) - method.reduced(
        columns["rejected_logp"], lengths["rejected"]
    )
    priority = method.selection.priority(Offline(iteration, controlled, gap))
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


def held_out_table(
    iteration: int, pairs: Pairs, store: RunStore, scorer: Scorer, phases: Phases
) -> pa.Table:
    """Iteration t's evaluation.parquet: log pi_{t-1} of the held-out pairs."""
    table = store.read(iteration, "evaluation")
    if table is not None:
        return table
    with phases.timed("score_evaluation"):
        logps = score_pairs(pairs, iteration - 1, scorer, "score_evaluation")
    table = make_table(
        {
            "row": np.arange(len(pairs)),
            "chosen_length": pairs.chosen_ids.lengths,
            "rejected_length": pairs.rejected_ids.lengths,
            "chosen_logp": logps["chosen"],
            "rejected_logp": logps["rejected"],
        }
    )
    store.write(iteration, "evaluation", table)
    return table


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
