"""The steps: each a function of a `Setup` that returns figures, in a process of its own."""

import importlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness import Setup, fresh

#: Of a toy, to try the script out; of what is measured.
_TOY, _REAL = ("toy", 1, 4), ("tinyllama-1.1b", 5, None)


@dataclass(frozen=True)
class Step:
    """A function of a `Setup` that returns figures.

    Attributes:
        module: `benchmarks.gpu.MODULE`, where it is.
        limit: seconds until it is killed; four times as many on a CPU.
        group: steps of one group run at the same time, groups one after the other.
        needs: steps that run even if only this one is asked for.
    """

    module: str
    limit: int
    group: str
    needs: tuple[str, ...] = ()


STEPS = {
    "world": Step("runs", 60, "first"),
    "large": Step("precision", 60, "first"),
    "quantised": Step("precision", 60, "first"),
    # The slowest first, so that none of them is left alone at the end; `killed` waits for `full`.
    "full": Step("runs", 150, "checks", ("world",)),
    "killed": Step("runs", 200, "checks", ("world", "full")),
    "evaluate": Step("runs", 200, "checks", ("world",)),
    "qlora": Step("runs", 240, "checks", ("large",)),
    "fsdp_offload": Step("runs", 120, "checks", ("world",)),
    "torchrun": Step("runs", 120, "checks", ("world",)),
    "scorer": Step("scorer", 90, "checks", ("large",)),
    "margins": Step("precision", 90, "checks", ("large",)),
    "lora_fp16": Step("runs", 120, "checks", ("world",)),
    "lora_bf16": Step("runs", 120, "checks", ("world",)),
    # Alone: they look at what is free on the device, or at the clock.
    "room": Step("room", 90, "room", ("large",)),
    "scoring": Step("speed", 90, "scoring", ("large",)),
    "step": Step("speed", 180, "step", ("large",)),
    "sampling": Step("speed", 120, "sampling", ("large",)),
    "whole_run": Step("speed", 300, "whole_run", ("large",)),
    # Only if asked for: they need an environment with vLLM.
    "vllm_base": Step("engine", 240, "vllm_base", ("world",)),
    "vllm_lora": Step("engine", 240, "vllm_lora", ("world",)),
    "vllm_nf4": Step("engine", 240, "vllm_nf4", ("world",)),
}


def in_time(log: Path, limit: float, name: str, device: str, smoke: bool, work: Path) -> int | None:
    """The exit status of a step, or None where it and all that it started had to be killed."""
    log.touch()
    child = fresh(device).Process(target=inside, args=(log, name, device, smoke, work))
    child.start()
    child.join(limit)
    if child.exitcode is not None:
        return int(child.exitcode)
    with suppress(psutil.NoSuchProcess):
        for process in (*psutil.Process(child.pid).children(recursive=True), child):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    child.join()
    return None


def inside(log: Path, name: str, device: str, smoke: bool, work: Path) -> None:
    """Run one step in this process and leave its figures for the one that started it."""
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    shape, rounds, pairs = _TOY if smoke else _REAL
    setup = Setup(device, shape, rounds, pairs, None, None, work)
    figures = getattr(importlib.import_module(f"benchmarks.gpu.{STEPS[name].module}"), name)(setup)
    partial = work / f"{name}.partial"
    partial.write_text(json.dumps(figures), encoding="utf-8")
    partial.rename(work / f"{name}.json")


def usual() -> list[str]:
    """The steps that need nothing beside the plugin's own environment."""
    return [name for name, step in STEPS.items() if step.module != "engine"]
