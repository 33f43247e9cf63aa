"""The report on a run: one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sera_plugin.config.kinds import is_reference_free
from sera_plugin.host.run import keeps
from sera_plugin.rundir.checksums import COMMAND, write_text
from sera_plugin.tools.report import about_data, about_training
from sera_plugin.tools.report.blocks import Section, Table, number, value_at
from sera_plugin.tools.report.data import Run
from sera_plugin.tools.report.examples import examples
from sera_plugin.tools.report.figures import figures
from sera_plugin.tools.report.html import fill
from sera_plugin.tools.report.reading import find_run, read_run
from sera_plugin.tools.report.tokens import Texts, shown_text, texts_of

NAME = "report.html"
#: What each alarm means; docs/alarms.md says the same.
MEANINGS = {
    "sampled_length": "the policy answers at greater length than the data",
    "length_growth": "answers grow from iteration to iteration",
    "chosen_length": "selection and ranking prefer length beyond the data's own taste",
    "drift": "down: the policy unlearns what the data calls good; up: it learns it by heart",
    "held_out_accuracy": "the policy ranks answers worse than before, or in reverse",
    "offline_accuracy": "the policy ranks answers worse than before, or in reverse; with more "
    "pairs than are held out, this one sees smaller falls",
    "duplicates": "half of sampling and scoring is for nothing",
    "without_pair": "these prompts give no pair; D_t leans towards the others",
    "unfinished": "half of the pairs have a cut answer; trained as chosen it teaches not to stop",
    "constant_rewards": "candidates are ranked by rounding: the last iteration hardly changed the "
    "policy",
    "constant_margins": "pairs are selected by rounding: the last iteration hardly changed the "
    "policy",
}


def write_report(output_dir: Path, path: Path | None = None) -> Path:
    """Read a run and write its report.

    Args:
        output_dir: the host's, or the run directory itself.
        path: where to; `report.html` in the run directory unless given.

    Returns:
        The file.

    Raises:
        ValueError: if no run is there.
        OSError: if the file cannot be written, with what to do about it.
    """
    store = find_run(output_dir)
    run = read_run(store)
    path = path or store.root / NAME
    # Training asks for a report too, and it is not training that has to be done again.
    again = COMMAND._replace(then="run `axolotl sera report` again")
    write_text(path, render(run, texts_of(run)), again)
    return path


def render(run: Run, texts: Texts) -> str:
    """The page."""
    found = figures(run)
    return fill(
        "page.html",
        run=run,
        title=shown_text(run.root.parent.resolve().name or "SeRA run", 120),
        facts=_facts(run),
        overview=_overview(found),
        alarms=_alarms(found["alarms"]),
        sections=_sections(run, found),
        examples=examples(run, texts),
        texts=texts,
        settings=_settings(run),
    )


def _sections(run: Run, found: dict[str, Any]) -> list[Section]:
    """All sections that have something to show."""
    every = [
        about_data.margins(run, found),
        about_data.choice(run, found),
        about_data.lengths(run, found),
        about_data.scores(run, found),
        about_training.accuracy(found),
        about_training.samples(found),
        about_training.cost(found),
        about_training.training(run),
    ]
    return [one for one in every if one.charts or one.tables]


def _facts(run: Run) -> list[tuple[str, str]]:
    config, settings = run.description.get("config") or {}, run.settings
    if not run.description:
        return []
    return [
        ("base model", shown_text(str(config.get("base_model")), 200)),
        ("trained", "an adapter" if config.get("adapter") else "all weights"),
        ("loss", f"{run.description['loss']}, beta {run.description['beta']:g}"),
        ("rewards in", run.unit),
        ("pairs", f"{run.total:,}"),
        ("held out", f"{run.description.get('evaluation_pairs') or 0:,}"),
        ("keeps", keeps(settings.get("selection", "irm"), settings["selection_ratio"])),
        ("samples", f"{settings['bootstrap_ratio']:g} N, of {settings['candidates']} answers each, "
         f"ranked by {run.labeler}"
         if settings["bootstrap_ratio"] else "nothing"),
        ("reference", _reference(run)),
        ("gamma", f"{settings['gamma']:g}"),
        ("seed", str(run.description.get("seed"))),
    ]  # fmt: skip


def _reference(run: Run) -> str:
    if is_reference_free(run.description["loss"]):
        return "none"
    return "theta_0" if run.settings.get("reference") == "initial" else "theta_{t-1}"


def _overview(found: dict[str, Any]) -> Table:
    raised = [(alarm["iteration"], alarm["raised"]) for alarm in found["alarms"]]
    kept_sets = found["jaccard"] or {"iterations": [], "matrix": []}
    places = {number: place for place, number in enumerate(kept_sets["iterations"])}
    rows = []
    for one in found["iterations"]:
        pairs, at = one["pairs"] or {}, one["iteration"]
        shared = None
        if at in places and at - 1 in places:
            shared = kept_sets["matrix"][places[at]][places[at - 1]]
        unfinished = " (not done)" if pairs and "train" not in one["seconds"] else ""
        sampled = pairs["bootstrapped_kept"] if pairs.get("bootstrapped_wanted") else None
        rows.append(
            {
                "iteration": str(at),
                "pairs trained": number(pairs.get("trained"), ",") + unfinished,
                "offline kept": number(one.get("kept"), ","),
                "sampled kept": number(sampled, ","),
                "kept above": number(one.get("threshold"), "+.3g"),
                "offline accuracy": number(one.get("offline_accuracy"), ".0%"),
                "held-out accuracy": number(value_at(one, "held_out", "accuracy"), ".0%"),
                "Jaccard with last": number(shared, ".2f"),
                "alarms": str(raised.count((at, True))),
            }
        )
    note = "Accuracies are those of the policy it starts from."
    return Table.of("Iterations", rows, note)


def _alarms(judged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per alarm its figures by iteration, the raised ones first."""
    rows: dict[str, dict[str, Any]] = {}
    for alarm in judged:
        row = rows.setdefault(
            alarm["name"],
            {
                "name": alarm["name"],
                "threshold": number(alarm["threshold"]),
                "meaning": MEANINGS.get(alarm["name"], ""),
                "figures": [],
                "texts": [],
            },
        )
        figure = f"{number(alarm['figure'], '.2g')} (t = {alarm['iteration']})"
        row["figures"].append((figure, alarm["raised"]))
        if alarm["raised"]:
            row["texts"].append(f"Iteration {alarm['iteration']}: {alarm['text']}")
    return sorted(rows.values(), key=lambda row: not row["texts"])


def _settings(run: Run) -> list[tuple[str, str]]:
    config = run.description.get("config") or {}
    keys = ("learning_rate", "lr_scheduler", "num_epochs", "micro_batch_size", "adapter", "lora_r",
            "sequence_len", "optimizer")  # fmt: skip
    shown = [(key, config[key]) for key in keys if config.get(key) is not None]
    shown += [(f"sera.{key}", value) for key, value in sorted(run.settings.items())]
    versions = run.description.get("versions") or {}
    shown += [("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))]
    return [(shown_text(str(key), 80), shown_text(str(value), 300)) for key, value in shown]
