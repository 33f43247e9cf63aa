"""What a YAML may not say with `rl: sera`: one table, and why.

Everything here would fail late, or do nothing without a word. It is refused before anything is
loaded, with the key, its value and what to do. Facts about the host are those of axolotl 0.19 and
trl 1.9. Keys inside `sera:` are checked by its own model (config/sera.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.quoting import as_written
from sera_plugin.config.sera import SeraConfig
from sera_plugin.config.spelling import require_block

TRAINER = "sera_plugin.host.trainer.SeraTrainer"
#: Losses of TRL's DPO trainer.
HOST_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
#: Those of them that read label smoothing; `sigmoid` does not.
_SMOOTHED_BY_HOST = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})
#: Every iteration has its files and its place in the schedule; more is a slip of the keyboard.
_MOST_EPOCHS = 10_000
WHOLE = "FULL_STATE_DICT"
#: Kernels for the cross-entropy of labels.
LABEL_KERNELS = (
    *("liger_cross_entropy", "liger_fused_linear_cross_entropy", "liger_use_token_scaling"),
    *("cut_cross_entropy", "chunked_cross_entropy", "flash_attn_cross_entropy"),
)

_BEST = (
    "the host ignores it in preference training. Remove it: every iteration's policy is kept (of "
    "full fine-tuning with sera.keep_policies: true), and `axolotl sera eval OUTPUT_DIR "
    "--iterations` compares them"
)
#: The problem of a key that is refused whatever else is set.
DOES_NOT_WORK = "does not work here:"
_NO_EFFECT = "has no effect:"


@dataclass(frozen=True)
class Given:
    """A configuration, as the conditions of the table ask it."""

    cfg: Mapping[str, Any]
    sera: SeraConfig

    def get(self, key: str) -> Any:
        """The value of a key; `block.key` is one inside a block, where that is one."""
        if key == "fsdp_version":  # read as the host does, in three places
            inside = self.get("fsdp_config.fsdp_version") or self.get("fsdp_config.version")
            return self.cfg.get("fsdp_version") or inside
        block, _, inner = key.partition(".")
        if block == "sera":
            return getattr(self.sera, inner)
        value = self.cfg.get(block)
        return value.get(inner) if inner and isinstance(value, Mapping) else value

    @property
    def smoothing(self) -> float:
        return number(self.cfg.get("dpo_label_smoothing")) or 0.0

    @property
    def smooths(self) -> str:
        """What the loss does with label smoothing, where the loss is SeRA's."""
        return "" if self.host_loss else LOSSES[self.sera.loss].label_smoothing

    @property
    def host_loss(self) -> bool:
        """Whether a loss of the host's is used in place of `sera.loss`."""
        return self.cfg.get("dpo_loss_type") is not None

    @property
    def sharded(self) -> bool:
        return self.cfg.get("fsdp_config") is not None or bool(self.cfg.get("fsdp"))


@dataclass(frozen=True)
class Refusal:
    """A line of the table, about one or more keys, separated by commas."""

    keys: str
    #: Why, and what to do instead. `{key}` is the key, `{loss}` is `sera.loss`.
    remedy: str
    #: Of the value and all that is given. Unless set: whatever is not off.
    when: Callable[[Any, Given], object] = lambda value, given: value
    problem: str = DOES_NOT_WORK
    #: For a reader, which ones are refused if not all.
    values: str = ""

    def check(self, given: Given) -> None:
        """Raises ValueError if one of the keys has a value that is refused."""
        for key in self.keys.split(", "):
            value = given.get(key)
            if self.when(value, given):
                remedy = self.remedy.format(key=key, loss=given.sera.loss)
                raise ValueError(f"{key}: {as_written(value)} {self.problem} {remedy}.")


