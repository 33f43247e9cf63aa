"""What the world's parameters were fixed by, before any two systems were compared.

The base model and plain DPO alone, on seeds that no comparison uses. How SeRA does is no part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from sera_plugin.tools.demo.world import PROMPT_LENGTH

#: Seeds of the worlds that the criteria are checked in, and of the language world.
SEEDS, LANGUAGE_SEEDS = (100, 101), (100,)
#: The baseline: no labels swapped, and a fifth.
SYSTEM, NOISES = "DPO, 3 epochs", (0.0, 0.2)
#: The baseline in the language world.
ITERATIVE = "iterative DPO"


@dataclass(frozen=True)
class Criterion:
    """What has to hold on average over `SEEDS`.

    Attributes:
        says: in words.
        figure: what was measured.
        least, most: between which it has to lie.
    """

    says: str
    figure: float
    least: float
    most: float

    @property
    def holds(self) -> bool:
        return self.least <= self.figure <= self.most


def check(bases: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> list[Criterion]:
    """The criteria with their figures.

    Args:
        bases: the base model's figures, one a seed.
        runs: records of `SYSTEM` without swapped labels.
    """
    first, last = ([run["policies"][place] for run in runs] for place in (0, -1))

    def words(policies: Sequence[dict[str, Any]]) -> float:
        return mean(policy["words"] for policy in policies)

    return [
        Criterion(
            "the base model answers neither well nor badly: mean true reward",
            mean(base["true_reward"] for base in bases),
            0.5,
            0.8,
        ),
        Criterion(
            "its answers to one prompt differ: mean standard deviation of true reward",
            mean(base["spread"] for base in bases),
            0.08,
            1.0,
        ),
        Criterion(
            "plain DPO learns something in its first epoch: gain in true reward",
            mean(
                policy["true_reward"] - base["true_reward"]
                for policy, base in zip(first, bases, strict=True)
            ),
            0.02,
            1.0,
        ),
        Criterion(
            "plain DPO over-optimises to length: words after 3 epochs beyond the "
            f"{PROMPT_LENGTH} of the best answer",
            words(last) - PROMPT_LENGTH,
            0.5,
            20.0,
        ),
        Criterion(
            "and it does so more with every epoch: words after 3 epochs less those after 1",
            words(last) - words(first),
            0.1,
            20.0,
        ),
    ]


def check_language(
    bases: Sequence[Mapping[str, Any]], by_rate: Sequence[Sequence[Mapping[str, Any]]]
) -> list[Criterion]:
    """The criteria of the language world with their figures.

    Args:
        bases: the base model's figures, one a seed.
        by_rate: records of `ITERATIVE`, one a seed, for each learning rate from the smallest.
    """
    middle, largest = by_rate[len(by_rate) // 2], by_rate[-1]
    best = [max(policy["true_reward"] for policy in run["policies"]) for run in middle]
    return [
        Criterion(
            "two answers of the base model to one prompt differ: standard deviation of true reward",
            mean(base["spread"] for base in bases),
            0.08,
            1.0,
        ),
        Criterion(
            "iterative DPO learns something at the middle rate: gain in true reward",
            mean(one - base["true_reward"] for one, base in zip(best, bases, strict=True)),
            0.03,
            1.0,
        ),
        Criterion(
            "it moves far at the largest: log-probability that chosen answers lose, nats a token",
            mean(-run["policies"][-1]["drift"] for run in largest),
            0.5,
            20.0,
        ),
    ]
