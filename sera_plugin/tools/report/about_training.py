"""Sections on the training itself: accuracy, drift, samples, cost, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sera_plugin.tools.report import charts
from sera_plugin.tools.report.blocks import NOTHING, Chart, Section, Table, number
from sera_plugin.tools.report.charts import DROPPED, KEPT, SAMPLED, Series
from sera_plugin.tools.report.data import SIDES, Run
from sera_plugin.tools.report.figures import spent

Figures = dict[str, Any]


def accuracy(found: Figures) -> Section:
    section = Section(
        "accuracy",
        "Accuracy and drift",
        "How often the implicit reward of the policy that an iteration starts from prefers the "
        "chosen answer, and how far that policy has moved from the initial one.",
    )
    iterations = found["iterations"]
    held_out = [one["held_out"] for one in iterations if one["held_out"]]
    offline = Series.over_iterations(
        "offline", KEPT, iterations, "offline_accuracy", error="offline_accuracy_error"
    )
    other = Series.over_iterations(
        "held out", SAMPLED, iterations, "held_out", "accuracy", error="accuracy_error"
    )
    series = [one for one in (offline, other) if one.x]
    if series:
        which = series[-1]
        title = f"The reward agrees with the label on {which.y[-1]:.0%} of " + (
            "held-out pairs" if held_out else "offline pairs"
        )
        if len(which.y) > 1:
            title += f", {which.y[0]:.0%} in iteration {which.x[0]}"
        note = (
            "Bars are one standard error. What is not better than a coin flip has learnt nothing."
        )
        if held_out:
            note += f" {held_out[-1]['pairs']:,} pairs are held out."
        svg = charts.lines(title, series, "share of pairs", (0.5, "a coin"))
        section.charts.append(Chart(title, svg, note))
    drift = [one for one in iterations if one["drift"]]
    if len(drift) > 1:
        series = [
            Series.over_iterations(side, colour, drift, "drift", side)
            for side, colour in zip(SIDES, (KEPT, DROPPED), strict=True)
        ]
        last = drift[-1]["drift"]
        title = (
            f"Iteration {drift[-1]['iteration']} began {last['chosen']:+.1f} nats (chosen) and "
            f"{last['rejected']:+.1f} (rejected) per answer from theta_0"
        )
        svg = charts.lines(title, series, "nats per answer", (0.0, "theta_0"), decimals=1)
        note = "Mean change in log-probability of the offline answers since the initial policy."
        section.charts.append(Chart(title, svg, note))
    return section


def _share(part: int | None, whole: int) -> str:
    return NOTHING if part is None else f"{part:,} ({part / max(1, whole):.0%})"


def samples(found: Figures) -> Section:
    section = Section(
        "samples",
        "Sampled answers",
        "Duplicates repeat another answer to the same prompt; ties and prompts with too few "
        "distinct answers give no pair; unfinished answers were cut at the longest length; "
        "unranked ones got no verdict that could be read.",
    )
    unranked = any((one["samples"] or {}).get("unranked") for one in found["iterations"])
    rows = []
    for one in found["iterations"]:
        samples, pairs = one["samples"], one["pairs"] or {}
        if samples:
            total = samples["sampled"]
            kept, of = (
                number(pairs.get(f"bootstrapped_{what}"), ",") for what in ("kept", "found")
            )
            rows.append(
                {
                    "iteration": str(one["iteration"]),
                    "prompts": f"{samples['prompts']:,}",
                    "answers": f"{total:,}",
                    "duplicates": _share(samples["duplicates"], total),
                    "unfinished": _share(samples["unfinished"], total),
                    "prompts without a pair": _share(samples["too_few"], samples["prompts"]),
                    "ties": number(samples["ties"], ","),
                    **({"unranked": _share(samples["unranked"], total)} if unranked else {}),
                    "pairs kept": f"{kept} of {of}",
                }
            )
    if rows:
        section.tables.append(Table.of("What became of the samples", rows))
    return section


def cost(found: Figures) -> Section:
    section = Section(
        "cost",
        "Time and tokens",
        "What each phase cost (Table 12 of the paper). Offline pairs are scored once under each "
        "policy: selection needs no forward pass of its own.",
    )
    iterations = [one for one in found["iterations"] if one["seconds"]]
    phases = list(dict.fromkeys(phase for one in iterations for phase in one["seconds"]))
    whole = [spent(one["seconds"]) for one in iterations]
    total = sum(whole)
    rows = []
    for phase in phases:
        seconds = [one["seconds"].get(phase) for one in iterations]
        of_phase = sum(one for one in seconds if one is not None)
        forwarded = [one["forwarded"].get(phase, {}) for one in iterations]
        tokens = sum(one.get("tokens", 0) for one in forwarded)
        rows.append(
            [
                phase.replace("_", " "),
                *(number(one, ",.1f") for one in seconds),
                f"{of_phase:,.1f}",
                f"{of_phase / total:.0%}" if total else NOTHING,
                f"{tokens:,}" if tokens else NOTHING,
            ]
        )
    if rows:
        rows.sort(key=lambda row: -float(row[-3].replace(",", "")))
        rows.append(["all", *(f"{one:,.1f}" for one in whole), f"{total:,.1f}", "100%", ""])
        head = ["phase, s", *(f"t = {one['iteration']}" for one in iterations)]
        head += ["all", "share", "tokens"]
        longest = rows[0]
        section.tables.append(
            Table(f"Most time went into: {longest[0]} ({longest[-2]})", head, rows)
        )
    return section


def training(run: Run) -> Section:
    anew = "Each iteration starts from its own reference, so loss and rewards start anew."
    if run.settings.get("reference") == "initial":
        anew = "All iterations have the initial policy as reference."
    section = Section(
        "training",
        "Training curves",
        f"From the host's log in the newest checkpoint. {anew}",
    )
    boundaries = _boundaries(run)
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
            Series(name, *_curve(run.history, f"{prefix}{key}"), colour)
            for prefix, name, colour in (("", "train", KEPT), ("eval_", "held out", SAMPLED))
        ]
        series = [one for one in series if one.x]
        if series:
            section.charts.append(Chart(title, charts.curves(title, series, ylabel, boundaries)))
    return section


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """A figure of the log over steps, with a gap where an iteration starts."""
    x: list[float] = []
    y: list[float] = []
    started = False
    for entry in history:
        started |= entry.get("sera/iteration", 1) != 1  # nothing is before the first
        if _is_number(entry.get("step")) and _is_number(entry.get(key)):
            if started and x:
                x.append(entry["step"])
                y.append(np.nan)
            started = False
            x.append(entry["step"])
            y.append(entry[key])
    return x, y


def _boundaries(run: Run) -> dict[int, int]:
    """The step at which each iteration starts: where its own figures are in the log."""
    return {
        int(entry["sera/iteration"]): int(entry["step"])
        for entry in run.history
        if _is_number(entry.get("sera/iteration")) and _is_number(entry.get("step"))
    }
