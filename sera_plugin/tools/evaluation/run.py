"""One evaluation: answers, verdicts, figures, and the files they are kept in."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sera_plugin.labeling.judging import (
    Answered,
    Comparison,
    Judge,
    ScoringJudge,
    by_scores,
    make_judge,
)
from sera_plugin.rundir.journal import Journal
from sera_plugin.rundir.progress import progress
from sera_plugin.rundir.writing import COMMAND, make_directory, write_text
from sera_plugin.tools.evaluation import accuracy
from sera_plugin.tools.evaluation.answers import (
    Decoding,
    Prompt,
    benchmark_answers,
    given,
    read_prompts,
    sampled,
)
from sera_plugin.tools.evaluation.checks import Check
from sera_plugin.tools.evaluation.models import find_models
from sera_plugin.tools.evaluation.results import Entry, Evaluation, figures, page
from sera_plugin.tools.evaluation.rewards import find_rewards, outcomes, read_pairs, scored
from sera_plugin.tools.report.output import json_text


def evaluate(
    specs: Sequence[str],
    prompt_file: Path,
    judge_spec: str | None,
    output: Path,
    decoding: Decoding,
    iterations: bool = False,
    limit: int | None = None,
    vllm_python: str | None = None,
    checks: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare models on a set of prompts; everything that is done is kept in `output`.

    For the arguments see `find_models`, `read_prompts`, `make_judge` (None only samples answers),
    `Engine` and `Check`. Returns the figures, which are in `output/results.json` too.

    A ValueError if something that is asked for is not there or cannot be used; after JudgeFailed,
    SamplingFailed or OSError what was finished is kept.
    """
    require_place(decoding.prompt_format)
    prompts = read_prompts(prompt_file, limit, decoding.seed)
    models = find_models(specs, iterations)
    # Before anything is sampled: one of these files may be of other prompts.
    there = {one.name: given(one.answers, prompts) for one in models if one.answers is not None}
    with ExitStack() as files:
        checking = []
        if checks:
            kept = files.enter_context(Journal(output / "checks.jsonl"))
            checking = [Check(spec, kept) for spec in dict.fromkeys(checks)]
        judge = None
        if judge_spec is not None:
            judge = make_judge(judge_spec, files.enter_context(Journal(output / "judge.jsonl")))
        entries = []
        for model in models:
            if model.name not in there:
                journal = files.enter_context(Journal(output / "answers" / f"{model.file}.jsonl"))
                engine = partial(_engine, model, decoding, vllm_python, output / "vllm.log")
                there[model.name] = sampled(model, prompts, decoding, journal, engine)
            entries.append(Entry(model, there[model.name], [None] * len(prompts)))
        for entry in entries:
            entry.checks = {check.spec: check(prompts, entry.answers) for check in checking}
        if judge is not None:
            judge_all(judge, prompts, entries)
    found = Evaluation(prompt_file, prompts, decoding, entries, judge)
    result = figures(found)
    _write(found, result, output)
    return result


