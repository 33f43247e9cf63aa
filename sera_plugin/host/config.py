"""What `rl: sera` becomes: the host's own `rl: dpo` with our trainer.

Every check, loader and dataset path that the host has for DPO then holds.
"""

from __future__ import annotations

import copy
import logging
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.quoting import as_written, quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.config.spelling import SERA_KEYS, closest, not_a_key, parse_sera, require_block
from sera_plugin.host.data_config import check_datasets, name_types
from sera_plugin.host.refused import LABEL_KERNELS, TRAINER, WHOLE, refuse

LOG = logging.getLogger("axolotl.sera")

#: Seed: the default of the host's command line and of transformers. Without one the host would
#: draw other held-out pairs in every run.
_DEFAULTS = {"num_epochs": 3, "seed": 42}


def resolve(cfg: dict[str, Any]) -> Mapping[str, Any]:
    """Turn `rl: sera` into what the host understands, in place. Idempotent.

    Returns:
        The datasets as the YAML has them; empty where nothing had to be turned.

    Raises:
        ValueError: for anything in the configuration that SeRA cannot run with, naming the key,
            the value, and what to do.
    """
    _refuse_evaluate()
    _refuse_misplaced(cfg)
    vllm = _with_unset_keys(cfg.get("vllm"))
    if cfg.get("rl") == "dpo" and cfg.get("trainer_cls") == TRAINER and cfg.get("sera"):
        parse_sera(cfg["sera"])
        cfg["vllm"] = vllm
        return {}  # a launched worker parses the resolved configuration again
    if cfg.get("inference"):
        return {}  # `axolotl inference` clears rl: nothing is trained
    if cfg.get("rl") != "sera":
        beside = "a `sera:` block and " if cfg.get("sera") is not None else ""
        raise ValueError(
            f"the YAML has {beside}the plugin sera_plugin.SeraPlugin, but rl: "
            f"{as_written(cfg.get('rl'))}. Set `rl: sera`, or remove the plugin line and the block."
        )
    sera = parse_sera(cfg.get("sera"))
    _require_writable("." if cfg.get("output_dir") is None else cfg["output_dir"])
    refuse(cfg, sera)
    check_datasets(cfg)
    name_types(cfg)
    entries = {key: copy.deepcopy(cfg.get(key)) for key in ("datasets", "test_datasets")}
    cfg["vllm"] = vllm
    cfg["rl"] = "dpo"
    cfg["trainer_cls"] = TRAINER
    cfg["sera"] = sera.model_dump(mode="json")
    for key, value in _DEFAULTS.items():
        if cfg.get(key) is None:
            cfg[key] = value
    if cfg.get("rl_beta") is None and (cfg.get("trl") or {}).get("beta") is None:
        ipo = cfg.get("dpo_loss_type") == ["ipo"]
        cfg["rl_beta"] = LOSSES["ipo" if ipo else sera.loss].beta
    if cfg.get("fsdp_config") and "fsdp_state_dict_type" not in cfg["fsdp_config"]:
        cfg["fsdp_config"] = {**cfg["fsdp_config"], "state_dict_type": WHOLE}
    _warn(cfg, sera)
    return entries


def _warn(cfg: Mapping[str, Any], sera: SeraConfig) -> None:
    """Say what has no effect and does no harm."""
    unused = [key for key in LABEL_KERNELS if cfg.get(key)]
    if unused:
        LOG.warning(
            "SeRA: %s: no effect. These kernels speed up the cross-entropy of labels, and a "
            "preference loss has none; remove them.",
            ", ".join(unused),
        )
    wanted = {"selected": sera.selection_ratio < 1, "sampled": sera.bootstrap_ratio > 0}
    missing = [what for what, is_wanted in wanted.items() if is_wanted]
    first = sera.first_iteration
    if missing and first > float(cfg["num_epochs"]):
        LOG.warning(
            "SeRA: num_epochs: %s ends before iteration %d, the first for which pairs are %s. Set "
            "num_epochs to %d or more.",
            cfg["num_epochs"],
            first,
            " and ".join(missing),
            first,
        )


def _with_unset_keys(block: Any) -> dict[str, Any]:
    """The `vllm:` block, so that the host fills in nothing that we derive.

    What free memory and the place of the run decide, the host would set as for a server that has
    the GPU to itself; it fills a block that is not there, too.
    """
    from axolotl.utils.schemas.vllm import VllmConfig

    block = {} if block is None else block
    require_block("vllm", block)
    for key in block:
        if key not in VllmConfig.model_fields:
            raise ValueError(not_a_key("vllm.", key, tuple(VllmConfig.model_fields)))
    return {"gpu_memory_utilization": None, "host": "127.0.0.1", **block}


def _refuse_evaluate() -> None:
    """`axolotl evaluate` loads the base model: it would compare the first policy with itself."""
    for frame, _ in traceback.walk_stack(None):
        if getattr(frame.f_globals.get("__spec__"), "name", None) == "axolotl.cli.evaluate":
            raise ValueError(
                "axolotl evaluate loads the base model and not what was trained, so with rl: sera "
                "it would compare that model with itself. Use `axolotl sera eval OUTPUT_DIR "
                "--prompts FILE` (docs/eval.md)."
            )


def _refuse_misplaced(cfg: Mapping[str, Any]) -> None:
    """The host drops unknown top-level keys without a word, so ours are looked for here.

    Raises:
        ValueError: for a key of the `sera:` block beside it, and for a misspelling of one.
    """
    from axolotl.utils.schemas.config import AxolotlInputConfig

    known = AxolotlInputConfig.model_fields
    for key in cfg:
        if key == "sera" or not isinstance(key, str):
            continue
        if key in SERA_KEYS and key not in known:
            raise ValueError(
                f"`{key}` stands beside the `sera:` block. Move it inside: `sera: {{{key}: ...}}`."
            )
        name = key.lower().replace("-", "_")
        prefixed = name.startswith("sera_")
        if key in known and not prefixed:
            continue
        close = closest(name.removeprefix("sera_"), SERA_KEYS, 0.6 if prefixed else 0.9)
        if not prefixed and closest(name, ["sera"], 0.75):
            meant = "`sera`"
        elif close is not None:
            meant = f"`sera: {{{close}: ...}}`"
        elif prefixed:
            meant = "the `sera:` block"
        else:
            continue
        raise ValueError(f"`{as_written(key)}` is not a key. Did you mean {meant}?")


def _require_writable(output_dir: Any) -> None:
    """The host would fail in one place or another, each with a traceback of its own."""
    try:
        os.fsencode(output_dir)
        place = Path(output_dir).expanduser().absolute()
        while not place.exists():
            place = place.parent
    except (TypeError, ValueError, OSError, RuntimeError):
        place = None
    if place is None or isinstance(output_dir, bytes) or "\0" in str(output_dir):
        raise ValueError(f"output_dir: {quoted(output_dir)} is not a path. Name a directory.")
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir: {quoted(output_dir, 200)} cannot be written: {quoted(str(place), 200)} "
            "is read-only, not a directory, or not yours. Make it writable, or set another "
            "output_dir."
        )
