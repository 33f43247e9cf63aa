"""The reward that the labels fit: hand-derived values, and what must hold for any labels."""

import numpy as np
import pytest

from sera_plugin.algorithm.fit import by_chance, fit_weights, judged, within_support

PAPER = np.array([1.0, -1.0, 0.0])


def labelled(pairs, weights, seed=0):
    """Differences in (log pi_1, log pi_0, tokens) of pairs labelled by Bradley-Terry."""
    random = np.random.default_rng(seed)
    before, moved = random.normal(0, 10, pairs), random.normal(0, 1.5, pairs)
    features = np.stack([before + moved, before, random.normal(0, 4, pairs)], axis=1)
    right = random.random(pairs) < 1 / (1 + np.exp(-(features @ weights)))
    return np.where(right[:, None], features, -features)


def test_without_labels_it_is_the_papers():
    weights, errors = fit_weights(np.empty((0, 3)), PAPER)
    assert weights.tolist() == PAPER.tolist()
    assert errors.tolist() == [0, 0, 0]


def test_two_labels_by_hand():
    """One feature, d = 1 and -1, so s = 1. The scale c along the paper's direction, and then w from
    the prior's mean c, solve  c - 1 = sigmoid(-c) - sigmoid(c)  and  w - c = sigmoid(-w) -
    sigmoid(w): c = 0.67483 and w = 0.45241. The curvature there is 1 + 2 sigmoid(w) sigmoid(-w) =
    1.47526, whose inverse root is the error 0.82331."""
    weights, errors = fit_weights(np.array([[1.0], [-1.0]]), np.ones(1))
    assert weights == pytest.approx([0.45241], abs=1e-5)
    assert errors == pytest.approx([0.82331], abs=1e-5)


@pytest.mark.parametrize("truth", [(1, -1, 0), (0.5, -0.3, -0.2), (-0.5, 0.5, 0.1)])
def test_with_many_labels_it_is_the_truth_within_its_errors(truth):
    weights, errors = fit_weights(labelled(20_000, np.array(truth)), PAPER)
    assert np.abs(weights - truth).max() < 0.05
    assert (np.abs(weights - truth) < 4 * errors).all()


def test_few_labels_move_it_less_than_many():
    truth = np.array([0.2, 0.3, -0.4])
    off = [np.abs(fit_weights(labelled(n, truth), PAPER)[0] - truth).max() for n in (10, 20_000)]
    assert off[0] > 5 * off[1]


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
def test_the_unit_of_a_feature_changes_its_weight_alone(unit):
    features = labelled(200, np.array([0.5, -0.4, -0.2]))
    scaled, errors = fit_weights(features * [1, 1, unit], PAPER)
    before, errors_before = fit_weights(features, PAPER)
    assert scaled * [1, 1, unit] == pytest.approx(before, rel=1e-6, abs=1e-9)
    assert errors * [1, 1, unit] == pytest.approx(errors_before, rel=1e-6)


def test_collinear_features_share_a_weight():
    features = labelled(300, np.array([0.5, -0.4, -0.2]))
    doubled = np.column_stack([features, features[:, 2]])
    weights, errors = fit_weights(doubled, np.array([*PAPER, 0.0]))
    assert weights[2] == pytest.approx(weights[3])
    assert np.isfinite(errors).all()


def test_separable_labels_leave_it_finite():
    features = np.abs(labelled(50, np.zeros(3)))
    weights, _ = fit_weights(features, PAPER)
    assert np.isfinite(weights).all()
    assert (features @ weights > 0).mean() > 0.8


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_features_in_which_no_pair_differs(value):
    """Neither equal margins nor pairs that are all alike are a division by zero."""
    features = np.full((30, 3), value)
    weights, errors = fit_weights(features, PAPER)
    assert np.isfinite([weights, errors]).all()
    if not value:
        assert weights.tolist() == PAPER.tolist()


