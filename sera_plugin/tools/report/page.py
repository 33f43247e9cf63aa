"""The report on a run: one HTML page of charts, tables and pairs; its words are in page.html."""

import csv
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np

from sera_plugin.algorithm.best import FIGURE
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.trust import SIDES
from sera_plugin.config.kinds import SELECTIONS, is_reference_free, labeler_kind
from sera_plugin.rundir.writing import COMMAND, write_text
from sera_plugin.tools.report import charts
from sera_plugin.tools.report.charts import Chart, Lines
from sera_plugin.tools.report.figures import (
    dataset_scores,
    figure,
    figures,
    pooled,
    spent,
    without_ensemble,
)
from sera_plugin.tools.report.output import Table, fill, number, shown_name, shown_text
from sera_plugin.tools.report.pairs import examples, facts_of
from sera_plugin.tools.report.reading import Iteration, Run, Texts, find_run

Figures = dict[str, Any]
#: Most iterations that have charts of their own.
_CHARTED = 6
_SHOWN = ("learning_rate", "lr_scheduler", "num_epochs", "micro_batch_size", "adapter", "lora_r",
          "sequence_len", "optimizer")  # fmt: skip


def write_report(output_dir: Path, path: Path | None = None) -> Path:
    """Read the run in `output_dir` and write its report, to `report.html` there unless told.

    A ValueError if no run is there, an OSError if the file cannot be written.
    """
    run = Run(find_run(output_dir))
    path = path or run.root / "report.html"
    # Training asks for a report too, and it is not training that has to be done again.
    again = COMMAND._replace(then="run `axolotl sera report` again")
    write_text(path, render(run), again)
    return path


