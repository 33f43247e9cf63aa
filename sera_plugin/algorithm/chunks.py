"""Chunks of samples: tables of finished prompts, whether one from disk can be used, and all in one.

Every rank knows how long each candidate is before a chunk is read. So each has its place in one
array, which a machine holds once, and no order and no second copy has to be made.
"""

from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sera_plugin.algorithm.method import Chunk, SamplingSettings
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.rundir.store import RunStore, make_table
from sera_plugin.rundir.tables import TYPES
from sera_plugin.rundir.tokens import IntArray, TokenColumn, as_lists, spans

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


class Sampled:
    """What there is in chunks: of N rows R candidates each, or none.

    `ends` is (N, R) tokens of each candidate, negative where it was cut, 0 where there is none.
    """

    def __init__(self, total: int, settings: SamplingSettings) -> None:
        self.settings, self.ends = settings, np.zeros((total, settings.candidates))

    def add(self, chunk: pa.Table) -> None:
        """Know of a chunk that can be used."""
        stopped = pc.equal(chunk["finish_reason"], "stop").to_numpy()
        lengths = TokenColumn(chunk["token_ids"]).lengths
        self.ends[chunk["row"], chunk["candidate"]] = np.where(stopped, lengths, -lengths)

    def problem(self, chunk: pa.Table) -> str | None:
        """What is wrong with a chunk from disk, in half a sentence; if nothing is, it is added.

        It may be of another version, or of other settings.
        """
        if not chunk.schema.equals(_SCHEMA):
            return f"its columns are not {', '.join(_NAMES)} of the types they have"
        if any(column.null_count for column in chunk.columns):
            return "it has nulls"
        total, count = self.ends.shape
        rows, numbers = (chunk[name].to_numpy() for name in ("row", "candidate"))
        own = np.unique(rows)
        by_row = np.lexsort((numbers, rows))
        expected = np.tile(np.arange(count), len(own))
        if len(rows) != count * len(own) or not np.array_equal(numbers[by_row], expected):
            return f"it does not have {count} candidates of each row"
        if own.min(initial=0) < 0 or own.max(initial=0) >= total:
            return f"it has rows outside 0 to {total - 1}"
        if self.ends[own].any():
            return "its rows are in another chunk too"
        tokens = TokenColumn(chunk["token_ids"])
        if not self._end_as_said(tokens, chunk["finish_reason"]):
            return "a candidate is longer than asked for, or does not end as it says"
        flat = tokens.flat()
        if flat.min(initial=0) < 0 or flat.max(initial=0) >= self.settings.vocabulary:
            return "it has token ids that the model does not know"
        self.add(chunk)
        return None

    def _end_as_said(self, tokens: TokenColumn, reasons: pa.ChunkedArray) -> bool:
        lengths = tokens.lengths
        if lengths.min(initial=1) < 1 or lengths.max(initial=1) > self.settings.max_new_tokens:
            return False
        last = np.cumsum(lengths) - 1
        is_end = np.isin(tokens.flat(), self.settings.end_ids)
        ends = np.diff(np.cumsum(is_end)[last], prepend=0)
        stopped = pc.equal(reasons, "stop").to_numpy()
        known = stopped | pc.equal(reasons, "length").to_numpy()
        return bool((known & (ends == stopped) & (is_end[last] == stopped)).all())


def all_samples(store: RunStore, iteration: int, ends: FloatArray) -> pa.Table:
    """The candidates of all chunks in the order of (row, candidate), where `Sampled.ends` has all.

    A collective call: the first rank of a machine reads the chunks for those that share its memory.

    Raises:
        ValueError: if one that was written is no longer whole.
    """
    total, count = ends.shape
    lengths = np.abs(ends).astype(np.int32).ravel()
    begins = np.cumsum(lengths, dtype=np.int64) - lengths

    def fill(tokens: IntArray) -> None:
        missing = lengths > 0
        for chunk in store.chunks(iteration):
            places = chunk["row"].to_numpy() * count + chunk["candidate"].to_numpy()
            found = TokenColumn(chunk["token_ids"])
            if np.array_equal(found.lengths, lengths[places]):
                tokens[spans(begins[places], found.lengths)] = found.flat()
                missing[places] = False
        if missing.any():
            raise ValueError(
                f"{store.samples(iteration)} has no candidates of row {missing.argmax() // count} "
                f"({missing.sum()} are missing in all): a file there was removed or damaged. Start "
                "the command again with `auto_resume_from_checkpoints: true`: they are sampled "
                "again."
            )

    size = int(lengths.sum(dtype=np.int64)) * 4
    tokens = store.ranks.share(size, lambda shared: fill(shared.view(np.int32))).view(np.int32)
    reasons = pa.DictionaryArray.from_arrays((ends < 0).ravel().astype(np.int8), ["stop", "length"])
    return make_table(
        {
            "row": np.repeat(np.arange(total), count),
            "candidate": np.tile(np.arange(count, dtype=np.int32), total),
            "token_ids": as_lists(tokens, lengths),
            "finish_reason": reasons.cast(pa.string()),
        }
    )
