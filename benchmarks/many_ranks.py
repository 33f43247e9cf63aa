"""Our own part of a run on 64 ranks, as in `large_n`: what of it grows with the pairs, and how.

Two ranks are played, each by a process, which meet over gloo: rank 0, and rank 1, which maps what
rank 0 has read and appends what the others would have sampled (that time is no rank's, and is not
shown). Eight ranks are on a machine. Sums carry whole arrays, as in a run.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import Setup, fresh, in_fresh_process, markdown
from benchmarks.large_n import CONFIG, PHASES, REST, WAITING, one_run, own

TITLE = "Many ranks"
WORLD = 64
#: Each size is run once, whatever is asked for.
ROUNDS = 1
SIZES = (62_500, 125_000, 250_000, 500_000, 1_000_000)
ESTIMATED = 10_000_000
GIB = 2**30


def measure(setup: Setup) -> dict[str, Any]:
    """A run of each size, once, whatever the rounds: what `one_run` gave to ranks 0 and 1."""
    runs: dict[str, list[dict[str, Any]]] = {}
    fresh(setup.device)  # before threads may ask for it at once
    for count in (setup.pairs,) if setup.pairs else SIZES:
        directory = setup.directory / "many"
        play = partial(in_fresh_process, setup, one_run, count, directory)
        with ThreadPoolExecutor(2) as both:
            runs[str(count)] = list(both.map(play, (0, 1), (WORLD, WORLD)))
        shutil.rmtree(directory)
        print(f"{count} pairs: {own(runs[str(count)][0]):.1f} s of rank 0", flush=True)
    return {"candidates": CONFIG.candidates, "world": WORLD, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """Markdown: figures by size, and the lines that they lie on."""
    sizes = [int(size) for size in result["runs"]]
    plays = list(result["runs"].values())
    head = ["pairs", *(f"{size:,}" for size in sizes)]
    fitted = len(sizes) > 2
    if fitted:
        head += [f"{ESTIMATED:,} (estimate)", "farthest from the line"]

    def line(name: str, values: list[float], digits: int = 1) -> list[str]:
        cells = [f"{value:,.{digits}f}" for value in values]
        if fitted:
            slope, start = np.polyfit(sizes, values, 1)
            off = np.abs(slope * np.array(sizes) + start - values).max()
            share = off / max(values) if max(values) else 0.0
            cells += [f"{slope * ESTIMATED + start:,.{digits}f}", f"{share:.0%}"]
        return [name, *cells]

    def of_rank_0(name: str) -> list[float]:
        return [main["processor"].get(name, 0.0) for main, _ in plays]

    rows = [line(f"{name}, s", of_rank_0(name), 2) for name in (*PHASES, REST)]
    rows += [
        line("**processor time of all these, s**", [own(main, "processor") for main, _ in plays]),
        line("the same by the clock, s", [own(main) for main, _ in plays]),
        line("rank 0 waits for others, s", [main["seconds"][WAITING] for main, _ in plays]),
        line("memory at most, rank 0, GiB", [main["peak"] / GIB for main, _ in plays], 2),
        line("memory at most, rank 1, GiB", [other["peak"] / GIB for _, other in plays], 2),
        line("summed by each rank, MiB", [_sum(main) / 2**20 for main, _ in plays]),
        line("files with chunks", [float(a["chunks"] + b["chunks"]) for a, b in plays], 0),
        line("run directory, GiB", [main["disk"] / GIB for main, _ in plays], 2),
    ]
    text = (
        f"Rank 0 of {result['world']}, three iterations, R = {result['candidates']}, each size "
        "once. Seconds of a phase are processor time.\n\n" + markdown(head, rows)
    )
    if before := result.get("before"):
        old, new = (own(run, "processor") for run in (before["old"], before["new"]))
        peaks = [run["peak"] / GIB for run in (before["old"], before["new"])]
        text += (
            f"\n\nOne process, {before['pairs']:,} pairs, at {before['commit']} and now, in turn: "
            f"{old:.1f} and {new:.1f} s of processor time ({old / new:.1f} times less), "
            f"{peaks[0]:.2f} and {peaks[1]:.2f} GiB at most."
        )
    return text


def _sum(run: dict[str, Any]) -> int:
    return sum(run["summed"].values())
