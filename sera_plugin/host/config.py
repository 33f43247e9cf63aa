"""What `rl: sera` becomes: the host's own `rl: dpo` with our trainer.

Every check, loader and dataset path that the host has for DPO then holds. Keys of ours in the wrong
place are looked for here; `keys` and `refused` have tables of the host's, `unused` finds the rest.
"""

import copy
import json
import logging
import os
import traceback
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from sera_plugin.config.block import block_of, closest, not_a_key
from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.labelers import require_held_out
from sera_plugin.config.quoting import as_written, quoted
from sera_plugin.config.sera import SeraArgs, SeraConfig
from sera_plugin.host.ends import describe_beginning
from sera_plugin.host.keys import TRAINER, WHOLE
from sera_plugin.host.refused import DATASETS, refuse
from sera_plugin.host.schedules import check_schedule
from sera_plugin.host.unused import unused

LOG = logging.getLogger("axolotl.sera")

#: Seed: the default of the host's command line and of transformers. Without one the host would
#: draw other held-out pairs in every run.
_DEFAULTS = {"num_epochs": 3, "seed": 42}
LM_EVAL = "axolotl.integrations.lm_eval.LMEvalPlugin"
#: What the host makes of a key, and then refuses beside it when a Ray worker validates again
#: (axolotl 0.19): the worker makes it anew.
_FOUND = {"saves_per_epoch": "save_steps", "evals_per_epoch": "eval_steps"}


def resolve(cfg: dict[str, Any]) -> dict[str, Any]:
    """Turn `rl: sera` into what the host understands, in place. Idempotent.

    Returns:
        The datasets as they were, for `restore_entries`; of a `cfg` that is resolved already what a
        Ray driver has handed over, else nothing.

    Raises:
        ValueError: for anything in the configuration that SeRA cannot run with, naming the key,
            the value, and what to do.
    """
    _refuse_evaluate()
    _refuse_misplaced(cfg)
    vllm = _with_unset_keys(cfg.get("vllm"))
    if cfg.get("inference"):
        return {}  # `axolotl inference` clears rl: nothing is trained
    # A launched worker parses the resolved configuration again.
    resolved = cfg.get("rl") == "dpo" and cfg.get("trainer_cls") == TRAINER and cfg.get("sera")
    if cfg.get("rl") != "sera" and not resolved:
        beside = "a `sera:` block and " if cfg.get("sera") is not None else ""
        raise ValueError(
            f"the YAML has {beside}the plugin sera_plugin.SeraPlugin, but rl: "
            f"{as_written(cfg.get('rl'))}. Set `rl: sera`, or remove the plugin line and the "
            "block."
        )
    sera = SeraConfig.parse(block_of("sera", cfg.get("sera")), "sera.")
    if resolved:
        cfg["vllm"] = vllm
        for each, found in _FOUND.items():
            if cfg.get("use_ray") and cfg.get(each):
                cfg.pop(found, None)
        return dict(json.loads(cfg.get("sera_entries") or "{}"))
    _require_writable("." if cfg.get("output_dir") is None else cfg["output_dir"])
    refuse(cfg, sera)
    if sera.held_out == 0 and not (cfg.get("test_datasets") or cfg.get("val_set_size")):
        require_held_out(sera, 0)
    check_schedule(cfg)
    name_types(cfg)
    entries = {key: copy.deepcopy(cfg.get(key)) for key in DATASETS}
    cfg |= {"rl": "dpo", "trainer_cls": TRAINER, "vllm": vllm}
    # What it is for, the output layer here does always; TRL's refuses references that are data.
    cfg.pop("dpo_use_liger_kernel", None)
    cfg["sera"] = sera.model_dump(mode="json") | _kept(cfg, sera)
    for key, value in _DEFAULTS.items():
        if cfg.get(key) is None:
            cfg[key] = value
    if cfg.get("rl_beta") is None and (cfg.get("trl") or {}).get("beta") is None:
        name = "ipo" if cfg.get("dpo_loss_type") == ["ipo"] else sera.loss
        cfg["rl_beta"] = LOSSES[name].beta
        LOG.info(
            f"SeRA: rl_beta is not set; it is {cfg['rl_beta']:g}, the paper's for {name} (the "
            "host's own default for DPO is 0.1)."
        )
    _name_what_lm_eval_evaluates(cfg)
    if cfg.get("fsdp_config") and "fsdp_state_dict_type" not in cfg["fsdp_config"]:
        cfg["fsdp_config"] = {**cfg["fsdp_config"], "state_dict_type": WHOLE}
    _warn(cfg, sera, entries)
    if _is_run_by("train") and os.environ.get("RANK", "0") == "0":
        LOG.info("%s", describe_beginning(cfg, sera))
    if cfg.get("use_ray"):
        cfg["sera_entries"] = json.dumps(entries, default=str)
    return entries


def _name_what_lm_eval_evaluates(cfg: MutableMapping[str, Any]) -> None:
    """Have the host's lm_eval plugin evaluate what was trained, by one process.

    axolotl 0.19 takes an adapter's directory for whole weights, and `hub_model_id` for what is on
    this machine; every process of a run would evaluate.
    """
    if LM_EVAL not in (cfg.get("plugins") or ()):
        return
    trained = cfg.get("output_dir") or "./model-out"  # the host's default
    if cfg.get("lm_eval_model") is None:
        adapter = f"{cfg.get('base_model')},peft={trained}"
        cfg["lm_eval_model"] = adapter if cfg.get("adapter") else trained
    if os.environ.get("RANK", "0") != "0":
        cfg["lm_eval_post_train"] = False


