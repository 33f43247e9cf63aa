"""The report on a run: one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sera_plugin.config.kinds import LABELERS, SELECTIONS, is_reference_free
from sera_plugin.host.run import keeps
from sera_plugin.rundir.checksums import COMMAND, write_text
from sera_plugin.tools.report.figures import figures
from sera_plugin.tools.report.output import Table, fill, number, shown_text, value_at
from sera_plugin.tools.report.pairs import examples
from sera_plugin.tools.report.reading import Run, find_run
from sera_plugin.tools.report.sections import sections
from sera_plugin.tools.report.tokens import Texts

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
    run = Run(find_run(output_dir))
    path = path or run.root / "report.html"
    # Training asks for a report too, and it is not training that has to be done again.
    again = COMMAND._replace(then="run `axolotl sera report` again")
    write_text(path, render(run), again)
    return path


def render(run: Run) -> str:
    """The page."""
    found, texts = figures(run), Texts(run)
    return fill(
        "page.html",
        run=run,
        title=shown_text(run.root.parent.resolve().name or "SeRA run", 120),
        facts=_facts(run) if run.description else [],
        overview=_overview(found),
        alarms=_alarms(found["alarms"]),
        sections=sections(run, found),
        by_margin=any(one.get("threshold") is not None for one in found["iterations"]),
        selection=SELECTIONS.get(run.settings.get("selection", "")),
        labeler=LABELERS[run.labeler],
        examples=examples(run, texts),
        texts=texts,
        settings=_settings(run),
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    description, settings = run.description, run.settings
    sampled = settings["bootstrap_ratio"]
    samples = (
        f"{sampled:g} N, of {settings['candidates']} answers each, ranked by {run.labeler}"
        if sampled
        else "nothing"
    )
    reference = "theta_0" if settings.get("reference") == "initial" else "theta_{t-1}"
    return [
        ("base model", shown_text(str(run.config.get("base_model")), 200)),
        ("trained", "an adapter" if run.config.get("adapter") else "all weights"),
        ("loss", f"{description['loss']}, beta {description['beta']:g}"),
        ("rewards in", run.unit),
        ("pairs", f"{run.total:,}"),
        ("held out", f"{description.get('evaluation_pairs') or 0:,}"),
        ("keeps", keeps(settings.get("selection", "irm"), settings["selection_ratio"])),
        ("samples", samples),
        ("reference", "none" if is_reference_free(description["loss"]) else reference),
        ("gamma", f"{settings['gamma']:g}"),
        ("seed", str(description.get("seed"))),
    ]


def _overview(found: dict[str, Any]) -> Table:
    raised = [alarm["iteration"] for alarm in found["alarms"] if alarm["raised"]]
    kept_sets = found["jaccard"] or {"iterations": [], "matrix": []}
    places = {iteration: place for place, iteration in enumerate(kept_sets["iterations"])}
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
                "alarms": str(raised.count(at)),
            }
        )
    return Table.of("Iterations", rows, "Accuracies are those of the policy it starts from.")


def _alarms(judged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was judged by alarm, those that were ever raised first."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in judged:
        by_name.setdefault(one["name"], []).append(one)
    rows = [
        {
            "name": name,
            "meaning": MEANINGS.get(name, ""),
            "judged": every,
            "raised": [one for one in every if one["raised"]],
        }
        for name, every in by_name.items()
    ]
    return sorted(rows, key=lambda row: not row["raised"])


def _settings(run: Run) -> list[tuple[str, str]]:
    keys = ("learning_rate", "lr_scheduler", "num_epochs", "micro_batch_size", "adapter", "lora_r",
            "sequence_len", "optimizer")  # fmt: skip
    shown = [(key, run.config[key]) for key in keys if run.config.get(key) is not None]
    shown += [(f"sera.{key}", value) for key, value in sorted(run.settings.items())]
    versions = run.description.get("versions") or {}
    shown += [("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))]
    return [(shown_text(str(key), 80), shown_text(str(value), 300)) for key, value in shown]