def test_a_reward_that_ranks_in_reverse_gives_the_prior_no_direction():
    features = labelled(2_000, np.array([-1.0, 1.0, 0.0]))
    found = judged((1.0, -1.0), features, fitted=True)
    assert found.paper_accuracy < 0.35
    assert found.accuracy > 0.65


def test_accuracy_is_of_pairs_that_were_not_fitted_to():
    """Labels that follow nothing: fitted to themselves they would seem to be ranked."""
    features = np.random.default_rng(1).normal(size=(60, 4))
    signs = np.sign(np.random.default_rng(2).normal(size=60))[:, None]
    found = judged((0.7, -0.4, -0.3), features * signs, fitted=True)
    own, _ = fit_weights(features * signs, np.array([0.7, -0.4, -0.3, 0]))
    assert found.accuracy < ((features * signs) @ own > 0).mean()


def test_the_papers_reward_is_judged_and_not_changed():
    features = labelled(100, np.array([1.0, -1.0, 0.0]))
    found = judged((1.0, -1.0), features, fitted=False)
    assert (found.weights, found.length, found.errors) == ((1.0, -1.0), 0.0, ())
    assert found.accuracy == found.paper_accuracy == ((features @ PAPER) > 0).mean()


def test_a_reward_per_token_and_with_a_weight_of_length():
    """(0.5 x -12 - 0.25 x -8) / 4 = -1, and 4 tokens at 0.5 nats."""
    found = judged((0.5, -0.25), np.zeros((0, 3)), fitted=False)
    assert found([[-12.0], [-8.0]], [4], True) == pytest.approx([-1.0])
    fitted = type(found)((0.5, -0.25), 0.5)
    assert fitted([[-12.0], [-8.0]], [4], True) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("right", "pairs", "beats"), [(58, 100, False), (59, 100, True), (9, 10, True), (7, 10, False)]
)
def test_better_than_a_coin(right, pairs, beats):
    """Equal margins, of which k too many of n are right: z = k / sqrt(n), 1.6, 1.8, 2.53, 1.26."""
    features = np.ones((pairs, 3)) * [1, 0, 0]
    features[right:] *= -1
    assert judged((1.0, -1.0), features, fitted=False).beats_coin is beats


def test_what_a_coin_does_by_margins():
    """Half of the pairs are right, by margins of 3 nats, and wrong by 1: the mean is 1, the root
    mean square sqrt(5), z = 1 / sqrt(5 / 20) = 2 of 20 pairs, and P(Z > 2) = 0.02275."""
    margins = np.array([3.0, -1.0] * 10)
    assert by_chance(margins) == pytest.approx(0.02275, abs=1e-5)
    assert by_chance(-margins) == pytest.approx(1 - 0.02275, abs=1e-5)
    assert by_chance(1e6 * margins) == by_chance(margins)  # no unit
    assert by_chance(np.zeros(20)) == by_chance(np.array([])) == 0.5


def test_large_margins_count_for_more_than_small_ones():
    """53 of 100 are right, which a coin often does; all the decided ones are among them."""
    margins = np.concatenate([np.full(30, 2.0), np.full(23, 0.1), np.full(47, -0.1)])
    features = np.stack([margins, 0 * margins, 0 * margins], axis=1)
    assert judged((1.0, -1.0), features, fitted=False).accuracy == 0.53
    assert judged((1.0, -1.0), features, fitted=False).beats_coin


def test_support_is_where_the_offline_answers_mostly_are():
    """Of 1, ..., 100 tokens at -1, ..., -100 nats a token, 95 % have at most 95.05 tokens, and 95 %
    at least -95.05 nats a token."""
    lengths = np.arange(1.0, 101.0)
    offline = lengths, -lengths * lengths
    tokens = np.array([95, 96, 10, 10])
    nats = tokens * np.array([-1.0, -1.0, -95.0, -96.0])
    assert within_support(tokens, nats, *offline).tolist() == [True, False, True, False]
