"""Judges: who says which of two answers is better, or how good one is.

- `prompts`   what a judge is asked, and how its replies are read
- `api`       judges behind an OpenAI-compatible endpoint
- `reward_model`   a sequence-classification model on this machine
- `choose`    a judge by what the command line calls it; a Python function that knows the truth

Nothing here but `reward_model` knows torch, and nothing the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class JudgeFailed(RuntimeError):
    """Judging stopped; the message says why and what to do. What was judged is kept."""


@dataclass(frozen=True)
class Answered:
    """A question with one answer to it."""

    question: str
    answer: str


@dataclass(frozen=True)
class Comparison:
    """A question with two answers to it."""

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """What a judge thinks of the first answer against the second.

    `orders` has for each order in which the two were shown (the first answer first, then second):
    1 the first answer is better, 0.5 a tie, 0 the second is better, None no verdict. A judge that
    scores answers one by one has one entry.
    """

    orders: tuple[float | None, ...]

    @property
    def outcome(self) -> float | None:
        """The mean over the orders; None where one is missing, because half would be biased."""
        seen = [one for one in self.orders if one is not None]
        return sum(seen) / len(seen) if len(seen) == len(self.orders) else None

    @property
    def consistent(self) -> bool | None:
        """Whether the verdict is the same in both orders; None where that is unknown."""
        if len(self.orders) < 2 or self.outcome is None:
            return None
        return len(set(self.orders)) == 1


@dataclass
class Replies:
    """Replies of a judge that is paid by the token."""

    count: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Usage:
    """What judging took."""

    asked: Replies = field(default_factory=Replies)  # replies that were asked for
    cached: Replies = field(default_factory=Replies)  # replies that were there from before
    retries: int = 0  # requests that were made again after an error
    malformed: int = 0  # replies without a verdict that can be read; the judge was asked again
    unparsed: int = 0  # verdicts that were given up, so are missing, after several such replies
    refused: int = 0  # verdicts that are missing because the endpoint refused the request

    def add(self, other: Usage) -> None:
        """Count another's in."""
        for total, more in ((self, other), (self.asked, other.asked), (self.cached, other.cached)):
            for name, count in vars(more).items():
                if isinstance(count, int):
                    setattr(total, name, getattr(total, name) + count)


class Judge(Protocol):
    """Compares answers."""

    #: For people.
    name: str
    #: What determines its verdicts, without secrets, for records.
    description: dict[str, Any]
    usage: Usage

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Yield (index, verdict) of every comparison as they are done, in any order.

        Raises:
            JudgeFailed: if it cannot go on.
        """
        ...


class ScoringJudge:
    """A judge that gives each answer a number; the larger one wins, equal ones tie."""

    def __init__(self, name: str, description: dict[str, Any]) -> None:
        self.name, self.description = name, description
        self.usage = Usage()

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """Yield (index, score) of every answer as they are done, in any order, None without one.

        Raises:
            JudgeFailed: if it cannot go on.
        """
        raise NotImplementedError

    def score_all(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """See `score`. An answer that occurs several times is scored once."""
        places: dict[Answered, list[int]] = {}
        for index, one in enumerate(answers):
            places.setdefault(one, []).append(index)
        of_each = list(places.values())
        for index, score in self.score(list(places)):
            for place in of_each[index]:
                yield place, score

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """See `Judge.compare`."""
        firsts = [Answered(one.question, one.first) for one in comparisons]
        seconds = [Answered(one.question, one.second) for one in comparisons]
        scores: dict[int, float | None] = {}
        for side, score in self.score_all(firsts + seconds):
            scores[side] = score
            index = side % len(firsts)
            if index in scores and index + len(firsts) in scores:
                yield index, by_scores(scores[index], scores[index + len(firsts)])


def by_scores(first: float | None, second: float | None) -> Verdict:
    """The verdict that two scores come to."""
    if first is None or second is None:
        return Verdict((None,))
    return Verdict((0.5 * (1 + (first > second) - (first < second)),))
