"""One evaluation: answers, verdicts, figures, and the files they are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sera_plugin.labeling.judging import (
    Answered,
    Comparison,
    Judge,
    ScoringJudge,
    by_scores,
    make_judge,
)
from sera_plugin.rundir.checksums import COMMAND, explained, write_text
from sera_plugin.rundir.journal import Journal
from sera_plugin.rundir.progress import progress
from sera_plugin.tools.evaluation.answers import Answer, Decoding, given, sampled
from sera_plugin.tools.evaluation.models import Model, find_models
from sera_plugin.tools.evaluation.prompts import Prompt, read_prompts
from sera_plugin.tools.evaluation.results import Evaluation, Judged, figures, page
from sera_plugin.tools.report.output import json_text

Asked = TypeVar("Asked")
Said = TypeVar("Said")


def evaluate(
    specs: Sequence[str],
    prompt_file: Path,
    judge_spec: str | None,
    output: Path,
    decoding: Decoding,
    iterations: bool = False,
    limit: int | None = None,
    vllm_python: str | None = None,
) -> dict[str, Any]:
    """Compare models on a set of prompts; everything that is done is kept in `output`.

    For the arguments see `find_models`, `read_prompts`, `make_judge` (None only samples answers)
    and `Engine`.

    Returns:
        The figures, which are in `output/results.json` too.

    Raises:
        ValueError: if something that is asked for is not there or cannot be used.
        JudgeFailed, SamplingFailed, OSError: what was finished is kept.
    """
    if "{prompt}" not in (decoding.prompt_format or "{prompt}"):
        raise ValueError("--prompt-format has no {prompt}, where the prompt goes.")
    prompts = read_prompts(prompt_file, limit, decoding.seed)
    models = find_models(specs, iterations)
    # Before anything is sampled: one of these files may be of other prompts.
    there = {one.name: given(one.answers, prompts) for one in models if one.answers is not None}
    with ExitStack() as files:
        judge = None
        if judge_spec is not None:
            judge = make_judge(judge_spec, files.enter_context(Journal(output / "judge.jsonl")))

        def answers_of(model: Model) -> list[Answer | None]:
            if model.name in there:
                return there[model.name]
            journal = files.enter_context(Journal(output / "answers" / f"{model.file}.jsonl"))
            engine = partial(_engine, model, decoding, vllm_python, output / "vllm.log")
            return sampled(model, prompts, decoding, journal, engine)

        answers = [answers_of(model) for model in models]
        judged = [] if judge is None else judge_all(judge, prompts, answers)
    found = Evaluation(prompt_file, prompts, models, decoding, answers, judge, judged)
    result = figures(found)
    _write(found, result, output)
    return result


def _engine(*arguments: Any) -> Any:
    from sera_plugin.tools.evaluation.engine import Engine  # loads torch

    return Engine(*arguments)


def judge_all(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer | None]]
) -> list[Judged]:
    """Every model against the first one, from answers per model in the order of the prompts.

    Raises:
        JudgeFailed: as the judge does.
    """
    there = {
        (model, row): answer
        for model, each in enumerate(answers)
        for row, answer in enumerate(each)
        if answer is not None
    }
    judged = [Judged([None] * len(prompts)) for _ in answers]
    if not isinstance(judge, ScoringJudge):
        comparisons = {
            (model, row): Comparison(prompts[row].question, mine.text, there[0, row].text)
            for (model, row), mine in there.items()
            if model and (0, row) in there
        }
        for (model, row), verdict in _each(comparisons, judge.compare, "verdict"):
            judged[model].verdicts[row] = verdict
        return judged
    scores = np.full((len(answers), len(prompts)), np.nan)
    asked = {
        (model, row): Answered(prompts[row].question, answer.text)
        for (model, row), answer in there.items()
    }
    for place, score in _each(asked, judge.score_all, "answer"):
        scores[place] = np.nan if score is None else score
    for (model, row), score in np.ndenumerate(scores):
        if model and not np.isnan([score, scores[0, row]]).any():
            judged[model].verdicts[row] = by_scores(float(score), float(scores[0, row]))
    return [Judged(one.verdicts, mine) for one, mine in zip(judged, scores, strict=True)]


def _each(
    asked: Mapping[tuple[int, int], Asked],
    ask: Callable[[Sequence[Asked]], Iterator[tuple[int, Said]]],
    unit: str,
) -> Iterator[tuple[tuple[int, int], Said]]:
    """What a judge says, by (model, row)."""
    places = list(asked)
    with progress("judging", len(asked), unit) as advance:
        for index, said in ask(list(asked.values())):
            yield places[index], said
            advance(1)


def _write(found: Evaluation, result: dict[str, Any], output: Path) -> None:
    with explained(output, COMMAND):
        (output / "outputs").mkdir(parents=True, exist_ok=True)
    for model, answers in zip(found.models, found.answers, strict=True):
        rows = [
            {"instruction": prompt.question, "output": answer.text, "generator": model.name}
            for prompt, answer in zip(found.prompts, answers, strict=True)
            if answer is not None
        ]
        write_text(output / "outputs" / f"{model.file}.json", json.dumps(rows, indent=1))
    if found.judged:
        verdicts = [
            {
                "row": prompt.row,
                "category": prompt.category,
                "model": model.name,
                "outcome": verdict.outcome,
                "orders": verdict.orders,
            }
            for model, judged in zip(found.models, found.judged, strict=True)
            for prompt, verdict in zip(found.prompts, judged.verdicts, strict=True)
            if verdict is not None
        ]
        lines = "".join(f"{json.dumps(one)}\n" for one in verdicts)
        write_text(output / "verdicts.jsonl", lines)
    write_text(output / "results.json", json_text(result) + "\n")
    write_text(output / "eval.html", page(found, result))
