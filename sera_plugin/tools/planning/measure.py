"""A short run of the same configuration on this machine, timed.

It is a run of SeRA by the host like any other, of two iterations over pairs of all lengths, in a
directory that is removed afterwards. What the second iteration takes is warm: kernels are compiled,
memory is allocated, and the model's abilities are known.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import PluginManager
from axolotl.train import setup_model_and_trainer
from axolotl.utils.dict import DictDefault
from transformers import TrainerCallback

from sera_plugin.config.sera import SeraConfig
from sera_plugin.model.budget import GIB
from sera_plugin.rundir.store import RunStore
from sera_plugin.tools.planning.counts import Lengths
from sera_plugin.tools.planning.disk import existing
from sera_plugin.tools.planning.plan import Speed, phase_flops
from sera_plugin.tools.planning.run import Run

LOG = logging.getLogger("axolotl.sera")

ITERATIONS = 2
#: Optimizer steps of an iteration that are timed at least, beside the first, which is not.
_STEPS = 3
#: Rows of the square matrices that are multiplied, on a GPU and on a CPU; for how many seconds.
_ON_GPU, _ON_CPU, _PROBE = 8192, 1024, 1.0
#: Keys of the short run.
_SHORT = {
    "num_epochs": ITERATIONS,
    "save_strategy": "no",
    "val_set_size": 0,
    **dict.fromkeys(("save_steps", "test_datasets", "eval_steps", "eval_strategy")),
    **dict.fromkeys(("auto_resume_from_checkpoints", "resume_from_checkpoint", "hub_model_id")),
    **dict.fromkeys(("load_best_model_at_end", "early_stopping_patience")),
    **dict.fromkeys(("use_wandb", "use_mlflow", "use_tensorboard", "use_comet"), False),
    **dict.fromkeys(("use_trackio", "use_otel_metrics"), False),
}


def measure(run: Run, dataset: Any, rows: Sequence[int]) -> tuple[Speed, float | None, str]:
    """Run two iterations over some of the pairs and time them: speed, tokens of a sample, words.

    Args:
        dataset, rows: the host's prepared rows, and which of them are the run's pairs.

    Raises:
        ValueError: if it runs out of memory.
        ValueError, RuntimeError: whatever else the run itself would raise.
    """
    counting = run.counting
    chosen = choose(counting.pairs, _enough(run))
    start = perf_counter()
    watch = _Steps()
    with _set_aside(run) as cfg:
        few = dataset.select([rows[index] for index in chosen])
        data = TrainDatasetMeta(few, None, counting.schedule.total_steps)
        try:
            trainer, *_ = setup_model_and_trainer(cfg, data)
            trainer.add_callback(watch)
            loading = perf_counter() - start
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the short run of --measure ran out of memory: {error}. The same command without "
                "--measure says which phase needs how much, and what to change."
            ) from error
        store = RunStore(cfg.output_dir)
        summaries = [store.summary(number) for number in range(1, ITERATIONS + 1)]
    sampled = summaries[-1]["forwarded"].get("sample")
    mean = sampled["tokens"] / sampled["sequences"] if sampled else None
    short = replace(
        counting,
        method=replace(counting.method, config=SeraConfig(**cfg.sera), total=len(chosen)),
        schedule=replace(
            counting.schedule, pairs=tuple(one["pairs"]["trained"] for one in summaries)
        ),
        pairs=counting.pairs.take(chosen),
        held_out=None,
        sampled=mean,
    )
    speed = _speed(replace(run, counting=short), summaries, watch.ends)
    said = (
        f"Measured here in {perf_counter() - start:.0f} s, with {len(chosen)} pairs of all lengths"
    )
    if mean is not None:
        said += f"; samples had {mean:.0f} tokens on average"
    if torch.cuda.is_available():
        said += f"; torch took {torch.cuda.max_memory_reserved() / GIB:.1f} GiB of the GPU"
    said += f". Loading took {loading:.0f} s, which is in no other figure."
    return speed, mean, said


def choose(pairs: Lengths, count: int) -> list[int]:
    """So many pairs whose lengths are spread as all pairs' are, the longest among them."""
    order = np.argsort(pairs.both, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order)))
    return sorted(order[np.unique(np.round(places).astype(int))].tolist())


