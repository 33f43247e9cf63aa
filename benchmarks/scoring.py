"""Scoring speed: useful tokens per second, ours against TRL's precomputed reference values."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import Setup, figure, interleave, markdown, times
from benchmarks.sides import DEFAULT_BATCH, Sides
from benchmarks.workload import longest_of, make_model, read_rows, vocabulary_of

TITLE = "Scoring"
BATCHES = (1, 2, 4, 16, 32)


def measure(setup: Setup) -> dict[str, Any]:
    """Useful tokens per second of each side, by round.

    Raises:
        ValueError: if the two sides disagree about the log-probabilities.
    """
    directory = make_model(setup)
    longest = longest_of(setup, directory)
    count = 16 if setup.device == "cpu" else 256
    sides = Sides(
        setup, directory, read_rows(setup, count, vocabulary_of(directory), longest), longest
    )

    def timed(score: Callable[[], np.ndarray]) -> float:
        start = time.perf_counter()
        score()
        return sides.tokens / (time.perf_counter() - start)

    # In bfloat16 TRL also sums in bfloat16, so its figures are coarse.
    difference = float(np.abs(sides.ours() - sides.theirs(DEFAULT_BATCH)).max())
    if setup.device == "cpu" and difference > 1e-4 * longest:
        raise ValueError(f"the two sides differ by {difference} nats")
    rates = {size: timed(lambda size=size: sides.theirs(size)) for size in BATCHES}
    best = max(rates, key=lambda size: rates[size])
    runs = {
        "ours": lambda: timed(sides.ours),
        "trl_default": lambda: timed(lambda: sides.theirs(DEFAULT_BATCH)),
        "trl_best": lambda: timed(lambda: sides.theirs(best)),
    }
    return {
        "pairs": len(sides.prompts),
        "tokens": sides.tokens,
        "default_batch": DEFAULT_BATCH,
        "best_batch": best,
        "tried_batches": sorted((*BATCHES, DEFAULT_BATCH)),
        "greatest_difference": difference,
        "tokens_per_second": interleave(runs, setup.rounds, warm_up=False),
    }


def table(result: dict[str, Any]) -> str:
    rates = result["tokens_per_second"]
    names = {
        "ours": "`score_sequences`",
        "trl_default": f"TRL, its default of {result['default_batch']} pairs a batch",
        "trl_best": f"TRL, its best of {', '.join(map(str, result['tried_batches']))}: "
        f"{result['best_batch']}",
    }
    rows = [
        [name, figure(rates[side]), times(rates["ours"], rates[side])]
        for side, name in names.items()
    ]
    return f"{result['pairs']} pairs, {result['tokens']:,} tokens without padding.\n\n" + markdown(
        ("", "useful tokens/s", "ours is faster by"), rows
    )
