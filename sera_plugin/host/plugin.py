"""The host's public hooks, and nothing else.

`register` sees the raw configuration before the host validates it. There `rl: sera` becomes the
host's own `rl: dpo` with our trainer: every check, loader and dataset path that the host has for
DPO then holds.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import math
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from pydantic import ValidationError

from sera_plugin.config.judge import JudgeConfig
from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.quoting import plain, quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.data_config import check_datasets, name_types, restore_entries
from sera_plugin.host.ignored_features import check_features
from sera_plugin.host.parallel_config import check_parallel

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

LOG = logging.getLogger("axolotl.sera")

TRAINER = "sera_plugin.host.trainer.SeraTrainer"
_FIELDS = tuple(SeraConfig.model_fields)
#: Losses of TRL 1.9's DPO trainer.
_HOST_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
#: Those of them that read label smoothing; `sigmoid` does not.
_SMOOTHED_BY_HOST = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})
#: Every iteration has its files and its place in the schedule; more is a slip of the keyboard.
_MOST_EPOCHS = 10_000
#: The default of the host's command line and of transformers. Without a seed the host would draw
#: other held-out pairs in every run.
_SEED = 42
_BEST = (
    "the host ignores it in preference training; remove it. Every iteration starts from the policy "
    "before it, and those policies are kept (of full fine-tuning with sera.keep_policies: true): "
    "compare them with `axolotl sera eval OUTPUT_DIR --iterations`"
)


class SeraPlugin(BasePlugin):
    """Adds `rl: sera` to Axolotl."""

    #: The datasets as they were before the host validated them.
    _entries: Mapping[str, Any] = MappingProxyType({})

    def register(self, cfg: dict[str, Any]) -> None:
        """Turn `rl: sera` into what the host understands. Idempotent.

        Raises:
            ValueError: for anything in the configuration that SeRA cannot run with, naming the
                key, the value, and what to do.
        """
        _reject_evaluate()
        _reject_misplaced_keys(cfg)
        vllm = _with_unset_keys(cfg.get("vllm"))
        if cfg.get("rl") == "dpo" and cfg.get("trainer_cls") == TRAINER and cfg.get("sera"):
            _parse(cfg["sera"])
            cfg["vllm"] = vllm
            return  # a launched worker parses the resolved configuration again
        if cfg.get("inference"):
            return  # `axolotl inference` clears rl: nothing is trained
        if cfg.get("rl") != "sera":
            beside = "a `sera:` block and " if cfg.get("sera") is not None else ""
            raise ValueError(
                f"the YAML has {beside}the plugin sera_plugin.SeraPlugin, but rl: "
                f"{_brief(cfg.get('rl'))}. Set `rl: sera`, or remove the plugin line and the block."
            )
        config = _parse(cfg.get("sera"))
        _reject_incompatible(cfg, config)
        check_parallel(cfg)
        check_datasets(cfg, *_host_dataset_keys())
        name_types(cfg)
        self._entries = {key: copy.deepcopy(cfg.get(key)) for key in ("datasets", "test_datasets")}
        cfg["vllm"] = vllm
        cfg["rl"] = "dpo"
        cfg["trainer_cls"] = TRAINER
        cfg["sera"] = config.model_dump(mode="json")
        if cfg.get("num_epochs") is None:
            cfg["num_epochs"] = 3
        if cfg.get("seed") is None:
            cfg["seed"] = _SEED
        _warn_of_one_iteration(cfg["num_epochs"], config)
        if cfg.get("rl_beta") is None and _trl_beta(cfg) is None:
            ipo = cfg.get("dpo_loss_type") == ["ipo"]
            cfg["rl_beta"] = LOSSES["ipo" if ipo else config.loss].beta

    def get_input_args(self) -> str:
        """The pydantic model that the host merges into its own."""
        return "sera_plugin.config.sera.SeraArgs"

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta:
        """The pairs to train and to evaluate on, instead of the host's own loading."""
        from sera_plugin.host.datasets import load_pairs

        restore_entries(cfg, self._entries)
        if not preprocess:
            from sera_plugin.host.patches import prepare_host

            prepare_host(cfg)
        return load_pairs(cfg)

    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        """The host calls this for training alone, and before it writes into output_dir."""
        trainer.open_run()

    def post_train_unload(self, cfg: DictDefault) -> None:
        """After the last thing the host does: a report on the run, which nothing waits for."""
        if os.environ.get("RANK", "0") == "0":
            _report(Path(cfg["output_dir"]))


