"""What an iteration works with: pairs, constants and steps, who samples and ranks, its tables.

Token ids in, token ids out: what was sampled is what is scored and trained. An engine samples from
theta_{t-1}; log-probabilities never come from it. A labeler gives candidates numbers; pairing the
best with the worst is the same for all of them (`algorithm.selection`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.algorithm.fit import Reward
from sera_plugin.algorithm.pairs import Beside, Labelled, Pairs
from sera_plugin.algorithm.rewards import FloatArray, reward_weights
from sera_plugin.algorithm.selection import Annotations, Selection
from sera_plugin.config.kinds import SELECTIONS, labeler_kind, labeler_name
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir.store import RunStore
from sera_plugin.rundir.tokens import TokenColumn

TokenIds = npt.NDArray[np.int32]

#: `finish_reason` of a candidate that was not sampled: the dataset's chosen answer.
DATASET = "dataset"


@dataclass(frozen=True)
class Method:
    """The method's constants, fixed for the run. Iterations are 1-based."""

    config: SeraConfig
    reference_free: bool  # the loss has no reference (SimPO, ORPO)
    per_token: bool  # the loss averages its reward over tokens; the margin follows it
    total: int  # N, the number of offline pairs
    iterations: int = 1  # T
    seed: int = 0
    annotations: Annotations = field(default_factory=Annotations)
    prompts: int = 0  # how many are sampled beside the offline pairs' (`sera.prompts`)

    @property
    def unit(self) -> str:
        """What implicit rewards and margins are measured in."""
        return "nats per token" if self.per_token else "nats"

    @cached_property
    def selection(self) -> Selection:
        """Which offline pairs an iteration trains on."""
        found: Selection = SELECTIONS[self.config.selection].load()(self)
        return found

    def kept(self, iteration: int) -> int:
        """How many offline pairs iteration t keeps: N, then k = round(selection_ratio N)."""
        return self.selection.count(iteration)

    def sampled(self, iteration: int) -> int:
        """How many sampled pairs iteration t asks for: none, then k~ = round(bootstrap_ratio N)."""
        samples = iteration >= self.config.first_iteration
        return round(self.config.bootstrap_ratio * self.total) if samples else 0

    @property
    def pairs_per_prompt(self) -> int:
        """Pairs that a prompt must be able to give so that k~ can exist (the paper: one)."""
        prompts = self.total + self.prompts
        return max(1, math.ceil(self.config.bootstrap_ratio * self.total / prompts))

    @property
    def sizes(self) -> tuple[int, ...]:
        """|D_1|, ..., |D_T| as asked for; fewer sampled pairs may exist."""
        iterations = range(1, self.iterations + 1)
        return tuple(self.kept(t) + self.sampled(t) for t in iterations)

    def reference(self, iteration: int) -> int:
        """The policy that iteration t's loss refers to."""
        return 0 if self.config.reference == "initial" else iteration - 1

    def reward_policies(self, iteration: int) -> tuple[int, ...]:
        """The policies that iteration t's reward weighs, theta_{t-1} first; in iteration 1 it."""
        count = len(self.paper_weights(iteration)) if iteration > 1 else 1
        return tuple(range(iteration - 1, iteration - 1 - count, -1))

    def ranking_policies(self, iteration: int) -> tuple[int, ...]:
        """The policies whose log-probabilities iteration t's candidates keep, theta_{t-1} first."""
        implicit = labeler_kind(self.config.labeler).implicit
        return self.reward_policies(iteration) if implicit else (iteration - 1,)

    def candidates_under(self, iteration: int) -> tuple[int, ...]:
        """The policies that iteration t's candidates are scored under, theta_{t-1} first."""
        ranking = self.ranking_policies(iteration)
        return tuple(dict.fromkeys([*ranking, self.reference(iteration)]))

    def oldest_policy(self, iteration: int) -> int:
        """The oldest policy that iteration t's phases may score under."""
        return min(*self.reward_policies(iteration), self.reference(iteration))

    def paper_weights(self, iteration: int) -> tuple[float, ...]:
        """Eq. 7's of `reward_policies`."""
        return reward_weights(iteration, self.config.gamma, self.reference_free)


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps each iteration takes; epochs have unequal lengths."""

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
        sizes = [*self.pairs[: iteration - 1], pairs, *self.pairs[iteration:]]
        return replace(self, pairs=tuple(sizes))


@dataclass
class Phases:
    """Seconds, sequences and tokens forwarded per phase of an iteration."""

    seconds: dict[str, float] = field(default_factory=dict)
    forwarded: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the seconds of the block, however it ends."""
        start = perf_counter()
        try:
            yield
        finally:
            self.spend(phase, perf_counter() - start)

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + seconds, 3)

    def count(self, phase: str, sequences: int, tokens: int) -> None:
        """Add to what a phase forwarded; a prompt counts with each of its completions."""
        entry = self.forwarded.setdefault(phase, {"sequences": 0, "tokens": 0})
        entry["sequences"] += sequences
        entry["tokens"] += tokens


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample, the same for every engine: with equal prompts and policy the same samples."""

    candidates: int  # R, samples per prompt
    temperature: float
    top_p: float
    max_new_tokens: int  # longest candidate, end token included
    max_length: int | None  # longest prompt + candidate in tokens
    end_ids: tuple[int, ...]  # tokens that end a candidate
    seed: int
    vocabulary: int = 2**31  # number of token ids that the model knows

    def stream(self, row: int) -> int:
        """A request's seed. Engines give candidate i of a prompt the seed + i: none meet."""
        return ((self.seed << 32) + row * self.candidates) % 2**63

    def within(self, longest: int | None) -> SamplingSettings:
        """The same for an engine whose context ends after that many tokens, None for no end."""
        limits = [limit for limit in (self.max_length, longest) if limit is not None]
        return replace(self, max_length=min(limits, default=None))


