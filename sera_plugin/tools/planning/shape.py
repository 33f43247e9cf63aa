"""A model as sizes: what its config.json and its adapter say, without a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

#: How the host stores a weight: norms and embeddings have rules of their own.
Role = Literal["norm", "embedding", "plain"]
Kind = Literal["linear", "table", "other"]
Source = Literal["normed", "attention", "activated"]


@dataclass(frozen=True)
class Weight:
    """One weight of the base model.

    Attributes:
        name: as the model calls it.
        shape: rows by columns, or one dimension.
        role: decides the type that the host stores it in.
        kind: a linear layer's matrix (what 4- and 8-bit loading quantises), a table of embeddings,
            or anything else, the output layer among it.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    kind: Kind

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Linear:
    """A linear layer inside the model's layers.

    Attributes:
        block: the module it is in.
        source: what it takes: a normed hidden state, which it shares with others of its block; the
            output of attention; or what the feed-forward part has made (`activated`).
        inputs, outputs: features.
        adapted: whether the adapter has a part there.
    """

    block: str
    source: Source
    inputs: int
    outputs: int
    adapted: bool = False


@dataclass(frozen=True)
class Shape:
    """What memory and time of a causal language model depend on.

    Attributes:
        kind: `model_type` of its config.json.
        weights: of the base model, shared ones once.
        linears: the linear layers but for the output layer.
        adapter: shape and bytes per element of each weight that the adapter adds, empty without.
        layers, hidden, intermediate, vocabulary: sizes.
        heads, kv_heads, head: attention heads, those with keys and values, and their width.
        gated: whether the feed-forward part multiplies two projections (SwiGLU).
        expert_elements: weights in experts (mixtures), 0 without any.
        expert_share: the part of the experts that a token passes through.
    """

    kind: str
    weights: tuple[Weight, ...]
    linears: tuple[Linear, ...]
    adapter: tuple[tuple[tuple[int, ...], int], ...]
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head: int
    gated: bool
    expert_elements: int = 0
    expert_share: float = 0.0

    @property
    def parameters(self) -> int:
        """Of the base model."""
        return sum(weight.elements for weight in self.weights)

    @property
    def adapter_parameters(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.adapter)

    @property
    def matrix_elements(self) -> int:
        """Weights of the layers that each token is multiplied with, the output layer left out."""
        linear = sum(layer.inputs * layer.outputs for layer in self.linears)
        return linear + round(self.expert_elements * self.expert_share)

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head

    @property
    def normed(self) -> tuple[int, int]:
        """Features of one token that norms take in all layers; those of norms without a bias."""
        names = {weight.name for weight in self.weights}
        every = scaled = 0
        for weight in self.weights:
            if weight.role != "norm" or not weight.name.endswith(".weight"):
                continue
            # Norms of queries and keys are as wide as a head.
            heads = {"q_norm": self.heads, "k_norm": self.kv_heads}
            width = weight.elements * heads.get(weight.name.split(".")[-2], 1)
            every += width
            if weight.name.removesuffix("weight") + "bias" not in names:
                scaled += width
        return every, scaled

    def with_lora(self, rank: int) -> Shape:
        """The same with a LoRA of this rank in float32 on all linear layers.

        Source: Hu et al. 2021, "LoRA", section 4.1: A is (rank, inputs), B is (outputs, rank).
        """
        adapter: list[tuple[tuple[int, ...], int]] = []
        for layer in self.linears:
            adapter += [((rank, layer.inputs), 4), ((layer.outputs, rank), 4)]
        linears = tuple(replace(layer, adapted=True) for layer in self.linears)
        return replace(self, adapter=tuple(adapter), linears=linears)
