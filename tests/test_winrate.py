"""Win rates: by hand, and against published figures."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from sera_plugin.tools.evaluation.winrate import length_controlled, mean_score, win_rate

NAN = float("nan")


def test_a_win_rate_by_hand():
    """Outcomes 1, 1/2, 0, 1/4 and two missing: mean 7/16.

    Deviations 9/16, 1/16, -7/16, -3/16; squares 140/256; variance 140/256/3; error its root / 2.
    """
    found = win_rate([1.0, 0.5, NAN, 0.0, 0.25, NAN], seed=3)
    assert found.rate == 7 / 16
    assert found.error == pytest.approx((140 / 256 / 3) ** 0.5 / 2, abs=1e-15)
    assert (found.wins, found.ties, found.losses, found.missing) == (1, 1, 2, 2)


def test_the_interval_is_that_of_a_binomial_and_seeded():
    """60 wins of 100: a resample's wins are binomial(100, 0.6), whose 2.5% and 97.5% quantiles
    are 50 and 69. A quantile of 2,000 draws may be off by one win."""
    found = win_rate([1.0] * 60 + [0.0] * 40)
    assert (found.low, found.high) == pytest.approx((0.50, 0.69), abs=0.011)
    outcomes = np.random.default_rng(0).random(50)
    intervals = [(found.low, found.high) for found in (win_rate(outcomes, s) for s in (1, 1, 2))]
    assert intervals[0] == intervals[1] != intervals[2]


def test_few_outcomes_or_none():
    # 2, 4, 9: mean 5; deviations -3, -1, 4; variance 26/2; error root(13/3).
    assert mean_score([2.0, NAN, 4.0, 9.0]) == pytest.approx((5.0, (13 / 3) ** 0.5), abs=1e-15)
    assert np.isnan([*mean_score([]), mean_score([3.0])[1]]).all()
    one = win_rate([1.0])
    assert (one.rate, one.low, one.high, one.wins) == (1.0, 1.0, 1.0, 1)
    assert np.isnan(one.error)
    for missing in (0, 2):
        none = win_rate([NAN] * missing)
        assert np.isnan([none.rate, none.error, none.low, none.high]).all()
        assert (none.wins, none.ties, none.losses, none.missing) == (0, 0, 0, missing)


def test_without_differences_in_length_nothing_is_controlled():
    random = np.random.default_rng(0)
    outcomes = (random.random((3, 400)) < np.array([[0.3], [0.5], [0.9]])).astype(float)
    outcomes[1, :7] = NAN
    for same in (0.0, 250.0):
        rates = length_controlled(outcomes, np.full((3, 400), same))
        assert rates == pytest.approx(np.nanmean(outcomes, axis=1), abs=1e-4)


def simulate(theta: float, phi: float, longer: float, prompts: int = 4000):
    """Outcomes of the regression's own kind, for a model whose answers are `longer` by so many
    standard deviations."""
    random = np.random.default_rng(0)
    difference = random.normal(longer, 1.0, prompts)
    logit = theta + phi * np.tanh(difference / difference.std(ddof=1))
    outcomes = (random.random(prompts) < 1 / (1 + np.exp(-logit))).astype(float)
    return outcomes, difference * 100


@pytest.mark.parametrize("longer", [1.5, -1.5])
def test_a_length_that_pays_is_taken_out(longer):
    outcomes, difference = simulate(theta=0.3, phi=1.0, longer=longer)
    true = 1 / (1 + np.exp(-0.3))  # the rate at equal length
    raw, (rate,) = outcomes.mean(), length_controlled(outcomes, difference)
    assert abs(raw - true) > 0.1
    # The prior holds phi back, so some of the difference stays.
    assert abs(rate - true) < 0.6 * abs(raw - true)
    assert (rate - raw) * (true - raw) > 0
    outcomes, difference = simulate(theta=0.5, phi=0.0, longer=2.0)  # a length that does not pay
    assert length_controlled(outcomes, difference)[0] == pytest.approx(outcomes.mean(), abs=0.03)


def test_models_that_are_compared_together_share_what_length_does():
    """The second model's own outcomes tell nothing of length; the first one's do."""
    outcomes, difference = simulate(theta=0.0, phi=1.5, longer=1.0)
    other = 1.0 - np.arange(len(outcomes)) % 2
    constant = np.where(np.arange(len(outcomes)) < 20, -100.0, 300.0)
    (alone,) = length_controlled(other, constant)
    together = length_controlled(np.stack([other, outcomes]), np.stack([constant, difference]))
    assert alone == pytest.approx(0.5, abs=0.03)
    assert together[0] < alone - 0.02


def test_one_sided_missing_and_few_outcomes():
    random = np.random.default_rng(0)
    for rate in (0.0, 1.0):
        controlled = length_controlled(np.full(100, rate), random.normal(1, 1, 100))
        assert controlled[0] == pytest.approx(rate, abs=0.02)
    outcomes, difference = simulate(theta=0.2, phi=1.0, longer=1.0, prompts=500)
    alone = length_controlled(outcomes, difference)
    for missing in (NAN, 1e9):
        lengths = np.concatenate([difference, np.full(50, missing)])
        more = length_controlled(np.concatenate([outcomes, [NAN] * 50]), lengths)
        assert more == pytest.approx(alone, abs=1e-6)
    rates = length_controlled(np.stack([outcomes, np.full(500, NAN)]), np.stack([difference] * 2))
    assert np.isnan(rates).tolist() == [False, True]
    assert np.isnan(length_controlled([NAN], [3.0])).all()
    assert length_controlled([1.0], [3.0])[0] == pytest.approx(1.0, abs=0.05)


DATA = Path(__file__).parents[2] / "shared/data"
PREFERENCES = DATA / "alpacaeval_preferences.csv.gz"
LEADERBOARD = DATA / "alpacaeval_leaderboard.csv"


@pytest.fixture(scope="module")
def published() -> SimpleNamespace:
    """AlpacaEval 2's verdicts on every prompt, and the leaderboard made of them."""
    if not PREFERENCES.exists():
        pytest.skip(f"AlpacaEval's verdicts are not there: {PREFERENCES}")
    board, rows = pd.read_csv(LEADERBOARD).set_index("model"), pd.read_csv(PREFERENCES)
    rows["longer_by"] = rows["output_chars"] - rows["baseline_chars"]
    columns = rows.pivot(index="model", columns="prompt_id").loc[board.index]
    return SimpleNamespace(
        outcomes=columns["preference"].to_numpy() - 1,
        longer_by=columns["longer_by"].to_numpy(),
        **{name: board[name].to_numpy() for name in board},
    )


