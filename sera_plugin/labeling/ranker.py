"""What labelers have in common, and the two that need no engine: the implicit reward and SPIN."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sera_plugin.algorithm.method import Method
from sera_plugin.algorithm.protocols import DATASET, FloatArray, Ranked, SamplingSettings
from sera_plugin.rundir.store import make_table
from sera_plugin.rundir.tokens import TokenColumn

if TYPE_CHECKING:
    from sera_plugin.labeling.labelers import Labelers


def first_places(answers: Sequence[Hashable], per_prompt: int) -> list[int]:
    """(n,) where each answer occurs first among those to its prompt: all are asked about once.

    `answers` are (n,) things that are equal where two answers are, `per_prompt` of them in a row.
    """
    places: dict[Hashable, int] = {}
    return [
        places.setdefault((index // per_prompt, one), index) for index, one in enumerate(answers)
    ]


class Ranker:
    """A `Labeler` that needs theta_{t-1} alone and adds nothing: most do.

    `name` is as in `sera.labeler`.
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


class ImplicitReward(Ranker):
    """SeRA's own ranking (paper Eq. 7, Algorithm 1, line 7).

    r_t, from the log-probabilities of theta_{t-1} and the policies before it.
    """

    def __init__(self, method: Method) -> None:
        super().__init__("implicit")
        self.method = method

    @classmethod
    def make(
        cls, run: Labelers, iteration: int, settings: SamplingSettings, optimizer: Any
    ) -> Ranker:
        """See `Ranker.make`."""
        return cls(run.method)

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`: (n,) nats, per token where the loss is."""
        return self.method.reward(ranked.logps, ranked.iteration, ranked.answers.lengths)


class Spin(Ranker):
    """The dataset's chosen answer is a candidate too, and better than every sample.

    It is the last one of its prompt. Samples that repeat it token for token are as good as it is,
    all others equal to each other: the last of those is the rejected one, and a prompt without any
    gives no pair (SPIN, Chen et al. 2024).
    """

    def __init__(self, name: str = "spin") -> None:
        super().__init__(name)

    def complete(self, samples: pa.Table, chosen: TokenColumn) -> pa.Table:
        """See `Labeler.complete`: one more per prompt, with `finish_reason` `dataset`."""
        added = np.arange(len(chosen)), np.full(len(chosen), len(samples) // len(chosen))
        row, candidate = (
            np.concatenate([samples[name].to_numpy(), more])
            for name, more in zip(("row", "candidate"), added, strict=True)
        )
        order = np.lexsort((candidate, row))
        reasons = [*samples["finish_reason"].to_pylist(), *[DATASET] * len(chosen)]
        return make_table(
            {
                "row": row[order],
                "candidate": candidate[order],
                "token_ids": TokenColumn(samples["token_ids"]).joined(chosen).take(order),
                "finish_reason": pa.array(reasons).take(order),
            }
        ).replace_schema_metadata(samples.schema.metadata)

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`: 1 for the chosen answer, 0 for any other."""
        answers = ranked.answers.numbered(ranked.per_prompt)
        return (answers == answers[:, -1:]).ravel().astype(np.float64)
