"""One iteration at work: the run's parts in one place, and its tables, each made or read once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import pyarrow as pa

from sera_plugin.algorithm.method import Method, Pairs, Phases
from sera_plugin.algorithm.protocols import (
    CandidateSampler,
    Chunk,
    Labeler,
    Progress,
    SamplingSettings,
    Scorer,
)
from sera_plugin.rundir.store import RunStore


def _no_progress(total: int, phase: str) -> AbstractContextManager[Callable[[Chunk], None]]:
    return nullcontext(lambda chunk: None)


@dataclass(frozen=True)
class Iteration:
    """What the steps of iteration t work with.

    Attributes:
        t: 1-based. The current policy is theta_{t-1}.
        method, pairs, store: the run.
        scorer, sampler: the model's two abilities.
        settings: how to sample.
        labeler: ranks the samples.
        phases: receives what each phase cost.
        progress: given (prompts to sample, phase), opens a bar that takes finished chunks.
        held_out: pairs that no iteration trains on, None without any.
        tables: the run directory's tables that have been read or made, by (iteration, name).
    """

    t: int
    method: Method
    pairs: Pairs
    store: RunStore
    scorer: Scorer
    sampler: CandidateSampler
    settings: SamplingSettings
    labeler: Labeler
    phases: Phases = field(default_factory=Phases)
    progress: Progress = _no_progress
    held_out: Pairs | None = None
    tables: dict[tuple[int, str], pa.Table] = field(default_factory=dict)

    def at(self, t: int) -> Iteration:
        """An earlier iteration of the same run; the tables are shared."""
        return replace(self, t=t)

    def read(self, name: str) -> pa.Table | None:
        """A finished phase's table; None if its file is missing or damaged."""
        if (self.t, name) not in self.tables:
            table = self.store.read(self.t, name)
            if table is None:
                return None
            self.tables[self.t, name] = table
        return self.tables[self.t, name]

    def table(self, name: str) -> pa.Table:
        """The table of a phase that is finished.

        Raises:
            ValueError: if its file is missing or damaged.
        """
        table = self.read(name)
        if table is None:
            raise ValueError(
                f"{self.store.table_file(self.t, name)} is missing or damaged. Start the command "
                "again with `auto_resume_from_checkpoints: true`: it is then made again."
            )
        return table

    def once(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        """The phase's table: from its file where that is whole, else made and written."""
        table = self.read(name)
        if table is None:
            table = make()
            self.store.write(self.t, name, table)
            self.tables[self.t, name] = table
        return table

    def scores(self, policy: int) -> pa.Table:
        """The offline pairs' log-probabilities under theta_policy (offline.parquet)."""
        return self.at(policy + 1).table("offline")
