"""Runs: the real host, a process for each, as many at a time as there are cores.

Importing the host takes longer than a run here. A server process imports it once and forks; a run
is still a fresh process with one thread, and dies alone.
"""

import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import yaml

from benchmarks.claims.systems import System
from benchmarks.claims.tasks import task_of
from benchmarks.claims.world import COLUMNS, World, make_world
from sera_plugin.config.sera import AS_PUBLISHED
from sera_plugin.rundir.journal import key_of

#: Of the server and all it forks. CUDA does not survive a fork, so the server sees no GPU, and NVML
#: tells it so without starting CUDA.
SERVER = {
    "CUDA_VISIBLE_DEVICES": "",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "OMP_NUM_THREADS": "1",
}
#: What runs compute on. Several share a GPU, and give the same figures again.
DEVICES = ("cpu", "cuda")
#: Of a run that sees the GPU.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

#: What the YAML of every run has: float32, one learning rate, no checkpoints.
HOST = {
    "plugins": ["sera_plugin.SeraPlugin"],
    "rl": "sera",
    "val_set_size": 0,
    "gradient_accumulation_steps": 1,
    "lr_scheduler": "constant",
    "optimizer": "adamw_torch",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "gradient_checkpointing": False,
    "logging_steps": 1_000,
    "save_strategy": "no",
}


@dataclass(frozen=True)
class Run:
    """One run: a system in a world, with a share of labels swapped."""

    system: System
    noise: float
    seed: int
    world: World

    @property
    def record(self) -> dict[str, Any]:
        """What it is, with nothing of how it went."""
        return {
            "system": self.system.name,
            "noise": self.noise,
            "seed": self.seed,
            "sera": dict(self.system.sera),
            "beside": dict(self.system.beside),
            "data": self.system.data,
        }

    @property
    def key(self) -> str:
        return key_of(self.record, self.world.record)[:16]


def config(run: Run, place: Path, output: Path) -> dict[str, Any]:
    """The YAML of a run."""
    world = run.world
    task = task_of(world.task)

    def dataset(name: str) -> list[dict[str, Any]]:
        how = {f"field_{column}": column for column in ("prompt", "chosen", "rejected")}
        how["prompt_format"] = task.prompt_format
        how |= {f"{side}_format": task.answer_format % side for side in ("chosen", "rejected")}
        path = str(place / f"{name}.jsonl")
        return [{"path": path, "ds_type": "json", "split": "train", "type": how}]

    return {
        "base_model": str(place / "base-model"),
        **HOST,
        **task.host,
        "sera": {
            "temperature": world.temperature,
            "top_p": world.top_p,
            "max_new_tokens": world.new_tokens,
            "sampler": "transformers",
            "keep_policies": True,
            "score_columns": list(COLUMNS),
            "label_noise": run.noise,
            **AS_PUBLISHED,
            **run.system.sera,
        },
        "rl_beta": world.beta,
        "datasets": dataset(run.system.data),
        **({"test_datasets": dataset("test")} if world.test_pairs else {}),
        "dataset_prepared_path": str(place / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(output),
        "num_epochs": 3,
        "micro_batch_size": world.batch,
        "learning_rate": world.learning_rate,
        "seed": run.seed,
        **run.system.beside,
    }


def perform(run: Run, place: Path, keep: Path | None, scratch: Path) -> dict[str, Any]:
    """Train and measure; the record that is kept. `keep` gets the whole output directory."""
    from axolotl.cli.train import do_cli

    from benchmarks.claims.measure import measure

    output = scratch / "out"
    path = scratch / "config.yaml"
    path.write_text(yaml.safe_dump(config(run, place, output)), encoding="utf-8")
    start = time.perf_counter()
    do_cli(config=str(path))
    seconds = round(time.perf_counter() - start, 2)
    record = {**run.record, "seconds": seconds, **measure(output, place, run.world, run.seed)}
    if keep:
        (output / "config.yaml").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        (output / "record.json").write_text(json.dumps(record), encoding="utf-8")
        name = f"{run.world.key}-{run.seed}-{run.system.name}".replace(" ", "-").replace(",", "")
        keep.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(keep / name, ignore_errors=True)
        shutil.move(output, keep / name)
    return record


# ------------------------------------------------------------------ processes


@dataclass(frozen=True)
class Job:
    """`call(*arguments, scratch)` in a process of its own; it prints into scratch/log.txt."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    scratch: Path


def perform_all(jobs: Sequence[Job], cores: int, device: str = "cpu") -> Iterator[tuple[Job, Any]]:
    """Run jobs in order, `cores` at a time, and yield each with what it returned as it ends.

    Raises:
        RuntimeError: if one fails; the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.claims.preload"])
    waiting, running = list(reversed(jobs)), dict[Connection, tuple[Job, Any]]()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if device == "cuda" else None
    with environment(SERVER):
        try:
            while waiting or running:
                while waiting and len(running) < cores:
                    job = waiting.pop()
                    ours, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_inside, args=(job, theirs, visible))
                    process.start()
                    theirs.close()
                    running[ours] = job, process
                for ready in wait(list(running)):
                    job, process = running.pop(ready)  # type: ignore[call-overload]
                    yield job, _received(ready, job)
                    process.join()
        finally:
            for _, process in running.values():
                process.terminate()


def _received(connection: Any, job: Job) -> Any:
    try:
        good, value = connection.recv()
    except EOFError:
        good, value = False, "it died"
    if not good:
        raise RuntimeError(
            f"{job.name} failed: {value}. Its output is in {job.scratch / 'log.txt'}."
        )
    return value


def _inside(job: Job, connection: Connection, visible: str | None) -> None:
    import torch

    torch.set_num_threads(1)
    if visible is not None:
        os.environ.update(DETERMINISTIC, CUDA_VISIBLE_DEVICES=visible)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Whatever the host starts in turn it starts as in any other process.
    multiprocessing.set_start_method(None, force=True)
    shutil.rmtree(job.scratch, ignore_errors=True)
    job.scratch.mkdir(parents=True)
    log = os.open(job.scratch / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.argv = ["axolotl"]
    try:
        value = job.call(*job.arguments, job.scratch)
    except BaseException as error:
        traceback.print_exc()
        connection.send((False, f"{type(error).__name__}: {error}"))
        raise
    connection.send((True, value))
    shutil.rmtree(job.scratch)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables set for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def build(
    world: World, seed: int, place: Path, model: Path | None, scratch: Path
) -> dict[str, Any]:
    """Make a world; figures of its base model."""
    from benchmarks.claims.measure import base_figures

    if not place.exists():
        make_world(place, world, seed, model)
    return base_figures(place, world)
