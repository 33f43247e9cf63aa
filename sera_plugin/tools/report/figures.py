"""The numbers of a report: plain values, as `--json` prints them. Pure functions of a `Run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

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
    return {
        "run": {
            "directory": str(run.root),
            "state": run.state,
            "base_model": run.config.get("base_model"),
            "pairs": run.total,
            **{key: run.description.get(key) for key in _DESCRIBED},
            "settings": run.settings,
            "versions": run.description.get("versions") or {},
            "unit": run.unit,
        },
        "iterations": [_iteration(run, one) for one in run.iterations],
        "jaccard": _selections(run),
        "alarms": _alarms(run),
        "notes": run.notes,
    }


def _iteration(run: Run, one: Iteration) -> dict[str, Any]:
    offline, margin, selected, pairs = one.offline, one.margin, one.selected, one.bootstrapped
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
    if offline is not None and margin is not None and selected is not None:
        # With a priority pairs are not kept by their margin.
        by_margin = selected.any() and "priority" not in offline
        found |= accuracy("offline_accuracy", margin) | {
            "margins": {
                "offline": quantiles(margin),
                "kept": quantiles(margin[selected]),
                "dropped": quantiles(margin[~selected]),
            },
            "threshold": float(margin[selected].min()) if by_margin else None,
            "length_r2": _length_r2(one, offline, margin),
            "scores": _score_r2(run, offline, margin),
            "groups": _groups(run, margin, selected),
            "ensemble": _ensemble(run, one, selected),
        }
    if offline is not None and selected is not None:
        if "selected" in offline:
            found["kept"], found["dropped"] = int(selected.sum()), int((~selected).sum())
        noise = noise_found(str(run.settings.get("selection")), run.swapped, selected)
        if noise is not None:
            found["label_noise"] = noise
    if pairs is not None:
        found["margins"] = found.get("margins", {}) | {
            "bootstrapped_kept": quantiles(pairs["margin"][pairs["selected"]]),
            "bootstrapped_dropped": quantiles(pairs["margin"][~pairs["selected"]]),
        }
        found["bootstrapped_ensemble"] = _bootstrapped_ensemble(run, one, pairs)
    return found


def spent(seconds: Mapping[str, float]) -> float:
    """Seconds of all phases of an iteration; an engine's start and stop are parts of `sample`."""
    return sum(value for phase, value in seconds.items() if not phase.endswith("_engine"))


