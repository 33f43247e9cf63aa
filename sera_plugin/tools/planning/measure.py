"""A short run of the same configuration on this machine, timed.

It is a run of SeRA by the host like any other, of two iterations over pairs of all lengths, in a
directory that is removed afterwards. What the second iteration takes is warm: kernels are compiled,
memory is allocated, and the model's abilities are known.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from sera_plugin.model.memory import (
    GIB,
    SAMPLED_ON_CPU,
    SCORED_ON_CPU,
    cache_bytes,
    scoring_bytes_per_token,
    tokens_per_pass,
)
from sera_plugin.rundir.store import RunStore
from sera_plugin.tools.planning.compute import Speed, phase_flops
from sera_plugin.tools.planning.counts import Counting, Iteration, Lengths
from sera_plugin.tools.planning.prepare import Prepared
from sera_plugin.tools.planning.setting import Setting
from sera_plugin.tools.planning.shape import Shape

LOG = logging.getLogger("axolotl.sera")

ITERATIONS = 2
#: Optimizer steps of an iteration that are timed at least, beside the first, which is not.
_STEPS = 3
#: Rows of the square matrices that are multiplied, on a GPU and on a CPU; for how many seconds.
_ON_GPU, _ON_CPU, _PROBE = 8192, 1024, 1.0


@dataclass(frozen=True)
class Measured:
    """What a short run was and took.

    Attributes:
        pairs: that it was made with.
        speed: what follows.
        sampled: mean tokens of a sample, None where nothing is sampled.
        seconds: of the whole of it, the model's loading included.
        loading: of that, until training could begin.
        peak: most bytes that torch has had of the GPU, None on a CPU.
    """

    pairs: int
    speed: Speed
    sampled: float | None
    seconds: float
    loading: float
    peak: int | None

    def __str__(self) -> str:
        found = f"Measured here in {self.seconds:.0f} s, with {self.pairs} pairs of all lengths"
        if self.sampled is not None:
            found += f"; samples had {self.sampled:.0f} tokens on average"
        if self.peak is not None:
            found += f"; torch took {self.peak / GIB:.1f} GiB of the GPU"
        return f"{found}. Loading took {self.loading:.0f} s, which is in no other figure."


def measure(prepared: Prepared, shape: Shape, setting: Setting, counting: Counting) -> Measured:
    """Run two iterations over some of the pairs and time them.

    Args:
        prepared: the run.
        shape, setting, counting: as it is planned; the same arithmetic then scales the times.

    Raises:
        ValueError: if it runs out of memory.
        ValueError, RuntimeError: whatever else the run itself would raise.
    """
    chosen = choose(counting.pairs, _enough(shape, setting, counting))
    rows = [prepared.rows.rows[index] for index in chosen]
    start = perf_counter()
    watch = _Steps()
    with _set_aside(prepared) as cfg:
        data = TrainDatasetMeta(prepared.dataset.select(rows), None, counting.schedule.total_steps)
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
    pairs = counting.pairs
    short = replace(
        counting,
        method=replace(counting.method, config=SeraConfig(**cfg.sera), total=len(chosen)),
        schedule=replace(
            counting.schedule, pairs=tuple(one["pairs"]["trained"] for one in summaries)
        ),
        pairs=Lengths(pairs.prompt[chosen], pairs.chosen[chosen], pairs.rejected[chosen]),
        held_out=None,
        sampled=mean,
    )
    return Measured(
        pairs=len(chosen),
        speed=_speed(shape, setting, short, summaries, watch),
        sampled=mean,
        seconds=perf_counter() - start,
        loading=loading,
        peak=torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
    )


def choose(pairs: Lengths, count: int) -> list[int]:
    """So many pairs whose lengths are spread as all pairs' are, the longest among them."""
    order = np.argsort(pairs.both, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order)))
    return sorted(order[np.unique(np.round(places).astype(int))].tolist())


def _memory() -> int | None:
    cuda = torch.cuda.is_available()
    return int(torch.cuda.get_device_properties(0).total_memory) if cuda else None


def _batch_tokens(shape: Shape, setting: Setting, memory: int | None) -> int:
    """Prompts and samples of one batch of the transformers sampler, in tokens."""
    cache = cache_bytes(shape.layers, shape.kv_heads, shape.head, 4)
    return tokens_per_pass(memory, cache, setting.sequence_len, SAMPLED_ON_CPU)


def _enough(shape: Shape, setting: Setting, counting: Counting) -> int:
    """Pairs for a few steps, for a full scoring pass, and for a full batch of samples."""
    batch, memory = setting.micro_batch * setting.accumulation, _memory()
    per_token = scoring_bytes_per_token(shape.hidden)
    scored = tokens_per_pass(memory, per_token, setting.sequence_len, SCORED_ON_CPU)
    needed = [(_STEPS + 1) * batch, scored / float(counting.pairs.both.mean())]
    if setting.sample:
        prompt = float((counting.pairs.prompt + counting.limits).mean())
        tokens = _batch_tokens(shape, setting, memory)
        needed.append(tokens / (setting.candidates * prompt))
    return math.ceil(max(needed) / batch) * batch


