"""A model's shape from its config.json: the model is built without storage, and counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from axolotl.loaders.adapter import load_adapter
from axolotl.loaders.utils import get_linear_embedding_layers, load_model_config
from axolotl.utils.dict import DictDefault
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from sera_plugin.config.quoting import quoted
from sera_plugin.sampling.choose import adapter_problem
from sera_plugin.tools.planning.shape import Kind, Linear, Role, Shape, Source, Weight

#: What configurations call the number of their experts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class EmptyModel:
    """A model without weights.

    Attributes:
        shape: its sizes.
        unserved: why vLLM would not serve it as it is trained, or None.
        other_layers: kinds of its layers whose activations are not modelled.
        quantised_already: how its checkpoint is quantised ("gptq"), or None.
    """

    shape: Shape
    unserved: str | None
    other_layers: tuple[str, ...]
    quantised_already: str | None


def read_model(cfg: DictDefault, tokenizer: Any) -> EmptyModel:
    """Build the model that a configuration names on the meta device, and its adapter, and count.

    Args:
        cfg: the host's resolved configuration.
        tokenizer: the host's; it may enlarge the vocabulary.

    Raises:
        ValueError: if the model is not a causal language model of transformers' own.
        OSError: if its config.json is not there.
    """
    config = load_model_config(cfg)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"base_model: {quoted(cfg.base_model, 200)} (model_type {config.model_type}) is not a "
            "causal language model that transformers has code for, and a plan runs no code that "
            "comes with a model. Train a few steps of it instead to see what it needs."
        ) from error
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows or (len(tokenizer) < rows and cfg.shrink_embeddings):
        multiple = 32 if cfg.resize_token_embeddings_to_32x else None
        model.resize_token_embeddings(
            len(tokenizer), pad_to_multiple_of=multiple, mean_resizing=False
        )
    text = model.config.get_text_config()
    if not hasattr(text, "num_attention_heads"):
        raise ValueError(
            f"base_model: {quoted(cfg.base_model, 200)} (model_type {config.model_type}) has no "
            "attention. A plan knows what layers of attention take, and nothing of others."
        )
    layers = _linear_layers(model)
    weights = _weights(model, set(layers), get_linear_embedding_layers(cfg.model_config_type))
    adapter, adapted, unserved = _adapter(model, cfg)
    if adapter and model.get_input_embeddings().num_embeddings != rows:
        unserved = "the adapter stands on a model whose vocabulary was resized after loading"
    number = next((int(getattr(text, name)) for name in _EXPERTS if getattr(text, name, 0)), 0)
    experts = sum(w.elements for w in weights if len(w.shape) == 3 and w.shape[0] == number)
    shape = Shape(
        kind=str(config.model_type),
        weights=weights,
        linears=tuple(
            Linear(block, _source(name, layers, int(text.hidden_size)), *sizes, name in adapted)
            for name, sizes in layers.items()
            for block in [name.rpartition(".")[0]]
        ),
        adapter=adapter,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        vocabulary=int(model.get_input_embeddings().num_embeddings),
        heads=int(text.num_attention_heads),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        head=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        gated=any("gate" in name for name in layers) or bool(experts),
        expert_elements=experts,
        expert_share=int(getattr(text, "num_experts_per_tok", None) or 1) / max(1, number),
    )
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    quantised = getattr(config, "quantization_config", None) or {}
    return EmptyModel(
        shape,
        unserved,
        tuple(sorted(kinds)),
        dict(quantised).get("quant_method") if quantised else None,
    )


def _linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear layer but the output layer, by name."""
    head = model.get_output_embeddings()
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def _source(name: str, layers: dict[str, tuple[int, int]], hidden: int) -> Source:
    """What a linear layer takes: the last that gives hidden states, what its block has made."""
    block = name.rpartition(".")[0]
    outputs = [
        other
        for other, sizes in layers.items()
        if other.rpartition(".")[0] == block and sizes[1] == hidden
    ]
    if not outputs or name != outputs[-1]:
        return "normed"
    return "attention" if "attn" in block or "attention" in block else "activated"


def _weights(model: Any, linear: set[str], embeddings: list[str]) -> tuple[Weight, ...]:
    """Every weight once, with the role that decides its type.

    The roles are those of `ModelLoader._convert_embedding_modules_dtype` in axolotl 0.19, which
    goes by names.
    """
    tables = {name for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
    found = []
    for name, weight in model.named_parameters():
        module, _, last = name.rpartition(".")
        role: Role = "plain"
        if "norm" in module:
            role = "norm"
        elif any(one in module for one in embeddings):
            role = "embedding"
        kind: Kind = "other"
        if last == "weight" and module in linear | tables:
            kind = "linear" if module in linear else "table"
        found.append(Weight(name, tuple(weight.shape), role, kind))
    return tuple(found)


def _adapter(
    model: Any, cfg: DictDefault
) -> tuple[tuple[tuple[tuple[int, ...], int], ...], set[str], str | None]:
    """What the adapter adds, as PEFT makes it; where; and why vLLM would not serve it."""
    if not cfg.adapter:
        return (), set(), None
    if cfg.lora_model_dir:
        config = PeftConfig.from_pretrained(cfg.lora_model_dir)
    else:
        _, config = load_adapter(model, cfg, cfg.adapter, config_only=True)
    # Nothing is initialised where there is no storage.
    config.init_lora_weights = False
    # PEFT keeps adapters of models in 16 bits in float32, ours on quantised ones too.
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    shapes = tuple(
        (tuple(weight.shape), weight.element_size())
        for weight in adapted.parameters()
        if weight.requires_grad
    )
    prefix = "base_model.model."
    names = {
        name.removeprefix(prefix)
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    return shapes, names, adapter_problem(config.to_dict())
