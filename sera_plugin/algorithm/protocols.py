"""What Algorithm 1 asks of the rest: who samples, who scores, and who ranks samples.

Token ids in, token ids out: what was sampled is what is scored and trained. An engine samples from
theta_{t-1}; log-probabilities never come from it. A labeler gives candidates numbers; pairing the
best with the worst is the same for all of them (`algorithm.selection`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.rundir.tokens import TokenColumn

if TYPE_CHECKING:
    from sera_plugin.algorithm.method import Method

TokenIds = npt.NDArray[np.int32]

#: `finish_reason` of a candidate that was not sampled: the dataset's chosen answer.
DATASET = "dataset"


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
    finish_reasons: Sequence[str]  # (n,)
    logps: Sequence[FloatArray]  # (n,) nats under each policy asked for, newest first
    sampler: CandidateSampler  # of theta_{t-1}
    settings: SamplingSettings  # how it has sampled them


class Labeler:
    """Ranks candidates; a subclass gives them rewards.

    `method` and `store` are the run's, the tokenizer the host's; `quiet` shows no progress. The
    `report` is for summary.json: `name` as in `sera.labeler`, calls, failures.
    """

    def __init__(
        self, method: Method, store: Any = None, tokenizer: Any = None, quiet: bool = True
    ) -> None:
        self.method, self.store, self.tokenizer, self.quiet = method, store, tokenizer, quiet
        self.report: dict[str, Any] = {"name": method.config.labeler}

    def check(self) -> None:
        """Find out now what a phase would find out after hours of sampling.

        ValueError or OSError if what it ranks with cannot be used, JudgeFailed without a key.
        """

    def complete(self, samples: pa.Table, chosen: TokenColumn) -> pa.Table:
        """Add candidates that are not sampled: the dataset's chosen answers, marked `DATASET`.

        Takes rows of candidates.parquet before they are scored, as many per prompt, and (N,) chosen
        answers; gives the same columns in the order of (row, candidate), as many per prompt.
        """
        return samples

    def rewards(self, ranked: Ranked) -> FloatArray:
        """(n,) larger is better; NaN for a candidate that could not be ranked."""
        raise NotImplementedError
