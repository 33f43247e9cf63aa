"""What a run keeps on its device, and how much is sampled in process at a time, by arithmetic.

Told by the model, the optimizer's name and the device's whole memory, never by what is free or
there at a time: a continued run, whose optimizer is still empty, samples in the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sera_plugin.model.budget import GIB
from sera_plugin.model.forward import innermost
from sera_plugin.model.parts import elements, trainable, whole_shape

#: A GPU's context, its kernels' workspaces, what lies between blocks. Assumed, not measured.
DEVICE_OVERHEAD = GIB

#: States per weight by the optimizer's name in the YAML: in the type of the weight (torch keeps
#: `zeros_like` it), in float32, or in 8 bits (bitsandbytes).
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), (2, "like")),
    **dict.fromkeys(("adagrad", "rmsprop"), (1, "like")),
    "sgd": (0, "like"),
    "paged_adamw_32bit": (2, "wide"),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), (1, "wide")),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), (2, "blocks")),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), (1, "blocks")),
}

#: What configurations call the number of their experts.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

#: Of what is free, sampling leaves an eighth: a cache that grows by a token at a time leaves blocks
#: behind that nothing else fits into, and a batch is padded to its longest prompt. Assumed, not
#: measured; where it is too little, `TokenBudget` goes on with half.
_LEFT = 8
#: Tokens of a batch on a GPU at most: one layer's keys, repeated for 8,192 wide queries, have 2^31
#: elements then, and some kernels count no further. On a CPU more are no faster.
_MOST, SAMPLED_ON_CPU = 2**18, 16_384
#: Bytes per element of the vocabulary that `generate` of transformers 5.16 has at once, when top_p
#: sorts: the logits in 16 bits, in float32, over the temperature (10), sorted and their places
#: (12), and what torch's sort takes for itself, which is assumed to be two more of each key and
#: place (24) and rounded up.
STEP_BYTES = 48


def optimizer_name(cfg: Mapping[str, Any]) -> str:
    """The optimizer as the YAML names it, from the host's configuration."""
    named = cfg.get("optimizer")
    return str(getattr(named, "value", named))


def state_bytes(optimizer: str, weights: Sequence[tuple[int, int, bool]]) -> int:
    """State of weights that are trained, each (elements, bytes per element, whether a table).

    Of an optimizer that is not known as of AdamW in float32.

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


def cache_bytes_per_token(model: Any, element_size: int) -> int:
    """Keys and values of one token in all layers (Kwon et al. 2023, 3).

    Of a model without attention, whose state is as large for any length: as if it had one head.
    """
    text = model.config.get_text_config()
    queries = getattr(text, "num_attention_heads", 1)
    heads = getattr(text, "num_key_value_heads", None) or queries
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    return int(2 * text.num_hidden_layers * heads * size * element_size)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a token takes in a pass, and in the cache, of a causal language model."""

    width: int  # bytes per element in passes
    hidden_width: int  # the same between layers
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    queries: int  # width of all query heads together
    cache: int  # elements of one token's keys and values in all layers
    gated: bool  # whether the feed-forward part multiplies two projections (SwiGLU)

    @classmethod
    def of(cls, model: Any, width: int) -> Shape:
        """Of a model of transformers, PEFT's adapter around it or not."""
        text, table = model.config.get_text_config(), model.get_input_embeddings()
        heads = int(getattr(text, "num_attention_heads", 1))
        head_width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        return cls(
            width=width,
            hidden_width=table.weight.element_size(),
            layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            intermediate=int(inner if isinstance(inner, int) else max(inner)),
            vocabulary=whole_shape(table.weight)[0],
            queries=heads * head_width,
            cache=cache_bytes_per_token(model, 1),
            gated=any(getattr(text, name, 0) for name in EXPERTS)
            or any("gate" in name for name, _ in model.named_modules()),
        )

    def passing(self, tokens: int) -> int:
        """Activations of a pass without gradients: hidden states, and one layer at its widest.

        That is a norm in float32 (three of h), attention (queries, repeated keys and values,
        output) or the feed-forward part (three of i where it is gated).
        """
        h, w = self.hidden, self.width
        inner = (3 if self.gated else 2) * self.intermediate
        return tokens * (w * h + max(12 * h, w * (h + 4 * self.queries), w * (h + inner)))

    @property
    def cached(self) -> int:
        """Bytes of a token's keys and values in all layers.

        In the type that is between layers: rotary embeddings have it, and keys are multiplied with
        them; transformers' cache then keeps values in the type of keys.
        """
        return max(self.width, self.hidden_width) * self.cache

    @property
    def held(self) -> int:
        """Bytes that a token in the cache takes in a step: of one layer a copy of the keys, as the
        cache grows, and keys and values repeated for all query heads."""
        each = max(self.width, self.hidden_width)
        return self.cached + self.cached // (2 * self.layers) + 2 * each * self.queries