def _enough(run: Run) -> int:
    """Pairs for a few steps, for a full scoring pass, and for a full batch of samples."""
    counting, batch = run.counting, run.micro_batch * run.accumulation
    needed = [(_STEPS + 1) * batch, run.scored_tokens / counting.pairs.both.mean()]
    if run.sample:
        prompt = (counting.pairs.prompt + counting.limits).mean()
        needed.append(run.sampled_tokens / (run.candidates * prompt))
    return math.ceil(max(needed) / batch) * batch


@contextmanager
def _set_aside(run: Run) -> Iterator[DictDefault]:
    """The short run's configuration, for as long as its directory is there.

    It is on the disk that the run will write to. Nothing is evaluated, saved or sent. Alarms about
    a run of a few pairs mean nothing, so none are shown.
    """
    place = existing(Path(run.cfg["output_dir"]).parent)
    plugins, level = PluginManager.get_instance(), LOG.level
    LOG.setLevel(logging.ERROR)
    try:
        with TemporaryDirectory(dir=place, prefix=".sera-plan-") as directory:
            cfg = DictDefault({**copy.deepcopy(run.cfg), **_SHORT, "output_dir": directory})
            if run.counting.last == 1:
                cfg.sera = {**cfg.sera, "selection_ratio": 1.0, "bootstrap_ratio": 0.0}
            plugins.cfg = cfg
            yield cfg
    finally:
        plugins.cfg = run.cfg
        LOG.setLevel(level)


class _Steps(TrainerCallback):
    """When the optimizer steps of each iteration ended."""

    def __init__(self) -> None:
        self.ends: list[list[float]] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append([])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends[-1].append(perf_counter())


def fastest(run: Run) -> Speed:
    """The speed of this machine if all work were products of large matrices.

    Real work is slower: this gives a time that a run takes at least. A step of sampling multiplies
    one row per sequence, which is slower than many rows: it reads as many weights.
    """
    device, size = ("cuda", _ON_GPU) if torch.cuda.is_available() else ("cpu", _ON_CPU)
    kind = torch.float32 if run.model.width == 4 else torch.bfloat16
    weights = torch.ones(size, size, dtype=kind, device=device)

    def rate(rows: int) -> float:
        tokens = torch.ones(rows, size, dtype=kind, device=device)
        best, until = 0.0, perf_counter() + _PROBE
        while perf_counter() < until:
            start = perf_counter()
            tokens @ weights
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2.0 * rows * weights.numel() / (perf_counter() - start))
        return best

    many, model = rate(size), run.model
    per_token = 2.0 * (model.matrices - model.adapter + model.vocabulary * model.hidden)
    shortest = int(run.counting.pairs.prompt.min())
    sequences = run.sampled_tokens // max(1, shortest + run.sample)
    return Speed(many, many, many, sampling=per_token / rate(max(run.candidates, sequences)))


def _speed(short: Run, summaries: list[dict[str, Any]], ends: list[list[float]]) -> Speed:
    """Operations per second, counted as the plan counts them."""
    iterations = list(short.counting.iterations())
    last, seconds = iterations[-1], summaries[-1]["seconds"]
    trained = spent = 0.0
    for iteration, summary, times in zip(iterations, summaries, ends, strict=True):
        # Fewer sampled pairs than planned may exist.
        epoch = phase_flops(short, iteration, "train")
        epoch *= summary["pairs"]["trained"] / iteration.pairs
        if len(times) > 1:
            trained += epoch * (len(times) - 1) / len(times)
            spent += times[-1] - times[0]
    if not spent:  # so few pairs that an iteration is one step
        trained, spent = epoch, seconds["train"]
    scoring = phase_flops(short, last, "score_offline") / seconds["score_offline"]
    sampling, candidates, engine = 0.0, scoring, 0.0
    if "sample" in last.phases:
        engine = seconds.get("start_engine", 0.0) + seconds.get("stop_engine", 0.0)
        sampling = (seconds["sample"] - engine) / summaries[-1]["forwarded"]["sample"]["tokens"]
        candidates = phase_flops(short, last, "score_candidates") / seconds["score_candidates"]
    return Speed(
        scoring=scoring,
        candidates=candidates,
        training=trained / spent,
        sampling=sampling,
        selecting=seconds.get("select", 0.0) / last.pairs,
        engine=engine,
    )
