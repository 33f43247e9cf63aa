"""Token id lists by the million: no Python object per token, and no copy before one is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

IntArray = npt.NDArray[np.int32]

TOKENS = pa.list_(pa.int32())
#: Tokens that are copied at a time (4 MiB), and in one chunk that is not copied: offsets of
#: list<int32> end at 2^31.
_CHUNK, _MOST = 2**20, 2**30


class TokenColumn(Sequence[IntArray]):
    """A list<int32> column without nulls, whose lists stay in the flat arrays that they came in.

    Picking and joining copies no tokens, and all arrays together may have more than 2^31 of them:
    positions are counted within each. `lengths` is (n,) tokens per list.
    """

    def __init__(self, column: pa.ChunkedArray | pa.ListArray) -> None:
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        none = np.empty(0, dtype=np.int32)
        self._set(
            [chunk.values.to_numpy() for chunk in chunks],
            np.repeat(np.arange(len(chunks), dtype=np.int32), [len(chunk) for chunk in chunks]),
            np.concatenate([none, *(each[:-1] for each in offsets)]),
            np.concatenate([none, *map(np.diff, offsets)]),
        )

    def _set(
        self, arrays: list[IntArray], array: IntArray, start: IntArray, lengths: IntArray
    ) -> TokenColumn:
        """List i is `lengths[i]` tokens of `arrays[array[i]]`, from `start[i]` on."""
        self._arrays, self._array, self._start, self.lengths = arrays, array, start, lengths
        return self

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        start = self._start[index]
        return self._arrays[self._array[index]][start : start + self.lengths[index]]

    def __iter__(self) -> Iterator[IntArray]:
        for rows in self._pieces():
            start = self._start[rows]
            places = (self._array[rows], start, start + self.lengths[rows])
            for array, first, last in zip(*(place.tolist() for place in places), strict=True):
                yield self._arrays[array][first:last]

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> TokenColumn:
        """The lists of these rows, in their order, as a column."""
        return TokenColumn.__new__(TokenColumn)._set(
            self._arrays, self._array[rows], self._start[rows], self.lengths[rows]
        )

    def joined(self, other: TokenColumn) -> TokenColumn:
        """These lists and then those of another column."""
        return TokenColumn.__new__(TokenColumn)._set(
            [*self._arrays, *other._arrays],
            np.concatenate([self._array, other._array + len(self._arrays)], dtype=np.int32),
            np.concatenate([self._start, other._start]),
            np.concatenate([self.lengths, other.lengths]),
        )

    def to_arrow(self) -> pa.ChunkedArray:
        """As list<int32>, in chunks that their offsets can count; a copy unless it is in order."""
        chunks = [
            pa.ListArray.from_arrays(self._offsets(rows).astype(np.int32), self.flat(rows))
            for rows in self._pieces()
        ]
        return pa.chunked_array(chunks, type=TOKENS)

    def numbered(self, group: int) -> IntArray:
        """(n / group, group) numbers: within a group equal where the lists are, and only there."""
        numbers = [np.empty(0, dtype=np.int32)]
        for rows in self._pieces(group):
            # Arrow finds equal strings, and a list of tokens is a string of bytes.
            ends, tokens = map(pa.py_buffer, (4 * self._offsets(rows), self.flat(rows)))
            size = rows.stop - rows.start
            strings = pa.Array.from_buffers(pa.large_binary(), size, [None, ends, tokens])
            numbers.append(strings.dictionary_encode().indices.to_numpy())
        return np.concatenate(numbers).reshape(-1, group)

    def same(self) -> IntArray:
        """(n,) numbers, equal where the lists are: 0, 1, 2, ... as each first comes."""
        if not len(self):
            return np.empty(0, dtype=np.int32)
        # Most repeats are picked from one place, and need not be read.
        place = (self._array.astype(np.int64) << 32) + self._start
        place[self.lengths == 0] = -1
        number = pa.array(place).dictionary_encode().indices.to_numpy()
        first = np.flatnonzero(np.diff(np.maximum.accumulate(number), prepend=-1))
        found: IntArray = self.take(first).numbered(len(first)).ravel()[number]
        return found

    def _pieces(self, group: int = 1) -> Iterator[slice]:
        """Rows in whole groups, as many at a time as have at most `_CHUNK` tokens."""
        ends = np.cumsum(self.lengths, dtype=np.int64)[group - 1 :: group]
        cuts = [0]
        while cuts[-1] < len(ends):
            done = ends[cuts[-1] - 1] if cuts[-1] else 0
            fits = int(np.searchsorted(ends, done + _CHUNK, side="right"))
            cuts.append(max(fits, cuts[-1] + 1))
        return (slice(first * group, last * group) for first, last in pairwise(cuts))

    def _offsets(self, rows: slice) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.lengths[rows], dtype=np.int64)])

    def flat(self, rows: slice = slice(None)) -> IntArray:
        """All tokens of these rows, one list after another. Not to be written to."""
        array, start, lengths = (each[rows] for each in (self._array, self._start, self.lengths))
        ends = np.cumsum(lengths, dtype=np.int64)
        if not len(ends):
            return np.empty(0, dtype=np.int32)
        if (array == array[0]).all() and (start[1:] == start[:-1] + lengths[:-1]).all():
            return self._arrays[array[0]][start[0] : start[0] + ends[-1]]
        flat = np.empty(ends[-1], dtype=np.int32)
        for number in np.unique(array):
            its = array == number
            size = lengths[its]
            places = spans(ends[its] - size, size)
            flat[places] = self._arrays[number][spans(start[its], size)]
        return flat


def lengths_of(lists: Sequence[Any]) -> IntArray:
    """(n,) tokens per list."""
    if isinstance(lists, TokenColumn):
        return lists.lengths
    return np.fromiter(map(len, lists), dtype=np.int32, count=len(lists))


def as_lists(tokens: IntArray, lengths: IntArray) -> pa.ChunkedArray:
    """Flat tokens as list<int32> of (n,) lengths, without a copy."""
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    cuts = np.searchsorted(ends, np.arange(_MOST, ends[-1], _MOST)).tolist()
    chunks = []
    for first, last in pairwise([0, *cuts, len(lengths)]):
        offsets = (ends[first : last + 1] - ends[first]).astype(np.int32)
        chunks.append(pa.ListArray.from_arrays(offsets, tokens[ends[first] : ends[last]]))
    return pa.chunked_array(chunks, type=TOKENS)


def spans(start: npt.NDArray[Any], size: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The places `start[i]` to `start[i] + size[i] - 1` for one i after another."""
    ends = np.cumsum(size, dtype=np.int64)
    return np.repeat(start - ends + size, size) + np.arange(ends[-1] if len(ends) else 0)


def fingerprint(columns: Iterable[TokenColumn]) -> str:
    """SHA-256 of token id columns; the identity of a dataset as it is trained."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(column.lengths.tobytes())
        for rows in column._pieces():
            digest.update(column.flat(rows).tobytes())
    return digest.hexdigest()
