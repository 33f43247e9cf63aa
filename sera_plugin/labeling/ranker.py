"""What most labelers have in common."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sera_plugin.algorithm.protocols import FloatArray, Ranked, SamplingSettings
from sera_plugin.rundir.tokens import TokenColumn

if TYPE_CHECKING:
    from sera_plugin.labeling.labelers import Labelers


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


class Ranker:
    """A `Labeler` that needs theta_{t-1} alone and adds nothing: most do.

    Args:
        name: as in `sera.labeler`.
    """

    def __init__(self, name: str) -> None:
        self.report: dict[str, Any] = {"name": name}

    @classmethod
    def check(cls, run: Labelers) -> None:
        """Find out before training whether it can rank.

        Raises:
            ValueError: if what it ranks with is missing or cannot be used.
            OSError: if a file of it cannot be read.
            JudgeFailed: if the environment variable with a judge's key is missing.
        """

    @classmethod
    def make(
        cls, run: Labelers, iteration: int, settings: SamplingSettings, optimizer: Any
    ) -> Ranker:
        """One for iteration t; see `Labelers.make`."""
        return cls(run.method.config.labeler)

    def complete(self, samples: pa.Table, chosen: TokenColumn) -> pa.Table:
        """See `Labeler.complete`."""
        return samples

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`."""
        raise NotImplementedError
