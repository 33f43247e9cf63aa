"""Chunks of samples laid out in one table, by what all ranks know of them beforehand."""

import numpy as np
import pytest

from sera_plugin.algorithm.chunks import Sampled, all_samples, chunk_table
from sera_plugin.algorithm.method import Candidate, SamplingSettings
from sera_plugin.rundir.ranks import Shard
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling.engine import plan

END = 2
SETTINGS = SamplingSettings(2, 1.0, 1.0, 4, 6, (END,), seed=0, vocabulary=100)


def candidates(row: int) -> list[Candidate]:
    return [Candidate([row + 10, END], "stop"), Candidate([row + 10, 7, 7, 7], "length")]


def written(store: RunStore, *chunks: tuple[int, ...]) -> Sampled:
    sampled = Sampled(4, SETTINGS)
    for rows in chunks:
        table = chunk_table([(row, candidates(row)) for row in rows])
        store.append_samples(2, table)
        sampled.add(table)
    return sampled


def test_chunks_in_any_order_are_one_table_in_the_order_of_rows(tmp_path):
    store = RunStore(tmp_path)
    sampled = written(store, (3, 0), (2,), (1,))
    assert sampled.ends.tolist() == [[2.0, -4.0]] * 4
    found = all_samples(store, 2, sampled.ends)
    assert found.equals(chunk_table([(row, candidates(row)) for row in range(4)]))
    # What is on disk is known to be the same, and none of it twice.
    again = Sampled(4, SETTINGS)
    assert [again.problem(chunk) for chunk in store.chunks(2)] == [None] * 3
    np.testing.assert_array_equal(again.ends, sampled.ends)
    assert {again.problem(chunk) for chunk in store.chunks(2)} == {
        "its rows are in another chunk too"
    }


@pytest.mark.parametrize("damage", ["removed", "another one"])
def test_a_chunk_that_is_gone_once_it_was_written_is_named(tmp_path, damage):
    store = RunStore(tmp_path)
    ends = written(store, (0, 1), (2, 3)).ends
    next(store.samples(2).glob("000-000001-*")).unlink()
    if damage == "another one":
        table = chunk_table([(row, [Candidate([5], "length")] * 2) for row in (2, 3)])
        store.append_samples(2, table)
    with pytest.raises(ValueError, match=r"no candidates of row 2 \(4 are missing .*auto_resume"):
        all_samples(store, 2, ends)


def test_a_part_has_the_rows_that_its_shard_deals_it_and_knows_the_longest_of_all():
    prompts = [np.zeros(length, dtype=np.int32) for length in (1, 5, 3, 2)]
    parts = [plan(prompts, SETTINGS, {3}, Shard(index, 2)) for index in (0, 1)]
    # Up to 6 tokens with the candidate: 5 + 1, 3 + 3, 1 + 4; the longest prompts come first.
    assert parts == [([1, 0], 6), ([2], 6)]
    assert plan(prompts, SETTINGS, {0, 1, 2, 3}, Shard(0, 2)) == ([], 0)
    prompts[2] = np.zeros(6, dtype=np.int32)
    with pytest.raises(ValueError, match="row 2 has 6 tokens, which leaves no room"):
        plan(prompts, SETTINGS, (), Shard(0, 2))
    assert plan(prompts, SETTINGS, {2}, Shard(0, 1)) == ([1, 3, 0], 6)
