"""The numbers of a report: plain values, as `--json` prints them. Pure functions of a `Run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.algorithm.alarms import judge
from sera_plugin.algorithm.algorithm import SIDES
from sera_plugin.algorithm.rewards import FloatArray, implicit_reward, reward_weights
from sera_plugin.algorithm.selection import by_side, pair_candidates, select_largest
from sera_plugin.algorithm.summary import accuracy, jaccard, noise_found, quantiles
from sera_plugin.config.kinds import LABELERS, is_reference_free
from sera_plugin.tools.report.reading import Columns, Iteration, Run

#: A column with more different values than this is not broken down by value.
_MOST_GROUPS = 12
_DESCRIBED = ("loss", "beta", "per_token", "evaluation_pairs", "seed", "dataset_fingerprint")


def figures(run: Run) -> dict[str, Any]:
    """Everything that the report says in numbers; what cannot be known is left out or None."""
    begun = [one for one in run.iterations if one.summary]
    summaries = [one.summary for one in begun]
    return {
        "run": {
            "directory": str(run.root),
            "state": run.state,
            "base_model": run.config.get("base_model"),
            "pairs": run.total,
            **{key: run.description.get(key) for key in _DESCRIBED},
            "settings": run.settings,
            "versions": run.description.get("versions", {}),
            "unit": run.unit,
        },
        "iterations": [_iteration(run, one) for one in run.iterations],
        "jaccard": _selections(run),
        # Every alarm that could be judged, raised or not.
        "alarms": [
            {"iteration": one.number, **asdict(alarm)}
            for count, one in enumerate(begun, start=1)
            for alarm in judge(summaries[:count])
        ],
        "notes": run.notes,
    }


def _iteration(run: Run, one: Iteration) -> dict[str, Any]:
    offline, margin, pairs = one.offline, one.margin, one.bootstrapped
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
    if margin is not None:
        kept = offline["selected"]
        parts = {"offline": margin, "kept": margin[kept], "dropped": margin[~kept]}
        found |= accuracy("offline_accuracy", margin) | {
            "margins": {name: quantiles(values) for name, values in parts.items()},
            "threshold": float(margin[kept].min()) if kept.any() and one.by_margin else None,
            "length_r2": _length_r2(one, margin),
            "scores": _score_r2(run, offline, margin),
            "groups": _groups(run, margin, kept),
            "ensemble": _ensemble(run, one),
        }
    if offline:
        kept = offline["selected"]
        if one.number > 1 or not kept.all():
            found["kept"], found["dropped"] = int(kept.sum()), int((~kept).sum())
        noise = noise_found(str(run.settings.get("selection")), run.swapped, kept)
        if noise is not None:
            found["label_noise"] = noise
    if pairs:
        found["margins"] = found.get("margins", {}) | {
            "bootstrapped_kept": quantiles(pairs["margin"][pairs["selected"]]),
            "bootstrapped_dropped": quantiles(pairs["margin"][~pairs["selected"]]),
        }
        found["bootstrapped_ensemble"] = _bootstrapped_ensemble(run, one)
    return found


def spent(seconds: Mapping[str, float]) -> float:
    """Seconds of all phases of an iteration; an engine's start and stop are parts of `sample`."""
    return sum(value for phase, value in seconds.items() if not phase.endswith("_engine"))


def _selections(run: Run) -> dict[str, Any] | None:
    """Jaccard index of every two iterations' kept sets (Fig. 6), and what chance would give.

    `by_chance` is k / (2 N - k), the index of two random choices of k out of N with the overlap
    that is expected of them. None before a selection.
    """
    masks = {
        one.number: one.offline["selected"] for one in run.iterations if one.margin is not None
    }
    if not masks:
        return None
    every = list(masks.values())
    kept, total = int(every[-1].sum()), len(every[-1])
    return {
        "iterations": list(masks),
        "matrix": [[jaccard(one, other) for other in every] for one in every],
        "by_chance": kept / (2 * total - kept) if kept else None,
    }


