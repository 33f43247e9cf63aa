"""Sections on what the run did to its data: margins, selection, lengths, scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.selection import select_largest
from sera_plugin.config.kinds import SELECTIONS
from sera_plugin.tools.report import charts
from sera_plugin.tools.report.agreement import numbers, pooled, score_columns, score_difference
from sera_plugin.tools.report.blocks import Chart, Section, Table, number
from sera_plugin.tools.report.charts import DROPPED, KEPT, MUTED, OTHER, SAMPLED, Panel, Series
from sera_plugin.tools.report.data import Iteration, Run
from sera_plugin.tools.report.ensemble import margins_without_ensemble
from sera_plugin.tools.report.tokens import shown_name

Figures = dict[str, Any]


def margins(run: Run, found: Figures) -> Section:
    by_margin = any(figures.get("threshold") is not None for figures in found["iterations"])
    kept = "The largest are kept. " if by_margin else ""
    section = Section(
        "margins",
        "Margins",
        "A pair's margin is the implicit reward of its chosen answer less that of its rejected "
        f"one: how far the last training has moved the policy towards the label. {kept}Below 0 "
        "the policy disagrees with the label.",
    )
    for one, figures in zip(run.iterations, found["iterations"], strict=True):
        panels, pairs = [], one.bootstrapped
        if one.margin is not None and one.selected is not None:
            panels.append(Panel("offline", one.margin, one.selected, KEPT))
        # What others rank by is not in nats.
        if pairs is not None and run.implicit and len(pairs["row"]):
            panels.append(Panel("sampled", pairs["margin"], pairs["selected"], SAMPLED))
        if not panels:
            continue
        said = []
        if figures.get("threshold") is not None:
            said.append(f"offline pairs above {figures['threshold']:+.3g} are kept")
            said.append(f"{1 - figures['offline_accuracy']:.0%} of all lie at or below 0")
        title = f"Iteration {one.number}: {', '.join(said) or 'sampled pairs'}"
        svg = charts.margins(title, panels, run.unit)
        section.charts.append(Chart(title, svg, "The end bars hold what lies beyond (0.2%)."))
    return section


def choice(run: Run, found: Figures) -> Section:
    section = Section(
        "selection",
        "What selection keeps",
        "Whether iterations agree on the pairs worth keeping, what the reward ensemble (gamma) "
        "changed, and which parts of the data were favoured.",
    )
    shared = found["jaccard"]
    chance = None if shared is None else shared["by_chance"]
    # Where all pairs are kept, or none, there is no choice to agree on.
    if chance not in (None, 1.0) and len(shared["iterations"]) > 1:
        latest = shared["matrix"][-1][-2]
        title = (
            f"The last two selections have a Jaccard index of {latest:.2f}; two random ones would "
            f"have {number(chance, '.2f')}"
        )
        note = (
            "Jaccard index of two iterations' kept sets: shared pairs over pairs in either. 1 is "
            "the same set."
        )
        names = [f"t = {iteration}" for iteration in shared["iterations"]]
        section.tables.append(Table.square(title, names, shared["matrix"], note))
    section.tables.extend(_noise(found))
    for one, figures in zip(run.iterations, found["iterations"], strict=True):
        chart = _ensemble(run, one, figures)
        if chart is not None:
            section.charts.append(chart)
    last: Figures = next((one for one in reversed(found["iterations"]) if one.get("groups")), {})
    for name, groups in last.get("groups", {}).items():
        rows = [
            {
                shown_name(name): shown_name(str(group["value"])),
                "pairs": f"{group['pairs']:,}",
                "kept": f"{group['kept']:.0%}",
                "median margin": f"{group['median_margin']:+.3g}",
            }
            for group in groups
        ]
        title = f"Kept by {shown_name(name)}, iteration {last['iteration']}"
        section.tables.append(Table.of(title, rows))
    return section


def _noise(found: Figures) -> list[Table]:
    """How many of the labels that were swapped on purpose selection has dropped."""
    noisy = [one for one in found["iterations"] if one.get("label_noise")]
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


def _ensemble(run: Run, one: Iteration, figures: Figures) -> Chart | None:
    without, changed = margins_without_ensemble(run, one), figures.get("ensemble")
    if without is None or changed is None or one.margin is None or one.selected is None:
        return None
    kept_without = select_largest(without, changed["kept"])
    title = (
        f"Iteration {one.number}: the ensemble exchanged {changed['exchanged']:,} of "
        f"{changed['kept']:,} kept pairs"
    )
    svg = charts.scatter(
        title,
        without,
        one.margin,
        f"margin with gamma = 0, {run.unit}",
        f"margin with gamma = {run.settings['gamma']:g}",
        [
            ("same choice", one.selected == kept_without, MUTED),
            ("kept by it", one.selected & ~kept_without, KEPT),
            ("dropped by it", ~one.selected & kept_without, DROPPED),
        ],
        (float(without[kept_without].min()), float(one.margin[one.selected].min())),
        one.selected != kept_without,
    )
    note = "Dashed: the margin from which pairs are kept"
    note += ", zoomed in on the pairs that changed." if changed["exchanged"] else "."
    sampled = figures.get("bootstrapped_ensemble")
    if sampled:
        note += f" Of {sampled['kept']:,} sampled pairs kept, {sampled['exchanged']:,} are others."
    return Chart(title, svg, note)


def lengths(run: Run, found: Figures) -> Section:
    section = Section(
        "lengths",
        "Lengths",
        "Preference tuning likes to learn length. Sampled answers that grow, and a reward that "
        "length explains, are its signs.",
    )
    iterations = found["iterations"]
    names = {
        "chosen": ("chosen", KEPT),
        "rejected": ("rejected", DROPPED),
        "sampled": ("sampled", SAMPLED),
        "bootstrapped_chosen": ("its best", OTHER),
    }
    series = [
        Series.over_iterations(*named, iterations, "lengths", key) for key, named in names.items()
    ]
    series = [one for one in series if one.x]
    if series:
        sampled = [one["lengths"] for one in iterations if "sampled" in one["lengths"]]
        title = (
            f"Sampled answers have {sampled[-1]['sampled']:,.1f} tokens on average, chosen ones "
            f"{sampled[-1]['chosen']:,.1f}"
            if sampled and "chosen" in sampled[-1]
            else "Mean length of answers in tokens"
        )
        svg = charts.lines(title, series, "mean tokens", decimals=1)
        note = "Its best: the chosen answers of sampled pairs that are kept." if sampled else ""
        section.charts.append(Chart(title, svg, note))
    for one, figures in zip(run.iterations, iterations, strict=True):
        r2 = figures.get("length_r2", {})
        if one.offline is None or "chosen_reward" not in one.offline or not r2:
            continue
        note = f"; of margins with the difference in length {number(r2['margin'], '.3f')}"
        if "sampled" in r2:
            note += f"; of sampled answers {number(r2['sampled'], '.3f')}"
        tokens = pooled(one.offline, "length")
        chart = _rewards(run, one, "length", r2["reward"], tokens, "tokens", f"{note}.")
        section.charts.append(chart)
    return section


def _rewards(
    run: Run,
    one: Iteration,
    name: str,
    r2: float | None,
    x: npt.NDArray[Any],
    xlabel: str,
    note: str,
) -> Chart:
    """Rewards of all answers over something else that is known of them."""
    assert one.offline is not None
    title = (
        f"Iteration {one.number}: {name} explains {number(r2, '.0%')} of the variance of rewards"
    )
    of_chosen = np.arange(len(x)) < len(x) // 2
    svg = charts.scatter(
        title,
        x,
        pooled(one.offline, "reward"),
        xlabel,
        f"implicit reward, {run.unit}",
        [("chosen", of_chosen, KEPT), ("rejected", ~of_chosen, DROPPED)],
    )
    return Chart(title, svg, f"R² {number(r2, '.3f')}{note}")


def scores(run: Run, found: Figures) -> Section:
    selection = run.settings.get("selection")
    role = "They never influence training."
    if selection is not None and SELECTIONS[selection].reads_scores:
        role = f"sera.selection: {selection} chooses pairs by the first of them."
    section = Section(
        "scores",
        "The dataset's own scores",
        "How far the policy's implicit reward agrees with the scores that came with the data "
        f"(sera.score_columns). {role}",
    )
    columns = score_columns(run)
    for one, figures in zip(run.iterations, found["iterations"], strict=True):
        for column, r2 in figures.get("scores", {}).items():
            both, name = columns[column], shown_name(column)
            of_margins = number(r2["margin"], ".3f")
            if both is not None and "reward" in r2:
                values = np.concatenate([numbers(run.scores[half]) for half in both])
                note = (
                    f"; of margins with the difference {of_margins}. Where {name} differs, the "
                    f"policy agrees with it on {number(r2['agreement'], '.0%')} of the pairs."
                )
                axis = f"{name} of the answer"
                section.charts.append(_rewards(run, one, name, r2["reward"], values, axis, note))
                continue
            difference = score_difference(run, both, column)
            if one.margin is not None and np.isfinite(difference).any():
                title = (
                    f"Iteration {one.number}: {name} explains {number(r2['margin'], '.0%')} of "
                    "the variance of margins"
                )
                marks = [("", np.ones(len(difference), dtype=bool), KEPT)]
                axis = f"margin, {run.unit}"
                svg = charts.scatter(title, difference, one.margin, name, axis, marks)
                section.charts.append(Chart(title, svg, f"R² {of_margins}."))
    return section
