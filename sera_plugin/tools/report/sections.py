"""Charts and tables of the page, by section; the page has the words around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

import numpy as np

from sera_plugin.algorithm.selection import select_largest
from sera_plugin.config.kinds import LABELERS
from sera_plugin.tools.report import charts
from sera_plugin.tools.report.charts import (
    DROPPED,
    KEPT,
    MUTED,
    OTHER,
    SAMPLED,
    Chart,
    Panel,
    Series,
)
from sera_plugin.tools.report.figures import (
    margin_without_ensemble,
    pooled,
    score_columns,
    scores_of,
    spent,
)
from sera_plugin.tools.report.output import NOTHING, Table, number, shown_name, value_at
from sera_plugin.tools.report.reading import SIDES, Iteration, Run

Figures = dict[str, Any]
Content = list[Chart | Table]


def sections(run: Run, found: Figures) -> dict[str, Content]:
    """Those that have something to show."""
    iterations = found["iterations"]
    both = list(zip(run.iterations, iterations, strict=True))
    every = {
        "margins": [chart for one in both for chart in _margins(run, *one)],
        "selection": [
            *_jaccard(found["jaccard"]),
            *_noise([one for one in iterations if one.get("label_noise")]),
            *(chart for one in both for chart in _ensemble(run, *one)),
            *_groups([one for one in iterations if one.get("groups")]),
        ],
        "lengths": [
            *_lengths(iterations),
            *(chart for one in both for chart in _length_r2(run, *one)),
        ],
        "scores": [chart for one in both for chart in _scores(run, *one)],
        "accuracy": [*_accuracy(iterations), *_drift([one for one in iterations if one["drift"]])],
        "samples": _samples([one for one in iterations if one["samples"]]),
        "cost": _cost([one for one in iterations if one["seconds"]]),
        "training": _training(run),
    }
    return {name: content for name, content in every.items() if content}


def over_iterations(
    name: str, colour: str, iterations: Sequence[Figures], *keys: str, error: str = ""
) -> list[Series]:
    """A figure over the iterations that have it, if any: where it is, a key for each level.

    Its standard error has the key `error` on the same level.
    """
    have = [one for one in iterations if value_at(one, *keys) is not None]
    errors = [value_at(one, *keys[:-1], error) for one in have] if error else None
    values = [value_at(one, *keys) for one in have]
    return (
        [Series(name, colour, [one["iteration"] for one in have], values, errors)] if have else []
    )


def _margins(run: Run, one: Iteration, figures: Figures) -> Content:
    panels, pairs, said = [], one.bootstrapped, []
    if one.margin is not None and one.selected is not None:
        panels.append(Panel("offline", one.margin, one.selected, KEPT))
    # What others rank by is not in nats.
    if pairs is not None and LABELERS[run.labeler].implicit and len(pairs["row"]):
        panels.append(Panel("sampled", pairs["margin"], pairs["selected"], SAMPLED))
    if figures.get("threshold") is not None:
        said.append(f"offline pairs above {figures['threshold']:+.3g} are kept")
        said.append(f"{1 - figures['offline_accuracy']:.0%} of all lie at or below 0")
    title = f"Iteration {one.number}: {', '.join(said) or 'sampled pairs'}"
    note = "The end bars hold what lies beyond (0.2%)."
    return [charts.margins(title, note, panels, run.unit)] if panels else []


def _jaccard(shared: Figures | None) -> Content:
    chance = None if shared is None else shared["by_chance"]
    # Where all pairs are kept, or none, there is no choice to agree on.
    if shared is None or chance in (None, 1.0) or len(shared["iterations"]) < 2:
        return []
    title = (
        f"The last two selections have a Jaccard index of {shared['matrix'][-1][-2]:.2f}; two "
        f"random ones would have {number(chance, '.2f')}"
    )
    note = (
        "Jaccard index of two iterations' kept sets: shared pairs over pairs in either. 1 is the "
        "same set."
    )
    names = [f"t = {iteration}" for iteration in shared["iterations"]]
    return [Table.square(title, names, shared["matrix"], note)]


def _noise(noisy: Sequence[Figures]) -> Content:
    """How many of the labels that were swapped on purpose selection has dropped."""
    if not noisy:
        return []
    last = noisy[-1]
    noise, total = last["label_noise"], last["kept"] + last["dropped"]
    title = (
        f"Iteration {last['iteration']} drops {noise['swapped_dropped']:,} of the "
        f"{noise['swapped']:,} labels swapped on purpose"
    )
    rows = [
        {
            "iteration": str(one["iteration"]),
            "swapped": f"{one['label_noise']['swapped']:,}",
            "dropped": f"{one['dropped']:,}",
            "both": f"{one['label_noise']['swapped_dropped']:,}",
            "recall": number(one["label_noise"]["recall"], ".0%"),
            "precision": number(one["label_noise"]["precision"], ".0%"),
        }
        for one in noisy
    ]
    note = (
        "Recall: the share of the swapped pairs that is dropped; by chance "
        f"{last['dropped'] / total:.0%}. Precision: the share of the dropped pairs that was "
        f"swapped; by chance {noise['swapped'] / total:.0%}."
    )
    return [Table.of(title, rows, note)]


def _ensemble(run: Run, one: Iteration, figures: Figures) -> Content:
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


def _groups(grouped: Sequence[Figures]) -> Content:
    found: Content = []
    for name, groups in grouped[-1]["groups"].items() if grouped else ():
        rows = [
            {
                shown_name(name): shown_name(str(group["value"])),
                "pairs": f"{group['pairs']:,}",
                "kept": f"{group['kept']:.0%}",
                "median margin": f"{group['median_margin']:+.3g}",
            }
            for group in groups
        ]
        title = f"Kept by {shown_name(name)}, iteration {grouped[-1]['iteration']}"
        found.append(Table.of(title, rows))
    return found


def _lengths(iterations: Sequence[Figures]) -> Content:
    names = {
        "chosen": ("chosen", KEPT),
        "rejected": ("rejected", DROPPED),
        "sampled": ("sampled", SAMPLED),
        "bootstrapped_chosen": ("its best", OTHER),
    }
    series = [
        one
        for key, named in names.items()
        for one in over_iterations(*named, iterations, "lengths", key)
    ]
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


def _length_r2(run: Run, one: Iteration, figures: Figures) -> Content:
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
    x: charts.FloatArray,
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


def _scores(run: Run, one: Iteration, figures: Figures) -> Content:
    found: Content = []
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


def _accuracy(iterations: Sequence[Figures]) -> Content:
    keys, error = ("held_out", "accuracy"), "accuracy_error"
    held_out = over_iterations("held out", SAMPLED, iterations, *keys, error=error)
    keys, error = ("offline_accuracy",), "offline_accuracy_error"
    series = over_iterations("offline", KEPT, iterations, *keys, error=error) + held_out
    if not series:
        return []
    x, y = series[-1].x, series[-1].y
    title = f"The reward agrees with the label on {y[-1]:.0%} of "
    title += "held-out pairs" if held_out else "offline pairs"
    if len(y) > 1:
        title += f", {y[0]:.0%} in iteration {x[0]}"
    note = "Bars are one standard error. What is not better than a coin flip has learnt nothing."
    if held_out:
        pairs = [one["held_out"]["pairs"] for one in iterations if one["held_out"]]
        note += f" {pairs[-1]:,} pairs are held out."
    return [charts.lines(title, note, series, "share of pairs", (0.5, "a coin"))]


def _drift(drifted: Sequence[Figures]) -> Content:
    if len(drifted) < 2:
        return []
    colours = dict(zip(SIDES, (KEPT, DROPPED), strict=True))
    series = [
        one
        for side, colour in colours.items()
        for one in over_iterations(side, colour, drifted, "drift", side)
    ]
    last = drifted[-1]["drift"]
    title = (
        f"Iteration {drifted[-1]['iteration']} began {last['chosen']:+.1f} nats (chosen) and "
        f"{last['rejected']:+.1f} (rejected) per answer from theta_0"
    )
    note = "Mean change in log-probability of the offline answers since the initial policy."
    return [charts.lines(title, note, series, "nats per answer", (0.0, "theta_0"), decimals=1)]


def _samples(sampled: Sequence[Figures]) -> Content:
    def share(part: int | None, whole: int) -> str:
        return NOTHING if part is None else f"{part:,} ({part / max(1, whole):.0%})"

    rows = []
    unranked = any(one["samples"].get("unranked") for one in sampled)
    for one in sampled:
        samples, pairs = one["samples"], one["pairs"] or {}
        total = samples["sampled"]
        kept, of = (number(pairs.get(f"bootstrapped_{what}"), ",") for what in ("kept", "found"))
        rows.append(
            {
                "iteration": str(one["iteration"]),
                "prompts": f"{samples['prompts']:,}",
                "answers": f"{total:,}",
                "duplicates": share(samples["duplicates"], total),
                "unfinished": share(samples["unfinished"], total),
                "prompts without a pair": share(samples["too_few"], samples["prompts"]),
                "ties": number(samples["ties"], ","),
                **({"unranked": share(samples["unranked"], total)} if unranked else {}),
                "pairs kept": f"{kept} of {of}",
            }
        )
    return [Table.of("What became of the samples", rows)] if rows else []


def _cost(iterations: Sequence[Figures]) -> Content:
    phases = dict.fromkeys(phase for one in iterations for phase in one["seconds"])
    if not phases:
        return []
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
    return [Table(title, [*head, "all", "share", "tokens"], rows)]


def _training(run: Run) -> Content:
    found: Content = []
    # Where each iteration's own figures are in the log, it starts.
    boundaries = {
        int(entry["sera/iteration"]): int(entry["step"])
        for entry in run.history
        if _is_number(entry.get("sera/iteration")) and _is_number(entry.get("step"))
    }
    for title, ylabel, key in (
        ("Loss", "loss", "loss"),
        (
            "Margin of rewards against the iteration's reference",
            "beta x margin",
            "rewards/margins",
        ),
        (
            "Accuracy of rewards against the iteration's reference",
            "share of pairs",
            "rewards/accuracies",
        ),
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
