"""What a judge says of every model against the baseline, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sera_plugin.labeling.judging import (
    Answered,
    Comparison,
    Judge,
    ScoringJudge,
    Verdict,
    by_scores,
)
from sera_plugin.rundir.progress import progress
from sera_plugin.tools.evaluation.answers import Answer
from sera_plugin.tools.evaluation.prompts import Prompt
from sera_plugin.tools.evaluation.winrate import FloatArray


@dataclass(frozen=True)
class Judged:
    """One model, judged. Everything is in the order of the prompts.

    Attributes:
        verdicts: on its answers against the baseline's; None for the baseline, and for a prompt
            that either has not answered.
        scores: (n,) of a judge that scores, nan where there is none; else None.
    """

    verdicts: list[Verdict | None]
    scores: FloatArray | None = None

    @property
    def outcomes(self) -> FloatArray:
        """(n,) 0 to 1, nan where there is none."""
        found = [None if one is None else one.outcome for one in self.verdicts]
        return np.array([np.nan if one is None else one for one in found])

    @property
    def inconsistent(self) -> float | None:
        """The share of verdicts that turn with the order of the answers; None if none can."""
        known = [one.consistent for one in self.verdicts if one is not None]
        known = [one for one in known if one is not None]
        return known.count(False) / len(known) if known else None


def judge_all(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer | None]]
) -> list[Judged]:
    """Every model against the first one.

    Args:
        judge: who judges.
        prompts: what was asked.
        answers: per model, in the order of the prompts.

    Raises:
        JudgeFailed: as the judge does.
    """
    if isinstance(judge, ScoringJudge):
        scores = _scores(judge, prompts, answers)
        return [
            Judged(_compared(mine, scores[0]) if model else [None] * len(prompts), mine)
            for model, mine in enumerate(scores)
        ]
    asked = {
        (model, row): Comparison(prompts[row].question, mine.text, theirs.text)
        for model in range(1, len(answers))
        for row, (mine, theirs) in enumerate(zip(answers[model], answers[0], strict=True))
        if mine is not None and theirs is not None
    }
    judged = [Judged([None] * len(prompts)) for _ in answers]
    places = list(asked)
    with progress("judging", len(asked), "verdict") as advance:
        for index, verdict in judge.compare(list(asked.values())):
            model, row = places[index]
            judged[model].verdicts[row] = verdict
            advance(1)
    return judged


def _scores(
    judge: ScoringJudge, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer | None]]
) -> FloatArray:
    """(models, prompts) scores, nan where there is none."""
    asked = {
        (model, row): Answered(prompts[row].question, answer.text)
        for model, each in enumerate(answers)
        for row, answer in enumerate(each)
        if answer is not None
    }
    scores = np.full((len(answers), len(prompts)), np.nan)
    places = list(asked)
    with progress("judging", len(asked), "answer") as advance:
        for index, score in judge.score_all(list(asked.values())):
            scores[places[index]] = np.nan if score is None else score
            advance(1)
    return scores


def _compared(mine: FloatArray, theirs: FloatArray) -> list[Verdict | None]:
    return [
        None if np.isnan(one) or np.isnan(other) else by_scores(one, other)
        for one, other in zip(mine.tolist(), theirs.tolist(), strict=True)
    ]
