"""Sampling candidates: one protocol, several engines.

Token ids in, token ids out: what was sampled is what is scored and trained. An engine samples
from the policy it is told to, here always theta_{t-1}; rewards never come from an engine, always
from the scorer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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


@dataclass(frozen=True)
class Candidate:
    """One sample: its token ids (end token included if it stopped) and why it ended.

    `finish_reason` is "stop" (an end token) or "length" (cut off).
    """

    token_ids: list[int]
    finish_reason: str


class CandidateSampler(Protocol):
    """Samples R candidates for each prompt from the current policy."""

    #: The engine's name as in `sera.sampler`.
    name: str

    def sample(
        self,
        prompts: Sequence[TokenIds],
        settings: SamplingSettings,
        skip: Collection[int] = (),
    ) -> Iterator[list[tuple[int, list[Candidate]]]]:
        """Yield finished chunks of (row, its R candidates), in any order.

        Args:
            prompts: token ids of all rows.
            settings: how to sample.
            skip: rows already sampled by an earlier, interrupted call. What the other rows give
                does not depend on it.
        """
        ...
