"""A configuration with its model and its data, as far as memory and disk depend on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sera_plugin.model.budget import (
    SAMPLED_ON_CPU,
    SCORED_ON_CPU,
    cache_bytes,
    scoring_bytes_per_token,
    tokens_per_pass,
)
from sera_plugin.tools.planning.counts import Counting
from sera_plugin.tools.planning.model import Model

#: States per weight by the optimizer's name in the YAML: in the type of the weight (torch keeps
#: `zeros_like` it), in float32, or in 8 bits (bitsandbytes).
OPTIMIZERS = {
    "adamw_torch": (2, "like"),
    "adamw_torch_fused": (2, "like"),
    "adagrad": (1, "like"),
    "rmsprop": (1, "like"),
    "sgd": (0, "like"),
    "paged_adamw_32bit": (2, "wide"),
    "lion_32bit": (1, "wide"),
    "paged_lion_32bit": (1, "wide"),
    "adamw_8bit": (2, "blocks"),
    "adamw_bnb_8bit": (2, "blocks"),
    "paged_adamw_8bit": (2, "blocks"),
    "lion_8bit": (1, "blocks"),
    "paged_lion_8bit": (1, "blocks"),
}
#: Those that make a copy as large as the weights in each step on a GPU (torch's documentation of
#: `foreach`).
FOREACH = frozenset({"adamw_torch"})


def state_bytes(optimizer: str, weights: Sequence[tuple[int, int, bool]]) -> int:
    """State of all weights; of an optimizer that is not known as much as AdamW's in float32.

    Args:
        weights: (elements, bytes per element, whether a table of embeddings) of each.

    Source: Loshchilov and Hutter 2019 (AdamW has two moments); Chen et al. 2023 (Lion has one);
    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2: a float32 scale
    for 256 elements. Weights of fewer than 4096 elements, and embeddings with Adam (transformers'
    own exception), are in float32.
    """
    states, kind = OPTIMIZERS.get(optimizer, (2, "wide"))
    total = 0
    for count, width, table in weights:
        if kind == "like":
            total += states * width * count
        elif kind == "wide" or count < 4096 or table:
            total += states * 4 * count
        else:
            total += states * (count + 4 * math.ceil(count / 256))
    return total


@dataclass(frozen=True)
class Run:
    """What is planned.

    Attributes:
        cfg: the host's resolved configuration.
        model, counting: its model and its data.
        sampler: transformers, vllm or vllm-server.
        memory: of the GPU in bytes; None on a CPU, where host memory takes its place.
        describe: the model of a changed configuration.
    """

    cfg: Mapping[str, Any]
    model: Model
    counting: Counting
    sampler: str
    memory: int | None
    describe: Callable[[Mapping[str, Any]], Model]

    def changed(self, keys: Mapping[str, Any]) -> Run:
        """The run with other values of some keys, `vllm.a` those of a block."""
        cfg = dict(self.cfg)
        for key, value in keys.items():
            block, _, inner = key.partition(".")
            cfg[block] = {**(cfg.get(block) or {}), inner: value} if inner else value
        counting = self.counting
        if length := keys.get("sequence_len"):
            counting = replace(counting, pairs=counting.pairs.within(length), sequence_len=length)
            if counting.held_out is not None:
                counting = replace(counting, held_out=counting.held_out.within(length))
        model = self.describe(cfg) if "adapter" in keys else self.model
        sampler = keys.get("sera.sampler", self.sampler)
        return replace(self, cfg=cfg, model=model, counting=counting, sampler=sampler)

    @property
    def micro_batch(self) -> int:
        return int(self.cfg["micro_batch_size"])

    @property
    def accumulation(self) -> int:
        return int(self.cfg.get("gradient_accumulation_steps") or 1)

    @property
    def checkpointing(self) -> bool:
        return bool(self.cfg.get("gradient_checkpointing"))

    @property
    def utilization(self) -> float | None:
        return (self.cfg.get("vllm") or {}).get("gpu_memory_utilization")

    @property
    def bits(self) -> int | None:
        return 4 if self.cfg.get("load_in_4bit") else 8 if self.cfg.get("load_in_8bit") else None

    @property
    def optimizer(self) -> str:
        optimizer = self.cfg.get("optimizer") or "adamw_torch_fused"
        return str(getattr(optimizer, "value", optimizer))

    @cached_property
    def states(self) -> int:
        """Bytes of the optimizer's state."""
        return state_bytes(self.optimizer, self.model.trained)

    @property
    def candidates(self) -> int:
        return self.counting.method.config.candidates

    @cached_property
    def sample(self) -> int:
        """Tokens of the longest sample, 0 where nothing is sampled."""
        counting = self.counting
        return int(counting.limits.max()) if counting.method.sampled(counting.last) else 0

    @cached_property
    def completion(self) -> int:
        """Tokens of the longest completion that there can be."""
        every = [max(each.chosen.max(), each.rejected.max()) for each in self.counting.data]
        return int(max(*every, self.sample))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion that is scored, sampled or trained."""
        every = [each.longer.max() for each in self.counting.data]
        if self.sample:
            every.append((self.counting.pairs.prompt + self.counting.limits).max())
        return int(max(every))

    @property
    def scored_tokens(self) -> int:
        """Tokens of a scoring pass, as `scoring.scoring_budget` plans it."""
        return self._pass(scoring_bytes_per_token(self.model.hidden), SCORED_ON_CPU)

    @property
    def sampled_tokens(self) -> int:
        """Tokens of prompts and samples in a batch of `sampling.transformers`."""
        return self._pass(self.cache_bytes(4), SAMPLED_ON_CPU)

    def _pass(self, per_token: int, on_cpu: int) -> int:
        longest = int(self.cfg.get("sequence_len") or 0)
        return tokens_per_pass(self.memory, per_token, longest, on_cpu)

    def cache_bytes(self, width: int) -> int:
        """Of one token's keys and values, of `width` bytes per element."""
        return cache_bytes(self.model.layers, self.model.kv_heads, self.model.head, width)
