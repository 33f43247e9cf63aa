"""The report on a run: one HTML page."""

from __future__ import annotations

from pathlib import Path

from sera_plugin.config.kinds import LABELERS, SELECTIONS, is_reference_free
from sera_plugin.rundir.checksums import COMMAND, write_text
from sera_plugin.tools.report.figures import figures
from sera_plugin.tools.report.output import fill, shown_text
from sera_plugin.tools.report.pairs import examples
from sera_plugin.tools.report.reading import Run, find_run
from sera_plugin.tools.report.sections import charts_of, cost_table, jaccard_table
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
    """Read the run in `output_dir` and write its report, to `report.html` there unless told.

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
    found, texts, settings = figures(run), Texts(run), run.settings
    return fill(
        "page.html",
        run=run,
        title=shown_text(run.root.parent.resolve().name or "SeRA run", 120),
        figures=found,
        charts=charts_of(run, found),
        jaccard=jaccard_table(found),
        cost=cost_table(found),
        examples=examples(run, texts),
        texts=texts,
        meanings=MEANINGS,
        by_margin=any(one.get("threshold") is not None for one in found["iterations"]),
        selection=SELECTIONS.get(settings.get("selection", "")),
        keeps=SELECTIONS[settings.get("selection", "irm")].keeps.format(
            ratio=settings.get("selection_ratio", 1)
        ),
        labeler=LABELERS[run.labeler],
        reference_free=is_reference_free(run.description.get("loss", "dpo")),
        settings=_settings(run),
    )


def _settings(run: Run) -> list[tuple[str, str]]:
    keys = ("learning_rate", "lr_scheduler", "num_epochs", "micro_batch_size", "adapter", "lora_r",
            "sequence_len", "optimizer")  # fmt: skip
    shown = [(key, run.config[key]) for key in keys if run.config.get(key) is not None]
    shown += [(f"sera.{key}", value) for key, value in sorted(run.settings.items())]
    versions = run.description.get("versions") or {}
    shown += [("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))]
    return [(shown_text(str(key), 80), shown_text(str(value), 300)) for key, value in shown]
