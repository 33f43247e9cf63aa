"""A configuration with its model and its data: bytes on the device and in host memory, by phase.

The parts are those of Rajbhandari et al. 2020, "ZeRO", section 3: weights, gradients, optimizer
states, activations, and what else there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from axolotl.utils.dict import DictDefault

from sera_plugin.algorithm.method import Method, Schedule
from sera_plugin.labeling.judging.reward_model import BYTES_PER_TOKEN
from sera_plugin.model import budget
from sera_plugin.model.budget import ENGINE_OVERHEAD, ENGINE_SLACK, GIB
from sera_plugin.model.forward import KEPT_LOGITS, LOGITS
from sera_plugin.model.memory import (
    DEVICE_OVERHEAD,
    STEP_BYTES,
    SampledBatches,
    optimizer_name,
    plan_sampling,
    state_bytes,
)
from sera_plugin.tools.planning.model import FOREACH, Model
from sera_plugin.tools.planning.placement import Placement


@dataclass(frozen=True)
class Phase:
    """What one phase takes of the device."""

    name: str  # score, sample, rank, train or update, the optimizer's step
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
    """What is planned: memory of one process, work of all."""

    cfg: DictDefault  # the host's, resolved
    model: Model
    method: Method
    pairs: Any  # `lengths` of the data, and of what is held out of it, which may be nothing
    held_out: Any
    sampler: str  # transformers, vllm or vllm-server
    memory: int | None  # of the GPU in bytes; None on a CPU, where host memory takes its place
    describe: Callable[[Mapping[str, Any]], Model]  # the model of a changed configuration
    processes: int = 1  # each with a device of its own
    sampled: float | None = None  # mean tokens of a sample where that was measured
    #: (M,) tokens of the prompts that are sampled and have no pair.
    more_prompts: Any = field(default_factory=lambda: np.empty(0, dtype=np.int64))

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
            more_prompts=self.more_prompts[self.more_prompts < cfg.sequence_len],
        )

    @property
    def placement(self) -> Placement:
        return Placement.of(self.cfg, self.processes)

    @property
    def judges(self) -> bool:
        """Whether the end of training compares the policies; see `Keeping.judges`."""
        return self.method.config.keep == "best" and len(self.held_out) > 0

    @property
    def bits(self) -> int | None:
        return 4 if self.cfg.load_in_4bit else 8 if self.cfg.load_in_8bit else None

    @property
    def optimizer(self) -> str:
        return optimizer_name(self.cfg)

    @cached_property
    def schedule(self) -> Schedule:
        together = self.cfg.micro_batch_size * self.processes
        return Schedule(self.method.sizes, together, self.cfg.gradient_accumulation_steps)

    @property
    def prompts(self) -> npt.NDArray[np.int64]:
        """(N + M,) tokens of each prompt that is sampled."""
        return np.concatenate([self.pairs.prompt, self.more_prompts])

    @property
    def limits(self) -> npt.NDArray[np.int64]:
        """(N + M,) most tokens of a sample for each prompt, see `client.room`."""
        room = self.cfg.sequence_len - self.prompts
        return np.minimum(self.method.config.max_new_tokens, room)

    @property
    def expected(self) -> npt.NDArray[np.float64]:
        """(N + M,) tokens expected of a sample: as measured, else as long as chosen answers are."""
        mean = self.pairs.chosen.mean() if self.sampled is None else self.sampled
        return np.minimum(mean, self.limits)

    @cached_property
    def states(self) -> int:
        """Bytes of the optimizer's state, of all processes together."""
        return state_bytes(self.optimizer, self.placement.stepped(self.model))

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
        sampled = (self.prompts + self.limits).max() if self.sample else 0
        return int(max(given, sampled))

    @property
    def scored_tokens(self) -> int:
        """Tokens of a scoring pass, as `budget.scoring_budget` plans it."""
        each = budget.scoring_bytes_per_token(self.model.hidden, self.model.whole)
        longest = self.cfg.sequence_len
        return budget.tokens_per_pass(self.memory, each, longest, budget.SCORED_ON_CPU)

    @property
    def batches(self) -> SampledBatches:
        """Prompts and samples of a batch of `sampling.transformers`."""
        model = self.model
        resident = self.placement.in_sampling(model, self.states) + model.copies
        return plan_sampling(self.memory, resident, model, self.cfg.sequence_len)

    @cached_property
    def phases(self) -> list[Phase]:
        """The device's memory from iteration 2 on, when there is optimizer state."""
        overhead = DEVICE_OVERHEAD if self.memory is not None else 0
        other = {"other": overhead + self.model.copies}
        resident = self.placement.resident(self.model, self.states)
        found = []
        if self.bits and self.placement.stage == 3:
            # `from_pretrained` of transformers 5.16 has no `zero.Init` for them.
            parts = {"weights": self.model.resident, "other": overhead}
            found.append(Phase("load", parts, "weights are whole until DeepSpeed has them"))
        found.append(Phase("score", resident | self.scoring() | other))
        if self.sample and self.sampler == "transformers":
            found.append(Phase("sample", resident | self.sampling() | other, self._filled()))
        elif self.sample and self.sampler == "vllm" and self.memory is not None:
            found.append(self._engine(self.memory, resident))
        if self.sample and self.judge and self.memory is not None:
            found.append(self._ranking(self.memory, resident))
        gradients = {"gradients": self.placement.gradients(self.model)}
        found.append(Phase("train", resident | gradients | self.training() | other))
        if self.memory is not None and self.optimizer in FOREACH:
            copies = {"other": overhead + self.placement.gradients(self.model)}
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
        if whole := model.vocabulary if self.cfg.torch_compile else model.whole:
            places = sequences * (self.longest - int(self.prompts.min()))
            logits = (12 + model.width) * places * whole
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

    def scoring(self) -> dict[str, int]:
        """A scoring pass; `budget.scoring_bytes_per_token` has what whole logits take."""
        # In float32, and their log-softmax; before that as they were computed.
        each = 8 if self.model.width == 4 else 8 + self.model.width
        logits = min(self.scored_tokens * self.model.vocabulary, LOGITS) * each
        logits += 8 * self.scored_tokens * self.model.whole
        return {"activations": self.model.passing(self.scored_tokens), "logits": logits}

    def sampling(self) -> dict[str, int]:
        """A batch of `sampling.transformers` at full length: of the shortest prompts or the
        longest, whichever takes more."""
        limit, prompts = self.method.config.max_new_tokens, self.prompts
        found = (self._batch(int(prompt), limit) for prompt in (prompts.min(), prompts.max()))
        return max(found, key=lambda parts: sum(parts.values()))

    def _batch(self, prompt: int, limit: int) -> dict[str, int]:
        """Prompts of such a length with all their candidates.

        What computing the prompts took is gone when the cache has grown, see `Shape.held`.
        """
        model, batches, candidates = self.model, self.batches, self.method.config.candidates
        together = batches.tokens // (candidates * batches.size(prompt, limit))
        lines = candidates * max(1, together)
        later = lines * limit * model.cached
        return {
            "activations": max(model.passing(lines), model.passing(lines * prompt) - later),
            "logits": STEP_BYTES * lines * model.vocabulary,
            "cache": lines * (prompt + limit) * model.held,
        }

    def _filled(self) -> str:
        """What to know about batches that are sampled on a GPU."""
        if self.memory is None:
            return ""
        config = self.method.config
        longest = self.batches.size(int(self.prompts.max()), config.max_new_tokens)
        each = longest * config.candidates
        prompts = max(1, self.batches.tokens // each)
        return f"as many prompts at a time as the GPU holds: {prompts:,} of the longest"

    @cached_property
    def judge(self) -> int:
        """Bytes of a reward model's weights on the disk, 0 where none ranks."""
        directory = self.method.config.reward_model
        files = Path(directory).glob("*.safetensors") if directory else ()
        return sum(file.stat().st_size for file in files)

    def _ranking(self, memory: int, resident: dict[str, int]) -> Phase:
        """A reward model beside the training run or in its place, see `offload.waiting`."""
        tokens = budget.tokens_per_pass(memory, BYTES_PER_TOKEN, self.longest, 0)
        parts = {"judge": self.judge, "activations": tokens * BYTES_PER_TOKEN}
        parts["other"] = DEVICE_OVERHEAD
        held, waiting, note = self._beside(memory, resident, sum(parts.values()) - DEVICE_OVERHEAD)
        return Phase("rank", held | parts, note, waiting=waiting)

    def _beside(
        self, memory: int, resident: dict[str, int], wanted: int
    ) -> tuple[dict[str, int], int, str]:
        """What stays on the device, bytes that wait in host memory, and how to say so."""
        if self.placement.stage == 3:
            return resident, 0, "beside the training run, whose parts of weights stay"
        if memory - DEVICE_OVERHEAD - sum(resident.values()) >= wanted + ENGINE_SLACK:
            return resident, 0, "beside the training run"
        return {}, sum(resident.values()), "weights and optimizer wait in host memory"

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
        held, waiting, note = self._beside(memory, resident, wanted)
        if self.bits and weights + ENGINE_OVERHEAD > given:
            weights = self.model.weights // devices
            note += "; only with a vLLM that serves 4 bits (bitsandbytes)"
        needed = weights + ENGINE_OVERHEAD
        possible = needed <= given and (utilization is None or wanted <= room)
        if not possible:
            note += f"; it needs {needed / GIB:.1f} GiB and would get {min(given, room) / GIB:.1f}"
        # All of the cache is wanted beside a run, unless that could not make room for it.
        beside = held and self.placement.stage < 3
        taken = wanted if beside or utilization is not None else needed
        parts = {"engine": taken + ENGINE_SLACK, "other": DEVICE_OVERHEAD}
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
            "dataset": 4 * int(self.prompts.sum() + self.pairs.completions.sum()),
            "reward model": self.judge,
            "waiting for the GPU": max(phase.waiting for phase in self.phases),
            **self.placement.host_parts(self.model, self.states),
            "offloaded activations": round(offloaded) * bool(self.cfg.activation_offloading),
        }
        # Before there is anything of the others.
        loading = {"models while they are loaded": self.placement.loading * self.model.weights}
        parts = max(loading, parts, key=lambda each: sum(each.values()))
        return {name: size for name, size in parts.items() if size}
