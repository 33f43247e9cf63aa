"""Training features of the host that do nothing under its DPO trainer, or not what they say.

The host accepts these keys and then ignores them (axolotl 0.19, trl 1.9). A run that needs the
memory they promise should not learn so by running out of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sera_plugin.config.quoting import quoted

LOG = logging.getLogger("axolotl.sera")

#: Kernels for the cross-entropy of labels.
_LABEL_KERNELS = (
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_use_token_scaling",
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "flash_attn_cross_entropy",
)


def check_features(cfg: Mapping[str, Any]) -> None:
    """Refuse what would be ignored and was meant to save memory; warn of what has no effect.

    Raises:
        ValueError: naming the key, the value, and what to do.
    """
    if cfg.get("use_liger_kernel"):
        raise ValueError(
            f"use_liger_kernel: {quoted(cfg['use_liger_kernel'])} is not a key of the host, which "
            "would drop it. Remove it; for Liger's layers use the plugin "
            "axolotl.integrations.liger.LigerPlugin with liger_rope, liger_rms_norm and "
            "liger_glu_activation."
        )
    if cfg.get("layer_offloading"):
        raise ValueError(
            f"layer_offloading: {quoted(cfg['layer_offloading'])} does not work here: the host "
            "offloads layers in its trainer for supervised fine-tuning only. Remove it; to save "
            "memory load the base in 4 bits (adapter: qlora), or set gradient_checkpointing: true."
        )
    _check_activation_offloading(cfg)
    if cfg.get("precompute_ref_log_probs") is False:
        raise ValueError(
            "precompute_ref_log_probs: False does not work here: rl: sera always has reference "
            "values as data, from the scoring that selection needs anyway. Remove it."
        )
    unused = [key for key in _LABEL_KERNELS if cfg.get(key)]
    if unused:
        LOG.warning(
            "SeRA: %s: no effect. These kernels speed up the cross-entropy of labels, and a "
            "preference loss has none; remove them.",
            ", ".join(unused),
        )


def _check_activation_offloading(cfg: Mapping[str, Any]) -> None:
    """The host's DPO trainer has one offloader, to host memory, whatever the key names."""
    key, value = "activation_offloading", cfg.get("activation_offloading")
    if cfg.get("gradient_checkpointing") == "offload_disk":  # what the host turns into `disk`
        key, value = "gradient_checkpointing", "offload_disk"
    if not isinstance(value, str):
        return
    kwargs = cfg.get("gradient_checkpointing_kwargs")
    reentrant = isinstance(kwargs, Mapping) and kwargs.get("use_reentrant")
    if value == "hidden_states" and reentrant:
        return  # done by the checkpointing itself, in any trainer
    raise ValueError(
        f"{key}: {quoted(value)} does not work here: under DPO the host has one offloader, to host "
        "memory. Set gradient_checkpointing: true and activation_offloading: true."
    )
