"""Charts of the page by section, and its tables that take more than a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

import numpy as np

from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.selection import select_largest
from sera_plugin.config.kinds import LABELERS
from sera_plugin.tools.report import charts
from sera_plugin.tools.report.charts import DROPPED, KEPT, MUTED, OTHER, SAMPLED, Chart, Series
from sera_plugin.tools.report.figures import (
    margin_without_ensemble,
    pooled,
    score_columns,
    scores_of,
    spent,
)
from sera_plugin.tools.report.output import NOTHING, Table, number, shown_name, value_at
from sera_plugin.tools.report.reading import Iteration, Run

Figures = dict[str, Any]


def charts_of(run: Run, found: Figures) -> dict[str, list[Chart]]:
    """The pictures of each section."""
    iterations = found["iterations"]
    both = list(zip(run.iterations, iterations, strict=True))
    each = {"margins": _margins, "selection": _ensemble, "lengths": _length_r2, "scores": _scores}
    drifted = [one for one in iterations if one["drift"]]
    first = {"lengths": _lengths(iterations)}
    return {
        name: first.get(name, []) + [chart for one in both for chart in make(run, *one)]
        for name, make in each.items()
    } | {
        "accuracy": _accuracy(iterations) + _drift(drifted),
        "samples": [],
        "cost": [],
        "training": _training(run),
    }


def _series(
    iterations: Sequence[Figures], named: Mapping[Any, tuple[str, str]], error: str = ""
) -> list[Series]:
    """Figures over the iterations that have them: name and colour by where a figure is.

    A figure's standard error is beside it, under its key and `error`.
    """
    found = []
    for keys, (name, colour) in named.items():
        have = [one for one in iterations if value_at(one, *keys) is not None]
        values = [value_at(one, *keys) for one in have]
        errors = [value_at(one, *keys[:-1], f"{keys[-1]}{error}") for one in have]
        x = [one["iteration"] for one in have]
        found.append(Series(name, colour, x, values, errors if error else None))
    return [one for one in found if one.x]


def _margins(run: Run, one: Iteration, figures: Figures) -> list[Chart]:
    panels, pairs, said = [], one.bootstrapped, []
    if one.margin is not None and one.selected is not None:
        panels.append(("offline", one.margin, one.selected, KEPT))
    # What others rank by is not in nats.
    if pairs is not None and LABELERS[run.labeler].implicit and len(pairs["row"]):
        panels.append(("sampled", pairs["margin"], pairs["selected"], SAMPLED))
    if figures.get("threshold") is not None:
        said.append(f"offline pairs above {figures['threshold']:+.3g} are kept")
        said.append(f"{1 - figures['offline_accuracy']:.0%} of all lie at or below 0")
    title = f"Iteration {one.number}: {', '.join(said) or 'sampled pairs'}"
    note = "The end bars hold what lies beyond (0.2%)."
    return [charts.margins(title, note, panels, run.unit)] if panels else []


def jaccard_table(found: Figures) -> Table | None:
    """How alike selections are; None where all pairs are kept, or none: there is no choice."""
    shared = found["jaccard"]
    if not shared or shared["by_chance"] in (None, 1.0) or len(shared["iterations"]) < 2:
        return None
    title = (
        f"The last two selections have a Jaccard index of {shared['matrix'][-1][-2]:.2f}; two "
        f"random ones would have {shared['by_chance']:.2f}"
    )
    note = (
        "Jaccard index of two iterations' kept sets: shared pairs over pairs in either. 1 is the "
        "same set."
    )
    names = [f"t = {iteration}" for iteration in shared["iterations"]]
    return Table.square(title, names, shared["matrix"], note)


def _ensemble(run: Run, one: Iteration, figures: Figures) -> list[Chart]:
    without, changed = margin_without_ensemble(run, one), figures.get("ensemble")
    if without is None or changed is None or one.margin is None or one.selected is None:
        return []
    kept, kept_without = one.selected, select_largest(without, changed["kept"])
    title = (
        f"Iteration {one.number}: the ensemble exchanged {changed['exchanged']:,} of "
        f"{changed['kept']:,} kept pairs"
    )
    note = "Dashed: the margin from which pairs are kept"
    note += ", zoomed in on the pairs that changed." if changed["exchanged"] else "."
    sampled = figures.get("bootstrapped_ensemble")
    if sampled:
        note += f" Of {sampled['kept']:,} sampled pairs kept, {sampled['exchanged']:,} are others."
    axes = (f"margin with gamma = 0, {run.unit}", f"margin with gamma = {run.settings['gamma']:g}")
    marks = [
        ("same choice", kept == kept_without, MUTED),
        ("kept by it", kept & ~kept_without, KEPT),
        ("dropped by it", ~kept & kept_without, DROPPED),
    ]
    cuts = (float(without[kept_without].min()), float(one.margin[kept].min()))
    around = kept != kept_without
    return [charts.scatter(title, note, without, one.margin, axes, marks, cuts, around)]


def _lengths(iterations: Sequence[Figures]) -> list[Chart]:
    named = {
        ("lengths", "chosen"): ("chosen", KEPT),
        ("lengths", "rejected"): ("rejected", DROPPED),
        ("lengths", "sampled"): ("sampled", SAMPLED),
        ("lengths", "bootstrapped_chosen"): ("its best", OTHER),
    }
    series = _series(iterations, named)
    title, note = "Mean length of answers in tokens", ""
    sampled = [one["lengths"] for one in iterations if "sampled" in one["lengths"]]
    if sampled:
        note = "Its best: the chosen answers of sampled pairs that are kept."
        if "chosen" in sampled[-1]:
            title = (
                f"Sampled answers have {sampled[-1]['sampled']:,.1f} tokens on average, chosen "
                f"ones {sampled[-1]['chosen']:,.1f}"
            )
    return [charts.lines(title, note, series, "mean tokens", decimals=1)] if series else []


def _length_r2(run: Run, one: Iteration, figures: Figures) -> list[Chart]:
    r2 = figures.get("length_r2")
    if not r2 or one.offline is None or "chosen_reward" not in one.offline:
        return []
    note = f"; of margins with the difference in length {number(r2['margin'], '.3f')}"
    if "sampled" in r2:
        note += f"; of sampled answers {number(r2['sampled'], '.3f')}"
    tokens = pooled(one.offline, "length")
    return [_rewards(run, one, "length", r2["reward"], tokens, "tokens", f"{note}.")]


def _rewards(
    run: Run,
    one: Iteration,
    name: str,
    r2: float | None,
    x: FloatArray,
    axis: str,
    note: str,
) -> Chart:
    """Rewards of all answers over something else that is known of them."""
    assert one.offline is not None
    title = (
        f"Iteration {one.number}: {name} explains {number(r2, '.0%')} of the variance of rewards"
    )
    of_chosen = np.arange(len(x)) < len(x) // 2
    axes = (axis, f"implicit reward, {run.unit}")
    marks = [("chosen", of_chosen, KEPT), ("rejected", ~of_chosen, DROPPED)]
    note = f"R² {number(r2, '.3f')}{note}"
    return charts.scatter(title, note, x, pooled(one.offline, "reward"), axes, marks)


def _scores(run: Run, one: Iteration, figures: Figures) -> list[Chart]:
    found: list[Chart] = []
    for column, r2 in figures.get("scores", {}).items():
        values, difference = scores_of(run, score_columns(run)[column])
        name, of_margins = shown_name(column), number(r2["margin"], ".3f")
        if "reward" in r2:
            note = (
                f"; of margins with the difference {of_margins}. Where {name} differs, the policy "
                f"agrees with it on {number(r2['agreement'], '.0%')} of the pairs."
            )
            axis = f"{name} of the answer"
            found.append(_rewards(run, one, name, r2["reward"], values, axis, note))
        elif one.margin is not None and np.isfinite(difference).any():
            title = (
                f"Iteration {one.number}: {name} explains {number(r2['margin'], '.0%')} of the "
                "variance of margins"
            )
            marks = [("", np.ones(len(difference), dtype=bool), KEPT)]
            axes, note = (name, f"margin, {run.unit}"), f"R² {of_margins}."
            found.append(charts.scatter(title, note, difference, one.margin, axes, marks))
    return found


def _accuracy(iterations: Sequence[Figures]) -> list[Chart]:
    named = {
        ("offline_accuracy",): ("offline", KEPT),
        ("held_out", "accuracy"): ("held out", SAMPLED),
    }
    series = _series(iterations, named, error="_error")
    held_out = [one["held_out"] for one in iterations if one["held_out"]]
    if not series:
        return []
    x, y = series[-1].x, series[-1].y
    title = f"The reward agrees with the label on {y[-1]:.0%} of "
    title += "held-out pairs" if held_out else "offline pairs"
    if len(y) > 1:
        title += f", {y[0]:.0%} in iteration {x[0]}"
    note = "Bars are one standard error. What is not better than a coin flip has learnt nothing."
    if held_out:
        note += f" {held_out[-1]['pairs']:,} pairs are held out."
    return [charts.lines(title, note, series, "share of pairs", (0.5, "a coin"))]


def _drift(drifted: Sequence[Figures]) -> list[Chart]:
    if len(drifted) < 2:
        return []
    named = {("drift", "chosen"): ("chosen", KEPT), ("drift", "rejected"): ("rejected", DROPPED)}
    series = _series(drifted, named)
    last = drifted[-1]["drift"]
    title = (
        f"Iteration {drifted[-1]['iteration']} began {last['chosen']:+.1f} nats (chosen) and "
        f"{last['rejected']:+.1f} (rejected) per answer from theta_0"
    )
    note = "Mean change in log-probability of the offline answers since the initial policy."
    return [charts.lines(title, note, series, "nats per answer", (0.0, "theta_0"), decimals=1)]


def cost_table(found: Figures) -> Table | None:
    """Seconds and tokens of each phase, the longest first."""
    iterations = [one for one in found["iterations"] if one["seconds"]]
    phases = dict.fromkeys(phase for one in iterations for phase in one["seconds"])
    if not phases:
        return None
    whole = [spent(one["seconds"]) for one in iterations]
    total, rows = sum(whole), []
    of_phase = {
        phase: sum(one["seconds"].get(phase) or 0 for one in iterations) for phase in phases
    }
    for phase in sorted(phases, key=lambda phase: -round(of_phase[phase], 1)):
        tokens = sum(one["forwarded"].get(phase, {}).get("tokens", 0) for one in iterations)
        rows.append(
            [
                phase.replace("_", " "),
                *(number(one["seconds"].get(phase), ",.1f") for one in iterations),
                f"{of_phase[phase]:,.1f}",
                f"{of_phase[phase] / total:.0%}" if total else NOTHING,
                f"{tokens:,}" if tokens else NOTHING,
            ]
        )
    title = f"Most time went into: {rows[0][0]} ({rows[0][-2]})"
    rows.append(["all", *(f"{one:,.1f}" for one in whole), f"{total:,.1f}", "100%", ""])
    head = ["phase, s", *(f"t = {one['iteration']}" for one in iterations)]
    return Table(title, [*head, "all", "share", "tokens"], rows)


def _training(run: Run) -> list[Chart]:
    found: list[Chart] = []
    # Where each iteration's own figures are in the log, it starts.
    boundaries = {
        int(entry["sera/iteration"]): int(entry["step"])
        for entry in run.history
        if _is_number(entry.get("sera/iteration")) and _is_number(entry.get("step"))
    }
    against = "of rewards against the iteration's reference"
    for title, ylabel, key in (
        ("Loss", "loss", "loss"),
        (f"Margin {against}", "beta x margin", "rewards/margins"),
        (f"Accuracy {against}", "share of pairs", "rewards/accuracies"),
    ):
        series = [
            Series(name, colour, *curve(run.history, f"{prefix}{key}"))
            for prefix, name, colour in (("", "train", KEPT), ("eval_", "held out", SAMPLED))
        ]
        series = [one for one in series if one.x]
        if series:
            found.append(charts.curves(title, series, ylabel, boundaries))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def curve(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """A figure of the log over steps, with a gap where an iteration starts."""
    points: list[tuple[float, float]] = []
    started = False
    for entry in history:
        started |= entry.get("sera/iteration", 1) != 1  # nothing is before the first
        if _is_number(entry.get("step")) and _is_number(entry.get(key)):
            if started and points:
                points.append((entry["step"], nan))
            started = False
            points.append((entry["step"], entry[key]))
    return [x for x, _ in points], [y for _, y in points]