@dataclass(frozen=True)
class Candidate:
    """One sample."""

    token_ids: list[int]  # end token included if it stopped
    finish_reason: str  # "stop" (an end token) or "length" (cut off)


#: Finished prompts: (row, its R candidates).
Chunk = list[tuple[int, list[Candidate]]]
#: Given (prompts to sample, phase), a block with a callable that takes finished chunks.
Progress = Callable[[int, str], AbstractContextManager[Callable[[Chunk], None]]]
#: A block in which so many bytes of an accelerator's memory are free, if that is possible.
Room = Callable[[int], AbstractContextManager[object]]
#: Given (policy, prompts, completions, phase): (n,) log pi_policy(completion | prompt) in nats.
Scorer = Callable[[int, Sequence[Any], Sequence[Any], str], FloatArray]


class CandidateSampler(Protocol):
    """Samples R candidates for each prompt from the current policy."""

    #: What sampled, for summary.json: `name` as in `sera.sampler` and what an engine reports.
    report: dict[str, Any]
    #: Seconds spent around sampling: starting and stopping an engine.
    seconds: dict[str, float]
    #: Longest prompt + candidate in tokens that the engine is set to take, None where it is not.
    longest: int | None

    def sample(
        self, prompts: Sequence[TokenIds], settings: SamplingSettings, skip: Collection[int] = ()
    ) -> Generator[Chunk, None, None]:
        """Yield finished chunks of (row, its R candidates), in any order.

        Rows in `skip` were sampled by an earlier, interrupted call; what the others give does not
        depend on it. ValueError for a prompt that leaves no room, SamplingFailed from an engine.
        """


@dataclass(frozen=True)
class Ranked:
    """Samples of theta_{t-1} to rank, n in all, those of a prompt next to each other."""

    iteration: int  # t, 1-based
    per_prompt: int  # how many of them belong to a prompt, the same for all
    prompts: TokenColumn  # (n,) token ids
    answers: TokenColumn  # (n,) token ids, the end token included
    logps: Sequence[FloatArray]  # (n,) nats under each policy asked for, newest first
    sampler: CandidateSampler  # of theta_{t-1}
    settings: SamplingSettings  # how it has sampled them
    reward: Reward | None = None  # the implicit one; there is none in iteration 1
    about: Callable[[int], str] = lambda place: ""  # what is known of an answer's row, as JSON
    named: Callable[[int], str] = lambda place: ""  # and how to name that row
    labelled: Labelled | None = None  # where there are held-out pairs, from iteration 2 on


