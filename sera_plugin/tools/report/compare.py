"""Runs side by side: settings that differ, metrics, and how alike their selections are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sera_plugin.algorithm.selection import BoolArray
from sera_plugin.algorithm.summary import jaccard
from sera_plugin.host.run import flat
from sera_plugin.rundir.writing import write_text
from sera_plugin.tools.report.figures import figure, figures, spent
from sera_plugin.tools.report.output import Table, fill, number, plain_table, shown_name
from sera_plugin.tools.report.reading import Run

#: Where things are on a machine says nothing of what a run is.
_PLACES = frozenset({"output_dir", "dataset_prepared_path", "axolotl_config_path"})
_BESIDE = ("loss", "beta", "per_token", "micro_batch", "accumulation", "pairs", "evaluation_pairs",
           "prompts", "prompts_fingerprint",
           "dataset_fingerprint", "evaluation_fingerprint", "score_fingerprint",
           "seed")  # fmt: skip
#: (name, how it is shown, where it is in an iteration's figures), in the order of the tables.
_METRICS = (
    ("pairs trained", ",", "pairs.trained"),
    ("kept above (margin)", "+.3g", "threshold"),
    ("offline accuracy", ".1%", "offline_accuracy"),
    ("held-out accuracy", ".1%", "held_out.accuracy"),
    ("R2 of reward with length", ".3f", "length_r2.reward"),
    ("drift of chosen, nats", "+.2f", "drift.chosen"),
    ("drift of rejected, nats", "+.2f", "drift.rejected"),
    ("sampled tokens, mean", ".1f", "lengths.sampled"),
    ("duplicate samples", ".1%", "samples.duplicates / samples.sampled"),
    ("unfinished samples", ".1%", "samples.unfinished / samples.sampled"),
    ("seconds", ",.0f", "spent"),
)


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """What `axolotl sera compare` says, as plain values. Lists are in the order of `runs`."""
    paths = [run.root.parent.resolve() for run in runs]
    names = [shown_name(path.name) for path in paths]
    if len(set(names)) < len(names):
        names = [shown_name(path, 120) for path in paths]
    settings = [
        {key: value for key, value in flat(run.config).items() if key not in _PLACES}
        | {key: run.description.get(key) for key in _BESIDE}
        for run in runs
    ]
    values = {key: [one.get(key) for one in settings] for key in sorted(set().union(*settings))}
    every = [{one["iteration"]: one for one in figures(run)["iterations"]} for run in runs]
    iterations = sorted({number for found in every for number in found})
    metrics: list[dict[str, Any]] = [
        {"iteration": number, "name": name, "form": form,
         "values": [_measured(found.get(number, {}), where) for found in every]}
        for number in iterations
        for name, form, where in _METRICS
    ]  # fmt: skip
    return {
        "runs": [
            {"name": name, "directory": str(run.root), "state": run.state, "unit": run.unit,
             "notes": run.notes}
            for name, run in zip(names, runs, strict=True)
        ],
        "settings": {
            key: each for key, each in values.items() if any(one != each[0] for one in each)
        },
        "metrics": [one for one in metrics if any(value is not None for value in one["values"])],
        "selections": [
            {"iteration": number, "matrix": matrix}
            for number in iterations
            if (matrix := _alike(runs, number))
        ],
    }  # fmt: skip


def _measured(figures: dict[str, Any], where: str) -> Any:
    """A figure, or a share of two, by where it is; None where it is unknown."""
    if where == "spent":
        return spent(figures.get("seconds", {})) or None
    part, _, whole = where.partition(" / ")
    value = figure(figures, part)
    return value / max(1, figure(figures, whole)) if whole and value is not None else value


def _alike(runs: Sequence[Run], number: int) -> list[list[float | None]] | None:
    """The Jaccard index of each two runs' kept pairs; None of other data, and of no two."""
    kept: list[tuple[str, BoolArray] | None] = []
    for run in runs:
        one, data = run.begun.get(number), run.description.get("dataset_fingerprint")
        known = one is not None and one.margin is not None and data is not None
        kept.append((str(data), one.offline["selected"]) if known and one is not None else None)
    matrix = [[jaccard(a[1], b[1]) if a and b and a[0] == b[0] else None for b in kept]
              for a in kept]  # fmt: skip
    pairs = (matrix[i][j] for i in range(len(runs)) for j in range(i))
    return matrix if any(value is not None for value in pairs) else None


def _tables(compared: dict[str, Any]) -> list[Table]:
    """The comparison as tables, for the terminal and for a page."""
    names = [run["name"] for run in compared["runs"]]
    units = {run["unit"] for run in compared["runs"]}
    each = ", ".join(f"{run['name']} {run['unit']}" for run in compared["runs"])
    note = f"Margins are not comparable: {each}." if len(units) > 1 else f"Margins in {min(units)}."
    changed = [
        [shown_name(key), *("unset" if v is None else shown_name(v, 32) for v in values)]
        for key, values in compared["settings"].items()
    ]
    measured = [
        [f"{one['iteration']}: {one['name']}", *(number(v, one["form"]) for v in one["values"])]
        for one in compared["metrics"]
    ]
    tables = [
        Table("Settings that differ", ["setting", *names], changed),
        Table("Metrics by iteration", ["metric", *names], measured, note),
    ]
    for one in compared["selections"]:
        title = f"Jaccard index of the pairs kept in iteration {one['iteration']}"
        note = "Only of runs with the same dataset."
        tables.append(Table.square(title, names, one["matrix"], note))
    return [table for table in tables if table.rows]


def show(compared: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    rows = [[run["name"], run["state"], run["directory"]] for run in compared["runs"]]
    notes = [f"{run['name']}: {note}" for run in compared["runs"] for note in run["notes"]]
    parts = [plain_table(["run", "state", "directory"], rows), "\n".join(notes)]
    parts += [table.text() for table in _tables(compared)]
    return "\n\n".join(part for part in parts if part)


def write(compared: dict[str, Any], path: Path) -> None:
    """The comparison as a page; an OSError if it cannot be written."""
    title = f"{len(compared['runs'])} runs compared"
    write_text(path, fill("compare.html", title=title, compared=compared, tables=_tables(compared)))
