"""Peak memory of scoring at several vocabularies, each side in a process of its own."""

from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.harness import (
    Setup,
    figure,
    highest_resident,
    in_fresh_process,
    interleave,
    markdown,
    times,
)
from benchmarks.sides import DEFAULT_BATCH, Sides
from benchmarks.workload import longest_of, make_model, make_rows

TITLE = "Memory"
VOCABULARIES = (4_096, 32_768, 131_072)


def measure(setup: Setup) -> dict[str, Any]:
    """GiB that a scoring pass adds to what model and data hold, by vocabulary, side and round."""
    # At 131,072 words TRL's default batch of longer rows would not fit a small machine.
    longest = 512 if setup.device == "cpu" else 2048
    pairs = setup.pairs or 16
    result: dict[str, Any] = {"pairs": pairs, "longest": longest, "default_batch": DEFAULT_BATCH}
    result["gib"] = {}
    for vocabulary in VOCABULARIES:
        # Of the shape asked for: a model of the user's has one vocabulary.
        directory = make_model(setup, vocabulary)
        most = min(longest, longest_of(setup, directory))
        sides = {
            side: lambda batch=batch, d=directory, v=vocabulary, m=most: in_fresh_process(
                setup, peak_gib, setup, d, pairs, v, m, batch
            )
            for side, batch in (("ours", 0), ("trl_default", DEFAULT_BATCH), ("trl_one", 1))
        }
        result["gib"][str(vocabulary)] = interleave(sides, setup.rounds, warm_up=False)
    return result


def peak_gib(
    setup: Setup, directory: Path, pairs: int, vocabulary: int, longest: int, batch: int
) -> float:
    """Peak of one pass above what was held before it, in GiB: TRL's, or ours if batch is 0."""
    # A small pass first brings in what is loaded at first use (threads, kernels, buffers).
    small = Sides(setup, directory, make_rows(1, vocabulary, 16), 16)
    small.ours() if batch == 0 else small.theirs(batch)
    sides = Sides(setup, directory, make_rows(pairs, vocabulary, longest), longest)
    del small
    if setup.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        # Linux forgets the highest resident size so far (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = psutil.Process().memory_info().rss
    sides.ours() if batch == 0 else sides.theirs(batch)
    peak = torch.cuda.max_memory_allocated() if setup.device == "cuda" else highest_resident()
    return (peak - before) / 2**30


def table(result: dict[str, Any]) -> str:
    rows = []
    for vocabulary, sides in result["gib"].items():
        rows.append(
            [
                f"{int(vocabulary):,}",
                *(figure(sides[side], 2) for side in ("ours", "trl_default", "trl_one")),
                times(sides["trl_default"], sides["ours"]),
                times(sides["trl_one"], sides["ours"]),
            ]
        )
    head = (
        "vocabulary",
        "ours, GiB",
        f"TRL, its default of {result['default_batch']} pairs a batch, GiB",
        "TRL, 1 pair a batch, GiB",
        "TRL's default / ours",
        "TRL's 1 pair / ours",
    )
    return (
        f"{result['pairs']} pairs of up to {result['longest']} tokens; what a pass adds to model "
        "and data.\n\n" + markdown(head, rows)
    )
