"""Chunks of samples: tables of finished prompts, and whether one from disk can be used."""

from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa

from sera_plugin.algorithm.method import Chunk, SamplingSettings
from sera_plugin.rundir.store import make_table
from sera_plugin.rundir.tables import TYPES
from sera_plugin.rundir.tokens import TokenColumn

_NAMES = ("row", "candidate", "token_ids", "finish_reason")
_SCHEMA = pa.schema({name: TYPES[name] for name in _NAMES})


def chunk_table(chunk: Chunk) -> pa.Table:
    """The candidates of some prompts as rows of candidates.parquet."""
    flat = [(row, index, one) for row, found in chunk for index, one in enumerate(found)]
    lists = [one.token_ids for _, _, one in flat]
    # Flat, because pyarrow takes many times longer over a list of lists.
    tokens = np.fromiter(chain.from_iterable(lists), dtype=np.int32)
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    return make_table(
        {
            "row": [row for row, _, _ in flat],
            "candidate": [index for _, index, _ in flat],
            "token_ids": pa.ListArray.from_arrays(offsets, tokens),
            "finish_reason": [one.finish_reason for _, _, one in flat],
        }
    )


@dataclass
class ChunkCheck:
    """What is wrong with a chunk that a run finds on disk, in half a sentence, or None.

    It may be of another version, or of other settings. `total` is N; one check sees all chunks.
    """

    total: int
    settings: SamplingSettings
    _seen: set[int] = field(default_factory=set)

    def __call__(self, chunk: pa.Table) -> str | None:
        if not chunk.schema.equals(_SCHEMA):
            return f"its columns are not {', '.join(_NAMES)} of the types they have"
        if any(column.null_count for column in chunk.columns):
            return "it has nulls"
        count = self.settings.candidates
        rows, numbers = (chunk[name].to_numpy() for name in ("row", "candidate"))
        own = set(rows.tolist())
        by_row = np.lexsort((numbers, rows))
        expected = np.tile(np.arange(count), len(own))
        if len(rows) != count * len(own) or not np.array_equal(numbers[by_row], expected):
            return f"it does not have {count} candidates of each row"
        if own and not (min(own) >= 0 and max(own) < self.total):
            return f"it has rows outside 0 to {self.total - 1}"
        if not own.isdisjoint(self._seen):
            return "its rows are in another chunk too"
        tokens = TokenColumn(chunk["token_ids"])
        for ids, reason in zip(tokens, chunk["finish_reason"].to_pylist(), strict=True):
            ends = np.flatnonzero(np.isin(ids, self.settings.end_ids))
            last = {"stop": [len(ids) - 1], "length": []}.get(reason)
            if not 1 <= len(ids) <= self.settings.max_new_tokens or ends.tolist() != last:
                return "a candidate is longer than asked for, or does not end as it says"
            if not 0 <= ids.min() <= ids.max() < self.settings.vocabulary:
                return "it has token ids that the model does not know"
        self._seen |= own
        return None
