"""A Python function as a judge, for tasks whose truth can be computed."""

from __future__ import annotations

import importlib
import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.labeling.judging import Answered, JudgeFailed, ScoringJudge


class FunctionJudge(ScoringJudge):
    """Scores an answer with `function(question, answer)`.

    Args:
        spec: `package.module:function` or `path/to/file.py:function`. The code is run.

    Raises:
        ValueError: if there is no such module, file or function.
    """

    def __init__(self, spec: str) -> None:
        super().__init__(spec, {"function": spec})
        self._function = load_function(spec)

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
            if score is not None and not math.isfinite(score):
                raise JudgeFailed(
                    f"{self.name} returned {score} on {given}. It must return a finite number, or "
                    "None where it cannot tell."
                )
            if score is None:
                self.usage.unparsed += 1
            yield index, score


def load_function(spec: str) -> Callable[[str, str], Any]:
    """The function that `module:function` or `file.py:function` names.

    Raises:
        ValueError: naming what is missing.
    """
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