def rate_rewards(
    specs: Sequence[str],
    pair_file: Path,
    output: Path,
    prompt_format: str | None = None,
    iterations: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How often the models' implicit rewards rank labelled pairs right; see `evaluate`.

    For the arguments see `find_models`, `read_pairs` and `find_rewards`.
    """
    require_place(prompt_format)
    pairs = read_pairs(pair_file, limit, seed)
    models = find_models(specs, iterations)
    rankings, notes = find_rewards(models)
    scores = {}
    with Journal(output / "scores.jsonl") as journal:
        for model in {one.identity: one for each in rankings for one in each.models}.values():
            engine = partial(_scores, model, prompt_format)
            scores[model.identity] = scored(model, pairs, prompt_format, journal, engine)
    found = [(one, outcomes(one, pairs, scores)) for one in rankings]
    result = accuracy.figures(pair_file, pairs, prompt_format, found, notes)
    make_directory(output, COMMAND)
    about = [
        {"row": pair.row, "subset": pair.subset, "reward": one.name, "outcome": _known(right)}
        for one, outcome in found
        for pair, right in zip(pairs, outcome.tolist(), strict=True)
    ]
    _clear(output)
    _write_lines(output / "outcomes.jsonl", about)
    write_text(output / "results.json", json_text(result) + "\n")
    named = {model.name: model.source for model in models}
    write_text(output / "eval.html", accuracy.page(result, named))
    return result


def require_place(prompt_format: str | None) -> None:
    """ValueError for a prompt format without a place for the prompt."""
    if "{prompt}" not in (prompt_format or "{prompt}"):
        raise ValueError("--prompt-format has no {prompt}, where the prompt goes.")


def _scores(*arguments: Any) -> Any:
    from sera_plugin.tools.evaluation.scores import Scores  # loads torch

    return Scores(*arguments)


def _engine(*arguments: Any) -> Any:
    from sera_plugin.tools.evaluation.engine import Engine  # loads torch

    return Engine(*arguments)


def judge_all(judge: Judge, prompts: Sequence[Prompt], entries: Sequence[Entry]) -> None:
    """Put in what the judge says of every model's answers against those of the first one."""
    texts = {
        (number, row): answer.text
        for number, entry in enumerate(entries)
        for row, answer in enumerate(entry.answers)
        if answer is not None
    }
    if not isinstance(judge, ScoringJudge):
        comparisons = {
            (number, row): Comparison(prompts[row].question, text, texts[0, row])
            for (number, row), text in texts.items()
            if number and (0, row) in texts
        }
        for (number, row), verdict in _each(comparisons, judge.compare, "verdict"):
            entries[number].verdicts[row] = verdict
        return
    asked = {place: Answered(prompts[place[1]].question, text) for place, text in texts.items()}
    for entry in entries:
        entry.scores = np.full(len(prompts), np.nan)
    for (number, row), score in _each(asked, judge.score_all, "answer"):
        entries[number].scores[row] = np.nan if score is None else score
    for entry in entries[1:]:
        for row, both in enumerate(zip(entry.scores, entries[0].scores, strict=True)):
            if not np.isnan(both).any():
                entry.verdicts[row] = by_scores(*map(float, both))


def _each(
    asked: Mapping[tuple[int, int], Any], ask: Callable[[list[Any]], Iterable[Any]], unit: str
) -> Iterator[tuple[tuple[int, int], Any]]:
    """What a judge says, by (model, row)."""
    places = list(asked)
    with progress("judging", len(asked), unit) as advance:
        for index, said in ask(list(asked.values())):
            yield places[index], said
            advance(1)


def _write(found: Evaluation, result: dict[str, Any], output: Path) -> None:
    _clear(output)
    make_directory(output / "outputs", COMMAND)
    verdicts, checked = [], []
    for entry in found.entries:
        name, rows = entry.model.name, []
        for spec, outcome in entry.checks.items():
            for prompt, value in zip(found.prompts, outcome.tolist(), strict=True):
                about = {"row": prompt.row, "category": prompt.category, "model": name}
                checked.append(about | {"check": spec, "outcome": _known(value)})
        for prompt, one, verdict in zip(found.prompts, entry.answers, entry.verdicts, strict=True):
            if one is not None:
                row = {"instruction": prompt.question, "output": one.text, "generator": name}
                rows.append(row)
            if verdict is not None:
                about = {"row": prompt.row, "category": prompt.category, "model": name}
                verdicts.append(about | {"outcome": verdict.outcome, "orders": verdict.orders})
        write_text(output / "outputs" / f"{entry.model.file}.json", json.dumps(rows, indent=1))
        # The judges look for a file by the name in it. One that was given is there already.
        lines = list(benchmark_answers(entry.model.file, found.prompts, entry.answers))
        if lines and entry.model.answers is None:
            make_directory(output / "model_answer", COMMAND)
            _write_lines(output / "model_answer" / f"{entry.model.file}.jsonl", lines)
    if checked:
        _write_lines(output / "outcomes.jsonl", checked)
    if found.judge is not None:
        _write_lines(output / "verdicts.jsonl", verdicts)
    write_text(output / "results.json", json_text(result) + "\n")
    write_text(output / "eval.html", page(found, result))


def _clear(output: Path) -> None:
    """No line of an earlier evaluation stays beside this one's figures."""
    for name in ("verdicts.jsonl", "outcomes.jsonl"):
        (output / name).unlink(missing_ok=True)


def _known(outcome: float) -> float | None:
    return None if math.isnan(outcome) else outcome


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
