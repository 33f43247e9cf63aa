"""`python -m tests.crash`: the long form of the crash test, and its table in the documentation."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from time import perf_counter

from sera_plugin import __version__
from tests.conftest import make_world
from tests.crash import points
from tests.crash.points import CHAIN, KINDS, LABELS, PHASES, RANDOM, Point, Verdict

BEGIN, END = "<!-- crash table: begin -->", "<!-- crash table: end -->"
_PACKAGES = ("axolotl", "trl", "transformers", "peft", "torch")
_HEAD = (
    "| killed | training | points | survived | rows sampled twice | differences | steps made again "
    "(most) |\n| --- | --- | --: | --: | --: | --: | --: |"
)


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
    (directory / "world").mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    verdicts: list[Verdict] = []
    bench = points.Bench(directory, make_world(directory / "world").directory, arguments.seed)
    # First a second uninterrupted run of each kind, which must not differ either.
    chosen = points.choose_points(bench, arguments.kinds, arguments.points, arguments.seed)
    for point in arguments.only or chain(map(Point, arguments.kinds), chosen):
        verdicts.append(bench.try_point(point))
        _tell(verdicts[-1], bench, len(verdicts))
    seconds = perf_counter() - start
    bad = [verdict for verdict in verdicts if not verdict.good]
    table = make_table(verdicts)
    print(f"\n{table}\n\n{len(verdicts) - len(bad)} of {len(verdicts)} good, {seconds:.0f} s")
    if arguments.table:
        write_table(arguments, table, seconds)
    if not bad and not arguments.directory:
        shutil.rmtree(directory)
    return 1 if bad else 0


def _tell(verdict: Verdict, bench: points.Bench, number: int) -> None:
    point = verdict.point
    state = "good" if verdict.good else "BAD"
    notes = f"  ({'; '.join(verdict.notes)})" if verdict.notes else ""
    print(f"{number:3d}  {state:4s} {point}  {verdict.seconds:.1f} s{notes}", flush=True)
    if not verdict.good:
        found = [*verdict.differences[:8], f"{len(verdict.differences)} differences"]
        found += [f"{verdict.sampled_twice} rows sampled twice"]
        found += [f"again: python -m tests.crash --seed {bench.seed} --only '{point}'"]
        for line in (*found, f"files: {bench.place(point)}"):
            print(f"       {line}", flush=True)


def make_table(verdicts: Sequence[Verdict]) -> str:
    """One row per phase, the totals, and what was not killed as planned."""
    rows = [_HEAD]
    for phase, label in (*LABELS.items(), (None, "**all**")):
        if group := [one for one in verdicts if phase in (one.point.phase, None)]:
            kinds = sorted({f"`{one.point.kind}`" for one in group}) if phase else []
            figures = (
                len(group),
                sum(one.survived for one in group),
                sum(one.sampled_twice for one in group),
                sum(len(one.differences) for one in group),
                max(one.repeated_steps for one in group),
            )
            rows.append(f"| {' | '.join([label, ', '.join(kinds), *map(str, figures)])} |")
    missed = sum(one.missed for one in verdicts)
    rows.append(f"\nKills that came too late, after the end of the run: {missed}.")
    return "\n".join(rows)


def write_table(arguments: argparse.Namespace, table: str, seconds: float) -> None:
    """Put a table between its markers in a page."""
    page, seed = arguments.table, arguments.seed
    before, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    about = (
        f"`python -m tests.crash --points {arguments.points} --seed {seed}` on "
        f"{date.today().isoformat()} in {seconds / 60:.0f} minutes: sera_plugin {__version__}, "
        f"{versions}, CPU, float32, seed {seed}."
    )
    page.write_text(f"{before}{BEGIN}\n{about}\n\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
