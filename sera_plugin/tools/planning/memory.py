"""Bytes on the device and in host memory, phase by phase.

The parts are those of Rajbhandari et al. 2020, "ZeRO", section 3: weights, gradients, optimizer
states, activations, and what else there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sera_plugin.model.memory import (
    ENGINE_OVERHEAD,
    ENGINE_SEQUENCES,
    ENGINE_SLACK,
    GIB,
    cache_bytes,
)
from sera_plugin.tools.planning import activations
from sera_plugin.tools.planning.optimizers import FOREACH, state_bytes
from sera_plugin.tools.planning.setting import (
    Setting,
    adapter_bytes,
    copied_bytes,
    trained,
    trained_bytes,
    weight_bytes,
)
from sera_plugin.tools.planning.shape import Shape

#: A GPU's context, its kernels' workspaces, what lies between blocks. Assumed, not measured.
DEVICE_OVERHEAD = GIB


@dataclass(frozen=True)
class Phase:
    """What one phase takes of the device.

    Attributes:
        name: `score`, `sample`, `train` or `update`, the optimizer's step.
        parts: bytes by what they are for.
        note: what to know about them, or "".
        possible: false where an engine could not start, whatever the sum.
        waiting: bytes that are in host memory meanwhile.
    """

    name: str
    parts: dict[str, int]
    note: str = ""
    possible: bool = True
    waiting: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self, memory: int) -> bool:
        return self.possible and self.total <= memory


def device_phases(shape: Shape, setting: Setting, memory: int | None) -> list[Phase]:
    """The phases of a run from iteration 2 on, when there is optimizer state.

    Args:
        memory: of the GPU in bytes; None on a CPU, where host memory takes its place.
    """
    overhead = DEVICE_OVERHEAD if memory is not None else 0
    other = {"other": overhead + copied_bytes(shape, setting)}
    resident = {
        "weights": weight_bytes(shape, setting) + adapter_bytes(shape),
        "optimizer": state_bytes(setting.optimizer, trained(shape, setting)),
    }
    found = [Phase("score", resident | activations.scoring(shape, setting, memory) | other)]
    if setting.sample and setting.sampler == "transformers":
        parts = resident | activations.sampling(shape, setting, memory) | other
        found.append(Phase("sample", parts))
    elif setting.sample and setting.sampler == "vllm" and memory is not None:
        found.append(_engine(shape, setting, memory, resident))
    kept, _ = activations.training_activations(shape, setting)
    gradients = {"gradients": trained_bytes(shape, setting)}
    passes = {"activations": kept, "logits": activations.training_logits(shape, setting)}
    found.append(Phase("train", resident | gradients | passes | other))
    if memory is not None and setting.optimizer in FOREACH:
        copies = {"other": overhead + trained_bytes(shape, setting)}
        found.append(Phase("update", resident | gradients | copies, "torch's foreach copies"))
    return found


def _engine(shape: Shape, setting: Setting, memory: int, resident: dict[str, int]) -> Phase:
    """vLLM beside the training run or in its place, as `offload.make_room` decides."""
    sizes = (shape.layers, shape.kv_heads, shape.head)
    weights = shape.parameters * setting.width // setting.engines
    cache = ENGINE_SEQUENCES * setting.longest * cache_bytes(*sizes, setting.width)
    wanted = weights + cache // setting.engines + ENGINE_OVERHEAD
    if setting.utilization is not None:
        wanted = int(setting.utilization * memory)
    room = memory - DEVICE_OVERHEAD
    beside = room - sum(resident.values()) >= wanted + ENGINE_SLACK
    given = wanted if setting.utilization is not None else room - ENGINE_SLACK
    note = "beside the training run" if beside else "weights and optimizer wait in host memory"
    if setting.bits and weights + ENGINE_OVERHEAD > given:
        weights = weight_bytes(shape, setting) // setting.engines
        note += "; only with a vLLM that serves 4 bits (bitsandbytes)"
    needed = weights + ENGINE_OVERHEAD
    taken = wanted if beside or setting.utilization is not None else needed
    stays = resident if beside else {}
    possible = needed <= given and (setting.utilization is None or wanted <= room)
    if not possible:
        note += f"; it needs {needed / GIB:.1f} GiB and would get {min(given, room) / GIB:.1f}"
    return Phase(
        "sample",
        {**stays, "engine": taken + ENGINE_SLACK, "other": DEVICE_OVERHEAD},
        note,
        possible,
        waiting=0 if beside else sum(resident.values()),
    )


def host_parts(
    shape: Shape, setting: Setting, phases: Sequence[Phase], policies: int, tokens: int
) -> dict[str, int]:
    """Host memory that a run takes beside the program itself.

    Args:
        phases: from `device_phases`.
        policies: snapshots at once, from `setting.snapshots`.
        tokens: of the dataset.
    """
    _, offloaded = activations.training_activations(shape, setting)
    parts = {
        "policies": policies * trained_bytes(shape, setting),
        "dataset": 4 * tokens,
        "while vLLM samples": max(phase.waiting for phase in phases),
        "offloaded activations": offloaded,
    }
    return {name: size for name, size in parts.items() if size}
