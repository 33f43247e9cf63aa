"""`python -m benchmarks.claims`: run systems, keep figures, write the tables of docs/claims*.md.

make claims                          the core table, five seeds
make claims ARGS="--sweeps"          what is varied around SeRA, too
make claims ARGS="--world small-steps"       the same in a world with one thing changed
make claims ARGS="--criteria"        what the world's parameters were fixed by
make claims ARGS="--again"           once more from nothing: are the kept figures found again?
make claims ARGS="--smoke"           one seed of a toy, to see that it works; nothing is kept
make claims ARGS="--compare --world fillers"  systems with the same held-out pairs, in one world
make claims ARGS="--compare --world language --model DIR --criteria"     what that was fixed by
make claims ARGS="--data FILE --model DIR"   ways to select on a dataset with scores and a model
"""

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.claims import criteria, real
from benchmarks.claims.page import COMPARISON, REAL, RESULTS, update_pages
from benchmarks.claims.runs import DEVICES, Job, Run, build, perform, perform_all
from benchmarks.claims.systems import COMPARED, COMPARED_SEEDS, CORE, SEEDS, SWEEPS, System
from benchmarks.claims.world import COMPARED as COMPARED_WORLDS
from benchmarks.claims.world import SMALL, SMOKE, WORLD, WORLDS, World
from benchmarks.harness import commit, cpu_name
from sera_plugin.rundir.journal import Journal, key_of

PACKAGES = ("torch", "transformers", "trl", "axolotl", "sera_plugin")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description="Run the paper's claims again."
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the tables unless given")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="systems by name")
    names = {**WORLDS, **COMPARED_WORLDS}
    parser.add_argument("--world", choices=names, help="see world.py; fixed, or letters")
    parser.add_argument("--compare", action="store_true", help="systems with held-out pairs")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates, for --compare")
    parser.add_argument("--keep", type=Path, help="a directory for the runs' own, for --compare")
    parser.add_argument("--sweeps", action="store_true", help="the sweeps beside the core table")
    parser.add_argument("--criteria", action="store_true", help="check the world's parameters only")
    parser.add_argument("--again", action="store_true", help="compare with what is kept")
    parser.add_argument("--smoke", action="store_true", help="one seed of a toy; nothing is kept")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="for language: cuda too")
    parser.add_argument("--render", action="store_true", help="only write the pages' tables again")
    parser.add_argument("--directory", type=Path, help="where worlds are made, and kept")
    parser.add_argument("--data", type=Path, help="JSONL with answers and scores, see real.py")
    parser.add_argument("--model", type=Path, help="a directory, for --data or language")
    parser.add_argument("--held-out", type=Path, help="JSONL with scored answers, for --data")
    options = parser.parse_args(arguments)
    if not options.compare and (options.data is None) != (options.model is None):
        parser.error("--data and --model go together")
    worlds = COMPARED_WORLDS if options.compare else WORLDS
    options.world = options.world or next(iter(worlds))
    if options.world not in worlds:
        parser.error(f"--world {options.world} is not among {', '.join(worlds)}")
    options.seeds = options.seeds or (COMPARED_SEEDS[options.world] if options.compare else SEEDS)
    if options.compare and options.criteria and options.world != "language":
        parser.error("with --compare there are --criteria for --world language")
    if options.device == "cuda" and options.world != "language":
        parser.error("--device cuda goes with --world language: smaller models are no faster there")
    if options.held_out and options.data is None:
        parser.error("--held-out goes with --data")
    if options.render:
        update_pages()
        return
    # `kill` ends the runs too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="sera-claims-") as temporary:
        directory = (options.directory or Path(temporary)).resolve()
        if options.smoke and not options.compare:
            systems = chosen(CORE, options.only)
            with Journal(directory / "smoke.jsonl") as journal:
                run_all(plan(systems, [0], SMOKE), directory, journal, options.cores)
            return
        if options.data:
            with Journal(REAL) as journal:
                run_real(options, directory, journal)
            update_pages()
            return
        if options.compare:
            compare(options, directory)
            return
        sweeps = [one for sweep in SWEEPS.values() for one in sweep]
        systems = chosen((*CORE, *sweeps * options.sweeps), options.only)
        runs = plan(systems, options.seeds, WORLDS[options.world])
        with Journal(RESULTS) as journal:
            if options.criteria:
                check_criteria(directory, journal, options.cores)
            elif options.again:
                run_again(runs, directory, journal, options.cores)
            else:
                run_all(runs, directory, journal, options.cores)
    update_pages()