def _drift(run: Run, one: Iteration) -> dict[str, float] | None:
    """Mean log pi_{t-1} - log pi_0 of the offline completions, in nats per completion."""
    first = run.iterations[0]
    if first.number != 1 or not first.offline or not one.offline:
        return None
    return {
        side: float((one.offline[f"{side}_logp"] - first.offline[f"{side}_logp"]).mean())
        for side in SIDES
    }


def _lengths(one: Iteration) -> dict[str, float]:
    """Mean tokens: of the offline pairs, of those kept, of samples, of sampled pairs kept."""
    found: dict[str, float] = {}
    samples, pairs = one.candidates, one.bootstrapped
    for side in SIDES if one.offline else ():
        lengths, kept = one.offline[f"{side}_length"], one.offline["selected"]
        found[side] = float(lengths.mean())
        if one.margin is not None and kept.any():
            found[f"kept_{side}"] = float(lengths[kept].mean())
    if samples and len(samples["row"]):
        found["sampled"] = float(samples["length"][~samples["given"]].mean())
        if pairs and pairs["selected"].any():
            for side, places in one.places().items():
                kept = places[pairs["selected"]]
                found[f"bootstrapped_{side}"] = float(samples["length"][kept].mean())
    return found


def _samples(one: Iteration) -> dict[str, Any] | None:
    counted = one.summary.get("samples")
    if not one.candidates:
        return counted
    names = ("duplicates", "ties", "too_few", "unranked")
    return {
        "prompts": len(np.unique(one.candidates["row"])),
        "sampled": int((~one.candidates["given"]).sum()),
        "unfinished": int(one.candidates["unfinished"].sum()),
        **{name: (counted or {}).get(name) for name in names},
    }


def _held_out(run: Run, one: Iteration) -> dict[str, Any] | None:
    """Accuracy of the implicit reward on the held-out pairs."""
    margin = run.implicit_margin(one.number, "evaluation") if one.number > 1 else None
    if margin is None or not len(margin):
        return None
    return {"pairs": len(margin), **accuracy("accuracy", margin)}


def r_squared(x: npt.ArrayLike, y: npt.ArrayLike) -> float | None:
    """The squared correlation: the share of one's variance the other explains.

    Of what is finite; None with fewer than three such pairs, or where a variable is constant.
    """
    both = np.array([x, y], dtype=np.float64)
    both = both[:, np.isfinite(both).all(axis=0)]
    if both.shape[1] < 3 or (np.ptp(both, axis=1) == 0).any():
        return None
    return float(np.corrcoef(both[0], both[1])[0, 1] ** 2)


def pooled(columns: Columns, what: str) -> FloatArray:
    """(2N,) a figure (`length`, `logp`, `reward`) of the chosen completions, then the rejected."""
    return np.concatenate([columns[f"{side}_{what}"].astype(np.float64) for side in SIDES])


def _length_r2(one: Iteration, margin: FloatArray) -> dict[str, float | None]:
    """R^2 of rewards with length (Fig. 2), of margins with the difference in length."""
    offline, samples = one.offline, one.candidates
    found = {
        "reward": r_squared(pooled(offline, "length"), pooled(offline, "reward")),
        "margin": r_squared(offline["chosen_length"] - offline["rejected_length"], margin),
    }
    if samples:
        own = ~samples["given"]
        found["sampled"] = r_squared(samples["length"][own], samples["reward"][own])
    return found


def score_columns(run: Run) -> dict[str, tuple[str, ...]]:
    """Numeric score columns by what to call them: the two of a score per completion, or one."""
    numeric = [name for name, values in run.scores.items() if _is_numeric(values)]
    sides = by_side(numeric)
    alone = [name for name in numeric if name not in {*sides, *sides.values()}]
    found: dict[str, tuple[str, ...]] = {}
    for chosen, rejected in sides.items():
        short = chosen.replace("chosen", "").strip("_-. ")
        named = bool(short) and short not in found and short not in alone
        found[short if named else chosen] = (chosen, rejected)
    return found | {name: (name,) for name in alone}


def _is_numeric(values: pa.ChunkedArray) -> bool:
    numeric = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    return numeric and values.null_count < len(values)