def no_room(wanted: int) -> AbstractContextManager[object]:
    """A `Room` that makes none."""
    return nullcontext()


class Labeler:
    """Ranks candidates; a subclass gives them rewards. `quiet` shows no progress.

    `room` is for a model that it ranks with beside the training run. The `report` is for
    summary.json: `name` as in `sera.labeler`, calls, failures.
    """

    def __init__(
        self, method: Method, store: Any = None, tokenizer: Any = None, quiet: bool = True
    ) -> None:
        self.method, self.store, self.tokenizer, self.quiet = method, store, tokenizer, quiet
        self.report: dict[str, Any] = {"name": labeler_name(method.config.labeler)}
        self.room: Room = no_room

    def check(self) -> None:
        """ValueError or OSError if what it ranks with cannot be used, JudgeFailed without a key.

        Called before training: a phase would find it out after hours of sampling.
        """

    def complete(self, samples: pa.Table, chosen: TokenColumn) -> pa.Table:
        """Add candidates that are not sampled: the dataset's chosen answers, marked `DATASET`.

        From rows of candidates.parquet before they are scored and (N,) chosen answers to the same
        columns in the order of (row, candidate); before and after as many per prompt.
        """
        return samples

    def rewards(self, ranked: Ranked) -> FloatArray:
        """(n,) larger is better; NaN for a candidate that could not be ranked."""
        raise NotImplementedError


@dataclass(frozen=True)
class Iteration:
    """What the steps of iteration t (1-based, of policy theta_{t-1}) work with."""

    t: int
    method: Method
    pairs: Pairs
    store: RunStore
    scorer: Scorer
    sampler: CandidateSampler
    settings: SamplingSettings
    labeler: Labeler
    phases: Phases = field(default_factory=Phases)
    progress: Progress = lambda total, phase: nullcontext(lambda chunk: None)
    held_out: Pairs | None = None  # pairs that no iteration trains on
    more_prompts: TokenColumn | None = None  # those of `sera.prompts`, which have no pair
    beside: Beside = field(default_factory=Beside)  # of the rows of all prompts
    beside_held_out: Beside = field(default_factory=Beside)
    tables: dict[tuple[int, str], pa.Table] = field(default_factory=dict)  # read or made so far

    @cached_property
    def prompts(self) -> TokenColumn:
        """All that are sampled: a row's is that of its offline pair, then come the others."""
        given, more = self.pairs.prompt_ids, self.more_prompts
        return given if more is None else given.joined(more)

    def at(self, t: int) -> Iteration:
        """An earlier iteration of the same run; the tables are shared."""
        return replace(self, t=t)

    def read(self, name: str) -> pa.Table | None:
        """A finished phase's table; None if its file is missing or damaged."""
        key = self.t, name
        if key not in self.tables and (table := self.store.read(*key)) is not None:
            self.tables[key] = table
        return self.tables.get(key)

    def table(self, name: str) -> pa.Table:
        """The table of a phase that is finished; ValueError if its file is missing or damaged."""
        table = self.read(name)
        if table is None:
            raise ValueError(
                f"{self.store.table_file(self.t, name)} is missing or damaged. Start the command "
                "again with `auto_resume_from_checkpoints: true`: it is then made again."
            )
        return table

    def keep(self, name: str, table: pa.Table) -> pa.Table:
        """Complete a phase: write its table."""
        self.store.write(self.t, name, table)
        self.tables[self.t, name] = table
        return table

    def once(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        """The phase's table: from its file where that is whole, else made and written."""
        table = self.read(name)
        return self.keep(name, make()) if table is None else table

    def scores(self, policy: int) -> pa.Table:
        """The offline pairs' log-probabilities under theta_policy (offline.parquet)."""
        return self.at(policy + 1).table("offline")
