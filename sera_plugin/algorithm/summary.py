"""What an iteration did, in figures: summary.json and the `sera/*` metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from sera_plugin.algorithm.algorithm import candidate_places
from sera_plugin.algorithm.iteration import Iteration
from sera_plugin.algorithm.offline import SIDES
from sera_plugin.algorithm.protocols import DATASET
from sera_plugin.config.kinds import LABELERS, SELECTIONS
from sera_plugin.rundir.tokens import TokenColumn

_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def quantiles(values: npt.ArrayLike) -> dict[str, float] | None:
    """Quantiles by name ("0.5" is the median), or None of nothing."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return None
    return dict(zip(map(str, _QUANTILES), np.quantile(array, _QUANTILES).tolist(), strict=True))


def jaccard(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    """|A and B| / |A or B| of two selections; 1 when both are empty."""
    union = int((one | other).sum())
    return 1.0 if union == 0 else int((one & other).sum()) / union


def summarize(it: Iteration) -> dict[str, Any]:
    """Count what the iteration's finished phases have left.

    Returns:
        The content of summary.json before the iteration has trained.
    """
    iteration, method, phases = it.t, it.method, it.phases
    offline = it.table("offline")
    columns = {name: offline[name].to_numpy(zero_copy_only=False) for name in offline.column_names}
    kept = columns.get("selected", np.ones(len(offline), dtype=bool))
    summary: dict[str, Any] = {
        "iteration": iteration,
        "pairs": {
            "offline": len(offline),
            "kept": int(kept.sum()),
            "dropped": int((~kept).sum()),
            "bootstrapped_wanted": method.sampled(iteration),
            "bootstrapped_found": 0,
            "bootstrapped_kept": 0,
            "trained": int(kept.sum()),
        },
        "lengths": {
            "prompt": float(columns["prompt_length"].mean()),
            "chosen": float(columns["chosen_length"].mean()),
            "rejected": float(columns["rejected_length"].mean()),
        },
        "drift": {
            side: float((columns[f"{side}_logp"] - it.scores(0)[f"{side}_logp"].to_numpy()).mean())
            for side in SIDES
        },
        "seconds": dict(phases.seconds),
        "forwarded": {phase: dict(counts) for phase, counts in phases.forwarded.items()},
    }
    trained = {side: columns[f"{side}_length"][kept] for side in SIDES}
    noise = noise_found(method.config.selection, columns.get("swapped"), kept)
    if noise is not None:
        summary["label_noise"] = noise
    if "margin" in columns:
        margin = columns["margin"]
        summary["margins"] = {
            "offline": quantiles(margin),
            "kept": quantiles(margin[kept]),
            "dropped": quantiles(margin[~kept]),
        }
        summary |= accuracy("offline_accuracy", margin)
        middle = summary["margins"]["offline"]
        tokens = 1.0 if method.per_token else _mean_length(columns)
        summary["spread"] = {"offline": (middle["0.75"] - middle["0.25"]) / tokens}
    if iteration > 2:
        previous = it.scores(iteration - 2)["selected"].to_numpy(zero_copy_only=False)
        summary["jaccard_with_previous"] = jaccard(kept, previous)
    if method.sampled(iteration):
        sampled = _add_bootstrapping(summary, it)
        trained = {side: np.concatenate([trained[side], sampled[side]]) for side in trained}
    for side, lengths in trained.items():
        summary["lengths"][f"trained_{side}"] = float(lengths.mean())
    if iteration > 1 and it.read("evaluation") is not None:
        summary["evaluation"] = _held_out_accuracy(it)
    return summary


def noise_found(
    selection: str, swapped: npt.NDArray[np.bool_] | None, kept: npt.NDArray[np.bool_]
) -> dict[str, float | None] | None:
    """How well selection found the labels that were swapped on purpose.

    Args:
        selection: `sera.selection`.
        swapped: (N,) of the offline pairs, None without label noise.
        kept: (N,).

    Returns:
        How many of the dropped pairs were swapped (`precision`), how many of the swapped ones were
        dropped (`recall`, None where none were), and both counts. By chance precision is the share
        that was swapped, and recall the share that is dropped. None where pairs are not told
        apart: where all are kept or none, and under a curriculum, where a pair that is not kept
        has had its turn or is to have it.
    """
    if swapped is None or not SELECTIONS[selection].rejects or kept.all() or not kept.any():
        return None
    found, all_swapped = int((swapped & ~kept).sum()), int(swapped.sum())
    return {
        "swapped": all_swapped,
        "swapped_dropped": found,
        "precision": found / int((~kept).sum()),
        "recall": found / all_swapped if all_swapped else None,
    }


def accuracy(name: str, margin: npt.NDArray[np.float64]) -> dict[str, float]:
    """The share of margins above 0, and its standard error as `<name>_error`.

    For the error two pairs of either kind are added (Agresti and Coull, 1998): a small set that is
    all right or all wrong would seem to be without any.
    """
    right, total = int((margin > 0).sum()), len(margin)
    share = (right + 2) / (total + 4)
    error = float(np.sqrt(share * (1 - share) / (total + 4)))
    return {name: right / total, f"{name}_error": error}


def _mean_length(columns: Mapping[str, Any]) -> float:
    return float(np.mean([columns["chosen_length"], columns["rejected_length"]]))


def _add_bootstrapping(summary: dict[str, Any], it: Iteration) -> dict[str, npt.NDArray[np.int32]]:
    """Count samples and sampled pairs; returns the lengths of the pairs kept, by side."""
    method, candidates, bootstrapped = it.method, it.table("candidates"), it.table("bootstrapped")
    selected = bootstrapped.filter(bootstrapped["selected"])
    count = len(candidates) // len(it.pairs)
    tokens = TokenColumn(candidates["token_ids"])
    lengths, numbers = tokens.lengths, tokens.numbered(count)
    differ = (numbers != numbers[:, :1]).any(axis=1)
    metadata = bootstrapped.schema.metadata or {}
    for who in ("sampler", "labeler"):
        report = (candidates.schema.metadata or {}).get(who.encode(), b"{}")
        summary[who] = json.loads(report)
    counted = ("duplicates", "ties", "too_few", "unranked")
    sampled = pc.not_equal(candidates["finish_reason"], DATASET).to_numpy()
    summary["samples"] = {
        "prompts": len(differ),
        "sampled": int(sampled.sum()),
        "unfinished": int(pc.equal(candidates["finish_reason"], "length").to_numpy().sum()),
        **{name: int(metadata.get(name.encode(), 0)) for name in counted},
    }
    if method.config.length_control != "none":
        summary["samples"]["length_control"] = float(metadata[b"alpha"])
    summary["pairs"]["bootstrapped_found"] = len(bootstrapped)
    summary["pairs"]["bootstrapped_kept"] = len(selected)
    summary["pairs"]["trained"] += len(selected)
    margins = summary.setdefault("margins", {})
    margins["bootstrapped"] = quantiles(selected["margin"].to_numpy())
    summary["lengths"]["sampled"] = float(lengths[sampled].mean())
    if LABELERS[method.config.labeler].implicit:
        spread = np.ptp(candidates["reward"].to_numpy().reshape(-1, count), axis=1)
        if not method.per_token:
            spread = spread / lengths.reshape(-1, count).mean(axis=1)
        # Only where candidates differ: equal ones say nothing about the reward.
        summary["spread"]["sampled"] = float(np.median(spread[differ])) if differ.any() else None
    places = candidate_places(candidates, selected)
    kept = {side: lengths[place] for side, place in places.items()}
    for side, values in kept.items():
        summary["lengths"][f"bootstrapped_{side}"] = float(values.mean()) if len(values) else None
    return kept


def _held_out_accuracy(it: Iteration) -> dict[str, Any]:
    """Accuracy of the implicit reward, the one of the margins, on the held-out pairs."""
    scores = [it.at(p + 1).table("evaluation") for p in it.method.reward_policies(it.t)]
    rewards = [
        it.method.reward(
            [each[f"{side}_logp"].to_numpy() for each in scores],
            it.t,
            scores[0][f"{side}_length"].to_numpy(),
        )
        for side in SIDES
    ]
    margin = rewards[0] - rewards[1]
    return {"pairs": len(margin), **accuracy("accuracy", margin), "margin": quantiles(margin)}


def metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The summary's numbers under `sera/...` names for the host's trackers."""
    flat: dict[str, float] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{prefix}/{key}", inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix] = float(value)

    add("sera", summary)
    return flat
