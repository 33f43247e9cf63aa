"""What of a run one of its processes holds: DDP, DeepSpeed's ZeRO stages, FSDP2.

Sources: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", section 3 (stage 1 shares optimizer state out, 2 gradients too, 3 weights too); FSDP2 is as
stage 3. DeepSpeed keeps what it trains in 16 bits once more in float32, with the optimizer's state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from axolotl.utils.dict import DictDefault

from sera_plugin.host.given import deepspeed_config
from sera_plugin.tools.planning.model import Model


@dataclass(frozen=True)
class Placement:
    """What is shared out among the processes of a run, and what lies in host memory."""

    processes: int = 1
    stage: int = 0  # of ZeRO
    in_float32: bool = False  # whether weights in 16 bits are kept in float32 too
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    by_fsdp: bool = False
    loading: int = 0  # processes of a machine that have the whole model in host memory at first

    @classmethod
    def of(cls, cfg: DictDefault, processes: int) -> Placement:
        """As the YAML says, in so many processes, each with a GPU."""
        if cfg.fsdp_config:
            offload = bool(cfg.fsdp_config.get("offload_params"))
            # With FSDP `ModelLoader._set_device_map_config` of axolotl 0.19 names no device.
            loading = 1 if cfg.fsdp_config.get("cpu_ram_efficient_loading") else processes
            return cls(processes, 3, False, offload, offload, by_fsdp=True, loading=loading)
        if not cfg.deepspeed:
            return cls(processes)
        zero: Any = (deepspeed_config(cfg.deepspeed) or {}).get("zero_optimization") or {}

        def on_host(what: str) -> bool:
            return bool((zero.get(what) or {}).get("device") == "cpu")

        low = bool(cfg.bf16 or cfg.fp16)
        optimizer, weights = on_host("offload_optimizer"), on_host("offload_param")
        return cls(processes, int(zero.get("stage") or 0), low, optimizer, weights)

    def resident(self, model: Model, states: int) -> dict[str, int]:
        """Bytes on one process's device between steps: weights, and what the optimizer keeps.

        Of weights that are shared out a layer is whole while it computes, and the next one is on
        its way. Embeddings and output layer are whole by turns, and under FSDP2 from the beginning
        of a pass to its end: the host shards them together with all that is outside of layers.
        """
        whole = model.resident
        weights = 0 if self.weights_on_host else self._part(whole, 3)
        if self.stage == 3:
            two = math.ceil(2 * (whole - model.outer) / model.layers)
            weights += two + model.outer if self.by_fsdp else max(two, model.outer)
        optimizer = 0 if self.optimizer_on_host else self.optimizer(model, states)
        return {"weights": weights, "optimizer": optimizer}

    def optimizer(self, model: Model, states: int) -> int:
        """Bytes of a process's part of the optimizer's state, wherever that is."""
        masters = sum(4 * count for count, *_ in model.trained) if self.in_float32 else 0
        return self._part(states + masters, 1)

    def stepped(self, model: Model) -> list[tuple[int, int, bool]]:
        """What the optimizer steps, as `Model.trained` has it."""
        return [
            (count, 4 if self.in_float32 else width, table) for count, width, table in model.trained
        ]

    def in_sampling(self, model: Model, states: int) -> int:
        """Bytes that sampling in process plans with, see `memory.resident_bytes`: whole weights."""
        trained = model.trained_bytes + states
        return model.resident + (self._part(trained, 1) if self.stage == 3 else trained)

    def gradients(self, model: Model) -> int:
        """Bytes of a process's gradients after a backward pass."""
        return self._part(model.trained_bytes, 2)

    def host_parts(self, model: Model, states: int) -> dict[str, int]:
        """Bytes in one machine's host memory, if all processes are on it."""
        weights = model.resident if self.weights_on_host else 0
        optimizer = self.processes * self.optimizer(model, states)
        return {
            "offloaded weights": weights,
            "offloaded optimizer": optimizer if self.optimizer_on_host else 0,
        }

    def _part(self, size: int, stage: int) -> int:
        return math.ceil(size / self.processes) if self.stage >= stage else size
