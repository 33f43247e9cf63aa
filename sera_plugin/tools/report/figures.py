"""The numbers of a report: plain values, as `--json` prints them. Pure functions of a `Run`."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.algorithm.alarms import judge
from sera_plugin.algorithm.rewards import FloatArray, implicit_reward, reward_weights
from sera_plugin.algorithm.selection import BoolArray, by_side, pair_candidates, select_largest
from sera_plugin.algorithm.summary import accuracy, jaccard, noise_found, quantiles
from sera_plugin.algorithm.trust import SIDES
from sera_plugin.config.kinds import is_reference_free, labeler_kind
from sera_plugin.tools.report.reading import Columns, Iteration, Run

#: A column with more different values than this is not broken down by value.
_MOST_GROUPS = 12
_COUNTED = ("prompts", "sampled", "unfinished", "duplicates", "ties", "too_few", "unranked")
_HELD_OUT = ("pairs", "accuracy", "accuracy_error")
_ENDING = ("policies", "kept", "held_out_losses")
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
            "prompts": run.description.get("prompts", 0),
            **{key: run.description.get(key) for key in _DESCRIBED},
            "settings": run.settings,
            "versions": run.description.get("versions", {}),
            "unit": run.unit,
        },
        "iterations": [_iteration(run, one) for one in run.iterations],
        # Which policy was kept, by whose losses.
        "ending": {key: run.ending.get(key) for key in _ENDING} if run.ending else None,
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
    offline, margin, pairs, counted = one.offline, one.margin, one.bootstrapped, one.summary
    samples, held_out = counted.get("samples"), counted.get("evaluation")
    found: dict[str, Any] = {
        "iteration": one.number,
        "pairs": counted.get("pairs"),
        "seconds": counted.get("seconds", {}),
        "forwarded": counted.get("forwarded", {}),
        "step_zero": counted.get("step_zero"),
        "drift": _drift(run, one),
        "lengths": _lengths(one),
        "samples": samples and {key: samples.get(key) for key in _COUNTED},
        "held_out": held_out and {key: held_out[key] for key in _HELD_OUT},
    }
    found |= {key: counted[key] for key in ("reward", "outranking", "noise") if key in counted}
    if mixed := (counted.get("labeler") or {}).get("reward"):
        found["mixed"] = mixed
    if margin is not None:
        kept = offline["selected"]
        parts = {"offline": margin, "kept": margin[kept], "dropped": margin[~kept]}
        chosen = one.by_margin and 0 < kept.sum() < len(kept)
        found |= accuracy("offline_accuracy", margin) | {
            "margins": {name: quantiles(values) for name, values in parts.items()},
            "threshold": float(margin[kept].min()) if chosen else None,
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


def figure(figures: Mapping[str, Any], where: str) -> Any:
    """A figure of an iteration by where it is (`lengths.chosen`); None where it is unknown."""
    value: Any = figures
    for key in where.split("."):
        value = (value or {}).get(key)
    return value


def _selections(run: Run) -> dict[str, Any] | None:
    """Jaccard index of every two iterations' kept sets (Fig. 6), and what chance would give.

    `by_chance` is k / (2 N - k), the index of two random choices of k out of N with the overlap
    that is expected of them. None before a selection.
    """
    selecting = [one for one in run.iterations if one.margin is not None]
    if not selecting:
        return None
    masks = [one.offline["selected"] for one in selecting]
    kept, total = int(masks[-1].sum()), len(masks[-1])
    return {
        "iterations": [one.number for one in selecting],
        "matrix": [[jaccard(one, other) for other in masks] for one in masks],
        "by_chance": kept / (2 * total - kept) if kept else None,
    }


def _drift(run: Run, one: Iteration) -> dict[str, float] | None:
    """Mean log pi_{t-1} - log pi_0 of the offline completions, in nats per completion."""
    first = run.begun[1].offline if 1 in run.begun else {}
    if not first or not one.offline:
        return None
    logps = {side: f"{side}_logp" for side in SIDES}
    return {side: float((one.offline[key] - first[key]).mean()) for side, key in logps.items()}


def _lengths(one: Iteration) -> dict[str, float]:
    """Mean tokens: of the offline pairs, of those kept, of samples, of sampled pairs kept."""
    lengths: dict[str, Any] = {}
    samples, pairs = one.candidates, one.bootstrapped
    for side in SIDES if one.offline else ():
        lengths[side] = one.offline[f"{side}_length"]
        if one.margin is not None:
            lengths[f"kept_{side}"] = lengths[side][one.offline["selected"]]
    if samples:
        lengths["sampled"] = samples["length"][~samples["given"]]
    for side, places in one.places().items() if samples and pairs else ():
        lengths[f"bootstrapped_{side}"] = samples["length"][places[pairs["selected"]]]
    return {name: float(values.mean()) for name, values in lengths.items() if len(values)}


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


def dataset_scores(run: Run) -> dict[str, list[FloatArray]]:
    """Numeric columns of the dataset by what to call them; (N,) each, nan where there is none.

    Of a score per completion those of the chosen and of the rejected ones, else the pair's own.
    """
    numeric = {
        name: values.to_numpy().astype(np.float64)
        for name, values in run.scores.items()
        if pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
        if values.null_count < len(values)
    }
    sides = by_side(list(numeric))
    alone = numeric.keys() - sides.keys() - set(sides.values())
    found: dict[str, list[FloatArray]] = {}
    for chosen, rejected in sides.items():
        short = chosen.replace("chosen", "").strip("_-. ")
        named = bool(short) and short not in found and short not in alone
        found[short if named else chosen] = [numeric[chosen], numeric[rejected]]
    return found | {name: [values] for name, values in numeric.items() if name in alone}


def _score_r2(run: Run, offline: Columns, margin: FloatArray) -> dict[str, Any]:
    """R^2 of rewards and margins with the dataset's own scores (Fig. 2, Fig. 11)."""
    found: dict[str, Any] = {}
    for name, (score, *rejected) in dataset_scores(run).items():
        difference = score - rejected[0] if rejected else score
        found[name] = {"margin": r_squared(difference, margin)}
        if rejected:
            scores = np.concatenate([score, *rejected])
            found[name]["reward"] = r_squared(scores, pooled(offline, "reward"))
            differs = np.isfinite(difference) & (difference != 0)
            agree = (np.sign(difference) == np.sign(margin))[differs]
            found[name]["agreement"] = float(agree.mean()) if len(agree) else None
    return found


