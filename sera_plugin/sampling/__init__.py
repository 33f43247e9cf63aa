"""Sampling candidates: one protocol, several engines.

Token ids in, token ids out: what was sampled is what is scored and trained. An engine samples
from the policy it is told to, here always theta_{t-1}; rewards never come from an engine, always
from the scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample, the same for every engine.

    Attributes:
        candidates: R, samples per prompt.
        temperature, top_p: as in `sera:`.
        max_new_tokens: longest candidate in tokens, end token included.
        max_length: longest prompt + candidate in tokens, or None.
        end_ids: token ids that end a candidate.
        seed: base seed; the same seed, prompts and policy give the same candidates.
    """

    candidates: int
    temperature: float
    top_p: float
    max_new_tokens: int
    max_length: int | None
    end_ids: tuple[int, ...]
    seed: int

    def stream(self, row: int) -> int:
        """A request's seed. Engines give candidate i of a prompt the seed + i: none meet."""
        return ((self.seed << 32) + row * self.candidates) % 2**63

    def within(self, longest: int | None) -> SamplingSettings:
        """The same for an engine whose context ends after so many tokens, None for no end."""
        limits = [limit for limit in (self.max_length, longest) if limit is not None]
        return replace(self, max_length=min(limits, default=None))


@dataclass(frozen=True)
class Candidate:
    """One sample: its token ids (end token included if it stopped) and why it ended.

    `finish_reason` is "stop" (an end token) or "length" (cut off).
    """

    token_ids: list[int]
    finish_reason: str


#: Finished prompts: (row, its R candidates).
Chunk = list[tuple[int, list[Candidate]]]
#: Given (prompts to sample, phase), a block with a callable that takes finished chunks.
Progress = Callable[[int, str], AbstractContextManager[Callable[[Chunk], None]]]


class SamplingFailed(RuntimeError):
    """Sampling stopped. Finished chunks are kept and the next try goes on from them."""


class CandidateSampler(Protocol):
    """Samples R candidates for each prompt from the current policy."""

    #: What sampled, for summary.json: `name` as in `sera.sampler` and what an engine tells.
    report: dict[str, Any]
    #: Seconds spent around sampling: starting and stopping an engine.
    seconds: dict[str, float]
    #: Longest prompt + candidate in tokens that the engine is set to take, None where it is not.
    longest: int | None

    def sample(
        self,
        prompts: Sequence[TokenIds],
        settings: SamplingSettings,
        skip: Collection[int] = (),
    ) -> Generator[Chunk, None, None]:
        """Yield finished chunks of (row, its R candidates), in any order.

        Args:
            prompts: token ids of all rows.
            settings: how to sample.
            skip: rows already sampled by an earlier, interrupted call. What the other rows give
                does not depend on it.

        Raises:
            ValueError: for a prompt that leaves no room to sample.
            SamplingFailed: if an engine outside this process does not do its work.
        """
        ...


def longest_first(prompts: Sequence[TokenIds], skip: Collection[int]) -> list[int]:
    """The rows that are left: what still runs at the end of a phase is then short."""
    lengths = np.fromiter(map(len, prompts), dtype=np.int64, count=len(prompts))
    return [row for row in np.argsort(-lengths, kind="stable").tolist() if row not in skip]


def room(row: int, prompt: TokenIds, settings: SamplingSettings) -> int:
    """How many tokens may be sampled after a prompt.

    Raises:
        ValueError: if that is none.
    """
    limit = settings.max_new_tokens
    if settings.max_length is not None:
        limit = min(limit, settings.max_length - len(prompt))
    if limit < 1:
        raise ValueError(
            f"the prompt of row {row} has {len(prompt)} tokens, which leaves no room to sample "
            f"within {settings.max_length}. Raise sequence_len (or vllm.max_model_len, where that "
            "is the smaller one), or remove the row."
        )
    return limit
