"""Which offline pairs are kept, how candidates are paired, and what a dataset says of its pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.data())
def test_no_dropped_margin_beats_a_kept_one_in_any_order(margins, data):
    count = data.draw(st.integers(1, len(margins)))
    order = data.draw(st.permutations(range(len(margins))))
    shuffled = [margins[i] for i in order]
    selected = select_largest(shuffled, count)
    assert sorted(np.asarray(shuffled)[selected]) == sorted(margins)[-count:]
    fewer = select_largest(shuffled, data.draw(st.integers(0, count)))
    assert not (fewer & ~selected).any()
    if len(set(margins)) == len(margins):
        assert sorted(order[i] for i in np.flatnonzero(selected)) == kept(margins, count)


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
        ("abcd", [1.0, 3.0, 3.0, 5.0], 2, [(3, 0)], [4.0], (0, 1, 0)),  # equal rewards give no pair
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


def test_no_prompts_give_empty_columns_of_the_right_types():
    found = pair_candidates(np.empty((0, 4)), np.empty((0, 4)))
    kinds = [c.dtype for c in (found.prompt, found.chosen, found.rejected, found.margin)]
    assert kinds == [np.int64, np.int32, np.int32, np.float64]


def plainly(candidates, rewards, pairs_per_prompt):
    """Prompt by prompt and candidate by candidate: what `pair_candidates` does for all at once."""
    found, duplicates, ties, too_few = [], 0, 0, 0
    for prompt, (answers, reward) in enumerate(zip(candidates, rewards, strict=True)):
        distinct = [i for i, answer in enumerate(answers) if answer not in answers[:i]]
        duplicates += len(answers) - len(distinct)
        too_few += len(distinct) < 2
        ranked = sorted(distinct, key=lambda index: (-reward[index], index))
        while len(ranked) >= 2 and len(distinct) - len(ranked) < 2 * pairs_per_prompt:
            best, *ranked, worst = ranked
            if reward[best] > reward[worst]:
                found.append((prompt, best, worst, reward[best] - reward[worst]))
            else:
                ties += 1
    return found, (duplicates, ties, too_few)


@st.composite
def groups(draw):
    count = draw(st.integers(1, 7))
    rewards = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0]) | st.floats(-1e3, 1e3)
    group = st.tuples(
        st.lists(st.integers(0, 4), min_size=count, max_size=count),
        st.lists(rewards, min_size=count, max_size=count),
    )
    return draw(st.lists(group, min_size=1, max_size=12)), draw(st.integers(1, 4))


@given(groups())
def test_all_prompts_at_once_are_paired_as_one_by_one(drawn):
    prompts, pairs_per_prompt = drawn
    candidates, rewards = map(list, zip(*prompts, strict=True))
    result = pair_candidates(candidates, rewards, pairs_per_prompt)
    columns = (result.prompt, result.chosen, result.rejected, result.margin)
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    counts = (result.duplicates, result.ties, result.too_few)
    assert (found, counts) == plainly(candidates, rewards, pairs_per_prompt)


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
