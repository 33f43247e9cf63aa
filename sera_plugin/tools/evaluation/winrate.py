"""Win rates against a baseline, as they are and with the length of answers held equal."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, ndtri

FloatArray = npt.NDArray[np.float64]

#: Resamples of a bootstrap, and the share of them inside its interval.
RESAMPLES, COVERAGE = 2_000, 0.95
#: Weight of the prior of phi, in outcomes of even odds per outcome.
_PRIOR = 0.2
#: Keeps theta finite for a model that wins or loses every time.
_FINITE = 1e-3
#: Wins and losses added to each prompt's, so that its log-odds are finite.
_SMOOTHING = 0.5


@dataclass(frozen=True)
class WinRate:
    """How often a model is preferred to the baseline; nan where there are too few outcomes."""

    rate: float  # mean outcome, 0 to 1
    error: float  # its standard error
    low: float  # 95% bootstrap interval of the rate, over prompts
    high: float
    wins: int  # outcomes above, at and below 1/2
    ties: int
    losses: int
    number: int  # of outcomes
    missing: int  # prompts without an outcome, which are left out of all the rest


def win_rate(outcomes: npt.ArrayLike, seed: int = 0) -> WinRate:
    """The win rate of a model, from (n,) outcomes of 0 to 1, nan where there is none.

    A win counts 1, a tie 1/2, a loss 0; an outcome is the mean over the orders in which the answers
    were shown. The standard error is that of a mean of independent prompts (n - 1 in its variance),
    as AlpacaEval has it; the interval is the percentile bootstrap (Efron 1979).
    """
    given = np.asarray(outcomes, dtype=np.float64)
    seen = given[~np.isnan(given)]
    rate, error = mean_score(seen)
    low, high = rate, rate
    if len(seen):
        # Resampling n outcomes is drawing how often each distinct value occurs among n.
        values, counts = np.unique(seen, return_counts=True)
        drawn = np.random.default_rng(seed).multinomial(len(seen), counts / len(seen), RESAMPLES)
        tail = (1 - COVERAGE) / 2
        low, high = map(float, np.quantile(drawn @ values / len(seen), [tail, 1 - tail]))
    wins, ties, losses = (int(one.sum()) for one in (seen > 0.5, seen == 0.5, seen < 0.5))
    number, missing = len(seen), len(given) - len(seen)
    return WinRate(rate, error, low, high, wins, ties, losses, number, missing)


@dataclass(frozen=True)
class Share:
    """How large a part of `number` answers or pairs is right; nan of none."""

    rate: float  # 0 to 1
    low: float  # its 95% interval
    high: float
    number: int
    missing: int  # without an outcome, which are left out of all the rest


def share(outcomes: npt.ArrayLike) -> Share:
    """The mean of (n,) outcomes of 0 to 1, nan where there is none, with Wilson's interval (1927).

    Unlike a bootstrap's it has a width where all outcomes are the same; of outcomes that are not
    only 0 and 1 it is too wide.
    """
    given = np.asarray(outcomes, dtype=np.float64)
    seen = given[~np.isnan(given)]
    n, missing = len(seen), len(given) - len(seen)
    if not n:
        return Share(math.nan, math.nan, math.nan, 0, missing)
    rate, z = float(seen.mean()), float(ndtri((1 + COVERAGE) / 2))
    middle, scale = rate + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    low, high = max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
    return Share(rate, low, high, n, missing)


def by_group(
    of: Callable[[FloatArray], Any], outcomes: FloatArray, groups: npt.NDArray[np.object_]
) -> dict[str, dict[str, Any]]:
    """What `win_rate` or `share` makes of the outcomes of each of (n,) groups, in their order."""
    return {name: asdict(of(outcomes[groups == name])) for name in dict.fromkeys(groups)}


def mean_score(scores: npt.ArrayLike) -> tuple[float, float]:
    """Mean of (n,) scores, nan where there is none, and its standard error."""
    given = np.asarray(scores, dtype=np.float64)
    seen = given[~np.isnan(given)]
    n = len(seen)
    mean = float(seen.mean()) if n else float("nan")
    return mean, float(seen.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def length_controlled(outcomes: npt.ArrayLike, longer_by: npt.ArrayLike) -> FloatArray:
    """What models would win with answers as long as the baseline's: (models,) rates from 0 to 1.

    After Dubois et al. 2024, "Length-Controlled AlpacaEval". There as here, outcomes are explained
    by a logistic regression, and the length term is then set to zero:

        logit P(model m is preferred on prompt x) = theta_m + phi_m tanh(d_mx / s_m) + gamma_mx

    with d_mx the model's length less the baseline's in characters and s_m its standard deviation.
    docs/eval.md says what differs and how close it comes: gamma_mx, how hard a prompt is, is the
    smoothed log-odds at which the *other* models win on it, centred; phi_m lies around a common
    phi, and that around 0, each with the weight of one fifth of the outcomes at even odds (the
    weight that the published regression gives to its extra verdicts).

    `outcomes` are (models, prompts) from 0 to 1, nan where there is none; `longer_by` characters of
    the model's answer less those of the baseline's. The rate of a model without outcomes is nan.
    """
    given = np.atleast_2d(np.asarray(outcomes, dtype=np.float64))
    rates = np.full(len(given), np.nan)
    some = ~np.isnan(given).all(axis=1)
    if not some.any():
        return rates
    given, difference = given[some], np.atleast_2d(np.asarray(longer_by, dtype=np.float64))[some]
    models, there = len(given), ~np.isnan(given)
    weight = there.astype(np.float64)
    outcome = np.where(there, given, 0.0)
    # In units of each model's standard deviation; 0 where all are equal or missing.
    longer = np.ma.masked_invalid(np.where(there, difference, np.nan))
    spread, scaled = longer.std(axis=1, ddof=1, keepdims=True).filled(0.0), np.zeros_like(weight)
    np.divide(longer.filled(0.0), spread, out=scaled, where=spread > 0)
    length = np.tanh(scaled)
    # Log-odds at which the other models win, centred per model.
    won = (weight * outcome).sum(axis=0) - weight * outcome
    lost = (weight * (1 - outcome)).sum(axis=0) - weight * (1 - outcome)
    odds = np.log((won + _SMOOTHING) / (lost + _SMOOTHING))
    gamma = odds - odds.mean(axis=1, keepdims=True)
    prior = _PRIOR * (length**2).sum(axis=1) / 4

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        theta, own, common = np.split(parameters, [models, 2 * models])
        logit = theta[:, None] + (common + own)[:, None] * length + gamma
        likelihood = (weight * (np.logaddexp(0.0, logit) - outcome * logit)).sum()
        penalty = _FINITE * theta @ theta + prior @ own**2 + prior.mean() * common @ common
        residual = weight * (expit(logit) - outcome)
        slope = (residual * length).sum(axis=1)
        gradient = [
            residual.sum(axis=1) + _FINITE * theta,
            slope + prior * own,
            [slope.sum() + prior.mean() * common[0]],
        ]
        return float(likelihood + penalty / 2), np.concatenate(gradient)

    start, options = np.zeros(2 * models + 1), {"maxiter": 5_000, "ftol": 1e-13, "gtol": 1e-7}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    at_equal_length = weight * expit(found.x[:models, None] + gamma)
    rates[some] = at_equal_length.sum(axis=1) / weight.sum(axis=1)
    return rates
