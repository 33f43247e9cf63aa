"""SPIN: the dataset's chosen answer against the policy's own (Chen et al. 2024)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from sera_plugin.algorithm.protocols import DATASET, FloatArray, Ranked
from sera_plugin.labeling.ranker import Ranker
from sera_plugin.rundir.store import make_table
from sera_plugin.rundir.tokens import TokenColumn


class Spin(Ranker):
    """The dataset's chosen answer is a candidate too, and better than every sample.

    It is the last one of its prompt. Samples that repeat it token for token are as good as it is,
    all others equal to each other: the last of those is the rejected one, and a prompt without any
    gives no pair.
    """

    def __init__(self, name: str = "spin") -> None:
        super().__init__(name)

    def complete(self, samples: pa.Table, chosen: TokenColumn) -> pa.Table:
        """See `Labeler.complete`: one more per prompt, with `finish_reason` `dataset`."""
        per_prompt = len(samples) // len(chosen)
        row, last = np.arange(len(chosen)), np.full(len(chosen), per_prompt)
        order = np.lexsort(
            (
                np.concatenate([samples["candidate"].to_numpy(), last]),
                np.concatenate([samples["row"].to_numpy(), row]),
            )
        )
        reasons = [*samples["finish_reason"].to_pylist(), *[DATASET] * len(chosen)]
        return make_table(
            {
                "row": np.concatenate([samples["row"].to_numpy(), row])[order],
                "candidate": np.concatenate([samples["candidate"].to_numpy(), last])[order],
                "token_ids": TokenColumn(samples["token_ids"]).joined(chosen).take(order),
                "finish_reason": pa.array(reasons).take(order),
            }
        ).replace_schema_metadata(samples.schema.metadata)

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`: 1 for the chosen answer, 0 for any other."""
        answers = ranked.answers.numbered(ranked.per_prompt)
        return (answers == answers[:, -1:]).ravel().astype(np.float64)
