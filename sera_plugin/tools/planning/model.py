"""A model's sizes from its config.json: the model is built without storage, and measured.

It is the class that the run trains, with the host's own types and PEFT's adapter. Tensors on the
meta device and fake ones have shapes and types alone: a 7B model takes seconds and no memory.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from axolotl.loaders import ModelLoader
from axolotl.loaders.adapter import load_adapter
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from peft import PeftConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from sera_plugin.config.quoting import plain, quoted
from sera_plugin.model.budget import whole_logits
from sera_plugin.model.memory import EXPERTS, Shape
from sera_plugin.sampling.vllm import adapter_problem

#: SDPA without a mask, as in a step. Of fake tensors transformers 5.16 cannot tell that none is
#: needed: under the name `sdpa` it makes one, and repeats the keys and values that heads share.
_UNMASKED = "sdpa_without_mask"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
#: Sequences that are passed, and their lengths.
_LINES, _LENGTHS = 4, (64, 128, 192)

#: Those that make a copy as large as the weights in each step on a GPU (torch's documentation of
#: `foreach`).
FOREACH = frozenset({"adamw_torch"})


@dataclass(frozen=True, kw_only=True)
class Model(Shape):
    """What memory and time of a causal language model depend on."""

    parameters: int  # weights of the base model, shared ones once
    adapter: int  # weights of the adapter
    weights: int  # bytes of the base model as it lies on the device
    outer: int  # of them the embeddings' and the output layer's
    #: (elements, bytes per element, whether a table of embeddings) of each weight.
    trained: tuple[tuple[int, int, bool], ...]
    #: Bytes of weights in the type that passes compute in: in training autocast keeps a copy of
    #: each float32 matrix, bitsandbytes makes one of a quantised layer at a time.
    copies: int
    matrices: int  # weights that each token is multiplied with, but for the output layer's
    #: Bytes per token that all layers keep for the backward pass, and what the length of its
    #: sequence adds to them per token.
    kept: tuple[float, float]
    whole: int  # logits of each token that a scoring pass makes at once, see `whole_logits`
    unserved: str | None = None  # why vLLM would not serve it as it is trained
    quantised_already: str | None = None  # how its checkpoint is ("gptq")

    @property
    def trained_bytes(self) -> int:
        """In the weights' own types: gradients and a snapshot are as large."""
        return sum(elements * width for elements, width, _ in self.trained)

    @property
    def resident(self) -> int:
        """Bytes of the base model and its adapter."""
        return self.weights + (self.trained_bytes if self.adapter else 0)


def describe(cfg: DictDefault, tokenizer: Any, on_gpu: bool) -> Model:
    """Build the model that the host's `cfg` names, and its adapter, without weights.

    The host's tokenizer may enlarge the vocabulary; `on_gpu` is where the run will be. A ValueError
    if it is no causal language model of transformers, an OSError without its config.json.
    """
    config = load_model_config(cfg)
    name = f"base_model: {quoted(cfg.base_model, 200)} (model_type {config.model_type})"
    text = config.get_text_config()
    if not hasattr(text, "num_attention_heads"):
        raise ValueError(
            f"{name} has no attention. A plan knows what layers of attention take, and nothing of "
            "others."
        )
    config._attn_implementation = "eager" if cfg.attn_implementation == "eager" else _UNMASKED
    unchecked = {"gradient_checkpointing": None, "mean_resizing_embeddings": False}
    loader = ModelLoader(DictDefault({**cfg, **unchecked}), tokenizer)
    try:
        with torch.device("meta"):
            loader.model = AutoModelForCausalLM.from_config(
                config, dtype=cfg.torch_dtype, trust_remote_code=False
            )
    except ValueError as error:
        raise ValueError(
            f"{name} is not a causal language model that transformers has code for, and a plan "
            "runs no code that comes with a model. Train a few steps of it instead to see what it "
            "needs."
        ) from error
    try:
        return _measured(loader, text, on_gpu)
    except Exception as error:  # whatever the model's own code does not do without values
        raise ValueError(
            f"{name} cannot be measured without its weights ({type(error).__name__}: "
            f"{plain(str(error), 300)}). Train a few steps of it instead to see what it needs."
        ) from error


