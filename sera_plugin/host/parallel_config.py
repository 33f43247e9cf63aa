"""What the YAML may say about training on several devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sera_plugin.config.quoting import quoted

_WHOLE = "FULL_STATE_DICT"
#: A sequence, or a layer, that several ranks work on: each would score another batch.
_SPLIT_MODELS = ("context_parallel_size", "tensor_parallel_size", "expert_parallel_size")


def check_parallel(cfg: dict[str, Any]) -> None:
    """Refuse what cannot run, and ask for checkpoints that hold whole weights.

    Raises:
        ValueError: naming the key, its value and what to do.
    """
    for key in _SPLIT_MODELS:
        if str(cfg.get(key) or 1) != "1":
            raise ValueError(
                f"{key}: {quoted(cfg[key])} does not work here: scoring needs whole sequences and "
                f"layers on each rank; remove {key}."
            )
    if cfg.get("deepspeed"):
        raise ValueError(
            f"deepspeed: {quoted(cfg['deepspeed'])} does not work here yet. Remove it; to share "
            "the weights out set fsdp_version: 2 and an fsdp_config (docs/many-gpus.md)."
        )
    if cfg.get("use_ray"):
        raise ValueError(
            "use_ray: true does not work here: the host asks Ray for a GPU per worker, and SeRA "
            "has never been run so. Remove use_ray, and start `axolotl train` with `--launcher "
            "torchrun` (docs/many-gpus.md)."
        )
    block = cfg.get("fsdp_config")
    if block is None and not cfg.get("fsdp"):
        return
    if not isinstance(block, Mapping) or not block:
        raise ValueError(
            f"fsdp_config: {quoted(block)} is not a block of keys. Write `fsdp_version: 2` and "
            "`fsdp_config:` with its keys indented (docs/many-gpus.md)."
        )
    version = cfg.get("fsdp_version") or block.get("fsdp_version") or block.get("version")
    if version not in (2, "2"):
        raise ValueError(
            f"fsdp_version: {quoted(version)} does not work here: FSDP1 flattens the weights that "
            "rl: sera takes snapshots of. Set fsdp_version: 2."
        )
    for key in ("state_dict_type", "final_state_dict_type"):
        kind = block.get(key) or block.get(f"fsdp_{key}")
        if kind not in (None, _WHOLE):
            raise ValueError(
                f"fsdp_config.{key}: {quoted(kind)} does not work here: a run continues from, and "
                f"ends with, whole weights. Set it to {_WHOLE}, or leave it out."
            )
    for key in ("load_in_4bit", "load_in_8bit"):
        if cfg.get(key):
            raise ValueError(
                f"{key}: true does not work under FSDP, where the host trains by preference only "
                f"what is not quantised. Remove {key}, or fsdp_version and fsdp_config."
            )
    if "fsdp_state_dict_type" not in block:
        cfg["fsdp_config"] = {**block, "state_dict_type": _WHOLE}
