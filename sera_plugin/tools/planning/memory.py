"""Bytes on the device and in host memory, phase by phase.

The parts are those of Rajbhandari et al. 2020, "ZeRO", section 3: weights, gradients, optimizer
states, activations, and what else there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sera_plugin.model.budget import (
    ENGINE_OVERHEAD,
    ENGINE_SEQUENCES,
    ENGINE_SLACK,
    GIB,
    KEPT_LOGITS,
    LOGITS,
)
from sera_plugin.tools.planning.run import FOREACH, Run

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

    def fits(self, memory: int | None) -> bool:
        return memory is None or (self.possible and self.total <= memory)


def device_phases(run: Run) -> list[Phase]:
    """The phases of a run from iteration 2 on, when there is optimizer state."""
    overhead = DEVICE_OVERHEAD if run.memory is not None else 0
    other = {"other": overhead + run.model.copies}
    resident = {"weights": run.model.resident, "optimizer": run.states}
    found = [Phase("score", resident | scoring(run) | other)]
    if run.sample and run.sampler == "transformers":
        found.append(Phase("sample", resident | sampling(run) | other))
    elif run.sample and run.sampler == "vllm" and run.memory is not None:
        found.append(_engine(run, run.memory, resident))
    gradients = {"gradients": run.model.trained_bytes}
    kept, _ = training_activations(run)
    passes = {"activations": kept, "logits": training_logits(run)}
    found.append(Phase("train", resident | gradients | passes | other))
    if run.memory is not None and run.optimizer in FOREACH:
        copies = {"other": overhead + run.model.trained_bytes}
        found.append(Phase("update", resident | gradients | copies, "torch's foreach copies"))
    return found


def training_activations(run: Run) -> tuple[int, int]:
    """What a micro-batch of the longest pairs keeps for its backward pass: (device, host) bytes.

    The first layer of the backward pass has gradients in work, of its output and two of what is
    between (one where nothing is gated), when the logits are gone. With checkpointing the inputs of
    layers stay, and one layer is computed again at a time. Offloading moves what stays to host
    memory: with an adapter all activations, else the layers' inputs.
    """
    model, tokens = run.model, 2 * run.micro_batch * run.longest
    each, square = model.kept
    layers = tokens * (each + square * run.longest)
    one = layers / model.layers
    inputs = tokens * model.layers * model.hidden_width * model.hidden
    if run.cfg.get("activation_offloading"):
        return round(2 * one), round(layers if model.adapter else inputs)
    between = (2 if model.gated else 1) * model.intermediate
    working = tokens * model.width * (model.hidden + between) - training_logits(run)
    if run.checkpointing:
        return round(inputs + max(0.0, one + working)), 0
    return round(layers + max(0, working)), 0


def training_logits(run: Run) -> int:
    """Logits of a micro-batch while it is trained: what is kept, and one chunk in work.

    Source: `forward.completion_logps`. All are kept as their log-softmax in float32, or those of
    one chunk at a time; behind it come the gradients of the loss and of the logits.
    """
    elements = 2 * run.micro_batch * run.completion * run.model.vocabulary
    chunk = min(elements, LOGITS)
    return 4 * (elements if elements <= KEPT_LOGITS else chunk) + 8 * chunk


def _passing(run: Run, tokens: int) -> int:
    """Activations of a pass without gradients: hidden states, and one layer at its widest.

    That is a norm in float32 (three of h), attention (queries, repeated keys and values, output)
    or the feed-forward part (three of i where it is gated).
    """
    model = run.model
    h, w = model.hidden, model.width
    inner = (3 if model.gated else 2) * model.intermediate
    return tokens * (w * h + max(12 * h, w * (h + 4 * model.queries), w * (h + inner)))


def scoring(run: Run) -> dict[str, int]:
    """A scoring pass."""
    # In float32, and their log-softmax; before that as they were computed.
    each = 8 if run.model.width == 4 else 8 + run.model.width
    logits = min(run.scored_tokens * run.model.vocabulary, LOGITS) * each
    return {"activations": _passing(run, run.scored_tokens), "logits": logits}


def sampling(run: Run) -> dict[str, int]:
    """A batch of prompts with all their candidates in `sampling.transformers`, at full length.

    The cache grows by a copy of one layer's keys or values at a time, and what computing the
    prompts took is gone by then. Sampling by top_p sorts the logits: their values, places,
    probabilities and sums take 32 bytes each.
    """
    tokens = max(run.sampled_tokens, run.candidates * run.longest)
    shortest = int(run.counting.pairs.prompt.min())
    lines = max(run.candidates, tokens // (shortest + run.sample))
    prompts = max(0, tokens - lines * run.sample)
    cache = tokens * run.cache_bytes(run.model.width)
    later = (tokens - prompts) * run.cache_bytes(run.model.width)
    return {
        "activations": max(_passing(run, lines), _passing(run, prompts) - later),
        "logits": 32 * lines * run.model.vocabulary,
        "cache": cache + cache // (2 * run.model.layers),
    }


def _engine(run: Run, memory: int, resident: dict[str, int]) -> Phase:
    """vLLM beside the training run or in its place, as `offload.make_room` decides."""
    utilization = run.utilization
    devices = int((run.cfg.get("vllm") or {}).get("tensor_parallel_size") or 1)
    weights = run.model.parameters * run.model.width // devices
    cache = ENGINE_SEQUENCES * run.longest * run.cache_bytes(run.model.width) // devices
    room = memory - DEVICE_OVERHEAD
    wanted, given = weights + cache + ENGINE_OVERHEAD, room - ENGINE_SLACK
    if utilization is not None:
        wanted = given = int(utilization * memory)
    beside = room - sum(resident.values()) >= wanted + ENGINE_SLACK
    note = "beside the training run" if beside else "weights and optimizer wait in host memory"
    if run.bits and weights + ENGINE_OVERHEAD > given:
        weights = run.model.weights // devices
        note += "; only with a vLLM that serves 4 bits (bitsandbytes)"
    needed = weights + ENGINE_OVERHEAD
    taken = wanted if beside or utilization is not None else needed
    possible = needed <= given and (utilization is None or wanted <= room)
    if not possible:
        note += f"; it needs {needed / GIB:.1f} GiB and would get {min(given, room) / GIB:.1f}"
    parts = {"engine": taken + ENGINE_SLACK, "other": DEVICE_OVERHEAD}
    if beside:
        return Phase("sample", resident | parts, note, possible)
    return Phase("sample", parts, note, possible, waiting=sum(resident.values()))


def snapshots(oldest: Sequence[int]) -> int:
    """Most policies in host memory at once, as `PolicyHistory` keeps and `Loop` forgets them.

    Args:
        oldest: `Method.oldest_policy` of iterations 1, 2, ..., T.
    """
    # Theta_{t-1} comes in before iteration t - 1's last is forgotten.
    return max(1, *(t - min(max(t - 2, 0), policy) for t, policy in enumerate(oldest, start=1)))


def host_parts(run: Run, phases: Sequence[Phase]) -> dict[str, int]:
    """Host memory that a run takes beside the program itself."""
    counting = run.counting
    oldest = [counting.method.oldest_policy(t) for t in range(1, counting.last + 1)]
    parts = {
        "policies": snapshots(oldest) * run.model.trained_bytes,
        "dataset": 4 * int(counting.pairs.prompt.sum() + counting.pairs.completions.sum()),
        "while vLLM samples": max(phase.waiting for phase in phases),
        "offloaded activations": training_activations(run)[1],
    }
    return {name: size for name, size in parts.items() if size}
