"""`python -m tests.crash`: the long form of the crash test."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from itertools import chain
from pathlib import Path
from time import perf_counter

from tests.conftest import make_world
from tests.crash.points import CHAIN, KINDS, PHASES, RANDOM, Bench, Point, Verdict, choose_points
from tests.crash.report import make_table, write_table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash",
        description="Kill runs, continue them, and compare them with uninterrupted ones.",
        epilog=f"Phases: {', '.join([*PHASES, RANDOM])}. Kinds: {', '.join(KINDS)}.",
    )
    parser.add_argument("--points", type=int, default=60, help="points to try (60)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the points (0)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--only",
        nargs="+",
        type=Point.parse,
        metavar="PHASE:N:KIND",
        help=f"these points instead; {CHAIN}: PHASE:N+PHASE:N:KIND",
    )
    parser.add_argument("--table", type=Path, help="page to write the table to")
    parser.add_argument("--directory", type=Path, help="a new directory to work in; kept")
    arguments = parser.parse_args()

    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="sera-crash-"))
    directory.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    verdicts: list[Verdict] = []
    bench = Bench(directory, make_world(directory / "world").directory, arguments.seed)
    # First a second uninterrupted run of each kind, which must not differ either.
    chosen = choose_points(bench, arguments.kinds, arguments.points, arguments.seed)
    for point in arguments.only or chain(map(Point, arguments.kinds), chosen):
        verdicts.append(bench.try_point(point))
        _tell(verdicts[-1], bench, len(verdicts))
    table = make_table(verdicts)
    seconds = perf_counter() - start
    bad = [verdict for verdict in verdicts if not verdict.good]
    print(f"\n{table}\n\n{len(verdicts) - len(bad)} of {len(verdicts)} good, {seconds:.0f} s")
    if arguments.table:
        options = [f"--points {arguments.points}", f"--seed {arguments.seed}"]
        command = f"python -m tests.crash {' '.join(options)}"
        write_table(arguments.table, table, command, arguments.seed, seconds)
    if not bad and not arguments.directory:
        shutil.rmtree(directory)
    return 1 if bad else 0


def _tell(verdict: Verdict, bench: Bench, number: int) -> None:
    point = verdict.point
    state = "good" if verdict.good else "BAD"
    notes = f"  ({'; '.join(verdict.notes)})" if verdict.notes else ""
    print(f"{number:3d}  {state:4s} {point}  {verdict.seconds:.1f} s{notes}", flush=True)
    if verdict.good:
        return
    for line in verdict.differences[:8]:
        print(f"       {line}")
    if len(verdict.differences) > 8:
        print(f"       and {len(verdict.differences) - 8} more")
    if verdict.sampled_twice:
        print(f"       {verdict.sampled_twice} rows sampled twice")
    print(f"       again: python -m tests.crash --seed {bench.seed} --only '{point}'")
    print(f"       files: {bench.place(point)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
