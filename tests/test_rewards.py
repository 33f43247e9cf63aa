"""Implicit rewards, against Eq. 7 written out."""

from __future__ import annotations

import numpy as np
import pytest

from sera_plugin.algorithm.rewards import implicit_reward, reward_weights


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


def test_first_iteration_has_no_reward():
    with pytest.raises(ValueError, match="iteration 1"):
        reward_weights(1, 0.3, reference_free=False)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, 1.0])
def test_weights_are_equation_seven(gamma):
    a, b, c = (np.array(x) for x in ([-10.0, -3.5], [-11.0, -3.0], [-14.0, -2.0]))
    expected = (1 - gamma) * (a - b) + gamma * (b - c)
    reward = implicit_reward([a, b, c], reward_weights(3, gamma, reference_free=False))
    np.testing.assert_allclose(reward, expected)


def test_a_missing_policy_is_an_error():
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


def test_low_precision_is_weighed_in_float64():
    # -700.35 + 400 + 299.85 = -0.5, which float16 cannot hold on the way.
    logps = np.asarray([[-1000.5], [-1000.0], [-999.5]], dtype=np.float16)
    assert implicit_reward(logps, (0.7, -0.4, -0.3))[0] == pytest.approx(-0.5, abs=1e-9)