def _report(output_dir: Path) -> None:
    """Write the report; a run that is trained does not fail for want of one."""
    try:
        from sera_plugin.tools.report.page import write_report

        LOG.info("SeRA report: %s", write_report(output_dir))
    except Exception as error:  # whatever it is: the model is saved
        LOG.warning(
            "SeRA: the report could not be written (%s: %s). The run is complete; to try again: "
            "axolotl sera report %s",
            type(error).__name__,
            plain(str(error), 300),
            output_dir,
        )


def _reject_evaluate() -> None:
    """`axolotl evaluate` loads the base model: it would compare the first policy with itself."""
    for frame, _ in traceback.walk_stack(None):
        if getattr(frame.f_globals.get("__spec__"), "name", None) == "axolotl.cli.evaluate":
            raise ValueError(
                "axolotl evaluate loads the base model and not what was trained, so with rl: sera "
                "it would compare that model with itself. Use `axolotl sera eval OUTPUT_DIR "
                "--prompts FILE` (docs/eval.md)."
            )


def _warn_of_one_iteration(epochs: Any, config: SeraConfig) -> None:
    """Say so where the configuration selects or samples in iterations that the run has not."""
    first = config.first_iteration
    missing = [
        what
        for what, wanted in (
            ("selected", config.selection_ratio < 1),
            ("sampled", config.bootstrap_ratio > 0),
        )
        if wanted and first > float(epochs)
    ]
    if missing:
        LOG.warning(
            "SeRA: num_epochs: %s ends before iteration %d, the first for which pairs are %s. Set "
            "num_epochs to %d or more.",
            epochs,
            first,
            " and ".join(missing),
            first,
        )


def _with_unset_keys(block: Any) -> dict[str, Any]:
    """The `vllm:` block, so that the host fills in nothing that we derive.

    What free memory and the place of the run decide, the host would set as for a server that has
    the GPU to itself; it fills a block that is not there, too.
    """
    if block is None:
        block = {}
    if not isinstance(block, Mapping):
        raise ValueError(
            f"vllm: {quoted(block)} is not a block of keys. Write `vllm:` and indent its keys."
        )
    known = _host_vllm_keys()
    for key in block:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known keys: {', '.join(known)}."
            raise ValueError(f"vllm.{_brief(key)} is not a key. {hint}")
    return {"gpu_memory_utilization": None, "host": "127.0.0.1", **block}


def _host_vllm_keys() -> list[str]:
    from axolotl.utils.schemas.vllm import VllmConfig

    return list(VllmConfig.model_fields)


def _host_dataset_keys() -> tuple[frozenset[str], frozenset[str]]:
    """What may stand in an entry of `datasets:`, and in its `type:` block."""
    from axolotl.utils.schemas import datasets as schemas

    entries = (schemas.SFTDataset, schemas.DPODataset, schemas.KTODataset)
    keys = frozenset(key for model in entries for key in model.model_fields)
    return keys, frozenset(schemas.UserDefinedDPOType.model_fields)


def _reject_misplaced_keys(cfg: Mapping[str, Any]) -> None:
    """The host drops unknown top-level keys without a word, so ours are looked for here."""
    known = _host_keys()
    for key in cfg:
        if key == "sera" or not isinstance(key, str):
            continue
        if key in _FIELDS and key not in known:
            raise ValueError(
                f"`{key}` stands beside the `sera:` block. Move it inside: `sera: {{{key}: ...}}`."
            )
        name = key.lower().replace("-", "_")
        if name.startswith("sera_"):
            inner = name.removeprefix("sera_")
            close = difflib.get_close_matches(inner, _FIELDS, n=1, cutoff=0.6)
            remedy = f"`sera: {{{close[0]}: ...}}`" if close else "the `sera:` block"
            raise ValueError(f"`{_brief(key)}` is not a key. Did you mean {remedy}?")
        if key in known:
            continue
        if difflib.get_close_matches(name, ["sera"], n=1, cutoff=0.75):
            raise ValueError(f"`{key}` is not a key. Did you mean `sera`?")
        close = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.9)
        if close:
            raise ValueError(f"`{key}` is not a key. Did you mean `sera: {{{close[0]}: ...}}`?")


