"""The numbers of a report: plain values, as `--json` prints them. Pure functions of a `Run`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sera_plugin.algorithm.alarms import judge
from sera_plugin.algorithm.summary import accuracy, jaccard, noise_found, quantiles
from sera_plugin.tools.report.agreement import groups, length_r2, score_r2
from sera_plugin.tools.report.data import SIDES, Iteration, Run
from sera_plugin.tools.report.ensemble import bootstrapped_ensemble, ensemble


def figures(run: Run) -> dict[str, Any]:
    """Everything that the report says in numbers; what cannot be known is left out or None."""
    description, settings = run.description, run.settings
    return {
        "run": {
            "directory": str(run.root),
            "state": run.state,
            "base_model": (description.get("config") or {}).get("base_model"),
            "pairs": run.total,
            **{
                key: description.get(key)
                for key in ("loss", "beta", "per_token", "evaluation_pairs", "seed")
            },
            "dataset_fingerprint": description.get("dataset_fingerprint"),
            "settings": dict(settings),
            "versions": dict(description.get("versions") or {}),
            "unit": run.unit,
        },
        "iterations": [_iteration(run, one) for one in run.iterations],
        "jaccard": selections(run),
        "alarms": alarms(run),
        "notes": list(run.notes),
    }


def _iteration(run: Run, one: Iteration) -> dict[str, Any]:
    found: dict[str, Any] = {
        "iteration": one.number,
        "pairs": one.summary.get("pairs"),
        "seconds": one.summary.get("seconds", {}),
        "forwarded": one.summary.get("forwarded", {}),
        "step_zero": one.summary.get("step_zero"),
        "drift": _drift(run, one),
        "lengths": _lengths(one),
        "samples": _samples(one),
        "held_out": _held_out(run, one),
    }
    margin, selected, offline = one.margin, one.selected, one.offline
    if margin is not None and selected is not None and offline is not None:
        # With a priority pairs are not kept by their margin.
        by_margin = selected.any() and "priority" not in offline
        found |= accuracy("offline_accuracy", margin) | {
            "margins": {
                "offline": quantiles(margin),
                "kept": quantiles(margin[selected]),
                "dropped": quantiles(margin[~selected]),
            },
            "threshold": float(margin[selected].min()) if by_margin else None,
            "length_r2": length_r2(one, margin),
            "scores": score_r2(run, one),
            "groups": groups(run, one),
            "ensemble": ensemble(run, one),
        }
    if selected is not None:
        if "selected" in (offline or {}):
            found["kept"], found["dropped"] = int(selected.sum()), int((~selected).sum())
        noise = noise_found(str(run.settings.get("selection")), run.swapped, selected)
        if noise is not None:
            found["label_noise"] = noise
    if one.bootstrapped is not None:
        of_pairs, kept = one.bootstrapped["margin"], one.bootstrapped["selected"]
        found["margins"] = found.get("margins", {}) | {
            "bootstrapped_kept": quantiles(of_pairs[kept]),
            "bootstrapped_dropped": quantiles(of_pairs[~kept]),
        }
        found["bootstrapped_ensemble"] = bootstrapped_ensemble(run, one)
    return found


def spent(seconds: Mapping[str, float]) -> float:
    """Seconds of all phases of an iteration; an engine's start and stop are parts of `sample`."""
    return sum(value for phase, value in seconds.items() if not phase.endswith("_engine"))


def selections(run: Run) -> dict[str, Any] | None:
    """Jaccard index of every two iterations' kept sets (Fig. 6), and what chance would give.

    Returns:
        `iterations` (numbers), `matrix`, and `by_chance`: k / (2 N - k), the index of two random
        choices of k out of N with the overlap that is expected of them. None before a selection.
    """
    chosen = [(one.number, one.selected) for one in run.iterations if one.margin is not None]
    if not chosen:
        return None
    masks = [mask for _, mask in chosen if mask is not None]
    kept, total = int(masks[-1].sum()), len(masks[-1])
    return {
        "iterations": [number for number, _ in chosen],
        "matrix": [[jaccard(one, other) for other in masks] for one in masks],
        "by_chance": kept / (2 * total - kept) if kept else None,
    }


def _drift(run: Run, one: Iteration) -> dict[str, float] | None:
    """Mean log pi_{t-1} - log pi_0 of the offline completions, in nats per completion."""
    first = run.iterations[0]
    if one.offline is None or first.number != 1 or first.offline is None:
        return None
    return {
        side: float((one.offline[f"{side}_logp"] - first.offline[f"{side}_logp"]).mean())
        for side in SIDES
    }


def _lengths(one: Iteration) -> dict[str, float]:
    """Mean tokens: of the offline pairs, of those kept, of samples, of sampled pairs kept."""
    found: dict[str, float] = {}
    if one.offline is not None:
        for side in SIDES:
            lengths = one.offline[f"{side}_length"]
            found[side] = float(lengths.mean())
            if one.margin is not None and one.selected is not None and one.selected.any():
                found[f"kept_{side}"] = float(lengths[one.selected].mean())
    if one.candidates is not None and len(one.candidates.row):
        found["sampled"] = float(one.candidates.lengths[~one.candidates.from_dataset].mean())
        if one.bootstrapped is not None and one.bootstrapped["selected"].any():
            for side in SIDES:
                at = one.sampled[side][one.bootstrapped["selected"]]
                found[f"bootstrapped_{side}"] = float(one.candidates.lengths[at].mean())
    return found


def _samples(one: Iteration) -> dict[str, Any] | None:
    if one.candidates is None:
        return one.summary.get("samples")
    counted: Mapping[str, int] = one.summary.get("samples", {})
    return {
        "prompts": len(np.unique(one.candidates.row)),
        "sampled": int((~one.candidates.from_dataset).sum()),
        "unfinished": int(one.candidates.unfinished.sum()),
        **{name: counted.get(name) for name in ("duplicates", "ties", "too_few", "unranked")},
    }


def _held_out(run: Run, one: Iteration) -> dict[str, Any] | None:
    """Accuracy of the implicit reward on the held-out pairs."""
    if one.number < 2 or one.evaluation is None:
        return None
    rewards = [run.reward(one.number, side, "evaluation") for side in SIDES]
    if rewards[0] is None or rewards[1] is None or not len(rewards[0]):
        return None
    margin = rewards[0] - rewards[1]
    return {"pairs": len(margin), **accuracy("accuracy", margin)}


def alarms(run: Run) -> list[dict[str, Any]]:
    """Every alarm that could be judged, per iteration, raised or not."""
    summaries: list[Mapping[str, Any]] = []
    found: list[dict[str, Any]] = []
    for one in run.iterations:
        if not one.summary:
            continue
        summaries.append(one.summary)
        try:
            judged = judge(summaries)
        except KeyError:  # a summary of another version
            continue
        names = ("name", "figure", "threshold", "raised", "text")
        found += [
            {"iteration": one.number, **{name: getattr(alarm, name) for name in names}}
            for alarm in judged
        ]
    return found
