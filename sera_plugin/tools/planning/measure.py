"""A short run of the same configuration on this machine, timed.

It is a run of SeRA by the host like any other, of two iterations over pairs of all lengths, in a
directory that is removed afterwards. What the second iteration takes is warm: kernels are compiled,
memory is allocated, and the model's abilities are known.
"""

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
from torch.utils.benchmark import Timer

from sera_plugin.config.kinds import LABELERS, labeler_kind
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model.budget import GIB
from sera_plugin.rundir.store import RunStore
from sera_plugin.tools.planning.counts import Speed, flops, iterations
from sera_plugin.tools.planning.run import Run

LOG = logging.getLogger("axolotl.sera")

#: Optimizer steps of an iteration that are timed at least.
_STEPS = 4
#: Rows of the square matrices that are multiplied, on a GPU and on a CPU; for how many seconds.
_ON_GPU, _ON_CPU, _PROBE = 8192, 1024, 1.0
#: Keys of the short run.
_SHORT = {
    "num_epochs": 2,
    "save_strategy": "no",
    "val_set_size": 0,
    **dict.fromkeys(("save_steps", "test_datasets", "eval_steps", "eval_strategy")),
    **dict.fromkeys(("auto_resume_from_checkpoints", "resume_from_checkpoint", "hub_model_id")),
    **dict.fromkeys(("load_best_model_at_end", "early_stopping_patience")),
    **dict.fromkeys(("use_wandb", "use_mlflow", "use_tensorboard", "use_comet"), False),
    **dict.fromkeys(("use_trackio", "use_otel_metrics"), False),
}


def existing(place: Path) -> Path:
    """The nearest directory that is there."""
    place = place.expanduser().absolute()
    return next(each for each in (place, *place.parents) if each.exists())


def measure(run: Run, dataset: Any, rows: Sequence[int]) -> tuple[Speed, float | None, str]:
    """Run two iterations over some of the pairs and time them: speed, tokens of a sample, words.

    `rows` says which of the host's prepared `dataset` are the run's pairs. A ValueError if it runs
    out of memory; whatever else the run itself would raise.
    """
    chosen, start = _chosen(run), perf_counter()
    with _set_aside(run) as cfg:
        few = dataset.select([rows[index] for index in chosen])
        try:
            data = TrainDatasetMeta(few, None, run.schedule.total_steps)
            trainer, *_ = setup_model_and_trainer(cfg, data)
            loading = perf_counter() - start
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the short run of --measure ran out of memory: {error}. The same command without "
                "--measure says which phase needs how much, and what to change."
            ) from error
        summary = RunStore(cfg.output_dir).summary(2)
    sampled = summary["forwarded"].get("sample")
    mean = sampled["tokens"] / sampled["sequences"] if sampled else None
    config = SeraConfig(**cfg.sera)
    method = replace(run.method, config=config, total=len(chosen), iterations=2, prompts=0)
    pairs, nothing, spent = run.pairs[chosen], run.pairs[:0], perf_counter() - start
    alone = {"held_out": nothing, "more_prompts": run.more_prompts[:0]}
    short = replace(run, method=method, pairs=pairs, sampled=mean, **alone)
    said = f"Measured here in {spent:.0f} s, with {len(chosen)} pairs of all lengths"
    if mean is not None:
        said += f"; samples had {mean:.0f} tokens on average"
    if torch.cuda.is_available():
        said += f"; torch took {torch.cuda.max_memory_reserved() / GIB:.1f} GiB of the GPU"
    said += f". Loading took {loading:.0f} s, which is in no other figure."
    return _speed(short, summary), mean, said


def _chosen(run: Run) -> list[int]:
    """Pairs for a few steps, a full scoring pass and a full batch of samples.

    Their lengths are spread as all pairs' are, the longest among them.
    """
    batch, pairs = run.cfg.micro_batch_size * run.cfg.gradient_accumulation_steps, run.pairs
    needed = [_STEPS * batch, run.scored_tokens / pairs.both.mean()]
    if run.sample:
        one = run.batches.size(round(pairs.prompt.mean()), run.method.config.max_new_tokens)
        needed.append(run.batches.tokens / (run.method.config.candidates * one))
    count = math.ceil(max(needed) / batch) * batch
    order = np.argsort(pairs.both, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order)))
    return sorted(order[np.unique(np.round(places).astype(int))].tolist())


