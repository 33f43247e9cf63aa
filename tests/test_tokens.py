"""Token columns: exact tokens however they are stored, picked, joined and cut into chunks."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sera_plugin.rundir import store as store_module
from sera_plugin.rundir import tokens as tokens_module
from sera_plugin.rundir.store import make_table, write_table
from sera_plugin.rundir.tables import Expected, read_table
from sera_plugin.rundir.tokens import TokenColumn, as_lists, fingerprint

LISTS = pa.list_(pa.int32())
token_lists = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=8)
#: Few different tokens and lengths: many lists are equal, or begin alike.
similar_lists = st.lists(st.lists(st.integers(0, 1), max_size=3), max_size=24)


def column(lists: list[list[int]], cut: int = 0) -> TokenColumn:
    """The lists in two chunks."""
    parts = [pa.array(part, type=LISTS) for part in (lists[:cut], lists[cut:])]
    return TokenColumn(pa.chunked_array(parts, type=LISTS))


@pytest.fixture(params=[4, 2**24], autouse=True, scope="module")
def _small_pieces(request: pytest.FixtureRequest) -> Any:
    """Everything holds however many tokens are copied at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "_CHUNK", request.param)
        patch.setattr(tokens_module, "_MOST", request.param)
        yield


@given(chunks=st.lists(token_lists, max_size=4), data=st.data())
def test_token_column_of_sliced_chunks(chunks: list[list[list[int]]], data: Any) -> None:
    arrays = [pa.array(lists, type=LISTS) for lists in chunks]
    sliced = [array[data.draw(st.integers(0, len(array))) :] for array in arrays]
    chunked = pa.chunked_array(sliced, type=LISTS)
    tokens = TokenColumn(chunked)
    assert [ids.tolist() for ids in tokens] == chunked.to_pylist()
    assert tokens.lengths.tolist() == list(map(len, chunked.to_pylist()))
    assert {ids.dtype for ids in tokens} | {tokens.lengths.dtype} == {np.dtype(np.int32)}
    for array in sliced:
        assert [ids.tolist() for ids in TokenColumn(array)] == array.to_pylist()
    assert fingerprint([tokens]) == fingerprint([column(chunked.to_pylist())])


@given(lists=token_lists, cut=st.integers(0, 8), data=st.data())
def test_picked_and_joined_rows_are_what_lists_would_give(lists, cut, data):
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1))) if lists else []
    picked = column(lists, cut).take(np.asarray(rows, dtype=np.int64))
    expected = [lists[row] for row in rows]
    assert [ids.tolist() for ids in picked] == expected
    joined = picked.joined(column(lists)).joined(picked)
    expected = [*expected, *lists, *expected]
    assert [ids.tolist() for ids in joined] == expected
    places = range(-len(joined), len(joined))  # it counts from the end as a sequence does
    assert [joined[index].tolist() for index in places] == 2 * expected
    with pytest.raises(IndexError):
        joined[len(joined)]
    assert joined.lengths.tolist() == [len(ids) for ids in expected]
    copied = joined.to_arrow()
    assert copied.to_pylist() == expected
    assert copied.type == LISTS
    assert all(len(one) == 1 or len(one.values) <= tokens_module._CHUNK for one in copied.chunks)
    assert fingerprint([joined]) == fingerprint([column(expected)])
    assert joined.flat().tolist() == [token for ids in expected for token in ids]
    assert as_lists(joined.flat(), joined.lengths).to_pylist() == expected


@given(lists=similar_lists, group=st.integers(1, 4), cut=st.integers(0, 24))
def test_numbers_are_equal_where_lists_of_a_group_are(lists, group, cut):
    lists = lists[: len(lists) // group * group]
    numbers = column(lists, cut).numbered(group)
    assert numbers.shape == (len(lists) // group, group)
    for row, found in enumerate(numbers.tolist()):
        some = lists[row * group : (row + 1) * group]
        for one, other in product(range(group), repeat=2):
            assert (found[one] == found[other]) == (some[one] == some[other])


def test_more_tokens_than_int32_counts(tmp_path: Path) -> None:
    """Three chunks of 2^30 tokens each, in a file without blocks that nobody reads."""
    zeros = np.memmap(tmp_path / "zeros", dtype=np.int32, mode="w+", shape=2**30)
    zeros[-1] = 7
    values = pa.Array.from_buffers(pa.int32(), 2**30, [None, pa.py_buffer(zeros)])
    chunk = pa.ListArray.from_arrays(pa.array([0, 5, 2**30], type=pa.int32()), values)
    many = TokenColumn(pa.chunked_array([chunk] * 3))
    assert int(many.lengths.sum(dtype=np.int64)) == 3 * 2**30
    assert [len(many[index]) for index in range(6)] == [5, 2**30 - 5] * 3
    assert many[5][-1] == 7
    doubled = many.joined(many)
    assert len(doubled[11]) == 2**30 - 5
    assert doubled[11][-1] == 7
    assert doubled.take(np.array([10, 0])).to_arrow().to_pylist() == [[0] * 5] * 2


PROMPTS, CHOSEN, REJECTED = [[1, 2], [3]], [[4], [5, 6]], [[7], [8]]


@pytest.mark.parametrize(
    "changed",
    [
        ([[1, 9], [3]], CHOSEN, REJECTED),
        (PROMPTS, CHOSEN, [[7], [9]]),
        # The same tokens in the same order with a boundary moved: within a column,
        ([[1], [2, 3]], CHOSEN, REJECTED),
        # between prompt and completion,
        ([[1, 2], [3, 4]], [[], [5, 6]], REJECTED),
        # and between columns.
        (CHOSEN, PROMPTS, REJECTED),
        (PROMPTS, REJECTED, CHOSEN),
        ([*PROMPTS, []], [*CHOSEN, []], [*REJECTED, []]),
    ],
)
def test_fingerprint_changes_with_any_token_and_any_boundary(changed: Any) -> None:
    original = fingerprint(map(column, (PROMPTS, CHOSEN, REJECTED)))
    assert len(original) == 64
    assert fingerprint(map(column, changed)) != original


def test_a_table_is_written_some_rows_at_a_time_and_read_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_GROUP", 2)
    ids = [[2**31 - 1, 0], [1], [7, 2**31 - 1, 5]]
    columns = {"row": [0, 1, 2], "prompt_ids": ids, "chosen_ids": ids[::-1], "rejected_ids": ids}
    table = make_table(columns).append_column("text", [["a", "b", "a"]])
    write_table(path := tmp_path / "dataset.parquet", table)
    about = pq.ParquetFile(path).metadata
    assert [about.row_group(group).num_rows for group in range(about.num_row_groups)] == [2, 1]
    assert "BYTE_STREAM_SPLIT" in about.row_group(0).column(1).encodings
    assert pq.read_table(path).equals(table)
    assert read_table(path, "dataset", Expected(3), beside=True).equals(table)
