"""Who ranks a prompt's candidates: one protocol, a module for each who does.

A labeler gives candidates numbers; pairing the best with the worst is the same for all of them
(`sera_plugin.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.tokens import TokenColumn

FloatArray = npt.NDArray[np.float64]

#: `finish_reason` of a candidate that was not sampled: the dataset's chosen answer.
DATASET = "dataset"

#: The iteration from which each can rank: an implicit reward compares two policies, and the first
#: iteration has one.
FIRST_ITERATION: Mapping[str, int] = {
    "implicit": 2,
    "reward_model": 1,
    "judge": 1,
    "self_judge": 1,
    "spin": 1,
}


def first_iteration(selection_ratio: float, labeler: str) -> int:
    """The iteration from which a run selects and samples: 2, as in the paper.

    1 where no offline pairs are asked for (`selection_ratio: 0`) and whoever ranks the samples
    needs no earlier policy: the run is then on samples from its first step (SPIN, OAIF).
    """
    return 2 if selection_ratio else FIRST_ITERATION[labeler]


@dataclass(frozen=True)
class Ranked:
    """Candidates to rank, n in all, those of a prompt next to each other.

    Attributes:
        iteration: t, 1-based; they are samples of theta_{t-1}.
        per_prompt: how many of them belong to a prompt, the same for all.
        prompts, answers: (n,) token ids; the end token included.
        finish_reasons: (n,) why each ended.
        logps: (n,) nats under each policy that the labeler asked for, newest first.
    """

    iteration: int
    per_prompt: int
    prompts: TokenColumn
    answers: TokenColumn
    finish_reasons: Sequence[str]
    logps: Sequence[FloatArray]


def first_places(answers: Sequence[Hashable], per_prompt: int) -> list[int]:
    """(n,) where each answer occurs first among those to its prompt: all are asked about once.

    Args:
        answers: (n,) anything that is equal where two answers are, those of a prompt in a row.
        per_prompt: how many belong to a prompt.
    """
    places: dict[Hashable, int] = {}
    return [
        places.setdefault((index // per_prompt, one), index) for index, one in enumerate(answers)
    ]


class Labeler(Protocol):
    """Ranks candidates."""

    #: What it has to tell, for summary.json: `name` as in `sera.labeler`, calls, failures.
    report: dict[str, Any]

    def policies(self, iteration: int) -> int:
        """How many policies' log-probabilities it needs: theta_{t-1} and so many before, >= 1."""
        ...

    def complete(self, samples: pa.Table, chosen: TokenColumn) -> pa.Table:
        """Add candidates that are not sampled: the dataset's chosen answers, marked `DATASET`.

        Args:
            samples: rows of candidates.parquet before they are scored, as many per prompt.
            chosen: (N,) the dataset's chosen answers.

        Returns:
            The same columns in the order of (row, candidate), as many per prompt.
        """
        ...

    def rewards(self, ranked: Ranked) -> FloatArray:
        """(n,) larger is better; NaN for a candidate that could not be ranked."""
        ...


class Ranker:
    """What most labelers have in common: theta_{t-1} is enough, and nothing is added."""

    def __init__(self, name: str) -> None:
        self.report: dict[str, Any] = {"name": name}

    def policies(self, iteration: int) -> int:
        """See `Labeler.policies`."""
        return 1

    def complete(self, samples: pa.Table, chosen: TokenColumn) -> pa.Table:
        """See `Labeler.complete`."""
        return samples