def render(run: Run) -> str:
    """The page."""
    found, settings = figures(run), run.settings
    shown = [(key, run.config[key]) for key in _SHOWN if run.config.get(key) is not None]
    shown += [(f"sera.{key}", value) for key, value in sorted(settings.items())]
    versions = found["run"]["versions"]
    shown += [("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))]
    return fill(
        "page.html",
        run=run,
        title=shown_text(run.root.parent.resolve().name or "SeRA run", 120),
        figures=found,
        figure_is=FIGURE,
        charts=_charts(run, found),
        charted=_CHARTED,
        square=Table.square,
        spent=spent,
        examples=examples(run),
        facts_of=facts_of,
        texts=Texts(run),
        by_margin=any(one.get("threshold") is not None for one in found["iterations"]),
        selection=SELECTIONS[settings.get("selection", "irm")],
        labeler=labeler_kind(run.labeler),
        reference_free=is_reference_free(run.description.get("loss", "dpo")),
        settings=shown,
    )


def _charts(run: Run, found: Figures) -> dict[str, list[Chart]]:
    """The pictures of each section."""
    iterations = found["iterations"]
    both = list(zip(run.iterations, iterations, strict=True))
    if len(both) > _CHARTED:  # the first ones of which there are charts, and the newest
        both = [*both[1:3], *both[2 - _CHARTED :]]
    each = {"margins": _margins, "selection": _ensemble, "lengths": _length_r2, "scores": _scores}
    made = {name: [one for two in both for one in make(run, *two)] for name, make in each.items()}
    made["lengths"] = _lengths(iterations) + made["lengths"]
    drifted = [one for one in iterations if one["drift"]]
    made["accuracy"] = _accuracy(iterations) + _drift(drifted) + _among_published(drifted)
    return made | {"samples": [], "cost": [], "training": _training(run)}


def _series(iterations: Sequence[Figures], **places: str) -> Lines:
    """Figures by where they are, over the iterations that have them, with standard errors."""
    found = {}
    for name, where in places.items():
        have = {one["iteration"]: one for one in iterations if figure(one, where) is not None}
        values = [figure(one, where) for one in have.values()]
        errors = [figure(one, f"{where}_error") for one in have.values()]
        if have:
            found[name.replace("_", " ")] = list(have), values, [e for e in errors if e is not None]
    return found


def _margins(run: Run, one: Iteration, figures: Figures) -> list[Chart]:
    panels, pairs, said = {}, one.bootstrapped, []
    if one.margin is not None:
        panels["offline"] = one.margin, one.offline["selected"]
    # What others rank by is not in nats.
    if pairs and labeler_kind(run.labeler).implicit and len(pairs["row"]):
        panels["sampled"] = pairs["margin"], pairs["selected"]
    if figures.get("threshold") is not None:
        said.append(f"offline pairs above {figures['threshold']:+.3g} are kept")
    elif "offline" in panels and one.offline["selected"].all():
        said.append("all offline pairs are kept")
    if said and one.margin is not None:
        said.append(f"{float((one.margin <= 0).mean()):.0%} of all lie at or below 0")
    title = f"Iteration {one.number}: {', '.join(said) or 'sampled pairs'}"
    note = "The end bars hold what lies beyond (0.2%)."
    if "margin" in (noise := figures.get("noise") or {}) and one.margin is not None:
        note += f" From batch to batch rounding moves a margin by {noise['margin']:.2g}"
        if "within" in noise:
            note += f"; {noise['within']:.0%} of the pairs are nearer to the cut than that"
        note += "."
    return [charts.margins(title, note, run.unit, panels)] if panels else []


def _ensemble(run: Run, one: Iteration, figures: Figures) -> list[Chart]:
    found = without_ensemble(run, one)
    if found is None:
        return []
    (without, kept_without), changed = found, figures["ensemble"]
    margin, kept = one.offline["margin"], one.offline["selected"]
    title = f"Iteration {one.number}: the ensemble exchanged {changed['exchanged']:,} of "
    title += f"{changed['kept']:,} kept pairs"
    note = "Dashed: the margin from which pairs are kept"
    note += ", zoomed in on the pairs that changed." if changed["exchanged"] else "."
    sampled = figures.get("bootstrapped_ensemble")
    if sampled:
        note += f" Of {sampled['kept']:,} sampled pairs kept, {sampled['exchanged']:,} are others."
    axes = (f"margin with gamma = 0, {run.unit}", f"margin with gamma = {run.settings['gamma']:g}")
    around = kept != kept_without
    marks = {"same choice": ~around, "kept by it": kept & around, "dropped by it": ~kept & around}
    cuts = (float(without[kept_without].min()), float(margin[kept].min()))
    return [charts.scatter(title, note, axes, without, margin, marks, cuts, around)]


def _lengths(iterations: Sequence[Figures]) -> list[Chart]:
    places = {name: f"lengths.{name}" for name in (*SIDES, "sampled")}
    series = _series(iterations, **places, best="lengths.bootstrapped_chosen")
    sampled = [one["lengths"] for one in iterations if "sampled" in one["lengths"]]
    last: Figures = sampled[-1] if sampled else {}
    note = "Best: the chosen answers of sampled pairs that are kept." if last else ""
    title = "Mean length of answers in tokens"
    if "chosen" in last:
        title = f"Sampled answers have {last['sampled']:,.1f} tokens on average, "
        title += f"chosen ones {last['chosen']:,.1f}"
    return [charts.lines(title, note, "mean tokens", series, decimals=1)] if series else []


def _length_r2(run: Run, one: Iteration, figures: Figures) -> list[Chart]:
    r2 = figures.get("length_r2")
    if not r2:
        return []
    note = f"; of margins with the difference in length {number(r2['margin'], '.3f')}"
    if "sampled" in r2:
        note += f"; of sampled answers {number(r2['sampled'], '.3f')}"
    tokens = pooled(one.offline, "length")
    return [_explained(run, one, "reward", r2, "length", "tokens", tokens, note)]


def _scores(run: Run, one: Iteration, figures: Figures) -> list[Chart]:
    found, scores = [], dataset_scores(run)
    for column, r2 in figures.get("scores", {}).items():
        what, name, note = "margin", shown_name(column), ""
        axis = name
        if "reward" in r2:
            what, axis = "reward", f"{name} of the answer"
            margins, agreement = number(r2["margin"], ".3f"), number(r2["agreement"], ".0%")
            note = f"; of margins with the difference {margins}. Where {name} differs, the policy"
            note += f" agrees with it on {agreement} of the pairs"
        values = np.concatenate(scores[column])
        found.append(_explained(run, one, what, r2, name, axis, values, note))
    return found


def _explained(
    run: Run, one: Iteration, what: str, r2: Figures, name: str, axis: str, x: FloatArray, note: str
) -> Chart:
    """The reward of all answers, or the margin of all pairs, over what else is known of them."""
    y, marks, measured = one.offline["margin"], {"": np.isfinite(x)}, "margin"
    if what == "reward":
        of_chosen = np.arange(len(x)) < len(x) // 2
        marks = {"chosen": of_chosen, "rejected": ~of_chosen}
        y, measured = pooled(one.offline, "reward"), "implicit reward"
    share = number(r2[what], ".0%")
    title = f"Iteration {one.number}: {name} explains {share} of the variance of {what}s"
    note = f"R² {number(r2[what], '.3f')}{note}."
    return charts.scatter(title, note, (axis, f"{measured}, {run.unit}"), x, y, marks)


def _accuracy(iterations: Sequence[Figures]) -> list[Chart]:
    series = _series(iterations, offline="offline_accuracy", held_out="held_out.accuracy")
    if not series:
        return []
    held_out = [one["held_out"]["pairs"] for one in iterations if one["held_out"]]
    x, y, _ = list(series.values())[-1]
    kind = "held-out pairs" if held_out else "offline pairs"
    title = f"The reward agrees with the label on {y[-1]:.0%} of {kind}"
    title += f", {y[0]:.0%} in iteration {x[0]}" if len(y) > 1 else ""
    note = "Bars are one standard error. What is not better than a coin flip has learnt nothing."
    note += f" {held_out[-1]:,} pairs are held out." if held_out else ""
    return [charts.lines(title, note, "share of pairs", series, (0.5, "a coin"))]


def _drift(drifted: Sequence[Figures]) -> list[Chart]:
    if len(drifted) < 2:
        return []
    last = drifted[-1]["drift"]
    title = f"Iteration {drifted[-1]['iteration']} began {last['chosen']:+.1f} nats (chosen) and "
    title += f"{last['rejected']:+.1f} (rejected) per answer from the initial policy"
    note = "Mean change in log-probability of the offline answers since the initial policy."
    series = _series(drifted, chosen="drift.chosen", rejected="drift.rejected")
    zero = (0.0, "initial policy")
    return [charts.lines(title, note, "nats per answer", series, zero, decimals=1)]


def published_runs() -> list[dict[str, str]]:
    """DPO runs whose model cards say how far they moved: docs/drift.md has how it is known."""
    with Path(__file__).with_name("drift.csv").open(encoding="utf-8", newline="") as rows:
        return list(csv.DictReader(rows))


def _among_published(drifted: Sequence[Figures]) -> list[Chart]:
    """Drift of the run, per token, beside that of published runs."""
    run = {f"iteration {one['iteration']}": [one["drift"]["chosen"] / one["lengths"]["chosen"]]
           for one in drifted if one["iteration"] > 1}  # fmt: skip
    if not run:
        return []
    published: dict[str, list[float]] = {}
    for one in published_runs():
        by_beta = published.setdefault(f"beta {one['beta']}", [])
        by_beta.append(float(one["nats_per_token"]))
    every = [value for values in published.values() for value in values]
    low, first, third, high = np.quantile(every, (0, 0.25, 0.75, 1)).tolist()
    label, (last,) = list(run.items())[-1]
    title = f"{label.capitalize()} began {last:+.2f} nats per token from the initial policy. Of "
    title += f"{len(every)} "
    title += f"published DPO runs half ended between {first:.2f} and {third:.2f}, all between "
    title += f"{low:.2f} and {high:.2f}"
    note = "Chosen answers of the data. Grey ground: the middle half of the published runs, which "
    note += "the page on drift in the docs names. How far a policy has moved is not how good it is."
    groups = {"this run": run, "published runs": published}
    return [
        charts.strips(title, note, "nats per token from the initial policy", groups, (first, third))
    ]


def _training(run: Run) -> list[Chart]:
    found: list[Chart] = []
    # Where each iteration's own figures are in the log, it starts.
    boundaries = {int(one["sera/iteration"]): int(one["step"])
                  for one in run.history if "sera/iteration" in one}  # fmt: skip
    against = "of rewards against the iteration's reference"
    for title, ylabel, key in (
        ("Loss", "loss", "loss"),
        (f"Margin {against}", "beta times margin", "rewards/margins"),
        (f"Accuracy {against}", "share of pairs", "rewards/accuracies"),
    ):
        both = {"train": curve(run.history, key), "held out": curve(run.history, f"eval_{key}")}
        series: Lines = {name: (x, y, []) for name, (x, y) in both.items() if x}
        if series:
            found.append(charts.curves(title, ylabel, series, boundaries))
    return found


def curve(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """A figure of the log over steps, with a gap where an iteration starts.

    There the policy is its own reference: all rewards are 0, and an accuracy is left out.
    """
    x: list[float] = []
    y: list[float] = []
    started, begun = False, 0
    # A step is logged with its number from 1, an evaluation with that of the steps before it.
    equal = {"rewards/accuracies": 1, "eval_rewards/accuracies": 0}.get(key)
    for entry in history:
        started |= entry.get("sera/iteration", 1) != 1  # nothing is before the first
        if "sera/iteration" in entry:
            begun = int(entry["step"])
        if equal is not None and entry.get("step") == begun + equal:
            continue
        value = entry.get(key)
        if isinstance(value, int | float) and isfinite(value):
            gap = [nan] if started and x else []
            x += [entry["step"]] * (1 + len(gap))
            y += [*gap, value]
            started = False
    return x, y
