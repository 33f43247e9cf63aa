"""What an iteration did, in figures: summary.json and the `sera/*` metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from sera_plugin.algorithm.algorithm import candidate_places
from sera_plugin.algorithm.method import Method, Phases
from sera_plugin.algorithm.protocols import DATASET
from sera_plugin.config.kinds import LABELERS, SELECTIONS
from sera_plugin.rundir.store import RunStore
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


def summarize(iteration: int, method: Method, store: RunStore, phases: Phases) -> dict[str, Any]:
    """Read the iteration's finished phases and count.

    Args:
        iteration: t, 1-based.
        method, store: the run.
        phases: what the iteration has cost so far.

    Returns:
        The content of summary.json before the iteration has trained.
    """
    offline = store.read(iteration, "offline")
    assert offline is not None  # the first phase of every iteration
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
        "drift": _drift(store, columns),
        "seconds": dict(phases.seconds),
        "forwarded": {phase: dict(counts) for phase, counts in phases.forwarded.items()},
    }
    trained = {side: columns[f"{side}_length"][kept] for side in ("chosen", "rejected")}
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
        before = store.read(iteration - 1, "offline", ["selected"])
        assert before is not None
        previous = before["selected"].to_numpy(zero_copy_only=False)
        summary["jaccard_with_previous"] = jaccard(kept, previous)
    if method.sampled(iteration):
        sampled = _add_bootstrapping(summary, iteration, method, store)
        trained = {side: np.concatenate([trained[side], sampled[side]]) for side in trained}
    for side, lengths in trained.items():
        summary["lengths"][f"trained_{side}"] = float(lengths.mean())
    _add_evaluation(summary, iteration, method, store)
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


def _drift(store: RunStore, columns: Mapping[str, Any]) -> dict[str, float]:
    """Mean log pi_{t-1} - log pi_0 over the offline completions, in nats."""
    return {
        side: float((columns[f"{side}_logp"] - store.column(1, "offline", f"{side}_logp")).mean())
        for side in ("chosen", "rejected")
    }


def _add_bootstrapping(
    summary: dict[str, Any], iteration: int, method: Method, store: RunStore
) -> dict[str, npt.NDArray[np.int32]]:
    """Count samples and sampled pairs; returns the lengths of the pairs kept, by side."""
    candidates = store.read(iteration, "candidates", ["row", "finish_reason", "reward"])
    bootstrapped = store.read(iteration, "bootstrapped")
    assert candidates is not None
    assert bootstrapped is not None
    selected = bootstrapped.filter(bootstrapped["selected"])
    count = len(candidates) // len(np.unique(candidates["row"].to_numpy()))
    lengths, differ = _candidate_tokens(iteration, count, store)
    metadata = bootstrapped.schema.metadata or {}
    for who in ("sampler", "labeler"):
        told = (candidates.schema.metadata or {}).get(who.encode(), b"{}")
        summary[who] = json.loads(told)
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


def _candidate_tokens(
    iteration: int, count: int, store: RunStore
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Tokens of each candidate; for each prompt, whether two of its `count` candidates differ."""
    lengths, differ = [], []
    for part in store.stream(iteration, "candidates", "token_ids", rows=4096 * count):
        tokens = TokenColumn(part)
        numbers = tokens.numbered(count)
        lengths.append(tokens.lengths)
        differ.append((numbers != numbers[:, :1]).any(axis=1))
    return np.concatenate(lengths), np.concatenate(differ)


def _add_evaluation(
    summary: dict[str, Any], iteration: int, method: Method, store: RunStore
) -> None:
    """Accuracy of the implicit reward, the one of the margins, on the held-out pairs."""
    current = store.read(iteration, "evaluation")
    if current is None or iteration == 1:
        return
    rewards = []
    for side in ("chosen", "rejected"):
        logps = [
            store.column(iteration - back, "evaluation", f"{side}_logp")
            for back in range(len(method.weights(iteration)))
        ]
        lengths = current[f"{side}_length"].to_numpy()
        rewards.append(method.reward(logps, iteration, lengths))
    margin = rewards[0] - rewards[1]
    summary["evaluation"] = {
        "pairs": len(current),
        **accuracy("accuracy", margin),
        "margin": quantiles(margin),
    }


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


def describe_start(summary: Mapping[str, Any], unit: str) -> str:
    """The log block before an iteration's first step: what it will train on.

    Args:
        summary: as `summarize` returns it.
        unit: of margins.
    """
    pairs: Mapping[str, int] = summary["pairs"]
    lines = [
        f"SeRA iteration {summary['iteration']}: trains on {pairs['trained']} pairs",
        f"  offline: {pairs['kept']} of {pairs['offline']} pairs kept",
    ]
    if "offline_accuracy" in summary:
        lines[-1] += (
            f", median margin {summary['margins']['offline']['0.5']:+.3f} {unit}, "
            f"{summary['offline_accuracy']:.0%} agree with their label"
        )
    if "jaccard_with_previous" in summary:
        lines[-1] += f", Jaccard with the last selection {summary['jaccard_with_previous']:.2f}"
    noise = summary.get("label_noise")
    if noise and noise["recall"] is not None:
        lines.append(
            f"  label noise: {noise['swapped_dropped']} of {noise['swapped']} swapped pairs "
            f"dropped (recall {noise['recall']:.0%}, precision {noise['precision']:.0%})"
        )
    if "samples" in summary:
        samples = summary["samples"]
        lines.append(
            f"  sampled: {pairs['bootstrapped_kept']} of {pairs['bootstrapped_found']} pairs kept, "
            f"from {samples['sampled']} samples of {summary['sampler'].get('name')} "
            f"({samples['duplicates']} duplicate, {samples['unfinished']} unfinished, "
            f"{samples['ties']} ties"
            + (f", {samples['unranked']} without a verdict)" if samples["unranked"] else ")")
        )
        if "length_control" in samples:
            lines[-1] += f", {samples['length_control']:+.3g} a token taken off"
    if pairs["bootstrapped_kept"] < pairs["bootstrapped_wanted"]:
        lines.append(
            f"  fewer sampled pairs than the {pairs['bootstrapped_wanted']} asked for: raise "
            "sera.candidates or sera.temperature, or lower sera.bootstrap_ratio"
        )
    if "evaluation" in summary:
        lines.append(f"  held out: {summary['evaluation']['accuracy']:.0%} agree with their label")
    return "\n".join(lines)


def describe_end(summary: Mapping[str, Any]) -> str:
    """The log block after an iteration's last step: what it cost."""
    seconds = ", ".join(
        f"{phase.replace('_', ' ')} {spent:.1f} s" for phase, spent in summary["seconds"].items()
    )
    drift = summary["drift"]
    return (
        f"SeRA iteration {summary['iteration']} is trained ({seconds})\n"
        f"  it began {drift['chosen']:+.2f} (chosen) and {drift['rejected']:+.2f} (rejected) nats "
        "per answer from the initial policy"
    )
