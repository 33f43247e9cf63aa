"""Win rates against a baseline: arrays of outcomes in, figures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: Resamples of a bootstrap, and the share of them inside its interval.
RESAMPLES, COVERAGE = 2_000, 0.95


@dataclass(frozen=True)
class WinRate:
    """How often a model is preferred to the baseline.

    Attributes:
        rate: mean outcome, 0 to 1; nan without any.
        error: its standard error; nan with fewer than two outcomes.
        low, high: 95% bootstrap interval of the rate, over prompts.
        wins, ties, losses: outcomes above, at and below 1/2.
        missing: prompts without an outcome; they are left out of all the rest.
    """

    rate: float
    error: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    missing: int


def win_rate(outcomes: npt.ArrayLike, seed: int = 0) -> WinRate:
    """The win rate of a model.

    A win counts 1, a tie 1/2, a loss 0; an outcome is the mean over the orders in which the answers
    were shown. The standard error is that of a mean of independent prompts (n - 1 in its variance),
    as AlpacaEval has it; the interval is the percentile bootstrap (Efron 1979).

    Args:
        outcomes: (n,) 0 to 1 for each prompt, nan where there is none.
        seed: of the bootstrap.
    """
    given = np.asarray(outcomes, dtype=np.float64)
    seen = given[~np.isnan(given)]
    rate, error = mean_score(seen)
    low, high = _interval(seen, seed) if len(seen) else (rate, rate)
    return WinRate(
        rate,
        error,
        low,
        high,
        wins=int((seen > 0.5).sum()),
        ties=int((seen == 0.5).sum()),
        losses=int((seen < 0.5).sum()),
        missing=len(given) - len(seen),
    )


def _interval(seen: FloatArray, seed: int) -> tuple[float, float]:
    """Resampling n outcomes is drawing how often each distinct value occurs among n."""
    values, counts = np.unique(seen, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(seen), counts / len(seen), RESAMPLES)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(drawn @ values / len(seen), [tail, 1 - tail])
    return float(low), float(high)


def by_category(
    outcomes: npt.ArrayLike, categories: Sequence[str], seed: int = 0
) -> dict[str, WinRate]:
    """The win rate among the prompts of each category, in order of first appearance.

    Args:
        outcomes: (n,) as for `win_rate`.
        categories: one per prompt.
        seed: of the bootstrap.
    """
    given = np.asarray(outcomes, dtype=np.float64)
    named = np.asarray(categories, dtype=object)
    return {name: win_rate(given[named == name], seed) for name in dict.fromkeys(categories)}


def mean_score(scores: npt.ArrayLike) -> tuple[float, float]:
    """Mean of scores and its standard error, nan where there are too few.

    Args:
        scores: (n,) nan where there is none.
    """
    given = np.asarray(scores, dtype=np.float64)
    seen = given[~np.isnan(given)]
    n = len(seen)
    mean = float(seen.mean()) if n else float("nan")
    return mean, float(seen.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
