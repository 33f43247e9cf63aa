"""`python -m benchmarks.claims`: run the systems, keep the figures, write docs/claims.md's tables.

make claims                          the core table, five seeds
make claims ARGS="--sweeps"          what is varied around SeRA, too
make claims ARGS="--criteria"        what the world's parameters were fixed by
make claims ARGS="--smoke"           one seed of a toy, to see that it works; nothing is kept
make claims ARGS="--data FILE --model DIR"   ways to select on a dataset with scores and a model
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.claims import criteria, real
from benchmarks.claims.page import REAL, RESULTS, update_page
from benchmarks.claims.runs import Job, Run, build, perform, perform_all
from benchmarks.claims.systems import CORE, SWEEPS, System
from benchmarks.claims.world import SMOKE, WORLD, World
from benchmarks.harness import commit, cpu_name
from sera_plugin.journal import Journal, key_of

SEEDS = (0, 1, 2, 3, 4)
PACKAGES = ("torch", "transformers", "trl", "axolotl", "sera_plugin")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description="Run the paper's claims again."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="systems by name")
    parser.add_argument("--sweeps", action="store_true", help="the sweeps beside the core table")
    parser.add_argument("--criteria", action="store_true", help="check the world's parameters only")
    parser.add_argument("--smoke", action="store_true", help="one seed of a toy; nothing is kept")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--render", action="store_true", help="only write the page's tables again")
    parser.add_argument("--directory", type=Path, help="where worlds are made, and kept")
    parser.add_argument("--data", type=Path, help="JSONL with answers and scores, see real.py")
    parser.add_argument("--model", type=Path, help="a directory, for --data")
    options = parser.parse_args(arguments)
    if (options.data is None) != (options.model is None):
        parser.error("--data and --model go together")
    if options.render:
        update_page()
        return
    # `kill` ends the runs too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="sera-claims-") as temporary:
        directory = (options.directory or Path(temporary)).resolve()
        if options.smoke:
            systems = chosen(CORE, options.only)
            with Journal(directory / "smoke.jsonl") as journal:
                run_all(plan(systems, [0], SMOKE), directory, journal, options.cores)
            return
        if options.data:
            with Journal(REAL) as journal:
                run_real(options, directory, journal)
            update_page()
            return
        with Journal(RESULTS) as journal:
            if options.criteria:
                check_criteria(directory, journal, options.cores)
            else:
                sweeps = [one for sweep in SWEEPS.values() for one in sweep]
                systems = chosen((*CORE, *sweeps * options.sweeps), options.only)
                run_all(plan(systems, options.seeds, WORLD), directory, journal, options.cores)
    update_page()


def chosen(systems: Sequence[System], names: Sequence[str] | None) -> list[System]:
    """Systems by name, all unless given.

    Raises:
        SystemExit: if there is none of a name.
    """
    known = {system.name: system for system in systems}
    if unknown := [name for name in names or () if name not in known]:
        raise SystemExit(f"no system is called {unknown[0]!r}. There are: {', '.join(known)}")
    return [known[name] for name in names or known]


def plan(systems: Sequence[System], seeds: Sequence[int], world: World) -> list[Run]:
    """Every run, seed by seed: what is broken off has whole seeds."""
    return [
        Run(system, noise, seed, world)
        for seed in seeds
        for system in systems
        for noise in system.noises
    ]


def check_criteria(directory: Path, journal: Journal, cores: int) -> None:
    system = next(one for one in CORE if one.name == criteria.SYSTEM)
    runs = [Run(system, noise, s, WORLD) for noise in criteria.NOISES for s in criteria.SEEDS]
    run_all(runs, directory, journal, cores)


def run_all(runs: Sequence[Run], directory: Path, journal: Journal, cores: int) -> None:
    """Make the worlds, then perform what the journal does not have yet."""
    left = [run for run in runs if run.key not in journal]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them done before", flush=True)
    if not left:
        return
    about = machine()
    journal.add(key_of("about", about)[:16], {"about": about})
    start = time.perf_counter()
    places = {(run.world, run.seed): place(directory, run.world, run.seed) for run in left}
    worlds = [
        Job(f"world {seed}", build, (world, seed, at), directory / "scratch" / at.name)
        for (world, seed), at in places.items()
    ]
    for job, figures in perform_all(worlds, cores):
        world, seed, _ = job.arguments
        key = key_of("base", asdict(world), seed)[:16]
        if key not in journal:
            journal.add(key, {"system": "base model", "seed": seed, **figures, **origin(world)})
    jobs = {
        run.key: Job(
            f"{run.system.name}, noise {run.noise:g}, seed {run.seed}",
            perform,
            (run, places[run.world, run.seed]),
            directory / "scratch" / run.key,
        )
        for run in left
    }
    for number, (job, record) in enumerate(perform_all(list(jobs.values()), cores), start=1):
        run = job.arguments[0]
        journal.add(run.key, {**record, **origin(run.world)})
        told(number, len(left), job, record, time.perf_counter() - start)


def run_real(options: argparse.Namespace, directory: Path, journal: Journal) -> None:
    """Each way to select on the dataset, unless the journal has it."""
    data, model = options.data.resolve(), options.model.resolve()
    jobs = []
    for seed in options.seeds:
        for system in chosen(real.SYSTEMS, options.only):
            key = real.key(system, real.Settings(), seed, data.name, model.name)
            if key not in journal:
                arguments = (system, real.Settings(), seed, data, model)
                scratch = directory / "scratch" / key
                jobs.append(Job(f"{system.name}, seed {seed}", real.perform, arguments, scratch))
    for job, record in perform_all(jobs, options.cores):
        versions = {name: version(name) for name in PACKAGES}
        journal.add(job.scratch.name, {**record, "versions": versions})
        print(f"{job.name}: {record['seconds']:.0f} s", flush=True)


def told(number: int, total: int, job: Job, record: dict[str, Any], spent: float) -> None:
    last = record["policies"][-1]
    print(
        f"{number}/{total}  {spent:.0f} s  {job.name}: true reward {last['true_reward']:.3f}, "
        f"{last['words']:.1f} words, {record['seconds']:.0f} s",
        flush=True,
    )


def place(directory: Path, world: World, seed: int) -> Path:
    return directory / f"world-{key_of(asdict(world))[:8]}-{seed}"


def origin(world: World) -> dict[str, Any]:
    """What a record came from: the world's parameters, and versions."""
    return {
        "world": key_of(asdict(world))[:8],
        "versions": {name: version(name) for name in PACKAGES},
    }


def machine() -> dict[str, Any]:
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "world": asdict(WORLD),
    }


if __name__ == "__main__":
    main()