def compare(options: argparse.Namespace, directory: Path) -> None:
    """Run the compared systems in one of their worlds."""
    world, rates = COMPARED_WORLDS[options.world]
    if options.smoke:
        world = replace(world, **SMALL)
    systems, seeds = chosen(COMPARED, options.only), options.seeds
    if options.criteria:
        systems, seeds = chosen(COMPARED, [criteria.ITERATIVE]), criteria.LANGUAGE_SEEDS
    by_rate = [
        plan(systems, seeds, replace(world, learning_rate=rate))
        for rate in sorted(options.rates or rates)
    ]
    # Seed by seed, too.
    runs = [run for seed in seeds for rate in by_rate for run in rate if run.seed == seed]
    keep = options.keep and options.keep.resolve()
    how = {"model": options.model, "keep": keep, "device": options.device}
    with Journal(directory / "smoke.jsonl" if options.smoke else COMPARISON) as journal:
        start = run_again if options.again else run_all
        start(runs, directory, journal, options.cores, **how)
        if options.criteria:
            bases = [journal.get(base_key(run.world, run.seed)) or {} for run in by_rate[0]]
            records = [[journal.get(run.key) or {} for run in rate] for rate in by_rate]
            for one in criteria.check_language(bases, records):
                says = "holds" if one.holds else "does not hold"
                print(f"{one.says}: {one.figure:.3f}, {one.least:g} to {one.most:g}: {says}")


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


def run_again(
    runs: Sequence[Run], directory: Path, journal: Journal, cores: int, **how: Any
) -> None:
    """Run what is kept once more, from nothing, and keep how many runs gave other figures."""
    kept = {run.key: found for run in runs if (found := journal.get(run.key))}
    start = time.perf_counter()
    scratch = directory / f"again-{os.getpid()}"
    with Journal(scratch / "runs.jsonl") as fresh:
        run_all([run for run in runs if run.key in kept], scratch, fresh, cores, **how)
        differ = [key for key in kept if timeless(fresh.get(key)) != timeless(kept[key])]
    seconds = round(time.perf_counter() - start)
    found = {"runs": len(kept), "differ": len(differ), "seconds": seconds, "at_a_time": cores}
    about = {**machine(), **found}
    journal.add(key_of("again", about)[:16], {"again": about})
    print(f"{len(kept)} runs in {seconds / 60:.0f} min, {len(differ)} gave other figures: {differ}")


def timeless(value: Any) -> Any:
    """A record without seconds and versions."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "versions")}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def run_all(
    runs: Sequence[Run],
    directory: Path,
    journal: Journal,
    cores: int,
    model: Path | None = None,
    keep: Path | None = None,
    device: str = "cpu",
) -> None:
    """Make the worlds, then perform what the journal does not have yet.

    `model` is the base model of a world that does not make one, `keep` gets the runs' output.
    """
    left = [run for run in runs if journal.get(run.key) is None]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them done before", flush=True)
    if not left:
        return
    about = {**machine(), "device": device, "world": left[0].world.record}
    journal.add(key_of("about", about)[:16], {"about": about})
    start = time.perf_counter()
    places = {(run.world, run.seed): place(directory, run.world, run.seed) for run in left}
    # Worlds that differ in how is trained are made once.
    made = {at: world_and_seed for world_and_seed, at in places.items()}
    worlds = [
        Job(f"world {seed}", build, (world, seed, at, model), directory / "scratch" / at.name)
        for at, (world, seed) in made.items()
    ]
    for job, figures in perform_all(worlds, cores, device):
        for (world, seed), at in places.items():
            key = base_key(world, seed)
            if at == job.arguments[2] and journal.get(key) is None:
                base = {"system": "base model", "seed": seed, **figures, **origin(world)}
                journal.add(key, base)
    jobs = {
        run.key: Job(
            f"{run.system.name}, noise {run.noise:g}, seed {run.seed}",
            perform,
            (run, places[run.world, run.seed], keep),
            directory / "scratch" / run.key,
        )
        for run in left
    }
    performed = perform_all(list(jobs.values()), cores, device)
    for number, (job, record) in enumerate(performed, start=1):
        run = job.arguments[0]
        journal.add(run.key, {**record, **origin(run.world)})
        told(number, len(left), job, record, time.perf_counter() - start)


def run_real(options: argparse.Namespace, directory: Path, journal: Journal) -> None:
    """Each way to select on the dataset, unless the journal has it."""
    data, model = options.data.resolve(), options.model.resolve()
    held_out = options.held_out and options.held_out.resolve()
    jobs = []
    for seed in options.seeds:
        for system in chosen((*real.SYSTEMS, real.SELF_JUDGING), options.only):
            settings = real.Settings()
            name = held_out and held_out.name
            key = real.key(system, settings, seed, data.name, model.name, name)
            if journal.get(key) is None:
                arguments = (system, settings, seed, data, model, held_out)
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
    """Where it is made: without what only training reads."""
    alike = replace(world, learning_rate=0.0, batch=0, beta=0.0)
    return directory / f"world-{alike.key}-{seed}"


def base_key(world: World, seed: int) -> str:
    """What the record of a world's base model is found by."""
    return key_of("base", world.record, seed)[:16]


def origin(world: World) -> dict[str, Any]:
    """What a record came from: the world's parameters, and versions."""
    return {
        "world": world.key,
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
    }


if __name__ == "__main__":
    main()
