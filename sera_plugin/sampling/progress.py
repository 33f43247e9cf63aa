"""Progress over prompts that are sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from sera_plugin.algorithm.protocols import Chunk, Progress
from sera_plugin.rundir.progress import progress


def sampling_progress(quiet: bool) -> Progress:
    """Progress over prompts with samples and tokens per second, as `prepare_iteration` wants it."""

    @contextmanager
    def start(total: int, phase: str) -> Iterator[Callable[[Chunk], None]]:
        samples = tokens = 0
        began = monotonic()
        with progress(phase, total, "prompt", quiet) as advance:

            def take(chunk: Chunk) -> None:
                nonlocal samples, tokens
                samples += sum(len(found) for _, found in chunk)
                tokens += sum(len(one.token_ids) for _, found in chunk for one in found)
                spent = max(monotonic() - began, 1e-9)
                advance(
                    len(chunk), f"{samples / spent:,.1f} samples/s, {tokens / spent:,.0f} tok/s"
                )

            yield take

    return start
