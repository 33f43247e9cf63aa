"""A plan from a YAML: parsed, checked and its data prepared by the host, as `train` does."""

import logging
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.loaders import load_tokenizer
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from huggingface_hub import constants, try_to_load_from_cache
from transformers import GenerationConfig

from sera_plugin.algorithm.method import Method
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.algorithm.selection import annotate
from sera_plugin.config.kinds import is_reference_free
from sera_plugin.config.labelers import require_candidates, require_held_out
from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import TokenizedRows, model_end_ids, prepare_rows
from sera_plugin.data.prompts import prepare_prompts
from sera_plugin.data.rows import LABELLED
from sera_plugin.host.given import Given
from sera_plugin.host.refused import MISTAKES
from sera_plugin.model.budget import GIB
from sera_plugin.model.memory import OPTIMIZERS
from sera_plugin.rundir.progress import told
from sera_plugin.rundir.store import make_table
from sera_plugin.rundir.tokens import TokenColumn
from sera_plugin.sampling.samplers import Choice, choose_sampler
from sera_plugin.tools.command import read_yaml
from sera_plugin.tools.planning.counts import disk_parts, lengths
from sera_plugin.tools.planning.measure import existing, fastest, measure
from sera_plugin.tools.planning.model import describe
from sera_plugin.tools.planning.run import Run
from sera_plugin.tools.planning.show import figures

