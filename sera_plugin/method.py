"""What an iteration is made of: preference pairs, the method's constants, what phases cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.args import SeraConfig
from sera_plugin.rewards import FloatArray, implicit_reward, reward_weights
from sera_plugin.tokens import TokenColumn


@dataclass(frozen=True)
class Pairs:
    """Preference pairs as token ids, (N,) each."""

    prompt_ids: TokenColumn
    chosen_ids: TokenColumn
    rejected_ids: TokenColumn

    @classmethod
    def from_table(cls, table: pa.Table) -> Pairs:
        return cls(
            *(TokenColumn(table[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        )

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class Method:
    """The method's constants, fixed for the run.

    Attributes:
        config: the `sera:` block.
        reference_free: whether the loss has no reference (SimPO).
        per_token: whether the loss averages its reward over tokens; the margin follows it.
        total: N, the number of offline pairs.
    """

    config: SeraConfig
    reference_free: bool
    per_token: bool
    total: int

    @property
    def kept(self) -> int:
        """k = round(selection_ratio N)."""
        return round(self.config.selection_ratio * self.total)

    @property
    def bootstrapped(self) -> int:
        """k~ = round(bootstrap_ratio N)."""
        return round(self.config.bootstrap_ratio * self.total)

    def weights(self, iteration: int) -> tuple[float, ...]:
        return reward_weights(iteration, self.config.gamma, self.reference_free)

    def oldest_policy(self, iteration: int) -> int:
        """The oldest policy that iteration t's phases score under."""
        return iteration - len(self.weights(iteration)) if iteration > 1 else 0

    def reward(
        self, logps: Sequence[npt.ArrayLike], iteration: int, lengths: npt.ArrayLike
    ) -> FloatArray:
        weights = self.weights(iteration)
        return implicit_reward(np.stack(logps), weights, lengths if self.per_token else None)


@dataclass
class Phases:
    """Seconds, sequences and tokens forwarded per phase of an iteration."""

    seconds: dict[str, float] = field(default_factory=dict)
    forwarded: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.spend(phase, perf_counter() - start)

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + seconds, 3)

    def count(self, phase: str, sequences: int, tokens: int) -> None:
        entry = self.forwarded.setdefault(phase, {"sequences": 0, "tokens": 0})
        entry["sequences"] += sequences
        entry["tokens"] += tokens
