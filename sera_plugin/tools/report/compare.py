"""Runs side by side: settings that differ, metrics, and how alike their selections are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sera_plugin.algorithm.summary import jaccard
from sera_plugin.host.run import flat
from sera_plugin.rundir.checksums import write_text
from sera_plugin.tools.report.blocks import Table, number
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


def _ratio(part: str, whole: str) -> Callable[[dict[str, Any]], float | None]:
    def of(one: dict[str, Any]) -> float | None:
        samples = one["samples"] or {}
        return None if samples.get(part) is None else samples[part] / max(1, samples[whole])

    return of


#: (name, how it is shown, where it is in an iteration's figures).
_METRICS: tuple[tuple[str, str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("pairs trained", ",", lambda one: (one["pairs"] or {}).get("trained")),
    ("kept above (margin)", "+.3g", lambda one: one.get("threshold")),
    ("offline accuracy", ".1%", lambda one: one.get("offline_accuracy")),
    ("held-out accuracy", ".1%", lambda one: (one["held_out"] or {}).get("accuracy")),
    ("R2 of reward with length", ".3f", lambda one: one.get("length_r2", {}).get("reward")),
    ("drift of chosen, nats", "+.2f", lambda one: (one["drift"] or {}).get("chosen")),
    ("drift of rejected, nats", "+.2f", lambda one: (one["drift"] or {}).get("rejected")),
    ("sampled tokens, mean", ".1f", lambda one: one["lengths"].get("sampled")),
    ("duplicate samples", ".1%", _ratio("duplicates", "sampled")),
    ("unfinished samples", ".1%", _ratio("unfinished", "sampled")),
    ("seconds", ",.0f", lambda one: spent(one["seconds"]) or None),
)


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """What `axolotl sera compare` says, as plain values. Lists are in the order of `runs`."""
    every = [figures(run) for run in runs]
    last = max((one.number for run in runs for one in run.iterations), default=0)
    metrics = []
    for iteration in range(1, last + 1):
        of_runs = [
            next((one for one in found["iterations"] if one["iteration"] == iteration), None)
            for found in every
        ]
        for name, form, get in _METRICS:
            values = [None if one is None else get(one) for one in of_runs]
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
    last = max((one.number for run in runs for one in run.iterations), default=0)
    for iteration in range(2, last + 1):
        masks = [
            next((o.selected for o in run.iterations if o.number == iteration and
                  o.margin is not None), None)
            for run in runs
        ]  # fmt: skip
        prints = [run.description.get("dataset_fingerprint") for run in runs]
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
        found.append(
            Table(
                f"Jaccard index of the pairs kept in iteration {one['iteration']}",
                ["", *names],
                [
                    [name, *(number(value, ".2f") for value in values)]
                    for name, values in zip(names, one["matrix"], strict=True)
                ],
                "Only of runs with the same dataset.",
                [[None, *values] for values in one["matrix"]],
            )
        )
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
