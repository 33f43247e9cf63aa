"""A judge ranks: a reward model (the paper's OAIF row, Guo et al. 2024) or an endpoint.

A judge that gives numbers gives rewards. One that compares meets every two different candidates of
a prompt, and a candidate's reward is its share of wins, a tie counting half. Candidates that read
the same have one reward; where all of a prompt's do, that is a half.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sera_plugin.algorithm.protocols import FloatArray, Ranked, SamplingSettings
from sera_plugin.config.quoting import quoted
from sera_plugin.labeling.conversation import Conversation
from sera_plugin.labeling.judging import Answered, Comparison, Judge, ScoringJudge
from sera_plugin.labeling.judging.api import api_judge
from sera_plugin.labeling.ranker import Ranker, first_places
from sera_plugin.rundir.journal import Journal
from sera_plugin.rundir.progress import progress
from sera_plugin.rundir.ranks import Ranks

if TYPE_CHECKING:
    from sera_plugin.labeling.labelers import Labelers


class Judged(Ranker):
    """Rewards from a judge, which rank 0 asks. What it says is kept in the journal."""

    def __init__(
        self,
        name: str,
        judge: Callable[[Journal], Judge],
        journal: Callable[[], AbstractContextManager[Journal]],
        conversation: Conversation,
        ranks: Ranks,
        quiet: bool,
    ) -> None:
        super().__init__(name)
        self.judge, self.journal, self.conversation = judge, journal, conversation
        self.ranks, self.quiet = ranks, quiet

    @classmethod
    def open_judge(cls, run: Labelers, journal: Journal) -> Judge:
        """The judge that the configuration names."""
        raise NotImplementedError

    @classmethod
    def make(
        cls, run: Labelers, iteration: int, settings: SamplingSettings, optimizer: Any
    ) -> Ranker:
        """See `Ranker.make`."""
        name, judge = run.method.config.labeler, partial(cls.open_judge, run)
        return cls(name, judge, run.journal, run.conversation, run.ranks, run.quiet)

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`.

        Raises:
            ValueError: if the judge cannot be used.
            JudgeFailed: if it stops answering. What it has said is kept and not asked again.
        """
        found = np.zeros(len(ranked.answers))
        if self.ranks.main:
            questions = list(map(self.conversation.question, ranked.prompts))
            answers = list(map(self.conversation.answer, ranked.answers))
            with self.journal() as journal:
                judge = self.judge(journal)
                if isinstance(judge, ScoringJudge):
                    found = self._scores(judge, questions, answers)
                else:
                    found = self._wins(judge, questions, answers, ranked.per_prompt)
                self.report |= {"judge": judge.name, "usage": asdict(judge.usage)}
        # NaN would spread to every rank's sum all the same.
        return self.ranks.sum(found)

    def _scores(self, judge: ScoringJudge, questions: list[str], answers: list[str]) -> FloatArray:
        found = np.full(len(answers), np.nan)
        given = list(map(Answered, questions, answers))
        with progress("judging", len(given), "verdict", self.quiet) as advance:
            for index, score in judge.score_all(given):
                found[index] = np.nan if score is None else score
                advance(1)
        return found

    def _wins(
        self, judge: Judge, questions: list[str], answers: list[str], per_prompt: int
    ) -> FloatArray:
        first = first_places(answers, per_prompt)
        pairs = [
            pair
            for begin in range(0, len(answers), per_prompt)
            for pair in combinations(dict.fromkeys(first[begin : begin + per_prompt]), 2)
        ]
        met = [Comparison(questions[one], answers[one], answers[other]) for one, other in pairs]
        won, known = np.zeros((2, len(answers)))
        with progress("judging", len(met), "verdict", self.quiet) as advance:
            for index, verdict in judge.compare(met):
                if verdict.outcome is not None:
                    one, other = pairs[index]
                    won[one] += verdict.outcome
                    won[other] += 1 - verdict.outcome
                    known[[one, other]] += 1
                advance(1)
        unmet = set(first).difference(place for pair in pairs for place in pair)
        found = np.full(len(answers), np.nan)
        found[list(unmet)] = 0.5
        return np.divide(won, known, out=found, where=known > 0)[first]


class RewardModelLabeler(Judged):
    """A local reward model (`sera.reward_model`)."""

    @classmethod
    def check(cls, run: Labelers) -> None:
        """See `Ranker.check`."""
        directory = str(run.method.config.reward_model)
        if not Path(directory, "config.json").exists():
            raise ValueError(
                f"sera.reward_model: {quoted(directory, 200)} has no config.json. Name the "
                "directory of a sequence classification model; relative paths start in the "
                "working directory, and nothing is downloaded."
            )

    @classmethod
    def open_judge(cls, run: Labelers, journal: Journal) -> Judge:
        """See `Judged.open_judge`."""
        from sera_plugin.labeling.judging.reward_model import RewardModelJudge

        return RewardModelJudge(Path(str(run.method.config.reward_model)), journal)


class JudgeLabeler(Judged):
    """A judge behind an API (`sera.judge`)."""

    @classmethod
    def check(cls, run: Labelers) -> None:
        """See `Ranker.check`: the template can be read, and the key is there."""
        cls.open_judge(run, run.journal())

    @classmethod
    def open_judge(cls, run: Labelers, journal: Journal) -> Judge:
        """See `Judged.open_judge`."""
        assert run.method.config.judge is not None
        return api_judge(run.method.config.judge, journal)