def scores_of(run: Run, columns: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """All of these columns' scores, one column after the other, and what is compared with margins.

    That is the chosen completion's score less the rejected one's, or the pair's own figure. What
    is missing is not a number.
    """
    each = [run.scores[name].to_numpy().astype(np.float64) for name in columns]
    return np.concatenate(each), each[0] - each[1] if len(each) > 1 else each[0]


def _score_r2(run: Run, offline: Columns, margin: FloatArray) -> dict[str, Any]:
    """R^2 of rewards and margins with the dataset's own scores (Fig. 2, Fig. 11)."""
    found = {}
    for name, columns in score_columns(run).items():
        scores, difference = scores_of(run, columns)
        found[name] = {"margin": r_squared(difference, margin)}
        if len(columns) > 1:
            found[name]["reward"] = r_squared(scores, pooled(offline, "reward"))
            differs = np.isfinite(difference) & (difference != 0)
            agree = (np.sign(difference) == np.sign(margin))[differs]
            found[name]["agreement"] = float(agree.mean()) if len(agree) else None
    return found


def _groups(
    run: Run, margin: FloatArray, kept: npt.NDArray[np.bool_]
) -> dict[str, list[dict[str, Any]]]:
    """Columns with few different values (a source, a flag): what was kept of each."""
    found = {}
    for name, values in run.scores.items():
        if pa.types.is_nested(values.type):
            continue
        encoded = values.combine_chunks().dictionary_encode("encode")
        distinct, of = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        plain = all(isinstance(value, bool | str | int | None) for value in distinct)
        if plain and 2 <= len(distinct) <= _MOST_GROUPS:
            groups = [
                {
                    "value": value,
                    "pairs": int((of == index).sum()),
                    "kept": float(kept[of == index].mean()),
                    "median_margin": float(np.median(margin[of == index])),
                }
                for index, value in enumerate(distinct)
            ]
            found[name] = sorted(
                groups, key=lambda one: (str(type(one["value"])), str(one["value"]))
            )
    return found


def margin_without_ensemble(run: Run, one: Iteration) -> FloatArray | None:
    """Iteration t's offline margins with gamma = 0; None where the ensemble plays no part."""
    if one.number < 3 or not run.settings.get("gamma") or one.margin is None or not one.by_margin:
        return None
    return run.implicit_margin(one.number, gamma=0.0)


def _ensemble(run: Run, one: Iteration) -> dict[str, Any] | None:
    """How many offline pairs the ensemble has exchanged for others."""
    margin, selected = margin_without_ensemble(run, one), one.offline["selected"]
    kept = int(selected.sum())
    if margin is None or not kept:
        return None
    without = select_largest(margin, kept)
    changed = int((selected & ~without).sum())
    return {"exchanged": changed, "kept": kept, "jaccard": jaccard(selected, without)}


def _bootstrapped_ensemble(run: Run, one: Iteration) -> dict[str, Any] | None:
    """How many of the sampled pairs kept are others than with gamma = 0."""
    samples, pairs, settings = one.candidates, one.bootstrapped, run.settings
    if not samples or one.number < 3 or not settings.get("gamma"):
        return None
    if not LABELERS[run.labeler].implicit or settings.get("length_control", "none") != "none":
        return None  # the pairs were ranked by something else
    count, kept = int(settings["candidates"]), pairs["selected"]
    weights = reward_weights(one.number, 0.0, is_reference_free(run.description["loss"]))
    lengths = samples["length"] if run.description["per_token"] else None
    reward = implicit_reward(samples["logps"].T[: len(weights)], weights, lengths)
    nested = max(1, int(np.ceil(settings["bootstrap_ratio"])))
    found = pair_candidates(one.tokens().numbered(count), reward.reshape(-1, count), nested)
    best = select_largest(found.margin, int(kept.sum()))
    names = ("row", "chosen_candidate", "rejected_candidate")
    now = zip(*(pairs[name][kept].tolist() for name in names), strict=True)
    others = (samples["row"][found.prompt * count], found.chosen, found.rejected)
    without = zip(*(values[best].tolist() for values in others), strict=True)
    return {"exchanged": len(set(now) - set(without)), "kept": int(kept.sum())}