_AT_LEAST = (
    "The times are what it takes at least: as if all of it were products of large matrices, which "
    "were timed here. --measure times a short run instead."
)
_NO_TIME = (
    "How long they take depends on the GPU: run `axolotl sera plan --measure` on the machine that "
    "will train."
)
_IN_STEP = (
    "How long they take depends on the GPU, and no short run can tell: FSDP2 needs all processes. "
    "The first iteration's seconds are in its summary.json."
)
#: The host's handlers that print.
_CONSOLES = ("console", "color_console")
_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def read_plan(
    path: Path, gpu: float | None, measuring: bool, processes: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The plan of a YAML as JSON has it, and remarks on its phases of memory.

    It is compared with `processes` GPUs of `gpu` GiB, None for those here; `measuring` makes a
    short run in one process. A ValueError or OSError if the configuration or its data cannot be
    trained, with what to do.
    """
    for handler in [*logging.getLogger().handlers, *logging.getLogger("axolotl").handlers]:
        if isinstance(handler, logging.StreamHandler) and handler.name in _CONSOLES:
            handler.setStream(sys.stderr)
            handler.setLevel(logging.WARNING)
    cfg = parse(path)
    if measuring and cfg.fsdp_config:
        raise ValueError(
            "--measure makes a short run in one process, and FSDP2 needs them all. Leave it out; "
            "the first iteration's seconds are in its summary.json."
        )
    config, tokenizer = SeraConfig(**cfg.sera), load_tokenizer(cfg)
    device, memory = _device(gpu)
    described = partial(describe, tokenizer=tokenizer, on_gpu=memory is not None)
    model = described(cfg)
    data = PluginManager.get_instance().load_datasets(cfg, preprocess=True)
    end_ids = model_end_ids(SimpleNamespace(generation_config=_generation(cfg)), tokenizer)

    def prepared(dataset: Any, split: str) -> tuple[TokenizedRows, Pairs, Any]:
        shown = told(dataset, f"tokenize {split} pairs", "pair")
        rows = prepare_rows(shown, tokenizer, end_ids, cfg, config, split)
        columns = {name: getattr(rows, name) for name in _COLUMNS}
        pairs = Pairs.from_table(make_table(columns))
        return rows, pairs, lengths(*(getattr(pairs, name).lengths for name in _COLUMNS))

    rows, pairs, sizes = prepared(data.train_dataset, "train")
    held_out, held_out_ids = sizes[:0], None
    if data.eval_dataset:
        _, aside, held_out = prepared(data.eval_dataset, "eval")
        held_out_ids = aside.prompt_ids
    more = None
    if data.prompts is not None:
        known = pairs.prompt_ids, held_out_ids
        more = prepare_prompts(data.prompts, tokenizer, end_ids, cfg, config, *known)
    kept = data.train_dataset.select(rows.rows)
    columns = {name: kept[name][:] for name in config.score_columns}
    method = Method(
        config,
        is_reference_free(config.loss) and not cfg.dpo_loss_type,
        per_token=False,
        total=len(pairs),
        iterations=int(cfg.num_epochs),
        seed=int(cfg.seed or 0),
        annotations=annotate(config, pairs.prompt_ids, columns, None),
        prompts=0 if more is None else len(more),
    )
    require_held_out(config, len(held_out))
    if more is not None:
        require_candidates(config, method.pairs_per_prompt)
    choice = Choice(config.sampler, "as sera.sampler says; not looked for on this machine")
    if gpu is None or model.unserved or config.sampler not in ("vllm", "vllm-server"):
        python = config.vllm_python or sys.executable
        choice = choose_sampler(config.sampler, python, model.unserved)
    if processes is None:
        processes = max(1, torch.cuda.device_count()) if gpu is None else 1
    run = Run(cfg, model, method, sizes, held_out, choice.name, memory, described, processes)
    if more is not None:
        tokens = TokenColumn(more["prompt_ids"])
        run = replace(run, more_prompts=tokens.lengths.astype(np.int64))
    speed, speed_from = None, _IN_STEP if cfg.fsdp_config else _NO_TIME
    room: tuple[int | None, int | None] = None, None
    if measuring:
        here = replace(run, memory=_device(None)[1])
        speed, sampled, speed_from = measure(here, data.train_dataset, rows.rows)
        run = replace(run, sampled=sampled)
    elif gpu is None:
        speed, speed_from = fastest(run), _AT_LEAST
    if gpu is None:
        free = shutil.disk_usage(existing(Path(cfg.output_dir))).free
        room = psutil.virtual_memory().available, free
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
    about = {"plan": str(path)} | _about(run, sum(map(len, rows.dropped.values())), choice)
    if labelled := sum(data.train_dataset[LABELLED][:]):
        about["data"] += f"; paired from {labelled:,} answers with a label"
    disk, notes = disk_parts(run, pairs, files), notes_of(run)
    found = figures(run, speed, about, device, room, disk, speed_from=speed_from, notes=notes)
    return found, [f"{phase.name}: {phase.note}" for phase in run.phases if phase.note]


def parse(path: Path) -> DictDefault:
    """The host's own parsing and checks, with nothing written into output_dir."""
    written = read_yaml(path)
    base_model = written.get("base_model_config") or written.get("base_model")
    _require_model(base_model, written.get("revision_of_model"))
    # The host begins output_dir's debug.log anew, and there may be a run there.
    with TemporaryDirectory() as scratch:
        # Of `deepspeed:` it would set its processes up, or miss a package that this machine lacks.
        cfg = load_cfg(str(path), output_dir=scratch, deepspeed=None)
    if cfg.sera and (deepspeed := written.get("deepspeed")):
        cfg.deepspeed = deepspeed
        given = Given(cfg, SeraConfig(**cfg.sera))
        for mistake in (line for line in MISTAKES if line.keys == "deepspeed"):
            mistake.check(given)
    cfg.output_dir = str(written.get("output_dir") or "./model-out")
    if not cfg.sera:
        raise ValueError(
            f"{path} has no `rl: sera`. Add it and `plugins: [sera_plugin.SeraPlugin]`; README.md "
            "has the lines."
        )
    return cfg


def _require_model(name: Any, revision: str | None) -> None:
    """Say what to do where config.json is not here and cannot be fetched."""
    if not isinstance(name, str) or (Path(name) / "config.json").is_file():
        return
    if Path(name).is_dir():
        raise ValueError(f"base_model: {quoted(name, 200)} is a directory without config.json.")
    here = name.startswith((".", "/", "~")) or name.count("/") != 1
    cached = None if here else try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str) or not (here or constants.HF_HUB_OFFLINE):
        return
    what = "there is no such directory" if here else "its config.json is not in the local hub cache"
    raise ValueError(
        f"base_model: {quoted(name, 200)} cannot be planned: {what}. A plan needs config.json and "
        "the tokenizer's files, no weights. Put them into a directory and name it, or where there "
        f"is a network run `hf download {name} --exclude '*.safetensors' '*.bin' '*.gguf' '*.pth'`."
    )