@contextmanager
def _set_aside(prepared: Prepared) -> Iterator[DictDefault]:
    """The short run's configuration, for as long as its directory is there.

    It is on the disk that the run will write to. Alarms about a run of a few pairs mean nothing, so
    none are shown.
    """
    place = Path(prepared.cfg.output_dir).expanduser().absolute().parent
    while not place.exists():
        place = place.parent
    plugins, level = PluginManager.get_instance(), LOG.level
    LOG.setLevel(logging.ERROR)
    try:
        with TemporaryDirectory(dir=place, prefix=".sera-plan-") as directory:
            plugins.cfg = _shortened(prepared, directory)
            yield plugins.cfg
    finally:
        plugins.cfg = prepared.cfg
        LOG.setLevel(level)


def _shortened(prepared: Prepared, directory: str) -> DictDefault:
    """The configuration of the short run: two iterations, nothing evaluated, saved or sent."""
    cfg: DictDefault = copy.deepcopy(prepared.cfg)
    cfg.output_dir = directory
    cfg.num_epochs = ITERATIONS
    cfg.save_strategy, cfg.save_steps = "no", None
    cfg.val_set_size, cfg.test_datasets, cfg.eval_steps, cfg.eval_strategy = 0, None, None, None
    cfg.auto_resume_from_checkpoints = cfg.resume_from_checkpoint = None
    cfg.load_best_model_at_end = cfg.early_stopping_patience = cfg.hub_model_id = None
    for tracker in ("wandb", "mlflow", "tensorboard", "comet", "trackio", "otel_metrics"):
        cfg[f"use_{tracker}"] = False
    if int(prepared.cfg.num_epochs) == 1:
        cfg.sera = {**cfg.sera, "selection_ratio": 1.0, "bootstrap_ratio": 0.0}
    return cfg


class _Steps(TrainerCallback):
    """When the optimizer steps of each iteration ended."""

    def __init__(self) -> None:
        self.ends: list[list[float]] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append([])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends[-1].append(perf_counter())


def fastest(shape: Shape, setting: Setting) -> Speed:
    """The speed of this machine if all work were products of large matrices.

    Real work is slower: this gives a time that a run takes at least. A step of sampling multiplies
    one row per sequence, which is slower than many rows: it reads as many weights.
    """
    device, size = ("cuda", _ON_GPU) if torch.cuda.is_available() else ("cpu", _ON_CPU)
    kind = torch.float32 if setting.width == 4 else torch.bfloat16
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

    many = rate(size)
    per_token = 2.0 * (shape.matrix_elements + shape.vocabulary * shape.hidden)
    sequences = _batch_tokens(shape, setting, _memory()) // max(1, setting.prompt + setting.sample)
    return Speed(many, many, many, sampling=per_token / rate(max(setting.candidates, sequences)))


def _speed(
    shape: Shape,
    setting: Setting,
    short: Counting,
    summaries: list[dict[str, Any]],
    watch: _Steps,
) -> Speed:
    """Operations per second, counted as the plan counts them."""
    iterations = list(short.iterations())
    last, seconds = iterations[-1], summaries[-1]["seconds"]
    batch = short.micro_batch_completions(setting.micro_batch)

    def flops(iteration: Iteration, phase: str) -> float:
        work = iteration.phases[phase]
        return phase_flops(shape, phase, work, setting.checkpointing, batch)

    trained = spent = 0.0
    for iteration, summary, ends in zip(iterations, summaries, watch.ends, strict=True):
        # Fewer sampled pairs than planned may exist.
        epoch = flops(iteration, "train") * summary["pairs"]["trained"] / iteration.pairs
        if len(ends) > 1:
            trained += epoch * (len(ends) - 1) / len(ends)
            spent += ends[-1] - ends[0]
    if not spent:  # so few pairs that an iteration is one step
        trained, spent = epoch, seconds["train"]
    scoring = flops(last, "score_offline") / seconds["score_offline"]
    sampling, candidates, engine = 0.0, scoring, 0.0
    if "sample" in last.phases:
        engine = seconds.get("start_engine", 0.0) + seconds.get("stop_engine", 0.0)
        sampling = (seconds["sample"] - engine) / summaries[-1]["forwarded"]["sample"]["tokens"]
        candidates = flops(last, "score_candidates") / seconds["score_candidates"]
    return Speed(
        scoring=scoring,
        candidates=candidates,
        training=trained / spent,
        sampling=sampling,
        selecting=seconds.get("select", 0.0) / last.pairs,
        engine=engine,
    )
