"""A configuration with its model and its data: bytes on the device and in host memory, by phase.

The parts are those of Rajbhandari et al. 2020, "ZeRO", section 3: weights, gradients, optimizer
states, activations, and what else there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from axolotl.utils.dict import DictDefault

from sera_plugin.algorithm.method import Method, Schedule
from sera_plugin.model import budget
from sera_plugin.model.budget import ENGINE_OVERHEAD, ENGINE_SLACK, GIB
from sera_plugin.model.forward import KEPT_LOGITS, LOGITS
from sera_plugin.tools.planning.model import FOREACH, Model, state_bytes

#: A GPU's context, its kernels' workspaces, what lies between blocks. Assumed, not measured.
DEVICE_OVERHEAD = GIB


@dataclass(frozen=True)
class Phase:
    """What one phase takes of the device."""

    name: str  # score, sample, train or update, the optimizer's step
    parts: dict[str, int]  # bytes by what they are for
    note: str = ""  # what to know about them
    possible: bool = True  # false where an engine could not start, whatever the sum
    waiting: int = 0  # bytes that are in host memory meanwhile

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self, memory: int | None) -> bool:
        return memory is None or (self.possible and self.total <= memory)


@dataclass(frozen=True)
class Run:
    """What is planned, for one process."""

    cfg: DictDefault  # the host's, resolved
    model: Model
    method: Method
    pairs: Any  # `lengths` of the data, and of what is held out of it, which may be nothing
    held_out: Any
    sampler: str  # transformers, vllm or vllm-server
    memory: int | None  # of the GPU in bytes; None on a CPU, where host memory takes its place
    describe: Callable[[Mapping[str, Any]], Model]  # the model of a changed configuration
    sampled: float | None = None  # mean tokens of a sample where that was measured

    def changed(self, keys: Mapping[str, Any]) -> Run:
        """The run with other values of some keys, `vllm.a` those of a block."""
        cfg = DictDefault(self.cfg)
        for key, value in keys.items():
            block, _, inner = key.partition(".")
            cfg[block] = {**(cfg[block] or {}), inner: value} if inner else value
        return replace(
            self,
            cfg=cfg,
            model=self.describe(cfg) if "adapter" in keys else self.model,
            sampler=keys.get("sera.sampler", self.sampler),
            pairs=self.pairs[self.pairs.longer <= cfg.sequence_len],
            held_out=self.held_out[self.held_out.longer <= cfg.sequence_len],
        )

    @property
    def judges(self) -> bool:
        """Whether the end of training compares the policies; see `Keeping.judges`."""
        return self.method.config.keep == "best" and len(self.held_out) > 0

    @property
    def bits(self) -> int | None:
        return 4 if self.cfg.load_in_4bit else 8 if self.cfg.load_in_8bit else None

    @property
    def optimizer(self) -> str:
        return str(getattr(self.cfg.optimizer, "value", self.cfg.optimizer))

    @cached_property
    def schedule(self) -> Schedule:
        batches = self.cfg.micro_batch_size, self.cfg.gradient_accumulation_steps
        return Schedule(self.method.sizes, *batches)

    @property
    def limits(self) -> npt.NDArray[np.int64]:
        """(N,) most tokens of a sample for each prompt, see `client.room`."""
        room = self.cfg.sequence_len - self.pairs.prompt
        return np.minimum(self.method.config.max_new_tokens, room)

    @property
    def expected(self) -> npt.NDArray[np.float64]:
        """(N,) tokens expected of a sample: as measured, else as long as chosen answers are."""
        mean = self.pairs.chosen.mean() if self.sampled is None else self.sampled
        return np.minimum(mean, self.limits)

    @cached_property
    def states(self) -> int:
        """Bytes of the optimizer's state."""
        return state_bytes(self.optimizer, self.model.trained)

    @cached_property
    def sample(self) -> int:
        """Tokens of the longest sample, 0 where nothing is sampled."""
        return int(self.limits.max()) if self.method.sampled(self.method.iterations) else 0

    @cached_property
    def completion(self) -> int:
        """Tokens of the longest completion that there can be."""
        every = np.concatenate([self.pairs, self.held_out])
        return max(int(every["chosen"].max()), int(every["rejected"].max()), self.sample)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion that is scored, sampled or trained."""
        given = np.concatenate([self.pairs, self.held_out])["longer"].max()
        sampled = (self.pairs.prompt + self.limits).max() if self.sample else 0
        return int(max(given, sampled))

    @property
    def scored_tokens(self) -> int:
        """Tokens of a scoring pass, as `budget.scoring_budget` plans it."""
        each = budget.scoring_bytes_per_token(self.model.hidden, self.model.whole)
        longest = self.cfg.sequence_len
        return budget.tokens_per_pass(self.memory, each, longest, budget.SCORED_ON_CPU)

    @property
    def sampled_tokens(self) -> int:
        """Tokens of prompts and samples in a batch of `sampling.transformers`."""
        each, longest = 4 * self.model.cache, self.cfg.sequence_len
        return budget.tokens_per_pass(self.memory, each, longest, budget.SAMPLED_ON_CPU)

    @cached_property
    def phases(self) -> list[Phase]:
        """The device's memory from iteration 2 on, when there is optimizer state."""
        overhead = DEVICE_OVERHEAD if self.memory is not None else 0
        other = {"other": overhead + self.model.copies}
        resident = {"weights": self.model.resident, "optimizer": self.states}
        found = [Phase("score", resident | self.scoring() | other)]
        if self.sample and self.sampler == "transformers":
            found.append(Phase("sample", resident | self.sampling() | other))
        elif self.sample and self.sampler == "vllm" and self.memory is not None:
            found.append(self._engine(self.memory, resident))
        gradients = {"gradients": self.model.trained_bytes}
        found.append(Phase("train", resident | gradients | self.training() | other))
        if self.memory is not None and self.optimizer in FOREACH:
            copies = {"other": overhead + self.model.trained_bytes}
            found.append(Phase("update", resident | gradients | copies, "torch's foreach copies"))
        return found

    @cached_property
    def failing(self) -> list[str]:
        """The phases that do not fit."""
        return [phase.name for phase in self.phases if not phase.fits(self.memory)]

    @property
    def excess(self) -> tuple[int, int]:
        """How many phases do not fit, and by how many bytes together."""
        over = [phase.total for phase in self.phases if phase.name in self.failing]
        return len(over), sum(max(0, total - (self.memory or 0)) for total in over)

    def training(self) -> dict[str, int]:
        """What a micro-batch of the longest pairs keeps for its backward pass, and its logits.

        The first layer of the backward pass has gradients in work, of its output and two of what is
        between (one where nothing is gated), when the logits are gone. With checkpointing the
        inputs of layers stay, and one layer is computed again at a time. Offloading moves what
        stays to host memory.

        Source of the logits: `forward.completion_logps`. All are kept as their log-softmax in
        float32, or those of one chunk at a time; behind it come the gradients of the loss and of
        the logits. Of a model that makes whole logits they are there from the shortest prompt's
        end on, twice in float32 and with two gradients at once; a cap keeps them as computed.
        """
        model, (layers, inputs), sequences = self.model, self._kept, 2 * self.cfg.micro_batch_size
        elements = sequences * self.completion * model.vocabulary
        chunk = min(elements, LOGITS)
        logits = 4 * (elements if elements <= KEPT_LOGITS else chunk) + 8 * chunk
        if model.whole:
            places = sequences * (self.longest - int(self.pairs.prompt.min()))
            logits = (12 + model.width) * places * model.whole
        one = layers / model.layers
        between = (2 if model.gated else 1) * model.intermediate
        working = sequences * self.longest * model.width * (model.hidden + between) - logits
        if self.cfg.activation_offloading:
            kept = 2 * one
        elif self.cfg.gradient_checkpointing:
            kept = inputs + max(0.0, one + working)
        else:
            kept = layers + max(0, working)
        return {"activations": round(kept), "logits": logits}

    @property
    def _kept(self) -> tuple[float, int]:
        """Bytes that a micro-batch's layers keep for their backward pass, and of their inputs."""
        model, tokens = self.model, 2 * self.cfg.micro_batch_size * self.longest
        each, square = model.kept
        layers = tokens * (each + square * self.longest)
        return layers, tokens * model.layers * model.hidden_width * model.hidden

    def _passing(self, tokens: int) -> int:
        """Activations of a pass without gradients: hidden states, and one layer at its widest.

        That is a norm in float32 (three of h), attention (queries, repeated keys and values,
        output) or the feed-forward part (three of i where it is gated).
        """
        model = self.model
        h, w = model.hidden, model.width
        inner = (3 if model.gated else 2) * model.intermediate
        return tokens * (w * h + max(12 * h, w * (h + 4 * model.queries), w * (h + inner)))

    def scoring(self) -> dict[str, int]:
        """A scoring pass; `budget.scoring_bytes_per_token` has what whole logits take."""
        # In float32, and their log-softmax; before that as they were computed.
        each = 8 if self.model.width == 4 else 8 + self.model.width
        logits = min(self.scored_tokens * self.model.vocabulary, LOGITS) * each
        logits += 8 * self.scored_tokens * self.model.whole
        return {"activations": self._passing(self.scored_tokens), "logits": logits}

    def sampling(self) -> dict[str, int]:
        """A batch of prompts with all their candidates in `sampling.transformers`, at full length.

        The cache grows by a copy of one layer's keys or values at a time, and what computing the
        prompts took is gone by then. Sampling by top_p sorts the logits: their values, places,
        probabilities and sums take 32 bytes each.
        """
        candidates, each = self.method.config.candidates, self.model.width * self.model.cache
        tokens = max(self.sampled_tokens, candidates * self.longest)
        lines = max(candidates, tokens // (int(self.pairs.prompt.min()) + self.sample))
        prompts = max(0, tokens - lines * self.sample)
        later = (tokens - prompts) * each
        return {
            "activations": max(self._passing(lines), self._passing(prompts) - later),
            "logits": 32 * lines * self.model.vocabulary,
            "cache": tokens * each + tokens * each // (2 * self.model.layers),
        }

    def _engine(self, memory: int, resident: dict[str, int]) -> Phase:
        """vLLM beside the training run or in its place, as `offload.make_room` decides."""
        utilization = (self.cfg.vllm or {}).get("gpu_memory_utilization")
        devices = (self.cfg.vllm or {}).get("tensor_parallel_size") or 1
        weights = self.model.parameters * self.model.width // devices
        lines = budget.ENGINE_SEQUENCES * self.longest
        cache = lines * self.model.width * self.model.cache // devices
        room = memory - DEVICE_OVERHEAD
        wanted, given = weights + cache + ENGINE_OVERHEAD, room - ENGINE_SLACK
        if utilization is not None:
            wanted = given = int(utilization * memory)
        waiting = sum(resident.values())
        beside = room - waiting >= wanted + ENGINE_SLACK
        note = "beside the training run" if beside else "weights and optimizer wait in host memory"
        if self.bits and weights + ENGINE_OVERHEAD > given:
            weights = self.model.weights // devices
            note += "; only with a vLLM that serves 4 bits (bitsandbytes)"
        needed = weights + ENGINE_OVERHEAD
        possible = needed <= given and (utilization is None or wanted <= room)
        if not possible:
            note += f"; it needs {needed / GIB:.1f} GiB and would get {min(given, room) / GIB:.1f}"
        taken = wanted if beside or utilization is not None else needed
        parts = {"engine": taken + ENGINE_SLACK, "other": DEVICE_OVERHEAD}
        held, waiting = (resident, 0) if beside else ({}, waiting)
        return Phase("sample", held | parts, note, possible, waiting)

    def host_parts(self) -> dict[str, int]:
        """Host memory that a run takes beside the program itself."""
        # Most policies at once, as `PolicyHistory` keeps and `Loop` forgets them: theta_{t-1}
        # comes in before iteration t - 1's last is forgotten.
        iterations = range(1, self.method.iterations + 1)
        held = (t - min(max(t - 2, 0), self.method.oldest_policy(t)) for t in iterations)
        offloaded = self._kept[0 if self.model.adapter else 1]
        parts = {
            "policies": max(1, *held) * self.model.trained_bytes,
            "dataset": 4 * int((self.pairs.prompt + self.pairs.completions).sum()),
            "while vLLM samples": max(phase.waiting for phase in self.phases),
            "offloaded activations": round(offloaded) * bool(self.cfg.activation_offloading),
        }
        return {name: size for name, size in parts.items() if size}
