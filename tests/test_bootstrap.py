"""How a prompt's candidates are paired."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sera_plugin.algorithm.pairing import pair_candidates


def pairs(candidates, rewards, pairs_per_prompt=1):
    found = pair_candidates([list(candidates)], [rewards], pairs_per_prompt)
    return list(zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)), found


def test_two_candidates_make_one_pair():
    found, result = pairs("ab", [0.25, 1.0])
    assert found == [(1, 0)]
    assert result.margin.tolist() == [0.75]


def test_best_is_paired_with_worst():
    assert pairs("abcd", [0.1, 0.9, -0.5, 0.3])[0] == [(1, 2)]


def test_six_candidates_make_three_nested_pairs():
    # Ranked: 5 (6.0), 0 (5.0), 3 (4.0), 1 (3.0), 4 (2.0), 2 (1.0).
    found, result = pairs("abcdef", [5.0, 3.0, 1.0, 4.0, 2.0, 6.0], 3)
    assert found == [(5, 2), (0, 4), (3, 1)]
    assert result.margin.tolist() == [5.0, 3.0, 1.0]


def test_identical_candidates_count_once():
    # "a" twice: two distinct remain, so one pair even if two are asked for.
    found, result = pairs(["a", "a", "b"], [2.0, 2.0, 1.0], 2)
    assert found == [(0, 2)]
    assert result.duplicates == 1


def test_fewer_than_two_distinct_candidates_give_no_pair():
    found, result = pairs(["a", "a", "a", "a"], [1.0, 1.0, 1.0, 1.0])
    assert found == []
    assert (result.duplicates, result.too_few) == (3, 1)


def test_equal_rewards_give_no_pair():
    found, result = pairs("abcd", [1.0, 3.0, 3.0, 5.0], 2)
    assert found == [(3, 0)]
    assert result.ties == 1


def test_a_reward_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="candidate 1 of prompt 1 is inf"):
        pair_candidates([[0, 1], [0, 1]], [[0.0, 1.0], [0.0, np.inf]])


REWARDS = st.lists(st.integers(-99, 99), min_size=2, max_size=10, unique=True)


@given(REWARDS, st.integers(1, 5))
def test_pairs_are_disjoint_with_positive_margins(rewards, count):
    found, result = pairs(range(len(rewards)), rewards, count)
    used = [index for pair in found for index in pair]
    assert len(used) == len(set(used))
    assert len(found) == min(count, len(rewards) // 2)
    assert (result.margin > 0).all()


@given(REWARDS, st.data())
def test_pairing_does_not_depend_on_the_order_of_candidates(rewards, data):
    shuffled = data.draw(st.permutations(rewards))
    one = {(rewards[c], rewards[r]) for c, r in pairs(rewards, rewards, 5)[0]}
    other = {(shuffled[c], shuffled[r]) for c, r in pairs(shuffled, shuffled, 5)[0]}
    assert one == other


@given(REWARDS, st.integers(1, 4))
def test_more_pairs_per_prompt_only_add_pairs(rewards, count):
    assert set(pairs(rewards, rewards, count)[0]) <= set(pairs(rewards, rewards, count + 1)[0])


def test_rewards_of_repeats_are_not_used():
    # Batching may move a repeat's reward in its last digits: the first stands for both.
    found, result = pairs("aabb", [1.0, 9.0, 0.0, -9.0], 2)
    assert found == [(0, 2)]
    assert result.margin.tolist() == [1.0]
    assert (result.duplicates, result.too_few) == (2, 0)


def test_the_middle_candidate_of_an_odd_number_stays_alone():
    assert pairs("abc", [2.0, 1.0, 0.0], 3)[0] == [(0, 2)]


def test_prompts_are_paired_separately_and_in_order():
    found = pair_candidates([[1, 2], [3, 3], [5, 6]], [[1, 0], [1, 1], [-2, -1]])
    assert found.prompt.tolist() == [0, 2]
    assert found.chosen.tolist() == [0, 1]
    assert found.margin.tolist() == [1.0, 1.0]
    assert (found.duplicates, found.ties, found.too_few) == (1, 0, 1)


def test_no_prompts_give_empty_columns_of_the_right_types():
    found = pair_candidates(np.empty((0, 4)), np.empty((0, 4)))
    kinds = [c.dtype for c in (found.prompt, found.chosen, found.rejected, found.margin)]
    assert kinds == [np.int64, np.int32, np.int32, np.float64]


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([-1.0, 0.0, 1.0])), min_size=1),
    st.integers(1, 5),
)
def test_repeats_and_ties_never_meet_in_a_pair(candidates, count):
    answers, rewards = zip(*candidates, strict=True)
    found, result = pairs(answers, rewards, count)
    used = [answers[index] for pair in found for index in pair]
    assert len(used) == len(set(used))
    assert all(rewards[c] > rewards[r] for c, r in found)
    possible = min(count, len(set(answers)) // 2)
    assert len(found) + result.ties == possible


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


def test_candidates_without_a_reward_are_refused():
    with pytest.raises(ValueError, match=r"candidates are \(1, 3\), their rewards \(1, 2\)"):
        pair_candidates([[0, 1, 2]], [[1.0, 2.0]])
