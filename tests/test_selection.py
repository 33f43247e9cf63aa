"""Which offline pairs are kept, how candidates are paired, and what a dataset says of its pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sera_plugin.algorithm.method import Pairs
from sera_plugin.algorithm.selection import (
    annotate,
    pair_candidates,
    score_gap,
    select_largest,
    swap,
    swapped_rows,
)
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir.store import make_table


def kept(margins, count):
    return np.flatnonzero(select_largest(margins, count)).tolist()


@pytest.mark.parametrize(
    ("margins", "count", "rows"),
    [
        ([0.5, -1.0, 2.0, -0.2], 3, [0, 2, 3]),  # negative ones too
        ([1.0, 2.0, 1.0, 1.0], 2, [0, 1]),  # ties in row order
        *(([1.0, 2.0], count, rows) for count, rows in ((0, []), (2, [0, 1]), (9, [0, 1]))),
        ([], 3, []),
    ],
)
def test_the_largest_margins_are_kept(margins, count, rows):
    assert kept(margins, count) == rows


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_margin_that_is_not_finite_is_named(broken):
    with pytest.raises(ValueError, match=r"margin in row 2 is .*\(2 such values\).*learning_rate"):
        select_largest([1.0, 2.0, broken, np.nan], 1)


# ------------------------------------------------------------------ pairs of candidates


def pairs(candidates, rewards, pairs_per_prompt=1):
    found = pair_candidates([list(candidates)], [rewards], pairs_per_prompt)
    return list(zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)), found


@pytest.mark.parametrize(
    ("candidates", "rewards", "count", "expected", "margins", "counts"),
    [
        ("ab", [0.25, 1.0], 1, [(1, 0)], [0.75], (0, 0, 0)),
        ("abcd", [0.1, 0.9, -0.5, 0.3], 1, [(1, 2)], [1.4], (0, 0, 0)),
        # Ranked: 5 (6.0), 0 (5.0), 3 (4.0), 1 (3.0), 4 (2.0), 2 (1.0).
        ("abcdef", [5, 3, 1, 4, 2, 6], 3, [(5, 2), (0, 4), (3, 1)], [5, 3, 1], (0, 0, 0)),
        # The middle one of an odd number stays alone.
        ("abc", [2.0, 1.0, 0.0], 3, [(0, 2)], [2.0], (0, 0, 0)),
        # Identical ones count once: two distinct remain, so one pair even if two are asked for.
        # Batching may move a repeat's reward in its last digits: the first stands for both.
        ("aab", [2.0, 2.0, 1.0], 2, [(0, 2)], [1.0], (1, 0, 0)),
        ("aabb", [1.0, 9.0, 0.0, -9.0], 2, [(0, 2)], [1.0], (2, 0, 0)),
        ("aaaa", [1.0] * 4, 1, [], [], (3, 0, 1)),
        # Equal rewards give no pair, and rank in the order of their candidates.
        ("abcd", [1.0, 3.0, 3.0, 5.0], 2, [(3, 0)], [4.0], (0, 1, 0)),
        ("abcd", [1.0, 3.0, 1.0, 3.0], 2, [(1, 2), (3, 0)], [2.0, 2.0], (0, 0, 0)),
        ("abc", [-0.0, 0.0, 0.0], 1, [], [], (0, 1, 0)),
    ],
)
def test_pairs_by_hand(candidates, rewards, count, expected, margins, counts):
    found, result = pairs(candidates, rewards, count)
    assert found == expected
    assert result.margin.tolist() == pytest.approx(margins)
    assert (result.duplicates, result.ties, result.too_few) == counts


def test_a_reward_that_is_infinite_is_named_and_one_that_is_missing_is_counted():
    with pytest.raises(ValueError, match="candidate in row 1 is inf"):
        pair_candidates([[0, 1], [0, 1]], [[0.0, 1.0], [0.0, np.inf]])
    found, result = pairs("abc", [np.nan, 1.0, 2.0])
    assert found == [(2, 1)]
    assert (result.unranked, result.too_few) == (1, 0)


def test_prompts_are_paired_each_for_itself():
    """The middle one has one distinct candidate, the last one equal rewards."""
    found = pair_candidates([[0, 1], [0, 0], [0, 1], [1, 0]], [[0, 2], [1, 3], [4, 4], [5, 2]])
    columns = (found.prompt, found.chosen, found.rejected, found.margin)
    assert [column.tolist() for column in columns] == [[0, 3], [1, 0], [0, 1], [2, 3]]
    assert (found.duplicates, found.ties, found.too_few) == (1, 1, 1)
    none = pair_candidates(np.empty((0, 4)), np.empty((0, 4)))
    kinds = [c.dtype for c in (none.prompt, none.chosen, none.rejected, none.margin)]
    assert kinds == [np.int64, np.int32, np.int32, np.float64]


def test_noise_swaps_the_share_that_is_asked_for_and_what_belongs_to_an_answer():
    swapped = swapped_rows(10, 0.25, seed=3)
    assert swapped.sum() == 2  # round(2.5)
    assert (swapped == swapped_rows(10, 0.25, seed=3)).all()
    assert (swapped != swapped_rows(10, 0.25, seed=4)).any()
    columns = {"chosen_ids": [1, 2], "rejected_ids": [3, 4], "source": ["a", "b"],
               "score_chosen": [9, 8], "score_rejected": [1, 2]}  # fmt: skip
    assert swap(columns, np.array([False, True])) == {
        "chosen_ids": [1, 4], "rejected_ids": [3, 2], "source": ["a", "b"],
        "score_chosen": [9, 2], "score_rejected": [1, 8],
    }  # fmt: skip


def test_a_score_is_a_gap_of_two_columns_or_a_column_that_is_one():
    assert score_gap({"source": ["a"], "s_rejected": [1], "s_chosen": [4]}).tolist() == [3]
    assert score_gap({"source": ["a", "b"], "gap": [1, 2.5]}).tolist() == [1, 2.5]
    # A swapped label turns a gap's sign; two columns have changed places by themselves.
    swapped = np.array([False, True])
    assert score_gap({"gap": [1, 2.5]}, swapped).tolist() == [1, -2.5]
    sides = swap({"s_chosen": [4, 4], "s_rejected": [1, 1]}, swapped)
    assert score_gap(sides, swapped).tolist() == [3, -3]
    for columns, said in (
        ({"source": ["a"]}, "has no numbers to select by"),
        ({"gap": [1, None]}, "column 'gap' is None in row 1"),
        ({"s_chosen": [1.0], "s_rejected": [math.nan]}, "column 's_rejected' is nan in row 0"),
    ):
        with pytest.raises(ValueError, match=said):
            score_gap(columns)


def test_prompts_are_numbered_for_a_curriculum():
    ids = {"prompt_ids": [[1], [2], [1]], "chosen_ids": [[3]] * 3, "rejected_ids": [[4]] * 3}
    pairs = Pairs.from_table(make_table(ids))
    config = SeraConfig(selection="curriculum", score_columns=["gap"], bootstrap_ratio=0)
    annotations = annotate(config, pairs.prompt_ids, {"gap": [1, 2, 3]}, None)
    assert annotations.prompts is not None
    first, second, third = annotations.prompts
    assert first == third != second
    assert annotations.score_gap.tolist() == [1, 2, 3]
