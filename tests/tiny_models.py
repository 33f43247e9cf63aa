"""Tiny random models of many kinds, with what each of them takes in a forward pass.

docs/models.md has a table of them; tests/test_models.py compares it with these.
"""

import copy

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

from sera_plugin.model.forward import Abilities

ENDS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = ENDS | {"hidden_size": 32, "num_hidden_layers": 2}
BASE = LAYERS | {"intermediate_size": 48, "num_attention_heads": 2, "max_position_embeddings": 64}
SMALL = BASE | {"num_key_value_heads": 1, "head_dim": 16}
_WINDOW = {"sliding_window": 30, "layer_types": ["sliding_attention", "full_attention"]}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}

#: All that a model takes without a kernel for packed lines.
EVERY = Abilities(in_head=True, packed=False, shared=True)
#: Its logits are changed after the output layer: capped, or scaled.
CHANGED = Abilities(in_head=False, packed=False, shared=True)
#: A state is carried along the line, which no mask cuts.
STATE = Abilities(in_head=True, packed=False, shared=False)

MODELS: dict[str, tuple[PretrainedConfig, Abilities]] = {
    "Llama": (LlamaConfig(**SMALL), EVERY),
    "Qwen3": (Qwen3Config(**SMALL), EVERY),
    "Mistral": (MistralConfig(**SMALL, sliding_window=30), EVERY),
    "Gemma 2": (Gemma2Config(**SMALL, **_WINDOW), CHANGED),
    "Gemma 3": (Gemma3TextConfig(**SMALL, **_WINDOW), EVERY),
    "GPT-NeoX": (GPTNeoXConfig(**BASE), EVERY),
    "GPT-2": (
        GPT2Config(
            **{"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        ),
        EVERY,
    ),
    "Phi-3": (Phi3Config(**BASE, num_key_value_heads=1), EVERY),
    "Granite": (GraniteConfig(**BASE, num_key_value_heads=1, logits_scaling=8.0), CHANGED),
    "Mixtral": (
        MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True),
        EVERY,
    ),
    "LFM2": (
        Lfm2Config(**BASE, num_key_value_heads=1, layer_types=["conv", "full_attention"]),
        STATE,
    ),
    "Mamba": (
        MambaConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
        ),
        STATE,
    ),
    "Falcon-H1": (FalconH1Config(**SMALL, **_MAMBA), STATE),
}


def build(config: PretrainedConfig):
    """A random model, far from uniform, so that a wrong mask or position shows."""
    torch.manual_seed(1)
    # A copy: a model keeps its configuration, and writes a new vocabulary's size into it.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.ndim > 1 else 1)
    return model


def in_segments(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, **keys):
    """Attention from the lengths that flash attention takes, where it is given them.

    A stand-in for its kernel, which needs a GPU: each segment under SDPA. It goes into
    `ALL_ATTENTION_FUNCTIONS` under a name with `flash` in it.
    """
    lengths = [query.shape[2]]
    if cu_seq_lens_q is not None:
        assert cu_seq_lens_q.dtype == torch.int32  # as its kernels ask for
        assert torch.equal(keys["cu_seq_lens_k"], cu_seq_lens_q)
        lengths = cu_seq_lens_q.diff().tolist()
        # A tensor would be waited for.
        assert keys["max_length_q"] is keys["max_length_k"] is max(lengths)
    parts = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    found = [
        F.scaled_dot_product_attention(*part, scale=scaling, is_causal=True, enable_gqa=True)
        for part in parts
    ]
    return torch.cat(found, dim=2).transpose(1, 2), None