@contextmanager
def _set_aside(run: Run) -> Iterator[DictDefault]:
    """The short run's configuration, for as long as its directory is there.

    It is on the disk that the run will write to. Nothing is evaluated, saved or sent. Alarms about
    a run of a few pairs mean nothing, so none are shown.
    """
    place = existing(Path(run.cfg["output_dir"]).parent)
    LOG.info("SeRA: loading the model, to time a short run")
    plugins, level = PluginManager.get_instance(), LOG.level
    LOG.setLevel(logging.ERROR)
    try:
        with TemporaryDirectory(dir=place, prefix=".sera-plan-") as directory:
            cfg = DictDefault({**run.cfg, **_SHORT, "output_dir": directory})
            config = run.method.config
            if config.prompts:  # without them as many pairs need more candidates
                ratio = min(config.bootstrap_ratio, config.candidates // 2)
                cfg.sera = {**cfg.sera, "prompts": [], "bootstrap_ratio": ratio}
            if labeler_kind(config.labeler).mixed:  # no labels weigh scores: nothing is held out
                alone = {setting[0]: None for one in LABELERS.values() if (setting := one.setting)}
                cfg.sera = {**cfg.sera, "labeler": "implicit", **alone}
            if run.method.iterations == 1:
                cfg.sera = {**cfg.sera, "selection_ratio": 1.0, "bootstrap_ratio": 0.0}
            plugins.cfg = cfg
            yield cfg
    finally:
        plugins.cfg = run.cfg
        LOG.setLevel(level)


def fastest(run: Run) -> Speed:
    """The speed of this machine if all work were products of large matrices.

    Real work is slower: this gives a time that a run takes at least. A step of sampling multiplies
    one row per sequence, which is slower than many rows: it reads as many weights.
    """
    device, size = ("cuda", _ON_GPU) if torch.cuda.is_available() else ("cpu", _ON_CPU)
    kind = torch.float32 if run.model.width == 4 else torch.bfloat16
    weights = torch.ones(size, size, dtype=kind, device=device)

    def rate(rows: int) -> float:
        both = {"tokens": torch.ones(rows, size, dtype=kind, device=device), "weights": weights}
        timer = Timer("tokens @ weights", globals=both, num_threads=torch.get_num_threads())
        seconds = min(timer.blocked_autorange(min_run_time=_PROBE).times)
        return 2.0 * rows * weights.numel() / seconds

    many, model = rate(size), run.model
    per_token = 2.0 * (model.matrices - model.adapter + model.vocabulary * model.hidden)
    shortest = run.batches.size(int(run.pairs.prompt.min()), max(1, run.sample))
    sequences = run.batches.tokens // shortest
    one = rate(max(run.method.config.candidates, sequences))
    return Speed(many, many, many, sampling=per_token / one)


def _speed(short: Run, summary: dict[str, Any]) -> Speed:
    """What the second iteration did in a second, counted as the plan counts it."""
    last, seconds = iterations(short)[-1], summary["seconds"]

    def rate(phase: str) -> float:
        return flops(short, phase, last.phases[phase]) / seconds[phase]

    scoring = candidates = rate("score_offline")
    sampling = engine = 0.0
    if "sample" in last.phases:
        candidates = rate("score_candidates")
        engine = seconds.get("start_engine", 0.0) + seconds.get("stop_engine", 0.0)
        sampling = (seconds["sample"] - engine) / summary["forwarded"]["sample"]["tokens"]
    # Fewer sampled pairs than planned may exist.
    training = rate("train") * summary["pairs"]["trained"] / last.pairs
    selecting = seconds.get("select", 0.0) / last.pairs
    return Speed(scoring, candidates, training, sampling, selecting, engine)
