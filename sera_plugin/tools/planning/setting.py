"""What of a configuration memory depends on, and the bytes that stay: weights, states, policies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sera_plugin.tools.planning.shape import Shape, Weight


@dataclass(frozen=True)
class Setting:
    """A configuration, as far as memory depends on it.

    Attributes:
        width: bytes per element that passes compute in: 2 or 4.
        bits: 4 or 8 where the base is quantised, else None.
        double_quantised: whether the scales of 4-bit blocks are quantised again.
        wide_norms: whether the host keeps norms and embeddings in float32.
        optimizer: as the YAML names it.
        micro_batch: pairs.
        accumulation: micro-batches per step.
        checkpointing: `gradient_checkpointing`.
        offloading: `activation_offloading`.
        eager: whether attention keeps a matrix of token by token.
        dropout: bytes per element of the mask of the adapter's dropout, 0 without any.
        longest: tokens of the longest prompt and completion that is scored, sampled or trained.
        completion: tokens of the longest completion.
        prompt: tokens of the shortest prompt.
        sample: tokens of the longest sample, 0 where nothing is sampled.
        candidates: samples per prompt.
        sequence_len: of the host; 0 if unset.
        sampler: transformers, vllm or vllm-server.
        utilization: `vllm.gpu_memory_utilization`, None if unset.
        engines: devices of one engine (`vllm.tensor_parallel_size`).
    """

    width: int
    bits: int | None
    double_quantised: bool
    wide_norms: bool
    optimizer: str
    micro_batch: int
    accumulation: int
    checkpointing: bool
    offloading: bool
    eager: bool
    dropout: int
    longest: int
    completion: int
    prompt: int
    sample: int
    candidates: int
    sequence_len: int
    sampler: str
    utilization: float | None = None
    engines: int = 1


def element_bytes(weight: Weight, setting: Setting) -> int:
    """Bytes per element of a weight that is not quantised.

    Source: `ModelLoader._configure_embedding_dtypes` of axolotl 0.19. It keeps norms and embeddings
    in float32 for full fine-tuning with SDPA or eager attention; takes them back to 16 bits for
    adapters and flash attention; and PEFT casts whatever else a quantised base has to float32.
    """
    if weight.role != "plain":
        return 4 if setting.wide_norms else setting.width
    return 4 if setting.bits else setting.width


def quantised_bytes(weight: Weight, setting: Setting) -> int:
    """A linear layer's weight in 8 or 4 bits, with its scales.

    Source: bitsandbytes 0.50. 8 bits: a float32 scale per row (Dettmers et al. 2022, "LLM.int8()").
    4 bits: a float32 scale per 64 weights and a table of 16; with double quantisation 8 bits per
    scale, a float32 per 256 of those, a table of 256 and their mean (Dettmers et al. 2023, "QLoRA",
    section 3).
    """
    if setting.bits == 8:
        return weight.elements + 4 * weight.shape[0]
    blocks = math.ceil(weight.elements / 64)
    again = blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4
    return (
        math.ceil(weight.elements / 2)
        + 4 * 16
        + (again if setting.double_quantised else 4 * blocks)
    )


def weight_bytes(shape: Shape, setting: Setting) -> int:
    """The base model as it lies on the device."""
    return sum(
        quantised_bytes(weight, setting)
        if weight.kind == "linear" and setting.bits
        else weight.elements * element_bytes(weight, setting)
        for weight in shape.weights
    )


def adapter_bytes(shape: Shape) -> int:
    """What the adapter adds, as PEFT keeps it."""
    return sum(math.prod(size) * width for size, width in shape.adapter)


def trained(shape: Shape, setting: Setting) -> list[tuple[int, int, bool]]:
    """(elements, bytes per element, whether a table of embeddings) of each weight in training."""
    if shape.adapter:
        return [(math.prod(size), width, False) for size, width in shape.adapter]
    return [
        (weight.elements, element_bytes(weight, setting), weight.kind == "table")
        for weight in shape.weights
    ]


def trained_bytes(shape: Shape, setting: Setting) -> int:
    """What training changes, in its own types: gradients and a snapshot are as large."""
    return sum(elements * width for elements, width, _ in trained(shape, setting))


def copied_bytes(shape: Shape, setting: Setting) -> int:
    """Copies of weights in the type that passes compute in, while they are made.

    Autocast keeps one of each matrix that is in float32, the adapter's or the output layer;
    bitsandbytes makes one of a quantised layer at a time.
    """
    if setting.width == 4:
        return 0
    kept = setting.width * shape.adapter_parameters
    if not shape.adapter and setting.wide_norms:
        kept = setting.width * shape.vocabulary * shape.hidden
    largest = max(layer.inputs * layer.outputs for layer in shape.linears)
    return kept + (setting.width * largest if setting.bits else 0)


def snapshots(oldest: list[int]) -> int:
    """Most policies in host memory at once, as `PolicyHistory` keeps and `Loop` forgets them.

    Args:
        oldest: `Method.oldest_policy` of iterations 1, 2, ..., T.
    """
    held = 1
    for t, policy in enumerate(oldest, start=1):
        # Theta_{t-1} comes in before iteration t - 1's last is forgotten.
        held = max(held, t - min(max(t - 2, 0), policy))
    return held