def number(value: Any) -> float | None:
    """A finite number out of a YAML value (0.1 or "0.1"); None where there is none."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(found := float(value)):
                return found
    return None


def _is_count(value: Any) -> bool:
    found = number(value)
    return found is not None and found.is_integer() and 1 <= found <= _MOST_EPOCHS


def _are_host_losses(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(v in HOST_LOSSES for v in value)


def _offloads_otherwise(value: Any, given: Given) -> bool:
    """`hidden_states` is done by reentrant checkpointing itself, in any trainer."""
    reentrant = given.get("gradient_checkpointing_kwargs.use_reentrant")
    return isinstance(value, str) and not (value == "hidden_states" and reentrant)


#: What is refused whatever its value and whatever else is set, unless it is off.
_NEVER = {
    "max_steps": "rl: sera needs whole epochs; remove max_steps and set num_epochs",
    "streaming": "rl: sera scores the whole dataset each iteration; remove streaming",
    "pretraining_dataset": "rl: sera needs preference pairs; use datasets",
    "sample_packing": "preference pairs cannot be packed; remove sample_packing",
    "dpo_use_liger_kernel": "the fused loss cannot take reference values as data, which rl: sera "
    "relies on (TRL refuses precomputed ones too); remove dpo_use_liger_kernel",
    "rl_adapter_ref_model": "rl: sera keeps no reference model; remove {key}",
    "neftune_noise_alpha": "noise makes the policy differ from its own reference; remove {key}",
    "relora": "rl: sera snapshots one adapter per iteration; remove relora",
    "load_best_model_at_end, metric_for_best_model, early_stopping_patience": _BEST,
    "use_liger_kernel": "it is not a key of the host, which would drop it. Remove it; for Liger's "
    "layers use the plugin axolotl.integrations.liger.LigerPlugin with liger_rope, liger_rms_norm "
    "and liger_glu_activation",
    "layer_offloading": "the host offloads layers in its trainer for supervised fine-tuning only. "
    "Remove it; to save memory load the base in 4 bits (adapter: qlora), or set "
    "gradient_checkpointing: true",
    "deepspeed": "it is not supported yet. Remove it; to share the weights out set fsdp_version: 2 "
    "and an fsdp_config (docs/many-gpus.md)",
    "use_ray": "the host asks Ray for a GPU per worker, and SeRA has never been run so. Remove "
    "use_ray, and start `axolotl train` with `--launcher torchrun` (docs/many-gpus.md)",
}
_OFFLOADING = (
    "under DPO the host has one offloader, to host memory. Set gradient_checkpointing: true and "
    "activation_offloading: true"
)
_STATE_DICTS = ", ".join(
    f"fsdp_config.{prefix}{key}"
    for key in ("state_dict_type", "final_state_dict_type")
    for prefix in ("", "fsdp_")
)

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "num_epochs",
        "rl: sera runs one iteration per epoch; set num_epochs to 1, 2, 3 or more",
        lambda value, given: value is not None and not _is_count(value),
        "is not a whole number of iterations:",
    ),
    *(Refusal(keys, remedy) for keys, remedy in _NEVER.items()),
    Refusal("greater_is_better", _BEST, lambda value, given: value is not None),
    Refusal(
        "save_strategy",
        f"{_BEST}. Set save_strategy: epoch",
        lambda value, given: value == "best",
        values="best",
    ),
    Refusal(
        "trainer_cls",
        "rl: sera brings its own trainer; remove trainer_cls",
        lambda value, given: value not in (None, TRAINER),
    ),
    Refusal(
        "sera.sampler",
        "the weights of full fine-tuning cannot be loaded into a running server. Set sera.sampler "
        "to vllm, or set `adapter: lora`",
        lambda value, given: value == "vllm-server" and not given.cfg.get("adapter"),
        "needs an adapter:",
    ),
    # ------------------------------------------------------------------ would save no memory
    Refusal(
        "gradient_checkpointing",
        _OFFLOADING,
        lambda value, given: value == "offload_disk",
        values="offload_disk",
    ),
    Refusal("activation_offloading", _OFFLOADING, _offloads_otherwise, values="legacy, disk"),
    Refusal(
        "precompute_ref_log_probs",
        "rl: sera always has reference values as data, from the scoring that selection needs "
        "anyway. Remove it",
        lambda value, given: value is False,
        values="false",
    ),
    # ------------------------------------------------------------------ several devices
    Refusal(
        "context_parallel_size, tensor_parallel_size, expert_parallel_size",
        "scoring needs whole sequences and layers on each rank; remove {key}",
        lambda value, given: str(value or 1) != "1",
        values="above 1",
    ),
    Refusal(
        "fsdp_config",
        "write `fsdp_version: 2` and `fsdp_config:` with its keys indented (docs/many-gpus.md)",
        lambda value, given: given.sharded and not (isinstance(value, Mapping) and value),
        "is not a block of keys:",
    ),
    Refusal(
        "fsdp_version",
        "FSDP1 flattens the weights that rl: sera takes snapshots of. Set fsdp_version: 2",
        lambda value, given: given.sharded and value not in (2, "2"),
        values="1",
    ),
    Refusal(
        _STATE_DICTS,
        f"a run continues from, and ends with, whole weights. Set it to {WHOLE}, or leave it out",
        lambda value, given: given.sharded and value not in (None, "", WHOLE),
    ),
    Refusal(
        "load_in_4bit, load_in_8bit",
        "with FSDP the host trains by preference only what is not quantised. Remove {key}, or "
        "fsdp_version and fsdp_config",
        lambda value, given: given.sharded and value,
    ),
    # ------------------------------------------------------------------ the loss
    Refusal(
        "dpo_loss_type",
        f"they are {', '.join(HOST_LOSSES)}; write for example dpo_loss_type: [sigmoid]",
        lambda value, given: value is not None and not _are_host_losses(value),
        "is not a list of the host's losses:",
    ),
    Refusal(
        "dpo_loss_type",
        f"sera.loss: {{loss}} is set too. Keep sera.loss for {', '.join(LOSSES)}, dpo_loss_type "
        "for any other",
        lambda value, given: given.host_loss and "loss" in given.sera.model_fields_set,
        "names a second loss:",
    ),
    Refusal(
        "rl_beta, trl.beta, dpo_label_smoothing, simpo_gamma, cpo_alpha",
        "set one, or remove {key}",
        lambda value, given: value and number(value) is None,
        "is not a number:",
    ),
    Refusal(
        "rl_beta, trl.beta",
        "set it above 0, e.g. 0.2",
        lambda value, given: value is not None and not (number(value) or 0) > 0,
        "is not a preference strength:",
    ),
    Refusal(
        "dpo_label_smoothing",
        "set it from 0 to below 0.5",
        lambda value, given: not 0 <= given.smoothing < 0.5,
        "is not a share of wrong labels:",
    ),
    Refusal(
        "dpo_label_smoothing",
        "that dpo_loss_type does not read it. For cDPO set sera.loss: dpo instead of dpo_loss_type",
        lambda value, given: (
            given.smoothing
            and given.host_loss
            and not _SMOOTHED_BY_HOST.intersection(given.cfg["dpo_loss_type"])
        ),
        _NO_EFFECT,
    ),
    Refusal(
        "sera.loss",
        "it corrects for a share of wrong labels. Set dpo_label_smoothing, for example to 0.1",
        lambda value, given: given.smooths == "required" and not given.smoothing,
        "needs dpo_label_smoothing:",
    ),
    Refusal(
        "dpo_label_smoothing",
        "sera.loss: {loss} does not read it. Remove it, or set sera.loss to dpo or robust",
        lambda value, given: given.smooths == "never" and given.smoothing,
        _NO_EFFECT,
    ),
    Refusal(
        "simpo_gamma, cpo_alpha",
        "it belongs to SimPO. Set sera.loss: simpo, or remove {key}",
        lambda value, given: (
            value is not None and not given.host_loss and not LOSSES[given.sera.loss].target_margin
        ),
        _NO_EFFECT,
    ),
    Refusal(
        "dpo_use_weighting",
        "set dpo_loss_type, for example [sigmoid], beside it",
        lambda value, given: value and not given.host_loss,
        "needs one of the host's own losses:",
    ),
)


def refuse(cfg: Mapping[str, Any], sera: SeraConfig) -> None:
    """Raises ValueError for what the table has, naming key, value, and what to do."""
    if cfg.get("trl") is not None:
        require_block("trl", cfg["trl"])
    given = Given(cfg, sera)
    for refusal in REFUSALS:
        refusal.check(given)