def _measured(loader: ModelLoader, text: Any, on_gpu: bool) -> Model:
    cfg, rows = loader.cfg, loader.model.get_input_embeddings().num_embeddings
    loader._resize_token_embeddings()
    loader.patch_manager._apply_adapter_patches()
    loader._configure_embedding_dtypes()
    model, width, unserved = loader.model, cfg.torch_dtype.itemsize, None
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    base, linears = list(model.parameters()), [layer.weight for layer in layers]
    bits = 4 if cfg.load_in_4bit else 8 if cfg.load_in_8bit else 0
    if bits:
        for weight in linears:  # the host leaves alone what bitsandbytes has quantised
            weight.data = weight.data.to(cfg.torch_dtype)
    number = next((int(getattr(text, name)) for name in EXPERTS if getattr(text, name, 0)), 0)
    experts = sum(w.numel() for w in base if w.dim() == 3 and len(w) == number)
    if cfg.adapter:
        if cfg.lora_model_dir:
            config = PeftConfig.from_pretrained(cfg.lora_model_dir)
        else:
            _, config = load_adapter(model, cfg, cfg.adapter, config_only=True)
        config.init_lora_weights = False
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
        unserved = adapter_problem(config.to_dict())
        if table.num_embeddings != rows:
            unserved = "the adapter stands on a model whose vocabulary was resized after loading"
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    quantised = {id(weight) for weight in linears} if bits else set()
    double = (cfg.bnb_config_kwargs or {}).get("bnb_4bit_use_double_quant", True)
    added = sum(weight.numel() for weight in trained) if cfg.adapter else 0
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    wide = [w for w in matrices if w.requires_grad and w.element_size() > width]
    outer = {id(m.weight): m.weight for m in (table, head) if m}  # one, where they are tied
    already = getattr(loader.model_config, "quantization_config", None) or {}
    return Model(
        parameters=sum(weight.numel() for weight in base),
        adapter=added,
        weights=sum(
            _quantised_bytes(w, bits, double) if id(w) in quantised else w.nbytes for w in base
        ),
        outer=sum(w.nbytes for w in outer.values()),
        # `policies.tidy_adapters` keeps all of an adapter in float32.
        trained=tuple(
            (w.numel(), 4 if cfg.adapter else w.element_size(), id(w) in tables) for w in trained
        ),
        copies=width * sum(w.numel() for w in wide)
        + width * max((w.numel() for w in linears if bits), default=0),
        matrices=sum(weight.numel() for weight in linears)
        + experts * int(getattr(text, "num_experts_per_tok", None) or 1) // max(1, number)
        + added,
        kept=_kept(model, cfg, bool(experts), on_gpu),
        whole=whole_logits(model),
        **vars(Shape.of(model, width)),
        unserved=unserved,
        quantised_already=dict(already).get("quant_method"),
    )


def _quantised_bytes(weight: torch.Tensor, bits: int, double: bool) -> int:
    """A linear layer's weight in 8 or 4 bits, with its scales.

    Source: bitsandbytes 0.50. 8 bits: a float32 scale per row (Dettmers et al. 2022, "LLM.int8()").
    4 bits: a float32 scale per 64 weights and a table of 16; with double quantisation 8 bits per
    scale, a float32 per 256 of those, a table of 256 and their mean (Dettmers et al. 2023, "QLoRA",
    section 3).
    """
    if bits == 8:
        return weight.numel() + 4 * len(weight)
    blocks = math.ceil(weight.numel() / 64)
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4 if double else 4 * blocks
    return math.ceil(weight.numel() / 2) + 4 * 16 + scales


class _Mask(nn.Module):
    """Dropout as a GPU makes it: a byte per element is kept, where a CPU keeps the type's."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * torch.ones_like(states, dtype=torch.bool)


def _kept(model: Any, cfg: DictDefault, experts: bool, on_gpu: bool) -> tuple[float, float]:
    """`Model.kept`, from passes at three lengths.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
    Models", section 4: activations grow with the length, attention's with its square.
    """
    for module in list(model.modules()) if on_gpu else ():
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout) and child.p:
                setattr(module, name, _Mask())
    kind, factor = cfg.torch_dtype, 1
    if experts and kind == torch.float32:  # torch's products for experts take 16 bits alone
        model, kind, factor = model.to(torch.bfloat16), torch.bfloat16, 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = model.to_empty(device="cpu").train()
        layers = (layers.get_base_model() if cfg.adapter else layers).base_model
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}
        measured = []
        for length in _LENGTHS:
            found: dict[int, torch.UntypedStorage] = {}

            def pack(tensor: torch.Tensor, found: Any = found) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    found[storage._cdata] = storage  # held, or another takes its address
                return tensor

            ids = torch.ones(_LINES, length, dtype=torch.long)
            with (
                saved_tensors_hooks(pack, lambda tensor: tensor),
                torch.autocast("cpu", kind, enabled=kind != torch.float32),
            ):
                alive = layers(input_ids=ids, use_cache=False)
            del alive
            measured.append(factor * sum(one.nbytes() for one in found.values()) / _LINES)
    square, each, _ = np.polyfit(_LENGTHS, measured, 2)
    return float(each), float(square)
