"""One evaluation: answers, verdicts, figures, and the files they are kept in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from sera_plugin.labeling.judging.choose import make_judge
from sera_plugin.rundir.checksums import COMMAND, explained, write_text
from sera_plugin.rundir.journal import Journal
from sera_plugin.tools.evaluation.answers import Answer, Decoding, given, sampled
from sera_plugin.tools.evaluation.models import Model, find_models
from sera_plugin.tools.evaluation.prompts import read_prompts
from sera_plugin.tools.evaluation.results import Evaluation, figures
from sera_plugin.tools.evaluation.verdicts import judge_all


def evaluate(
    specs: Sequence[str],
    prompt_file: Path,
    judge_spec: str | None,
    output: Path,
    decoding: Decoding,
    *,
    iterations: bool = False,
    limit: int | None = None,
    vllm_python: str | None = None,
) -> dict[str, Any]:
    """Compare models on a set of prompts; everything that is done is kept in `output`.

    Args:
        specs: see `find_models`.
        prompt_file: see `read_prompts`.
        judge_spec: see `make_judge`; None only samples answers.
        output: a directory of this command's.
        decoding: how answers are sampled.
        iterations: all policies of a run in place of its last.
        limit: how many prompts, drawn by the seed.
        vllm_python: the interpreter of an environment with vLLM, to sample with it.

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
    from sera_plugin.tools.evaluation.engine import load_engine  # loads torch

    return load_engine(*arguments)


def _write(found: Evaluation, result: dict[str, Any], output: Path) -> None:
    from sera_plugin.tools.evaluation.page import page
    from sera_plugin.tools.report.output import json_text

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
        lines = [
            json.dumps(
                {
                    "row": prompt.row,
                    "category": prompt.category,
                    "model": model.name,
                    "outcome": verdict.outcome,
                    "orders": verdict.orders,
                }
            )
            for model, judged in zip(found.models[1:], found.judged[1:], strict=True)
            for prompt, verdict in zip(found.prompts, judged.verdicts, strict=True)
            if verdict is not None
        ]
        write_text(output / "verdicts.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(output / "results.json", json_text(result) + "\n")
    write_text(output / "eval.html", page(found, result))