def _selections(run: Run) -> dict[str, Any] | None:
    """Jaccard index of every two iterations' kept sets (Fig. 6), and what chance would give.

    `by_chance` is k / (2 N - k), the index of two random choices of k out of N with the overlap
    that is expected of them. None before a selection.
    """
    with_margins = [one for one in run.iterations if one.margin is not None]
    masks = [one.selected for one in with_margins if one.selected is not None]
    if not masks:
        return None
    kept, total = int(masks[-1].sum()), len(masks[-1])
    return {
        "iterations": [one.number for one in with_margins],
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
    for side in SIDES if one.offline is not None else ():
        assert one.offline is not None
        lengths = one.offline[f"{side}_length"]
        found[side] = float(lengths.mean())
        if one.margin is not None and one.selected is not None and one.selected.any():
            found[f"kept_{side}"] = float(lengths[one.selected].mean())
    if one.candidates is not None and len(one.candidates.row):
        lengths, pairs = one.candidates.lengths, one.bootstrapped
        found["sampled"] = float(lengths[~one.candidates.from_dataset].mean())
        if pairs is not None and pairs["selected"].any():
            for side, at in one.sampled.items():
                found[f"bootstrapped_{side}"] = float(lengths[at[pairs["selected"]]].mean())
    return found


def _samples(one: Iteration) -> dict[str, Any] | None:
    counted = one.summary.get("samples")
    if one.candidates is None:
        return counted
    names = ("duplicates", "ties", "too_few", "unranked")
    return {
        "prompts": len(np.unique(one.candidates.row)),
        "sampled": int((~one.candidates.from_dataset).sum()),
        "unfinished": int(one.candidates.unfinished.sum()),
        **{name: (counted or {}).get(name) for name in names},
    }


def _held_out(run: Run, one: Iteration) -> dict[str, Any] | None:
    """Accuracy of the implicit reward on the held-out pairs."""
    margin = run.implicit_margin(one.number, "evaluation") if one.number > 1 else None
    if margin is None or not len(margin):
        return None
    return {"pairs": len(margin), **accuracy("accuracy", margin)}


def _alarms(run: Run) -> list[dict[str, Any]]:
    """Every alarm that could be judged, per iteration, raised or not."""
    summaries: list[Mapping[str, Any]] = []
    found: list[dict[str, Any]] = []
    for one in run.iterations:
        if one.summary:
            summaries.append(one.summary)
            found += [{"iteration": one.number, **asdict(alarm)} for alarm in judge(summaries)]
    return found


# ------------------------------------------------- what rewards agree with


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


def _length_r2(one: Iteration, offline: Columns, margin: FloatArray) -> dict[str, float | None]:
    """R^2 of rewards with length (Fig. 2), of margins with the difference in length."""
    rewarded = "chosen_reward" in offline
    found = {
        "reward": r_squared(pooled(offline, "length"), pooled(offline, "reward"))
        if rewarded
        else None,
        "margin": r_squared(offline["chosen_length"] - offline["rejected_length"], margin),
    }
    if one.candidates is not None:
        sampled = ~one.candidates.from_dataset
        found["sampled"] = r_squared(
            one.candidates.lengths[sampled], one.candidates.reward[sampled]
        )
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


def _is_numeric(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in known
    )


def scores_of(run: Run, columns: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """All of these columns' scores, one column after the other, and what is compared with margins.

    That is the chosen completion's score less the rejected one's, or the pair's own figure. What
    is missing is not a number.
    """
    each = [np.array(run.scores[name], dtype=np.float64) for name in columns]
    return np.concatenate(each), each[0] - each[1] if len(each) > 1 else each[0]


def _score_r2(run: Run, offline: Columns, margin: FloatArray) -> dict[str, Any]:
    """R^2 of rewards and margins with the dataset's own scores (Fig. 2, Fig. 11)."""
    found = {}
    for name, columns in score_columns(run).items():
        scores, difference = scores_of(run, columns)
        if len(difference) != len(margin):
            continue
        found[name] = {"margin": r_squared(difference, margin)}
        if len(columns) > 1:
            if "chosen_reward" in offline:
                found[name]["reward"] = r_squared(scores, pooled(offline, "reward"))
            differs = np.isfinite(difference) & (difference != 0)
            agree = (np.sign(difference) == np.sign(margin))[differs]
            found[name]["agreement"] = float(agree.mean()) if len(agree) else None
    return found


def _groups(
    run: Run, margin: FloatArray, selected: npt.NDArray[np.bool_]
) -> dict[str, list[dict[str, Any]]]:
    """Columns with few different values (a source, a flag): what was kept of each."""
    found = {}
    for name, values in run.scores.items():
        if len(values) != len(margin) or not all(
            isinstance(value, bool | str | int | None) for value in values
        ):
            continue
        distinct = sorted(set(values), key=lambda value: (str(type(value)), str(value)))
        if not 2 <= len(distinct) <= _MOST_GROUPS:
            continue
        of = np.array([distinct.index(value) for value in values])
        found[name] = [
            {
                "value": value,
                "pairs": int((of == index).sum()),
                "kept": float(selected[of == index].mean()),
                "median_margin": float(np.median(margin[of == index])),
            }
            for index, value in enumerate(distinct)
        ]
    return found


# ------------------------------------------------- what the ensemble (gamma) changed


def margin_without_ensemble(run: Run, one: Iteration) -> FloatArray | None:
    """Iteration t's offline margins with gamma = 0; None where the ensemble plays no part."""
    if one.number < 3 or not run.settings.get("gamma") or one.margin is None:
        return None
    if "priority" in (one.offline or {}):
        return None  # selection looked at something else
    return run.implicit_margin(one.number, gamma=0.0)


def _ensemble(run: Run, one: Iteration, selected: npt.NDArray[np.bool_]) -> dict[str, Any] | None:
    """How many offline pairs the ensemble has exchanged for others."""
    margin, kept = margin_without_ensemble(run, one), int(selected.sum())
    if margin is None or not kept:
        return None
    without = select_largest(margin, kept)
    changed = int((selected & ~without).sum())
    return {"exchanged": changed, "kept": kept, "jaccard": jaccard(selected, without)}


def _bootstrapped_ensemble(run: Run, one: Iteration, pairs: Columns) -> dict[str, Any] | None:
    """How many of the sampled pairs kept are others than with gamma = 0."""
    samples = one.candidates
    if samples is None or one.number < 3 or not run.settings.get("gamma"):
        return None
    if not LABELERS[run.labeler].implicit or run.settings.get("length_control", "none") != "none":
        return None  # the pairs were ranked by something else
    count = int(run.settings["candidates"])
    weights = reward_weights(one.number, 0.0, is_reference_free(run.description["loss"]))
    lengths = samples.lengths if run.description["per_token"] else None
    reward = implicit_reward(samples.logps.T[: len(weights)], weights, lengths)
    nested = max(1, int(np.ceil(run.settings["bootstrap_ratio"])))
    shape = (-1, count)
    found = pair_candidates(samples.identity.reshape(shape), reward.reshape(shape), nested)
    kept = pairs["selected"]
    best = select_largest(found.margin, int(kept.sum()))
    names = ("row", "chosen_candidate", "rejected_candidate")
    now = zip(*(pairs[name][kept].tolist() for name in names), strict=True)
    others = (samples.row[found.prompt * count], found.chosen, found.rejected)
    without = zip(*(values[best].tolist() for values in others), strict=True)
    return {"exchanged": len(set(now) - set(without)), "kept": int(kept.sum())}
