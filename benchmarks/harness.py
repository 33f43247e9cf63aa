"""What all parts share: one setup, interleaved sides, medians with their spread, fresh processes,
and what a figure needs beside it to be worth anything: machine, versions, date."""

import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from sera_plugin import __version__

ROOT = Path(__file__).parents[1]
PRELOAD = "benchmarks.preload"
#: How processes start here, once it has been tried; those that are started in turn inherit it.
_METHOD = "SERA_BENCHMARKS_START"
T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """What is measured on.

    Attributes:
        device: `cpu` or `cuda`.
        shape: a name in `workload.SHAPES`.
        rounds: how often each side runs; at least 5 for figures that are kept.
        pairs: preference pairs, None for each part's own number.
        model: a directory with a model and a tokenizer, instead of random weights of `shape`.
        data: JSONL with `prompt`, `chosen`, `rejected`, instead of words at random.
        directory: scratch space, gone afterwards.
    """

    device: str
    shape: str
    rounds: int
    pairs: int | None
    model: Path | None
    data: Path | None
    directory: Path

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def interleave(
    sides: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: bool
) -> dict[str, list[T]]:
    """Run every side once a round, in turn, so that a slow minute slows all of them.

    Args:
        sides: what to run, by name.
        rounds: how often.
        warm_up: run each side once before, and forget what it returned.

    Returns:
        What each side returned, by round.
    """
    if warm_up:
        for side in sides.values():
            side()
    results: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            results[name].append(side())
            print(f"round {number + 1}/{rounds}: {name}: {results[name][-1]}", flush=True)
    return results


def figure(values: Sequence[float], digits: int = 0) -> str:
    """The median, and in brackets the least and the most."""
    least, most = min(values), max(values)
    return f"{statistics.median(values):,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


def times(over: Sequence[float], under: Sequence[float]) -> str:
    """Median and spread of the ratio of two sides, round by round."""
    return f"{figure([a / b for a, b in zip(over, under, strict=True)], 2)}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def in_fresh_process(setup: Setup, function: Callable[..., T], *arguments: Any) -> T:
    """Call a module's function in a process of its own, with nothing left of earlier calls."""
    context = fresh(setup.device)
    # Whatever the call starts in turn (data loaders' workers) it starts as in any other process.
    reset = multiprocessing.set_start_method
    with ProcessPoolExecutor(1, context, initializer=reset, initargs=(None, True)) as pool:
        return pool.submit(function, *arguments).result()


def fresh(device: str) -> Any:
    """The context of processes that have imported what is slow to import and done nothing else.

    They are forked from a server that imports it once. A GPU that an import has touched does not
    survive that; this is tried once, and if so they begin from nothing.
    """
    if preloaded() and not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    # Asked of the driver's library, which does not touch the device.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([PRELOAD])
    if _METHOD not in os.environ:
        trial = server.Process(target=torch.zeros, args=(1,), kwargs={"device": device})
        try:
            trial.start()
            trial.join(120)
            trial.kill()
            works = trial.exitcode == 0
        except (OSError, EOFError):  # an import has ended the server
            works = False
        os.environ[_METHOD] = "forkserver" if works else "spawn"
    return multiprocessing.get_context(os.environ[_METHOD])


def preloaded() -> bool:
    """Whether this process descends from the server that imports what is slow to import."""
    return PRELOAD in sys.modules


def highest_resident() -> int:
    """Bytes of this process's greatest resident size so far."""
    with open(f"/proc/{os.getpid()}/status", encoding="ascii") as file:
        kib = next(line.split()[1] for line in file if line.startswith("VmHWM:"))
    return int(kib) * 1024


def provenance(setup: Setup) -> dict[str, Any]:
    """Where and on what figures were taken."""
    memory = psutil.virtual_memory().total / 2**30
    cuda = setup.device == "cuda"
    packages = ("torch", "transformers", "trl", "axolotl", "peft")
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_gib": (
            round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None
        ),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        # The plugin itself may be no more than a folder on the path.
        "versions": {name: version(name) for name in packages} | {"sera_plugin": __version__},
        "commit": commit(),
        "device": setup.device,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "model": setup.model.name if setup.model else f"random weights, shape `{setup.shape}`",
        "data": setup.data.name if setup.data else "words at random, AlpacaEval's lengths",
        "rounds": setup.rounds,
    }


def described(about: Mapping[str, Any]) -> str:
    """`provenance` in one line."""
    gpu = f"{about['gpu']} ({about['gpu_memory_gib']} GiB), " if about["gpu"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['date']}; {gpu}{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB "
        f"of memory, load {about['load_at_start']} at the start; Python {about['python']}, "
        f"{versions} at {about['commit']}. Model: {about['model']}, {about['dtype']}; data: "
        f"{about['data']}; {about['rounds']} round{'s' * (about['rounds'] != 1)}."
    )


def cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    if shutil.which("git") is None:
        return "an unknown commit"
    commands = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*commands, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
    )
    if head.returncode:
        return "an unknown commit"
    paths = ["sera_plugin", "benchmarks/*.py"]
    changed = subprocess.run([*commands, "diff", "--quiet", "HEAD", "--", *paths])
    return head.stdout.strip() + ("" if changed.returncode == 0 else " with changes")