def test_published_win_rates_and_errors(published):
    found = [win_rate(outcomes) for outcomes in published.outcomes]
    assert len(found) == 57
    assert [100 * one.rate for one in found] == pytest.approx(published.win_rate, abs=1e-9)
    assert [100 * one.error for one in found] == pytest.approx(published.standard_error, abs=1e-9)


@pytest.mark.parametrize("models", [57, 5, 3, 2, 1])
def test_length_control_moves_every_model_as_published(published, models):
    """All at once, or in groups as small as an evaluation of one's own."""
    order = np.random.default_rng(0).permutation(len(published.outcomes))
    controlled = np.full(len(order), NAN)
    for first in range(0, len(order), models):
        group = order[first : first + models]
        rates = length_controlled(published.outcomes[group], published.longer_by[group])
        controlled[group] = 100 * rates
    theirs = published.length_controlled_winrate - published.win_rate
    ours = controlled - published.win_rate
    moved = np.abs(theirs) > 1e-6  # the baseline against itself does not move
    assert moved.sum() == 56
    assert np.sign(ours[moved]).tolist() == np.sign(theirs[moved]).tolist()
    assert ours[~moved] == pytest.approx(0.0, abs=1e-3)
    apart = np.abs(controlled - published.length_controlled_winrate)
    page = (Path(__file__).parents[1] / "docs/eval.md").read_text()
    at_a_time, means, most = (
        list(map(float, re.search(rf"^\| {name} \|(.*)\|$", page, re.MULTILINE)[1].split("|")))
        for name in ("models compared at a time", "mean distance", "largest")
    )
    column = at_a_time.index(models)
    assert means[column] == pytest.approx(apart.mean(), abs=0.051)
    assert most[column] == pytest.approx(apart.max(), abs=0.051)
    assert apart.mean() < np.abs(theirs).mean() / 2
    assert np.corrcoef(controlled, published.length_controlled_winrate)[0, 1] > 0.99
