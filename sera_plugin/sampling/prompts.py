"""Which prompts an engine takes next, and how much room each leaves; what it raises if it fails."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from sera_plugin.algorithm.protocols import SamplingSettings, TokenIds


class SamplingFailed(RuntimeError):
    """Sampling stopped. Finished chunks are kept and the next try goes on from them."""


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
