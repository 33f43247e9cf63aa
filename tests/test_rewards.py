"""Implicit rewards, against Eq. 7 written out."""

from __future__ import annotations

import numpy as np
import pytest

from sera_plugin.algorithm.rewards import implicit_reward, reward_weights


def test_second_iteration_compares_two_policies():
    assert reward_weights(2, 0.3, reference_free=False) == (1.0, -1.0)


def test_ensemble_starts_at_the_third_iteration():
    # (1 - 0.3)(a - b) + 0.3 (b - c) = 0.7 a - 0.4 b - 0.3 c
    assert reward_weights(3, 0.3, reference_free=False) == pytest.approx((0.7, -0.4, -0.3))


def test_gamma_zero_turns_the_ensemble_off():
    assert reward_weights(5, 0.0, reference_free=False) == (1.0, -1.0)
    assert reward_weights(5, 0.0, reference_free=True) == (1.0,)


def test_reference_free_reward_weighs_log_probabilities_themselves():
    assert reward_weights(2, 0.3, reference_free=True) == (1.0,)
    assert reward_weights(3, 0.3, reference_free=True) == pytest.approx((0.7, 0.3))


def test_first_iteration_has_no_reward():
    with pytest.raises(ValueError, match="iteration 1"):
        reward_weights(1, 0.3, reference_free=False)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, 1.0])
def test_weights_are_equation_seven(gamma):
    a, b, c = (np.array(x) for x in ([-10.0, -3.5], [-11.0, -3.0], [-14.0, -2.0]))
    expected = (1 - gamma) * (a - b) + gamma * (b - c)
    reward = implicit_reward([a, b, c], reward_weights(3, gamma, reference_free=False))
    np.testing.assert_allclose(reward, expected)


def test_reward_per_token_divides_by_the_completion():
    # (-10 + 12) / 4 = 0.5
    assert implicit_reward([[-10.0], [-12.0]], (1.0, -1.0), lengths=[4]) == pytest.approx([0.5])


def test_a_missing_policy_is_an_error():
    with pytest.raises(ValueError, match="2 policies"):
        implicit_reward([[0.0], [0.0]], (0.7, -0.4, -0.3))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_second_iteration_has_no_ensemble_whatever_gamma_is(gamma):
    assert reward_weights(2, gamma, reference_free=False) == (1.0, -1.0)
    assert reward_weights(2, gamma, reference_free=True) == (1.0,)


def test_gamma_one_is_the_previous_reward_alone():
    assert reward_weights(3, 1.0, reference_free=False) == (0.0, 1.0, -1.0)
    assert reward_weights(3, 1.0, reference_free=True) == (0.0, 1.0)


def test_ensemble_of_two_completions_by_hand():
    # 0.7 (-7 + 9) + 0.3 (-9 + 10) = 1.7 and 0.7 (-23 + 22) + 0.3 (-22 + 20) = -1.3;
    # over 4 and 10 tokens: 0.425 and -0.13.
    logps, weights = [[-7, -23], [-9, -22], [-10, -20]], reward_weights(3, 0.3, False)
    assert implicit_reward(logps, weights) == pytest.approx([1.7, -1.3])
    assert implicit_reward(logps, weights, [4, 10]) == pytest.approx([0.425, -0.13])


def test_simpo_by_hand():
    # t = 2: -9 / 3 and -22 / 4; t = 3: (0.7 (-7) + 0.3 (-9)) / 2 = -3.8.
    assert implicit_reward([[-9, -22]], (1.0,), [3, 4]) == pytest.approx([-3.0, -5.5])
    ensemble = reward_weights(3, 0.3, reference_free=True)
    assert implicit_reward([[-7], [-9]], ensemble, [2]) == pytest.approx([-3.8])


def test_integers_and_low_precision_are_weighed_in_float64():
    # -700.35 + 400 + 299.85 = -0.5, which float16 cannot hold on the way.
    logps = np.asarray([[-1000.5], [-1000.0], [-999.5]], dtype=np.float16)
    reward = implicit_reward(logps, (0.7, -0.4, -0.3))
    assert reward.dtype == np.float64
    assert reward[0] == pytest.approx(-0.5, abs=1e-9)
