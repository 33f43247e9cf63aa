"""Implicit rewards, against Eq. 7 written out."""

from __future__ import annotations

import numpy as np
import pytest

from sera_plugin.rewards import implicit_reward, reward_weights


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