@dataclass(frozen=True)
class SampledBatches:
    """How large batches are, in tokens of the cache or what takes as much memory as these."""

    tokens: int  # of a batch
    prompt: float = 1.0  # of a prompt's token, while prompts are computed and nothing else is there
    step: int = 0  # of a sequence, whatever its length: what a step makes of its logits

    def size(self, prompt: int, limit: int) -> int:
        """Of one sequence: tokens of its prompt, and the most that are sampled."""
        return max(prompt + limit, math.ceil(self.prompt * prompt)) + self.step


def plan_sampling(memory: int | None, resident: int, shape: Shape, longest: int) -> SampledBatches:
    """Batches for `sampling.transformers`, of at least the longest sequence there can be.

    `memory` is the GPU's in bytes, of which the run keeps `resident`; None without a GPU. Only the
    first three or four binary digits are kept, because a driver may give a little more or less.
    """
    if memory is None:
        return SampledBatches(max(longest, SAMPLED_ON_CPU))
    room = max(0, memory - DEVICE_OVERHEAD - resident)
    tokens = min(_MOST, (room - room // _LEFT) // shape.held)
    unit = 1 << max(0, tokens.bit_length() - 4)
    prompt = (shape.cached + shape.passing(1)) / shape.held
    step = math.ceil((STEP_BYTES * shape.vocabulary + shape.passing(1)) / shape.held)
    return SampledBatches(max(longest, tokens // unit * unit), prompt, step)


def sampled_batches(
    model: Any, device: torch.device, width: int, longest: int, optimizer: str | None = None
) -> SampledBatches:
    """`plan_sampling` of a model on its device, for passes of `width` bytes per element.

    `optimizer` is its name in the YAML, None where nothing is trained.
    """
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    resident = resident_bytes(model, width, optimizer)
    return plan_sampling(memory, resident, Shape.of(model, width), longest)


def element_size(model: Any, device: torch.device) -> int:
    """Bytes per element in passes, in the autocast that is on or without one."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type).itemsize
    return int(innermost(model).dtype.itemsize)


def resident_bytes(model: nn.Module, width: int, optimizer: str | None) -> int:
    """Weights as they lie there, gradients (DDP keeps their size in buckets) and optimizer state.

    And weights in the type that passes compute in: autocast keeps a copy of each float32 matrix
    that is trained, bitsandbytes makes one of a quantised layer at a time. Of sharded weights this
    process's part is trained, but passes may leave the whole ones.
    """
    trained = trainable(model) if optimizer else {}
    tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    parts = [(elements(one), one.element_size(), id(one) in tables) for one in trained.values()]
    linear = [one for one in model.modules() if isinstance(one, nn.Linear)]
    wide = {id(one.weight): one.weight for one in linear if one.weight.element_size() > width}
    return (
        _stored([*model.parameters(), *statistics_of(model)])
        + sum(count * size for count, size, _ in parts)
        + (state_bytes(optimizer, parts) if optimizer else 0)
        + width * sum(one.numel() for one in wide.values() if one.requires_grad)
        + width * max((n.in_features * n.out_features for n in linear if _quantised(n)), default=0)
    )


def statistics_of(model: nn.Module) -> list[Tensor]:
    """What bitsandbytes 0.50 keeps beside quantised weights, as attributes that are no buffers.

    4 bits: `Params4bit.quant_state`, whose scales may be quantised again. 8 bits: the weight and
    its scales once more, in `Int8Params` before a layer's first pass and in `Linear8bitLt.state`
    after it; the weight there shares the parameter's storage.
    """
    holders: list[Any] = [weight for weight in model.parameters() if hasattr(weight, "SCB")]
    holders += [module.state for module in model.modules() if hasattr(module, "init_8bit_state")]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        while state is not None:
            holders.append(state)
            state = getattr(state, "state2", None)
    values = [value for holder in holders for value in vars(holder).values()]
    return [value for value in values if isinstance(value, Tensor)]


def _quantised(linear: nn.Module) -> bool:
    return hasattr(linear.weight, "quant_state") or hasattr(linear, "init_8bit_state")


def _stored(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, those that share a storage once, sharded ones whole."""
    found: dict[int, int] = {}
    for one in tensors:
        if isinstance(one, DTensor) or whole_shape(one) != one.shape:
            found[id(one)] = whole_shape(one).numel() * one.element_size()
        else:
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
