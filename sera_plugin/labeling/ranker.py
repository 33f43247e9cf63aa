"""What most labelers have in common."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import pyarrow as pa

from sera_plugin.rundir.tokens import TokenColumn


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
    """What most labelers have in common: theta_{t-1} is enough, and nothing is added."""

    def __init__(self, name: str) -> None:
        self.report: dict[str, Any] = {"name": name}

    def policies(self, iteration: int) -> int:
        """See `Labeler.policies`."""
        return 1

    def complete(self, samples: pa.Table, chosen: TokenColumn) -> pa.Table:
        """See `Labeler.complete`."""
        return samples
