"""A plan's inputs from a YAML, a GPU and, where that is asked for, a short run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from sera_plugin.model.memory import GIB
from sera_plugin.tools.planning import keys
from sera_plugin.tools.planning.compute import Speed
from sera_plugin.tools.planning.counts import Counting, Lengths
from sera_plugin.tools.planning.measure import fastest, measure
from sera_plugin.tools.planning.plan import Device, Inputs
from sera_plugin.tools.planning.prepare import Prepared, prepare
from sera_plugin.tools.planning.setting import Setting

_AT_LEAST = (
    "The times are what it takes at least: as if all of it were products of large matrices, which "
    "were timed here. --measure times a short run instead."
)
_NO_TIME = (
    "How long they take depends on the GPU: run `axolotl sera plan --measure` on the machine that "
    "will train."
)


def read_inputs(path: Path, gpu: float | None, measuring: bool) -> Inputs:
    """Everything that `plan.make_plan` takes.

    Args:
        path: the YAML.
        gpu: GiB of the GPU to compare with, None for the one here.
        measuring: whether to make a short run.

    Raises:
        ValueError, OSError: for a configuration or data that cannot be trained, with what to do.
    """
    prepared = prepare(path, elsewhere=gpu is not None)
    cfg, empty = prepared.cfg, prepared.model
    shape = empty.shape
    held_out = None if prepared.held_out is None else Lengths.of(prepared.held_out)
    counting = keys.counting_of(cfg, prepared.method, Lengths.of(prepared.pairs), held_out)
    device = _device(gpu)
    on_gpu = device.memory is not None
    setting = keys.setting_of(cfg, shape, counting, prepared.choice.name, on_gpu)
    speed: Speed | None = None
    speed_from = _NO_TIME
    if measuring:
        measured = measure(prepared, shape, setting, counting)
        counting = replace(counting, sampled=measured.sampled)
        speed, speed_from = measured.speed, str(measured)
    elif gpu is None:
        speed, speed_from = fastest(shape, setting), _AT_LEAST
    return Inputs(
        about=_about(path, prepared, setting, counting),
        shape=shape,
        setting=setting,
        counting=counting,
        pairs=prepared.pairs,
        saving=keys.saving_of(cfg, shape, setting, counting, prepared.tokenizer_bytes),
        device=device,
        room=None if gpu is not None else _room(Path(cfg.output_dir)),
        notes=keys.notes_of(
            cfg, shape, setting, counting, empty.other_layers, empty.quantised_already
        ),
        speed=speed,
        speed_from=speed_from,
    )


def _room(output_dir: Path) -> tuple[int, int]:
    """Bytes free in host memory, and on the disk of a directory that may not be there yet."""
    place = output_dir.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return psutil.virtual_memory().available, shutil.disk_usage(place).free


def _device(gpu: float | None) -> Device:
    if gpu is not None:
        return Device("--gpu", round(gpu * GIB))
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return Device(found.name, found.total_memory)
    return Device("no GPU", None)


def _about(path: Path, prepared: Prepared, setting: Setting, counting: Counting) -> dict[str, str]:
    shape, method = prepared.model.shape, prepared.method
    base = f"{shape.parameters:,} parameters"
    if setting.bits:
        base += f" in {setting.bits} bits"
    what = "all trained"
    if shape.adapter:
        what = f"an adapter of {shape.adapter_parameters:,} trained"
    dropped = sum(map(len, prepared.rows.dropped.values()))
    held_out = 0 if counting.held_out is None else len(counting.held_out)
    width = "float32" if setting.width == 4 else "16 bits"
    prompt, answer = counting.pairs.prompt.mean(), counting.pairs.completions.mean() / 2
    found = {
        "plan": str(path),
        "model": f"{shape.kind}, {base}, {what}; computed in {width}",
        "data": f"{method.total:,} pairs ({dropped:,} rows dropped), {held_out:,} held out; "
        f"prompts of {prompt:.0f} and completions of {answer:.0f} tokens on average",
        "training": f"{len(counting.schedule.pairs)} iterations, {setting.micro_batch} pairs x "
        f"{setting.accumulation}, {setting.optimizer}, gradient checkpointing "
        f"{'on' if setting.checkpointing else 'off'}",
    }
    if setting.sample:
        choice = prepared.choice
        found["sampler"] = f"{choice.name} ({choice.reason})"
    return found
