"""Three offline pairs, a scorer that looks log-probabilities up, and a sampler of known answers."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sera_plugin.algorithm.algorithm import prepare
from sera_plugin.algorithm.method import (
    Candidate,
    Iteration,
    Method,
    Phases,
    SamplingSettings,
)
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.config.kinds import LABELERS
from sera_plugin.config.sera import AS_PUBLISHED, SeraConfig
from sera_plugin.rundir.store import RunStore, make_table

# log pi of (prompt token, completion's first token) under theta_0, theta_1, theta_2, in nats.
LOGPS: dict[tuple[int, int], list[float]] = {
    # chosen            rejected
    (1, 11): [-10, -9, -8], (1, 12): [-10, -12, -15],
    (2, 21): [-20, -21, -20], (2, 22): [-20, -20, -21],
    (3, 31): [-30, -28, -29], (3, 32): [-30, -29, -31],
    # candidates
    (1, 13): [-5, -3, -2], (1, 14): [-5, -6, -6],
    (2, 23): [-6, -6, -7], (2, 24): [-6, -5, -3],
    (3, 33): [-7, -1, -9], (3, 34): [-7, -7, -7],
}  # fmt: skip
END = 99
CANDIDATES = {row: [[10 * row + 13, END], [10 * row + 14, END]] for row in range(3)}
PAIRS = {
    "prompt_ids": [[1], [2, 2], [3]],
    "chosen_ids": [[11, END], [21, 0, 0, END], [31, END]],
    "rejected_ids": [[12, END], [22, END], [32, 0, 0, END]],
}
CONFIG = SeraConfig(selection_ratio=0.67, bootstrap_ratio=0.67, candidates=2, **AS_PUBLISHED)


class FakeScorer:
    def __init__(self) -> None:
        self.calls: list[tuple[int, str, int]] = []
        self.broken: tuple[int, int] | None = None

    def __call__(self, policy, prompts, completions, phase):
        self.calls.append((policy, phase, len(prompts)))
        keys = [(int(p[0]), int(c[0])) for p, c in zip(prompts, completions, strict=True)]
        return np.asarray([math.nan if k == self.broken else LOGPS[k][policy] for k in keys])


class FakeSampler:
    """Last row first, in chunks of `size` rows: their order is the sampler's own business."""

    size = 1
    fail_after: int | None = None

    def __init__(self) -> None:
        self.report: dict[str, Any] = {"name": "fake"}
        self.seconds = {"start_engine": 0.5}
        self.sampled: list[int] = []
        self.calls = self.running = 0

    def sample(self, prompts, settings, skip=()):
        self.calls += 1
        self.running += 1
        order = [row for row in reversed(range(len(prompts))) if row not in skip]
        try:
            for first in range(0, len(order), self.size):
                if len(self.sampled) == self.fail_after:
                    raise RuntimeError("the machine was taken away")
                rows = order[first : first + self.size]
                self.sampled += rows
                yield [(row, [Candidate(ids, "stop") for ids in CANDIDATES[row]]) for row in rows]
        finally:
            self.running -= 1


@dataclass
class Run:
    """One run directory with its fakes."""

    directory: Path
    config: SeraConfig = CONFIG
    reference_free: bool = False
    per_token: bool = False
    scorer: FakeScorer = field(default_factory=FakeScorer)
    sampler: FakeSampler = field(default_factory=FakeSampler)
    phases: Phases = field(default_factory=Phases)

    @property
    def store(self) -> RunStore:
        return RunStore(self.directory)

    @property
    def method(self) -> Method:
        return Method(self.config, self.reference_free, self.per_token, total=3)

    def iteration(self, t: int, labeler: Any = None) -> Iteration:
        return Iteration(
            t,
            self.method,
            Pairs.from_table(make_table(PAIRS)),
            self.store,
            self.scorer,
            self.sampler,
            SamplingSettings(self.config.candidates, 0.7, 0.95, 8, None, (END,), 0, vocabulary=100),
            labeler or LABELERS[self.config.labeler].load()(self.method),
            self.phases,
        )

    def prepare(self, t, labeler=None) -> dict[str, list[Any]]:
        return prepare(self.iteration(t, labeler)).to_pydict()

    def upto(self, t: int) -> dict[str, list[Any]]:
        """What iteration t trains on, after those before it."""
        return [self.prepare(each) for each in range(1, t + 1)][-1]

    def table(self, iteration, name) -> dict[str, list[Any]]:
        return self.store.read(iteration, name).to_pydict()

    def offline(self, iteration) -> dict[str, list[Any]]:
        return self.table(iteration, "offline")

    def columns(self, iteration, name, columns: str) -> list[list[Any]]:
        return [self.table(iteration, name)[column] for column in columns.split()]


def firsts(trained: dict[str, list[Any]]) -> list[tuple[int, int, int]]:
    """Pairs as the first tokens of prompt, chosen, rejected."""
    columns = (trained[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
    return [(p[0], c[0], r[0]) for p, c, r in zip(*columns, strict=True)]


def assert_reference_is(policy: int, trained: dict[str, list[Any]]) -> None:
    for place, side in enumerate(("chosen", "rejected"), start=1):
        expected = [LOGPS[pair[0], pair[place]][policy] for pair in firsts(trained)]
        assert trained[f"ref_{side}_logps"] == expected
