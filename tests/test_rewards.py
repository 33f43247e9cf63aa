"""The method's arithmetic by hand: rewards (Eq. 7), length control, steps, selection, pairing."""

import math

import numpy as np
import pyarrow as pa
import pytest

from sera_plugin.algorithm.method import Schedule
from sera_plugin.algorithm.rewards import (
    equalizing_alpha,
    implicit_reward,
    regressed_alpha,
    reward_weights,
)
from sera_plugin.algorithm.selection import (
    annotate,
    pair_candidates,
    score_gap,
    select_largest,
    swap,
    swapped_rows,
)
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir.tokens import TokenColumn


@pytest.mark.parametrize(
    ("iteration", "gamma", "with_reference", "reference_free"),
    [
        # t = 2 has no ensemble whatever gamma is, and gamma = 0 turns it off.
        *((2, gamma, (1.0, -1.0), (1.0,)) for gamma in (0.0, 0.3, 1.0)),
        (5, 0.0, (1.0, -1.0), (1.0,)),
        # (1 - 0.3)(a - b) + 0.3 (b - c) = 0.7 a - 0.4 b - 0.3 c
        (3, 0.3, (0.7, -0.4, -0.3), (0.7, 0.3)),
        # The previous reward alone.
        (3, 1.0, (0.0, 1.0, -1.0), (0.0, 1.0)),
    ],
)
def test_weights_by_hand(iteration, gamma, with_reference, reference_free):
    assert reward_weights(iteration, gamma, False) == pytest.approx(with_reference)
    assert reward_weights(iteration, gamma, True) == pytest.approx(reference_free)


def test_rewards_by_hand():
    # 0.7 (-7 + 9) + 0.3 (-9 + 10) = 1.7 and 0.7 (-23 + 22) + 0.3 (-22 + 20) = -1.3;
    # over 4 and 10 tokens: 0.425 and -0.13.
    logps, weights = [[-7, -23], [-9, -22], [-10, -20]], reward_weights(3, 0.3, False)
    assert implicit_reward(logps, weights) == pytest.approx([1.7, -1.3])
    assert implicit_reward(logps, weights, [4, 10]) == pytest.approx([0.425, -0.13])
    # SimPO, t = 2: -9 / 3 and -22 / 4; t = 3: (0.7 (-7) + 0.3 (-9)) / 2 = -3.8.
    assert implicit_reward([[-9, -22]], (1.0,), [3, 4]) == pytest.approx([-3.0, -5.5])
    assert implicit_reward([[-7], [-9]], (0.7, 0.3), [2]) == pytest.approx([-3.8])
    # Low precision is weighed in float64:
    # -700.35 + 400 + 299.85 = -0.5, which float16 cannot hold on the way.
    logps = np.asarray([[-1000.5], [-1000.0], [-999.5]], dtype=np.float16)
    assert implicit_reward(logps, (0.7, -0.4, -0.3))[0] == pytest.approx(-0.5, abs=1e-9)
    with pytest.raises(ValueError, match="iteration 1"):
        reward_weights(1, 0.3, reference_free=False)
    with pytest.raises(ValueError, match="2 policies"):
        implicit_reward([[0.0], [0.0]], (0.7, -0.4, -0.3))


def test_regressed_alpha_by_hand():
    """Within groups: lengths -1, 1 and -2, 2; rewards -1, 1 and -3, 3: 14 / 10."""
    assert regressed_alpha([[1, 3], [0, 6]], [[2, 4], [1, 5]]) == pytest.approx(1.4)
    assert regressed_alpha([[1, np.nan], [0, 6]], [[2, 400], [1, 5]]) == pytest.approx(1.5)
    assert regressed_alpha([[1, 2]], [[3, 3]]) == 0.0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.02, 0.5])
def test_auto_makes_chosen_and_rejected_equally_long(seed, slope):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, (200, 4))
    rewards = slope * lengths + rng.normal(0, 3, lengths.shape)
    identity = np.arange(800).reshape(200, 4)

    def longer(controlled):
        found = pair_candidates(identity, controlled)
        return (lengths[found.prompt, found.chosen] - lengths[found.prompt, found.rejected]) * 1.0

    alpha = equalizing_alpha(rewards, lengths, longer)
    before, after = (abs(longer(rewards - a * lengths).mean()) for a in (0.0, alpha))
    assert after <= before
    # One pair's answers changing places moves the mean by at most twice 55 tokens / 200 pairs.
    assert after < 0.6


def walk(pairs, batch_size, accumulation, drop_last):
    """Optimizer steps as a data loader and an accumulating loop make them, one by one."""
    batches = [range(pairs)[first : first + batch_size] for first in range(0, pairs, batch_size)]
    if drop_last and len(batches[-1]) < batch_size:
        batches.pop()
    return len(batches[::accumulation])


@pytest.mark.parametrize("later", [10, 7, 27])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_and_places_equal_a_walk(later, batch_size, accumulation, drop_last):
    schedule = Schedule((10, later, later), batch_size, accumulation, drop_last)
    expected = [walk(n, batch_size, accumulation, drop_last) for n in schedule.pairs]
    assert [schedule.steps(t) for t in (1, 2, 3)] == expected
    assert schedule.total_steps == sum(expected)
    places = [(t, made) for t, steps in enumerate(expected, 1) for made in range(steps)]
    located = [schedule.locate(step) for step in range(schedule.total_steps + 1)]
    assert located == [*places, (4, 0)]


def test_fewer_pairs_than_planned_change_only_their_iteration():
    planned = Schedule((10, 10, 10), batch_size=2, accumulation=1, drop_last=True)
    known = planned.with_pairs(2, 7)
    assert known == Schedule((10, 7, 10), 2, 1, True)
    assert (known.batches(2), known.total_steps) == (3, 13)


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
    assert np.flatnonzero(select_largest(margins, count)).tolist() == rows


def test_equal_values_are_ranked_in_their_order_where_there_are_many():
    """Sorting a few values would be stable by chance."""
    margins = np.random.default_rng(0).integers(0, 5, 2_000)
    order = sorted(range(2_000), key=lambda row: (-margins[row], row))
    assert np.flatnonzero(select_largest(margins, 700)).tolist() == sorted(order[:700])
    ranked = [row for row in order if row < 64]
    found = pair_candidates([list(range(64))], [margins[:64]], pairs_per_prompt=10)
    assert (found.chosen.tolist(), found.rejected.tolist()) == (ranked[:10], ranked[::-1][:10])


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_margin_that_is_not_finite_is_named(broken):
    with pytest.raises(ValueError, match=r"margin in row 2 is .*\(2 such values\).*learning_rate"):
        select_largest([1.0, 2.0, broken, np.nan], 1)


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
    prompt_ids = TokenColumn(pa.array([[1], [2], [1]], type=pa.list_(pa.int32())))
    config = SeraConfig(selection="curriculum", score_columns=["gap"], bootstrap_ratio=0)
    annotations = annotate(config, prompt_ids, {"gap": [1, 2, 3]}, None)
    first, second, third = annotations.prompts
    assert first == third != second
    assert annotations.score_gap.tolist() == [1, 2, 3]
