"""Steps of a run whose epochs have unequal length. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps each iteration takes; iterations are 1-based."""

    pairs: tuple[int, ...]  # |D_t| for t = 1..T
    batch_size: int  # pairs per micro-batch, all processes together
    accumulation: int  # micro-batches per optimizer step
    drop_last: bool = False  # whether the data loader drops an incomplete last micro-batch

    def batches(self, iteration: int) -> int:
        """Micro-batches of iteration t."""
        rounding = math.floor if self.drop_last else math.ceil
        return rounding(self.pairs[iteration - 1] / self.batch_size)

    def steps(self, iteration: int) -> int:
        """Optimizer steps of iteration t; an incomplete accumulation still makes a step."""
        return math.ceil(self.batches(iteration) / self.accumulation)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(self.steps(t) for t in range(1, len(self.pairs) + 1))

    def locate(self, global_step: int) -> tuple[int, int]:
        """(iteration, steps made in it) where a run that has made `global_step` steps continues.

        At a boundary this is the next iteration with 0 steps, at the end of the run (T + 1, 0).
        """
        iteration, made = 1, global_step
        while iteration <= len(self.pairs) and made >= self.steps(iteration):
            made -= self.steps(iteration)
            iteration += 1
        return iteration, made

    def with_pairs(self, iteration: int, pairs: int) -> Schedule:
        """The same schedule once |D_t| is known (fewer pairs than asked for may exist)."""
        sizes = list(self.pairs)
        sizes[iteration - 1] = pairs
        return replace(self, pairs=tuple(sizes))
