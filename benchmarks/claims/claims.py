"""Each claim as differences of two figures, paired by seed, and the rule for its verdict.

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
    """What the paper says, where, and the comparisons that test it."""

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


REWARD, SHARE = "true reward", "share"
_ALL = (0.0, 0.2, 0.4)
_LOSSES = ("cDPO", "rDPO", "IPO", "SLiC", "SimPO")

CLAIMS = (
    Claim(
        "SeRA trains better policies than plain DPO",
        "main comparison",
        REWARD,
        (
            *versus("SeRA", "DPO, 3 epochs", *_ALL),
            *(
                Comparison(
                    "SeRA - DPO, 1 epoch",
                    noise,
                    Side("SeRA"),
                    Side("iterative DPO", after(1, "true_reward")),
                )
                for noise in _ALL
            ),
        ),
    ),
    Claim(
        "SeRA trains better policies than iterative DPO",
        "main comparison",
        REWARD,
        versus("SeRA", "iterative DPO", *_ALL),
    ),
    Claim(
        "SeRA wins more often against the base model than iterative DPO",
        "main comparison",
        "win rate",
        versus("SeRA", "iterative DPO", *_ALL, figure="win_rate"),
    ),
    Claim(
        "selection alone helps",
        "ablation",
        REWARD,
        versus("SeRA, selection only", "iterative DPO", *_ALL),
    ),
    Claim(
        "sampled pairs help beyond selection",
        "ablation",
        REWARD,
        versus("SeRA", "SeRA, selection only", *_ALL),
    ),
    Claim(
        "offline pairs help beyond sampled ones",
        "ablation",
        REWARD,
        versus("SeRA", "SeRA, bootstrap only", *_ALL),
    ),
    Claim(
        "selection drops swapped labels more often than chance (0.3)",
        "robustness to noise",
        SHARE,
        tuple(
            Comparison(
                f"SeRA, selection only, iteration {t}: recall - 0.3",
                noise,
                Side("SeRA, selection only", during(t, "recall")),
                Side(None, constant=0.3),
            )
            for noise in (0.2, 0.4)
            for t in (2, 3)
        ),
    ),
    Claim(
        "SeRA is robust to noise: better than losses made for it",
        "robustness to noise",
        REWARD,
        (*versus("SeRA", "iterative cDPO", 0.2), *versus("SeRA", "iterative rDPO", 0.2)),
    ),
    Claim(
        "implicit reward margins select better than other criteria",
        "comparison of selections",
        REWARD,
        (
            *versus("SeRA, selection only", "selection by score", 0.0, 0.2),
            *versus("SeRA, selection only", "selection by reference", 0.2),
            *versus("SeRA, selection only", "random selection", 0.2),
        ),
    ),
    Claim(
        "SeRA helps other direct alignment losses",
        "main comparison",
        REWARD,
        tuple(one for loss in _LOSSES for one in versus(f"SeRA, {loss}", f"iterative {loss}", 0.2)),
    ),
    Claim(
        "SeRA is better than other ways to choose pairs",
        "main comparison",
        REWARD,
        (*versus("SeRA", "SPIN", 0.2), *versus("SeRA", "Curri-DPO", 0.2)),
    ),
    Claim(
        "the implicit reward follows length less under SeRA",
        "Fig. 2, Fig. 11, Table 10",
        "R^2 with words, the baseline's less SeRA's",
        versus("iterative DPO", "SeRA", *_ALL, figure="r2_words"),
    ),
    Claim(
        "the implicit reward follows quality more under SeRA",
        "Fig. 2, Fig. 11, Table 10",
        "R^2 with true reward",
        versus("SeRA", "iterative DPO", *_ALL, figure="r2_true"),
    ),
    Claim(
        "the implicit reward ranks the policy's own samples in true order",
        "Table 6",
        SHARE,
        tuple(
            Comparison(
                f"SeRA, iteration {t}: in true order - 0.5",
                noise,
                Side("SeRA", during(t, "order_found")),
                Side(None, constant=0.5),
            )
            for noise in _ALL
            for t in (2, 3)
        ),
    ),
    Claim(
        "every iteration helps",
        "iterations",
        REWARD,
        tuple(
            Comparison(
                f"SeRA, after {t} - after {t - 1}",
                noise,
                Side("SeRA", after(t, "true_reward")),
                Side("SeRA", after(t - 1, "true_reward")),
            )
            for noise in _ALL
            for t in (2, 3)
        ),
    ),
    Claim(
        "the reward ensemble helps",
        "gamma",
        REWARD,
        versus("SeRA", "SeRA, gamma 0", 0.2),
    ),
    Claim(
        "more sampled pairs help (best-SeRA)",
        "ratios",
        REWARD,
        versus("SeRA, k~ = 2 N", "SeRA", 0.2),
    ),
)

#: Not the paper's: what this plugin adds or decides.
OURS = (
    Claim(
        "length control helps",
        "DICE; off by default",
        REWARD,
        versus("SeRA, length control", "SeRA", *_ALL),
    ),
    Claim(
        "with length control SeRA is better than iterative DPO",
        "DICE; off by default",
        REWARD,
        versus("SeRA, length control", "iterative DPO", *_ALL),
    ),
    Claim(
        "a fresh optimizer each iteration is better than one for all",
        "default of `restart_optimizer`",
        REWARD,
        (
            *versus("SeRA", "SeRA, one optimizer", 0.2),
            *versus("iterative DPO", "iterative DPO, one optimizer", 0.2),
        ),
    ),
)
