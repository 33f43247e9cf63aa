"""Figures of runs, differences of them over seeds, and the rule for a verdict.

The rule was written before anything was compared. A difference has a 95% interval over seeds
(Student's t, paired). Above 0: reproduced. Below 0: reversed. Around 0: not reproduced. With fewer
than three seeds: not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Record = dict[str, Any]
Figure = Callable[[Record], float | None]
FEWEST_SEEDS = 3
COVERAGE = 0.95
VERDICTS = ("reproduced", "not reproduced", "reversed", "not measured")


@dataclass(frozen=True)
class Results:
    """Records of runs, found by what they are."""

    records: Sequence[Record]

    def of(self, system: str, noise: float, figure: Figure) -> dict[int, float]:
        """A figure by seed; seeds where it is not defined are left out."""
        return {
            one["seed"]: value
            for one in self.records
            if one["system"] == system and one["noise"] == noise
            if (value := figure(one)) is not None
        }


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval; nan where there are too few."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def over(cls, values: Sequence[float]) -> Estimate:
        nan = float("nan")
        n = len(values)
        centre = float(np.mean(values)) if n else nan
        if n < 2:
            return cls(centre, nan, nan, n)
        error = float(np.std(values, ddof=1)) / n**0.5
        half = float(stats.t.ppf((1 + COVERAGE) / 2, n - 1)) * error
        return cls(centre, centre - half, centre + half, n)

    @property
    def verdict(self) -> str:
        if self.seeds < FEWEST_SEEDS:
            return "not measured"
        if self.low > 0:
            return "reproduced"
        return "reversed" if self.high < 0 else "not reproduced"


def final(name: str) -> Figure:
    """A figure of the last policy."""
    return lambda record: record["policies"][-1].get(name)


TRUE_REWARD = final("true_reward")


def after(iteration: int, name: str) -> Figure:
    """A figure of the policy after an iteration."""

    def read(record: Record) -> float | None:
        policies = record["policies"]
        return policies[iteration - 1].get(name) if len(policies) >= iteration else None

    return read


def during(iteration: int, name: str) -> Figure:
    """A figure of what an iteration kept and sampled."""

    def read(record: Record) -> float | None:
        found = record["iterations"]
        return found[iteration - 1].get(name) if len(found) >= iteration else None

    return read


@dataclass(frozen=True)
class Side:
    """A figure of a system, or a constant where `system` is None."""

    system: str | None
    figure: Figure = TRUE_REWARD
    constant: float = 0.0

    def of(self, results: Results, noise: float) -> dict[int, float] | None:
        return None if self.system is None else results.of(self.system, noise, self.figure)


@dataclass(frozen=True)
class Comparison:
    """One difference: that `more` less `less` is above 0 is what is claimed."""

    label: str
    noise: float
    more: Side
    less: Side

    def estimate(self, results: Results) -> Estimate:
        more = self.more.of(results, self.noise)
        assert more is not None
        less = self.less.of(results, self.noise)
        if less is None:
            return Estimate.over([value - self.less.constant for value in more.values()])
        return Estimate.over(
            [more[seed] - less[seed] for seed in sorted(more.keys() & less.keys())]
        )


@dataclass(frozen=True)
class Claim:
    """What the paper says and where, with its figures, and the comparisons that test it.

    Win rates are of TinyLlama-1.1B against its SFT model on UltraFeedback unless it says more.
    """

    says: str
    where: str
    unit: str
    comparisons: tuple[Comparison, ...]


def versus(
    more: str, less: str, *noises: float, figure: str = "true_reward"
) -> tuple[Comparison, ...]:
    """The last policies of two systems, at each share of swapped labels."""
    return tuple(
        Comparison(f"{more} - {less}", noise, Side(more, final(figure)), Side(less, final(figure)))
        for noise in noises
    )