def _host_keys() -> frozenset[str]:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    return frozenset(AxolotlInputConfig.model_fields)


def _parse(block: Any) -> SeraConfig:
    if block is None:
        block = {}
    if not isinstance(block, Mapping):
        raise ValueError(
            f"sera: {quoted(block)} is not a block of keys. Write `sera:` and indent its keys."
        )
    try:
        return SeraConfig.model_validate(dict(block))
    except ValidationError as error:
        raise ValueError(_once("; ".join(map(_readable, error.errors())))) from None
    except (OverflowError, RecursionError) as error:
        raise ValueError(
            f"sera: {quoted(block)} has a value that cannot be read: {error}"
        ) from None


def _once(sentences: str) -> str:
    """Say which keys are known at the last unknown one alone."""
    hint = f" Known keys: {', '.join(_FIELDS)}."
    before, found, after = sentences.rpartition(hint)
    return before.replace(hint, "") + found + after


def _readable(error: Any) -> str:
    """One sentence a problem: the key, the value, what is allowed."""
    key = ".".join(map(_brief, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = tuple(JudgeConfig.model_fields) if error["loc"][0] == "judge" else _FIELDS
        close = difflib.get_close_matches(_brief(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"Did you mean `{close[0]}`?" if close else f"Known keys: {', '.join(known)}."
        return f"sera.{key} is not a key. {hint}"
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"sera.{key}: {message}" if key else f"sera.{message}"
    return f"sera.{key}: {quoted(error['input'])} is not allowed: {error['msg']}"


def _brief(value: Any) -> str:
    """A value as the YAML has it, escaped and cut."""
    return plain(value) if isinstance(value, str) else quoted(value)


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
            "is read-only, no directory, or not yours. Make it writable, or set another output_dir."
        )


def _reject_incompatible(cfg: Mapping[str, Any], config: SeraConfig) -> None:
    """Refuse, before anything is loaded, what would fail late or be wrong in silence."""
    output_dir = cfg.get("output_dir")
    _require_writable("." if output_dir is None else output_dir)
    epochs = cfg.get("num_epochs")
    if epochs is not None and not _is_count(epochs):
        raise ValueError(
            f"num_epochs: {_brief(epochs)} is not a whole number of iterations. rl: sera runs one "
            "iteration per epoch; set num_epochs to 1, 2, 3, ..."
        )
    problems = {
        "max_steps": "rl: sera needs whole epochs; remove max_steps and set num_epochs",
        "streaming": "rl: sera scores the whole dataset each iteration; remove streaming",
        "pretraining_dataset": "rl: sera needs preference pairs; use datasets",
        "sample_packing": "preference pairs cannot be packed; remove sample_packing",
        "dpo_use_liger_kernel": "the fused loss cannot take reference values as data, which "
        "rl: sera relies on (TRL refuses precomputed ones too); remove dpo_use_liger_kernel",
        "rl_adapter_ref_model": "rl: sera keeps no reference model; remove rl_adapter_ref_model",
        "neftune_noise_alpha": "noise makes the policy differ from its own reference; remove "
        "neftune_noise_alpha",
        "relora": "rl: sera snapshots one adapter per iteration; remove relora",
        "load_best_model_at_end": _BEST,
        "metric_for_best_model": _BEST,
        "early_stopping_patience": _BEST,
    }
    for key, remedy in problems.items():
        if cfg.get(key):
            raise ValueError(f"{key}: {_brief(cfg[key])} does not work here: {remedy}.")
    if cfg.get("greater_is_better") is not None:
        raise ValueError(
            f"greater_is_better: {_brief(cfg['greater_is_better'])} does not work here: {_BEST}."
        )
    if cfg.get("save_strategy") == "best":
        raise ValueError(
            f"save_strategy: best does not work here: {_BEST}. Set save_strategy: epoch."
        )
    if cfg.get("trainer_cls") not in (None, TRAINER):
        raise ValueError(
            f"trainer_cls: {_brief(cfg['trainer_cls'])} cannot be combined with rl: sera, which "
            "brings its own trainer. Remove trainer_cls."
        )
    if config.sampler == "vllm-server" and not cfg.get("adapter"):
        raise ValueError(
            "sera.sampler: vllm-server needs an adapter: the weights of full fine-tuning cannot be "
            "loaded into a running server. Set sera.sampler to vllm, or set `adapter: lora`."
        )
    check_features(cfg)
    _reject_loss_conflicts(cfg, config)


def _trl_beta(cfg: Mapping[str, Any]) -> Any:
    block = cfg.get("trl")
    if block is not None and not isinstance(block, Mapping):
        raise ValueError(
            f"trl: {quoted(block)} is not a block of keys. Write `trl:` and indent its keys."
        )
    return block.get("beta") if block else None


def _number(key: str, value: Any) -> float:
    """A finite number out of a YAML value (0.1 or "0.1")."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    raise ValueError(f"{key}: {quoted(value)} is not a number. Set one, or remove {key}.")


def _is_count(value: Any) -> bool:
    """Whether a YAML value is a whole number of at least 1 (3, 3.0 or "3")."""
    try:
        number = _number("num_epochs", value)
    except ValueError:
        return False
    return number.is_integer() and 1 <= number <= _MOST_EPOCHS


def _are_host_losses(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(name, str) and name in _HOST_LOSSES for name in value)
    )


def _reject_loss_conflicts(cfg: Mapping[str, Any], config: SeraConfig) -> None:
    host_loss = cfg.get("dpo_loss_type")
    if host_loss is not None and not _are_host_losses(host_loss):
        raise ValueError(
            f"dpo_loss_type: {quoted(host_loss)} is not a list of the host's losses. They are "
            f"{', '.join(_HOST_LOSSES)}; write for example dpo_loss_type: [sigmoid]."
        )
    if host_loss is not None and "loss" in config.model_fields_set:
        raise ValueError(
            f"dpo_loss_type: {host_loss} and sera.loss: {config.loss} both name the loss. Keep "
            f"sera.loss for {', '.join(LOSSES)}, dpo_loss_type for any other."
        )
    for key, beta in (("rl_beta", cfg.get("rl_beta")), ("trl.beta", _trl_beta(cfg))):
        if beta is not None and not _number(key, beta) > 0:
            raise ValueError(
                f"{key}: {_brief(beta)} is not a preference strength. Set it above 0, e.g. 0.2."
            )
    smoothing = _number("dpo_label_smoothing", cfg.get("dpo_label_smoothing") or 0.0)
    if not 0.0 <= smoothing < 0.5:
        raise ValueError(
            f"dpo_label_smoothing: {smoothing} is not a share of wrong labels. Set it from 0 to "
            "below 0.5."
        )
    if smoothing and host_loss is not None and not _SMOOTHED_BY_HOST.intersection(host_loss):
        raise ValueError(
            f"dpo_label_smoothing: {smoothing} has no effect on dpo_loss_type: {host_loss}. For "
            "cDPO set sera.loss: dpo instead of dpo_loss_type."
        )
    if host_loss is not None:
        return
    kind = LOSSES[config.loss]
    if kind.label_smoothing == "required" and not smoothing:
        raise ValueError(
            f"sera.loss: {config.loss} corrects for a share of wrong labels, which is not given. "
            "Set dpo_label_smoothing, for example to 0.1."
        )
    if smoothing and kind.label_smoothing == "never":
        raise ValueError(
            f"dpo_label_smoothing: {smoothing} has no meaning for sera.loss: {config.loss}. Remove "
            "it, or set sera.loss to dpo or robust."
        )
    for key in ("simpo_gamma", "cpo_alpha"):
        if cfg.get(key) is not None and not kind.target_margin:
            raise ValueError(
                f"{key}: {_brief(cfg[key])} belongs to SimPO. Set sera.loss: simpo or remove it."
            )
        _number(key, cfg.get(key) or 0.0)
    if cfg.get("dpo_use_weighting"):
        raise ValueError(
            "dpo_use_weighting: true needs one of the host's own losses. Set dpo_loss_type, for "
            "example [sigmoid], beside it."
        )