def _kept(cfg: Mapping[str, Any], sera: SeraConfig) -> dict[str, str]:
    """`sera.keep` as the host's keys say it, where the block does not."""
    best = cfg.get("load_best_model_at_end")
    if "keep" in sera.model_fields_set or (best is None and not cfg.get("early_stopping_patience")):
        return {}
    return {"keep": "last" if best is False else "best"}


def _warn(cfg: Mapping[str, Any], sera: SeraConfig, entries: Mapping[str, Any]) -> None:
    """Say what has no effect and does no harm."""
    for said in unused(cfg, entries):
        LOG.warning("SeRA: %s", said)
    if cfg.get("hub_model_id"):
        LOG.warning(
            f"SeRA: hub_model_id: {quoted(cfg['hub_model_id'])} has the host push output_dir as it "
            "is, with the run directory in it: the data's pairs, samples, and every policy. "
            "sera.push_to_hub pushes the policies and what you choose alone."
        )
    wanted = {"selected": sera.selection_ratio < 1, "sampled": sera.bootstrap_ratio > 0}
    missing = " and ".join(what for what, is_wanted in wanted.items() if is_wanted)
    first, epochs = sera.first_iteration, cfg["num_epochs"]
    if missing and first > float(epochs):
        LOG.warning(
            f"SeRA: num_epochs: {epochs} ends before iteration {first}, the first for which pairs "
            f"are {missing}. Set num_epochs to {first} or more."
        )


def _with_unset_keys(block: Any) -> dict[str, Any]:
    """The `vllm:` block, so that the host fills in nothing that we derive.

    What free memory and the place of the run decide, the host would set as for a server that has
    the GPU to itself; it fills a block that is not there, too.
    """
    from axolotl.utils.schemas.vllm import VllmConfig

    block = block_of("vllm", block)
    for key in block:
        if key not in VllmConfig.model_fields:
            raise ValueError(not_a_key("vllm.", key, tuple(VllmConfig.model_fields)))
    return {"gpu_memory_utilization": None, "host": "127.0.0.1", **block}


def _is_run_by(command: str) -> bool:
    """Whether a module of the host's commands (`train`) has asked for this."""
    frames = (frame for frame, _ in traceback.walk_stack(None))
    modules = {getattr(one.f_globals.get("__spec__"), "name", None) for one in frames}
    return f"axolotl.cli.{command}" in modules


def _refuse_evaluate() -> None:
    """`axolotl evaluate` loads the base model: it would compare the first policy with itself."""
    if _is_run_by("evaluate"):
        raise ValueError(
            "axolotl evaluate loads the base model and not what was trained, so with rl: sera it "
            "would compare that model with itself. Use `axolotl sera eval OUTPUT_DIR --prompts "
            "FILE` (docs/eval.md)."
        )


def _refuse_misplaced(cfg: Mapping[str, Any]) -> None:
    """The host drops unknown top-level keys without a word, so ours are looked for here."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    ours, known = SeraConfig.model_fields, AxolotlInputConfig.model_fields
    for key in cfg:
        if key in SeraArgs.model_fields or not isinstance(key, str):
            continue
        if key in ours and key not in known:
            raise ValueError(
                f"`{key}` stands beside the `sera:` block. Move it inside: `sera: {{{key}: ...}}`."
            )
        name = key.lower().replace("-", "_")
        if name.startswith("sera_"):
            close = closest(name.removeprefix("sera_"), ours, 0.6)
            meant = f"`sera: {{{close}: ...}}`" if close else "the `sera:` block"
        elif key in known:
            continue
        elif closest(name, ["sera"], 0.75):
            meant = "`sera`"
        elif close := closest(name, ours, 0.9):
            meant = f"`sera: {{{close}: ...}}`"
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
    if place is None or "\0" in output_dir:
        raise ValueError(f"output_dir: {quoted(output_dir)} is not a path. Name a directory.")
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir: {quoted(output_dir, 200)} cannot be written: {quoted(str(place), 200)} "
            "is read-only, not a directory, or not yours. Make it writable, or set another "
            "output_dir."
        )


def name_types(cfg: Mapping[str, Any]) -> None:
    """Give datasets without a type the host's strategy for rows that need none.

    Without any it would not look at such rows at all before it measures their length.
    """
    for key in DATASETS:
        for entry in cfg.get(key) or ():
            if not entry.get("type"):
                entry["type"] = "passthrough.default"


def restore_entries(cfg: MutableMapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Put back what the host's validation lost of `datasets` and `test_datasets`.

    axolotl 0.19 reads an entry as the first of five schemas that accepts it, and all accept
    anything. A `type:` block of two field names comes out empty, and the dataset is then read as
    if it had none; a `name:` beside a longer block is gone.
    """
    for key, raw in entries.items():
        for entry, before in zip(cfg.get(key) or (), raw or (), strict=False):
            for name, value in before.items():
                if value is not None and (entry.get(name) is None or isinstance(value, Mapping)):
                    entry[name] = type(entry)(value) if isinstance(value, Mapping) else value
    cfg.pop("sera_entries", None)  # data, which run.json compares as tokens
