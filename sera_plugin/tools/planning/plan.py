"""All figures of a plan, put together from its inputs. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sera_plugin.algorithm.method import Pairs
from sera_plugin.tools.planning.advice import Case, Change, advise
from sera_plugin.tools.planning.compute import Speed, phase_flops, phase_seconds
from sera_plugin.tools.planning.counts import Counting, Iteration
from sera_plugin.tools.planning.disk import Saving, disk_parts
from sera_plugin.tools.planning.memory import Phase, device_phases, host_parts
from sera_plugin.tools.planning.setting import Setting, snapshots
from sera_plugin.tools.planning.shape import Shape


@dataclass(frozen=True)
class Device:
    """What a plan is compared with.

    Attributes:
        name: of the GPU, or what was said of it.
        memory: in bytes, None where there is nothing to compare with.
    """

    name: str
    memory: int | None


@dataclass(frozen=True)
class Inputs:
    """What a plan is made of.

    Attributes:
        about: what the run is, for the reader: name, value.
        shape, setting: the model and what memory depends on.
        counting: the data and the method.
        pairs: the data as token ids.
        saving: what goes to disk.
        device: where it will run.
        room: bytes of host memory and disk that are free, None where the run is elsewhere.
        notes: what the figures leave out.
        speed: of this machine, None where it is not known.
        speed_from: where the speed comes from.
    """

    about: Mapping[str, Any]
    shape: Shape
    setting: Setting
    counting: Counting
    pairs: Pairs
    saving: Saving
    device: Device
    room: tuple[int, int] | None
    notes: list[str]
    speed: Speed | None
    speed_from: str


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes:
        inputs: what it was made of.
        iterations: what each does.
        flops: operations by phase, an iteration each.
        seconds: the same in seconds, None where the speed is not known.
        phases: the device's memory.
        host, disk: bytes by what they are for.
        changes: what makes it fit, empty where it does or where there is nothing to compare with.
    """

    inputs: Inputs
    iterations: list[Iteration]
    flops: list[dict[str, float]]
    seconds: list[dict[str, float]] | None
    phases: list[Phase]
    host: dict[str, int]
    disk: dict[str, int]
    changes: list[Change]

    @property
    def fits(self) -> bool | None:
        """Whether every phase does, None where there is nothing to compare with."""
        memory = self.inputs.device.memory
        return None if memory is None else all(phase.fits(memory) for phase in self.phases)


def make_plan(inputs: Inputs) -> Plan:
    """All figures of a plan."""
    shape, setting, counting = inputs.shape, inputs.setting, inputs.counting
    memory = inputs.device.memory
    iterations = list(counting.iterations())
    batch = counting.micro_batch_completions(setting.micro_batch)
    flops = [
        {
            phase: phase_flops(shape, phase, work, setting.checkpointing, batch)
            for phase, work in one.phases.items()
        }
        for one in iterations
    ]
    seconds = None
    if inputs.speed is not None:
        seconds = [
            phase_seconds(inputs.speed, one, each)
            for one, each in zip(iterations, flops, strict=True)
        ]
    phases = device_phases(shape, setting, memory)
    changes: list[Change] = []
    if memory is not None and not all(phase.fits(memory) for phase in phases):
        changes = advise(Case(shape, setting, counting.pairs, memory))
    method = counting.method
    oldest = [method.oldest_policy(one.number) for one in iterations]
    tokens = int(counting.pairs.prompt.sum() + counting.pairs.completions.sum())
    return Plan(
        inputs=inputs,
        iterations=iterations,
        flops=flops,
        seconds=seconds,
        phases=phases,
        host=host_parts(shape, setting, phases, snapshots(oldest), tokens),
        disk=disk_parts(method, inputs.pairs, iterations, inputs.saving),
        changes=changes,
    )