def _groups(run: Run, margin: FloatArray, kept: BoolArray) -> dict[str, list[dict[str, Any]]]:
    """Columns with few different values (a source, a flag): what was kept of each."""
    found = {}
    for name, values in run.scores.items():
        if pa.types.is_nested(values.type):
            continue
        encoded = values.combine_chunks().dictionary_encode("encode")
        distinct, of = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        plain = all(isinstance(value, bool | str | int | None) for value in distinct)
        if plain and 2 <= len(distinct) <= _MOST_GROUPS:
            order = sorted(enumerate(distinct), key=lambda one: (str(type(one[1])), str(one[1])))
            found[name] = [
                {
                    "value": value,
                    "pairs": int((of == index).sum()),
                    "kept": float(kept[of == index].mean()),
                    "median_margin": float(np.median(margin[of == index])),
                }
                for index, value in order
            ]
    return found


def without_ensemble(run: Run, one: Iteration) -> tuple[FloatArray, BoolArray] | None:
    """Iteration t's offline margins with gamma = 0, and which pairs would be kept; (N,) each.

    None where the ensemble plays no part.
    """
    previous, gamma = run.begun.get(one.number - 1), run.settings.get("gamma")
    if one.number < 3 or not gamma or one.margin is None or not one.by_margin:
        return None
    if run.settings.get("reward") == "fitted":
        return None  # the labels weigh the policies
    kept = int(one.offline["selected"].sum())
    if previous is None or not previous.offline or not kept:
        return None
    chosen, rejected = (
        _newest_reward(run, one, [each.offline[f"{side}_logp"] for each in (one, previous)],
                       one.offline[f"{side}_length"])
        for side in SIDES
    )  # fmt: skip
    return chosen - rejected, select_largest(chosen - rejected, kept)


def _newest_reward(run: Run, one: Iteration, logps: Any, lengths: Any) -> FloatArray:
    """(n,) rewards with gamma = 0; (policies, n) log-probabilities, newest policy first."""
    weights = reward_weights(one.number, 0.0, is_reference_free(run.description["loss"]))
    per_token = lengths if run.description["per_token"] else None
    return implicit_reward(logps[: len(weights)], weights, per_token)


def _ensemble(run: Run, one: Iteration) -> dict[str, Any] | None:
    """How many offline pairs the ensemble has exchanged for others."""
    found, kept = without_ensemble(run, one), one.offline["selected"]
    if found is None:
        return None
    changed = {"exchanged": int((kept & ~found[1]).sum()), "kept": int(kept.sum())}
    return changed | {"jaccard": jaccard(kept, found[1])}


def _bootstrapped_ensemble(run: Run, one: Iteration) -> dict[str, Any] | None:
    """How many of the sampled pairs kept are others than with gamma = 0."""
    samples, pairs, settings = one.candidates, one.bootstrapped, run.settings
    if not samples or one.number < 3 or not settings.get("gamma"):
        return None
    controlled = settings.get("length_control", "none") != "none"
    if not labeler_kind(run.labeler).implicit or controlled or settings.get("reward") == "fitted":
        return None  # the pairs were ranked by something else
    count, kept = int(settings["candidates"]), pairs["selected"]
    reward = _newest_reward(run, one, samples["logps"].T, samples["length"])
    nested = max(1, int(np.ceil(settings["bootstrap_ratio"])))
    found = pair_candidates(one.tokens().numbered(count), reward.reshape(-1, count), nested)
    best = select_largest(found.margin, int(kept.sum()))
    names = ("row", "chosen_candidate", "rejected_candidate")
    now = zip(*(pairs[name][kept].tolist() for name in names), strict=True)
    others = (samples["row"][found.prompt * count], found.chosen, found.rejected)
    without = zip(*(values[best].tolist() for values in others), strict=True)
    return {"exchanged": len(set(now) - set(without)), "kept": int(kept.sum())}
