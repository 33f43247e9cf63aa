"""Runs side by side: settings that differ, metrics, and how alike their selections are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sera_plugin.algorithm.summary import jaccard
from sera_plugin.host.run import flat
from sera_plugin.rundir.checksums import write_text
from sera_plugin.tools.report.blocks import Table, number, value_at
from sera_plugin.tools.report.data import Run
from sera_plugin.tools.report.figures import figures, spent
from sera_plugin.tools.report.html import fill
from sera_plugin.tools.report.terminal import plain_table
from sera_plugin.tools.report.tokens import shown_name

#: Where things are on a machine says nothing of what a run is.
_PLACES = frozenset({"output_dir", "dataset_prepared_path", "axolotl_config_path"})
_BESIDE = ("loss", "beta", "per_token", "micro_batch", "accumulation", "pairs", "evaluation_pairs",
           "dataset_fingerprint", "evaluation_fingerprint", "score_fingerprint",
           "seed")  # fmt: skip


#: (name, how it is shown, where it is in an iteration's figures), in the order of the tables.
_METRICS = (
    ("pairs trained", ",", ("pairs", "trained")),
    ("kept above (margin)", "+.3g", ("threshold",)),
    ("offline accuracy", ".1%", ("offline_accuracy",)),
    ("held-out accuracy", ".1%", ("held_out", "accuracy")),
    ("R2 of reward with length", ".3f", ("length_r2", "reward")),
    ("drift of chosen, nats", "+.2f", ("drift", "chosen")),
    ("drift of rejected, nats", "+.2f", ("drift", "rejected")),
    ("sampled tokens, mean", ".1f", ("lengths", "sampled")),
    ("duplicate samples", ".1%", ("shares", "duplicates")),
    ("unfinished samples", ".1%", ("shares", "unfinished")),
    ("seconds", ",.0f", ("all_seconds",)),
)


def _with_shares(one: dict[str, Any]) -> dict[str, Any]:
    """An iteration's figures, and those that are made of two of them."""
    samples = one["samples"] or {}
    shares = {
        name: samples[name] / max(1, samples["sampled"])
        for name in ("duplicates", "unfinished")
        if samples.get(name) is not None
    }
    return {**one, "shares": shares, "all_seconds": spent(one["seconds"]) or None}


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """What `axolotl sera compare` says, as plain values. Lists are in the order of `runs`."""
    every = [
        {one["iteration"]: _with_shares(one) for one in figures(run)["iterations"]} for run in runs
    ]
    metrics = []
    for iteration in sorted({key for found in every for key in found}):
        for name, form, keys in _METRICS:
            values = [value_at(found.get(iteration), *keys) for found in every]
            if any(value is not None for value in values):
                metrics.append(
                    {"iteration": iteration, "name": name, "form": form, "values": values}
                )
    return {
        "runs": [
            {"name": name, "directory": str(run.root), "state": run.state, "unit": run.unit,
             "notes": list(run.notes)}
            for name, run in zip(_names(runs), runs, strict=True)
        ],
        "settings": _differences(runs),
        "metrics": metrics,
        "selections": _selections(runs),
    }  # fmt: skip


def _names(runs: Sequence[Run]) -> list[str]:
    """Short names: of the directories as far as they tell the runs apart."""
    paths = [run.root.parent.resolve() for run in runs]
    names = [shown_name(path.name) for path in paths]
    alike = len(set(names)) < len(names)
    return [shown_name(str(path), 120) for path in paths] if alike else names


def _differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    settings = [
        {key: run.description.get(key) for key in _BESIDE}
        | {
            key: value
            for key, value in flat(run.description.get("config") or {}).items()
            if key not in _PLACES and key not in _BESIDE
        }
        for run in runs
    ]
    keys = sorted({key for one in settings for key in one})
    values = {key: [one.get(key) for one in settings] for key in keys}
    return {key: each for key, each in values.items() if any(one != each[0] for one in each)}


def _selections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per iteration, the Jaccard index of each two runs' kept pairs; None of other data."""
    found = []
    prints = [run.description.get("dataset_fingerprint") for run in runs]
    for iteration in sorted({one.number for run in runs for one in run.iterations}):
        masks = [
            next(
                (one.selected for one in run.iterations if one.number == iteration and
                 one.margin is not None), None)
            for run in runs
        ]  # fmt: skip
        matrix = [
            [
                jaccard(one, other)
                if one is not None and other is not None and here is not None and here == there
                else None
                for other, there in zip(masks, prints, strict=True)
            ]
            for one, here in zip(masks, prints, strict=True)
        ]
        if any(matrix[i][j] is not None for i in range(len(runs)) for j in range(i)):
            found.append({"iteration": iteration, "matrix": matrix})
    return found


def tables(compared: dict[str, Any]) -> list[Table]:
    """The comparison as tables, for the terminal and for a page."""
    names = [run["name"] for run in compared["runs"]]
    found = [
        Table(
            "Settings that differ",
            ["setting", *names],
            [
                [shown_name(key), *(_setting(value) for value in values)]
                for key, values in compared["settings"].items()
            ],
        ),
        Table(
            "Metrics by iteration",
            ["metric", *names],
            [
                [
                    f"{one['iteration']}: {one['name']}",
                    *(number(value, one["form"]) for value in one["values"]),
                ]
                for one in compared["metrics"]
            ],
            _units(compared["runs"]),
        ),
    ]
    for one in compared["selections"]:
        title = f"Jaccard index of the pairs kept in iteration {one['iteration']}"
        note = "Only of runs with the same dataset."
        found.append(Table.square(title, names, one["matrix"], note))
    return [table for table in found if table.rows]


def _setting(value: Any) -> str:
    return "unset" if value is None else shown_name(str(value), 32)


def _units(runs: Sequence[dict[str, Any]]) -> str:
    units = {run["unit"] for run in runs}
    if len(units) == 1:
        return f"Margins in {units.pop()}."
    each = ", ".join(f"{run['name']} {run['unit']}" for run in runs)
    return f"Margins are not comparable: {each}."


def show(compared: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    parts = [table.text() for table in tables(compared)]
    notes = [f"{run['name']}: {note}" for run in compared["runs"] for note in run["notes"]]
    states = plain_table(
        ["run", "state", "directory"],
        [[run["name"], run["state"], run["directory"]] for run in compared["runs"]],
    )
    return "\n\n".join([states, *(["\n".join(notes)] if notes else []), *parts])


def write(compared: dict[str, Any], path: Path) -> None:
    """The comparison as a page.

    Raises:
        OSError: if it cannot be written, with what to do about it.
    """
    title = f"{len(compared['runs'])} runs compared"
    write_text(path, fill("compare.html", title=title, compared=compared, tables=tables(compared)))
