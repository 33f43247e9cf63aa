"""A judge by what the command line calls it, such as a Python function that computes the truth."""

from __future__ import annotations

import importlib
import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sera_plugin.config.judge import read_judge
from sera_plugin.config.quoting import quoted
from sera_plugin.labeling.judging import Answered, Judge, JudgeFailed, ScoringJudge
from sera_plugin.labeling.judging.api import api_judge
from sera_plugin.rundir.journal import Journal


def make_judge(spec: str, journal: Journal) -> Judge:
    """The judge that a name stands for, which keeps what it says in the journal.

    Args:
        spec: a YAML file with an API judge, a directory with a reward model, or a function as
            `module:function` or `file.py:function`.

    Raises:
        ValueError: if it is none of these, or cannot be used.
        JudgeFailed: if the key of an API judge is not there.
    """
    if spec.endswith((".yaml", ".yml")):
        return api_judge(read_judge(Path(spec)), journal)
    if Path(spec).is_dir():
        from sera_plugin.labeling.judging.reward_model import RewardModelJudge

        return RewardModelJudge(Path(spec), journal)
    if ":" in spec:
        return FunctionJudge(spec)
    raise ValueError(
        f"judge: {quoted(spec)} is neither a YAML file, a directory nor a function. Give "
        "judge.yaml (an API judge), the directory of a reward model, or "
        "module:function or file.py:function."
    )


class FunctionJudge(ScoringJudge):
    """Scores an answer with `function(question, answer)`. The code is run.

    Raises:
        ValueError: naming the module, file or function of `spec` that is missing.
    """

    def __init__(self, spec: str) -> None:
        super().__init__(spec, {"function": spec})
        self._function = _load_function(spec)

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """See `ScoringJudge.score`. None from the function is a missing verdict."""
        for index, one in enumerate(answers):
            given = f"the question {quoted(one.question)} and the answer {quoted(one.answer)}"
            try:
                value = self._function(one.question, one.answer)
                score = None if value is None else float(value)
            except Exception as error:
                raise JudgeFailed(
                    f"{self.name} raised {type(error).__name__}: {error} on {given}. It must "
                    "return a number, or None where it cannot tell."
                ) from error
            if score is None:
                self.usage.unparsed += 1
            elif not math.isfinite(score):
                raise JudgeFailed(
                    f"{self.name} returned {score} on {given}. It must return a finite number, or "
                    "None where it cannot tell."
                )
            yield index, score


def _load_function(spec: str) -> Callable[[str, str], Any]:
    place, _, name = spec.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(
            f"there is no file {place}. Relative paths start in the working directory."
        )
    try:
        if place.endswith(".py"):
            function = runpy.run_path(place).get(name)
        else:
            function = getattr(importlib.import_module(place), name, None)
    except Exception as error:  # whatever the code does while it is imported
        raise ValueError(
            f"{place} cannot be imported: {type(error).__name__}: {error}. A module has to be "
            "installed; a file is named with its path and its ending, file.py:function."
        ) from error
    if not callable(function):
        raise ValueError(f"{place} has no function {quoted(name)}.")
    found: Callable[[str, str], Any] = function
    return found
