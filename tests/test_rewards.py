"""Arithmetic of the method: rewards against Eq. 7 written out, length control, steps of epochs."""

from __future__ import annotations

import numpy as np
import pytest

from sera_plugin.algorithm.method import Schedule
from sera_plugin.algorithm.rewards import (
    equalizing_alpha,
    implicit_reward,
    regressed_alpha,
    reward_weights,
)
from sera_plugin.algorithm.selection import pair_candidates


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


def test_the_first_iteration_and_a_missing_policy_are_errors():
    with pytest.raises(ValueError, match="iteration 1"):
        reward_weights(1, 0.3, reference_free=False)
    with pytest.raises(ValueError, match="2 policies"):
        implicit_reward([[0.0], [0.0]], (0.7, -0.4, -0.3))


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
    batches = []
    for _ in range(pairs):
        if not batches or batches[-1] == batch_size:
            batches.append(0)
        batches[-1] += 1
    if drop_last and batches and batches[-1] < batch_size:
        batches.pop()
    return len([i for i in range(len(batches)) if i % accumulation == 0])


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
    assert planned.pairs == (10, 10, 10)
