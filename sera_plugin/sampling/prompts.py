"""The prompts of a phase: room after each, progress over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from sera_plugin.algorithm.method import Chunk, Progress, SamplingSettings, TokenIds
from sera_plugin.rundir.progress import progress


class SamplingFailed(RuntimeError):
    """Sampling stopped. Finished chunks are kept and the next try goes on from them."""


def room(row: int, prompt: TokenIds, settings: SamplingSettings) -> int:
    """How many tokens may be sampled after a prompt; a ValueError if that is none."""
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


def sampling_progress(quiet: bool) -> Progress:
    """Progress over prompts with samples and tokens per second, as the algorithm wants it."""

    @contextmanager
    def start(total: int, phase: str) -> Iterator[Callable[[Chunk], None]]:
        samples = tokens = 0
        began = monotonic()

        def take(chunk: Chunk) -> None:
            nonlocal samples, tokens
            samples += sum(len(found) for _, found in chunk)
            tokens += sum(len(one.token_ids) for _, found in chunk for one in found)
            spent = max(monotonic() - began, 1e-9)
            advance(len(chunk), f"{samples / spent:,.1f} samples/s, {tokens / spent:,.0f} tok/s")

        with progress(phase, total, "prompt", quiet) as advance:
            yield take

    return start