def _generation(cfg: DictDefault) -> Any:
    """What the model's own generation_config would be once it is loaded."""
    try:
        return GenerationConfig.from_pretrained(cfg.base_model, revision=cfg.revision_of_model)
    except OSError:
        return GenerationConfig.from_model_config(load_model_config(cfg))


def _device(gpu: float | None) -> tuple[str, int | None]:
    """Name and memory of what a plan is compared with."""
    if gpu is not None:
        return "--gpu", round(gpu * GIB)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return found.name, found.total_memory
    return "no GPU", None


def _about(run: Run, dropped: int, choice: Choice) -> dict[str, str]:
    cfg, model, pairs = run.cfg, run.model, run.pairs
    bits = f" in {run.bits} bits" if run.bits else ""
    what = f"an adapter of {model.adapter:,} trained" if model.adapter else "all trained"
    width = "computed in float32" if model.width == 4 else "computed in 16 bits"
    prompt, answer = pairs.prompt.mean(), pairs.completions.mean() / 2
    found = {
        "model": f"{cfg.model_config_type}, {model.parameters:,} parameters{bits}, {what}; {width}",
        "data": f"{len(pairs):,} pairs ({dropped:,} rows dropped), {len(run.held_out):,} held out; "
        f"prompts of {prompt:.0f} and completions of {answer:.0f} tokens on average",
        "training": f"{run.method.iterations} iterations, "
        f"{cfg.micro_batch_size} pairs x {cfg.gradient_accumulation_steps}"
        f"{f' x {run.processes} GPUs' if run.processes > 1 else ''}, {run.optimizer}, "
        f"gradient checkpointing {'on' if cfg.gradient_checkpointing else 'off'}",
    }
    if len(run.more_prompts):
        found["prompts"] = f"{len(run.more_prompts):,} more, which have no pair and are sampled"
    if run.sample:
        found["sampler"] = f"{choice.name} ({choice.reason})"
    return found


def _lengths_note(run: Run) -> str:
    """How long samples are taken to be, and how many of the answers are longer than one can be."""
    chosen, most = run.pairs.chosen, run.method.config.max_new_tokens
    note = "Samples are expected to be as long as chosen answers are "
    note += f"({chosen.mean():.0f} tokens on average)"
    longer = int((chosen > most).sum())
    if longer:
        note += f", and at most sera.max_new_tokens: {most}, which cuts {longer:,} of them"
    return note + "."


def notes_of(run: Run) -> list[str]:
    """What the figures leave out or take for granted, in sentences."""
    quantised = run.model.quantised_already
    config, iterations = run.method.config, run.method.iterations
    schedules = map(run.schedule.steps, range(1, iterations + 1))
    steps = min(schedules) if config.restart_optimizer else run.schedule.total_steps
    warmup = run.cfg.warmup_steps or 0
    notes = {
        f"warmup_steps: {warmup} leaves nothing of a schedule of {steps:,} steps; it warms up in "
        "at most all of them but one.": warmup >= max(steps, 2),
        f"num_epochs: {iterations} ends before iteration {config.first_iteration}, the first that "
        "selects or samples pairs: this run does neither.": iterations < config.first_iteration,
        _lengths_note(run): run.sampled is None and run.sample,
        f"optimizer: {run.optimizer} is counted like AdamW in float32.": run.optimizer
        not in OPTIMIZERS,
        "State of paged optimizers is counted on the device; where that is short it moves to "
        "host memory by itself.": run.optimizer.startswith("paged"),
        f"The checkpoint is quantised with {quantised}; its weights are counted as the "
        "YAML would load them.": quantised,
        "Weights, gradients or optimizer state are shared out among processes, and this is the "
        "plan of one that has them all: say how many there are with --gpus.": (
            run.processes == 1 and run.placement.stage
        ),
        f"Memory is that of each of {run.processes} processes, host memory that of a machine with "
        "all of them; work is that of all together.": run.processes > 1,
        "Sampling in the training process plans with weights, gradients and optimizer state as "
        "one process has them, so with ZeRO it takes fewer samples at a time than fit.": (
            run.cfg.deepspeed and run.sample and run.sampler == "transformers"
        ),
    }
    return [note for note, applies in notes.items() if applies]
