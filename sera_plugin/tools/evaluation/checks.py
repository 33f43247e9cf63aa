"""Answers that a function checks one by one, as IFEval does: which share of them passes."""

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from sera_plugin.config.labelers import FunctionConfig
from sera_plugin.config.quoting import quoted
from sera_plugin.labeling.judging import Answered, JudgeFailed
from sera_plugin.labeling.judging.function import FunctionJudge
from sera_plugin.rundir.journal import Journal
from sera_plugin.rundir.progress import progress
from sera_plugin.tools.evaluation.answers import Answer, Prompt
from sera_plugin.tools.evaluation.winrate import FloatArray


class Check:
    """A function (row, answer) -> whether the answer passes, or 0 to 1; None where it cannot tell.

    `row` is the prompt's row as the file has it, with whatever columns the check needs; a date or
    bytes come as text. A ValueError if there is no such function.
    """

    def __init__(self, spec: str, journal: Journal) -> None:
        self.spec = spec
        self._function = FunctionJudge(FunctionConfig.parse({"call": spec}, "--check: "), journal)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer | None]) -> FloatArray:
        """(n,) 0 to 1, nan without an answer and where it cannot tell.

        JudgeFailed if the function returns anything else, or nearly always fails.
        """
        there = [row for row, one in enumerate(answers) if one is not None]
        found = np.full(len(prompts), np.nan)
        asked = [self._asked(prompts[row].content, cast(Answer, answers[row])) for row in there]
        with progress(f"checking with {self.spec}", len(there), "answer") as advance:
            for index, value in self._function.score(asked):
                if value is not None and not 0 <= value <= 1:
                    raise JudgeFailed(
                        f"{self.spec} returned {value} on row {prompts[there[index]].row} and the "
                        f"answer {quoted(asked[index].answer)}. A check returns True, False, a "
                        "number from 0 to 1, or None where it cannot tell."
                    )
                found[there[index]] = np.nan if value is None else value
                advance(1)
        return found

    def _asked(self, row: Any, answer: Answer) -> Answered:
        """What the function is called with: a row takes the place of a judge's question."""
        return Answered(json.loads(json.dumps(row, default=str)), answer.text)
