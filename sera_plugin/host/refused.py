"""What a YAML may not say with `rl: sera`, in tables, and why.

Everything here would fail late, or do nothing without a word. It is refused before anything is
loaded, with the key, its value and what to do. Facts about the host are those of axolotl 0.19 and
trl 1.9. Keys inside `sera:` are checked by its own model (config/sera.py).
"""

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sera_plugin.config.block import block_of, closest, not_a_key
from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.quoting import as_written, quoted
from sera_plugin.config.sera import SeraConfig

TRAINER = "sera_plugin.host.trainer.SeraTrainer"
DATASETS = ("datasets", "test_datasets")
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


def number(value: Any) -> float | None:
    """A finite number out of a YAML value (0.1 or "0.1"); None where there is none."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(found := float(value)):
                return found
    return None


class Given:
    """A configuration, or a block of it at `where`, as the conditions of the tables ask it."""

    def __init__(self, cfg: Mapping[str, Any], sera: SeraConfig, where: str = "") -> None:
        self.cfg, self.sera, self.where = cfg, sera, where
        self.sharded = cfg.get("fsdp_config") is not None or bool(cfg.get("fsdp"))
        #: None where the loss is the host's, in place of `sera.loss`.
        self.loss = LOSSES[sera.loss] if cfg.get("dpo_loss_type") is None else None
        self.smooths = self.loss.label_smoothing if self.loss else None
        self.smoothing = number(cfg.get("dpo_label_smoothing")) or 0.0
        self.says_keep = "keep" in sera.model_fields_set

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


@dataclass(frozen=True)
class Refusal:
    """A line of a table, about one or more keys, separated by commas."""

    keys: str
    #: Why, and what to do instead. `{key}` is the key, `{loss}` and `{keep}` are `sera`'s.
    remedy: str
    #: Of the value and all that is given. Unless set: whatever is not off, or one of `values`.
    when: Callable[[Any, Given], object] | None = None
    #: Which ones are refused if not all, as a YAML has them; for a reader alone beside `when`.
    values: str = ""

    def check(self, given: Given, problem: str = "") -> None:
        """Raises ValueError if one of the keys has a value that is refused."""
        for key in self.keys.split(", "):
            value = given.get(key)
            if self.when is not None:
                refused = self.when(value, given)
            else:
                refused = as_written(value) in self.values.split(", ") if self.values else value
            if refused:
                remedy = self.remedy.format(key=key, loss=given.sera.loss, keep=given.sera.keep)
                raise ValueError(f"{given.where}{key}: {as_written(value)} {problem}{remedy}.")


def _not_of_host(value: Any, given: Given) -> bool:
    losses = value if isinstance(value, (list, tuple)) else ()
    return value is not None and not (losses and all(one in HOST_LOSSES for one in losses))


#: What is wrong by itself, or beside something else.
MISTAKES = (
    Refusal(
        "num_epochs",
        "is not a whole number of iterations: rl: sera runs one iteration per epoch; set "
        "num_epochs to 1, 2, 3 or more",
        lambda value, _: value is not None and number(value) not in range(1, _MOST_EPOCHS + 1),
    ),
    Refusal(
        "sera.sampler",
        "needs an adapter: the weights of full fine-tuning cannot be loaded into a running server. "
        "Set sera.sampler to vllm, or set `adapter: lora`",
        lambda value, given: value == "vllm-server" and not given.get("adapter"),
    ),
    Refusal(
        "sera.held_out",
        "beside val_set_size or test_datasets: those pairs are the held-out ones. Keep one of them",
        lambda value, given: (
            value is not None and (given.get("val_set_size") or given.get("test_datasets"))
        ),
    ),
    Refusal(
        "fsdp_config",
        "is not a block of keys: write `fsdp_version: 2` and `fsdp_config:` with its keys indented "
        "(docs/many-gpus.md)",
        lambda value, given: given.sharded and not (isinstance(value, Mapping) and value),
    ),
    Refusal(
        "dpo_loss_type",
        f"is not a list of the host's losses: they are {', '.join(HOST_LOSSES)}; write for example "
        "dpo_loss_type: [sigmoid]",
        _not_of_host,
    ),
    Refusal(
        "dpo_loss_type",
        "names a second loss: sera.loss: {loss} is set too. Keep sera.loss for "
        f"{', '.join(LOSSES)}, dpo_loss_type for any other",
        lambda value, given: value is not None and "loss" in given.sera.model_fields_set,
    ),
    Refusal(
        "rl_beta, trl.beta, dpo_label_smoothing, simpo_gamma, cpo_alpha",
        "is not a number: set one, or remove {key}",
        lambda value, _: value and number(value) is None,
    ),
    Refusal(
        "rl_beta, trl.beta",
        "is not a preference strength: set it above 0, e.g. 0.2",
        lambda value, _: value is not None and not (number(value) or 0) > 0,
    ),
    Refusal(
        "dpo_label_smoothing",
        "is not a share of wrong labels: set it from 0 to below 0.5",
        lambda _, given: not 0 <= given.smoothing < 0.5,
    ),
    Refusal(
        "dpo_label_smoothing",
        "has no effect: that dpo_loss_type does not read it. For cDPO set sera.loss: dpo instead "
        "of dpo_loss_type",
        lambda _, given: (
            given.smoothing
            and not given.loss
            and _SMOOTHED_BY_HOST.isdisjoint(given.get("dpo_loss_type"))
        ),
    ),
    Refusal(
        "sera.loss",
        "needs dpo_label_smoothing: it corrects for a share of wrong labels. Set "
        "dpo_label_smoothing, for example to 0.1",
        lambda _, given: given.smooths == "required" and not given.smoothing,
    ),
    Refusal(
        "dpo_label_smoothing",
        "has no effect: sera.loss: {loss} does not read it. Remove it, or set sera.loss to dpo or "
        "robust",
        lambda _, given: given.smooths == "never" and given.smoothing,
    ),
    Refusal(
        "simpo_gamma, cpo_alpha",
        "has no effect: it belongs to SimPO. Set sera.loss: simpo, or remove {key}",
        lambda value, given: value is not None and given.loss and not given.loss.target_margin,
    ),
    Refusal(
        "load_best_model_at_end",
        "contradicts sera.keep: {keep}. Remove one of them",
        lambda value, given: (
            value is not None and given.says_keep and bool(value) != (given.sera.keep == "best")
        ),
    ),
    Refusal(
        "early_stopping_patience",
        "ends training where no better policy comes, but what is to be kept is the last one "
        "(sera.keep: last, or load_best_model_at_end: false). Set sera.keep: best, or remove "
        "early_stopping_patience",
        lambda value, given: (
            value
            and (
                given.sera.keep == "last"
                if given.says_keep
                else given.get("load_best_model_at_end") is False
            )
        ),
    ),
    Refusal(
        "dpo_use_weighting",
        "needs one of the host's own losses: set dpo_loss_type, for example [sigmoid], beside it",
        lambda value, given: value and given.loss,
    ),
    Refusal(
        "datasets, test_datasets",
        "is not a list of datasets: name preference pairs, for example `datasets: [{{path: "
        "pairs.jsonl, type: chat_template.default}}]`",
        lambda value, given: (
            not (isinstance(value, (list, tuple)) and value)
            and not (value is None and given.get("datasets"))
        ),
    ),
)
_SEVERAL = (
    "makes several datasets of one, which the host cannot do for preference pairs: give each an "
    "entry of its own"
)
#: The same of an entry of `datasets`.
ENTRY_MISTAKES = (
    Refusal(
        "path",
        "is not a path: name a file, a directory or a dataset of the Hugging Face hub",
        lambda value, _: not isinstance(value, str) or not value.strip() or "\0" in value,
    ),
    Refusal(
        "type",
        "is not a strategy: use chat_template.default or another one of "
        "axolotl.prompt_strategies.dpo, or a block of field names",
        lambda value, _: (
            not isinstance(value, (Mapping, type(None)))
            and not (isinstance(value, str) and value.strip(". "))
        ),
    ),
    Refusal("preprocess_shards", _SEVERAL),
    Refusal("name", _SEVERAL, lambda value, _: isinstance(value, (list, tuple))),
)

_BEST = (
    "the host ignores it in preference training. Remove it; sera.keep: best leaves the policy that "
    "is best on the held-out pairs"
)
_OFFLOADING = (
    "under DPO the host has one offloader, to host memory. Set gradient_checkpointing: true and "
    "activation_offloading: true"
)
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
    "metric_for_best_model": _BEST,
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
#: What does not work here, as docs/configuration.md has it.
REFUSALS = (
    *(Refusal(keys, remedy) for keys, remedy in _NEVER.items()),
    Refusal("greater_is_better", _BEST, lambda value, _: value is not None),
    Refusal("save_strategy", f"{_BEST}. Set save_strategy: epoch", values="best"),
    Refusal(
        "trainer_cls",
        "rl: sera brings its own trainer; remove trainer_cls",
        lambda value, _: value not in (None, TRAINER),
    ),
    # would save no memory
    Refusal("gradient_checkpointing", _OFFLOADING, values="offload_disk"),
    Refusal(
        "activation_offloading",
        _OFFLOADING,
        # `hidden_states` is done by reentrant checkpointing itself, in any trainer
        lambda value, given: (
            isinstance(value, str)
            and not (
                value == "hidden_states"
                and given.get("gradient_checkpointing_kwargs.use_reentrant")
            )
        ),
        "legacy, disk",
    ),
    Refusal(
        "precompute_ref_log_probs",
        "rl: sera always has reference values as data, from the scoring that selection needs "
        "anyway. Remove it",
        values="false",
    ),
    # several devices
    Refusal(
        "context_parallel_size, tensor_parallel_size, expert_parallel_size",
        "scoring needs whole sequences and layers on each rank; remove {key}",
        lambda value, _: str(value or 1) != "1",
        "above 1",
    ),
    Refusal(
        "fsdp_version",
        "FSDP1 flattens the weights that rl: sera takes snapshots of. Set fsdp_version: 2",
        lambda value, given: given.sharded and value not in (2, "2"),
        "1",
    ),
    Refusal(
        "fsdp_config.state_dict_type, fsdp_config.fsdp_state_dict_type, "
        "fsdp_config.final_state_dict_type, fsdp_config.fsdp_final_state_dict_type",
        f"a run continues from, and ends with, whole weights. Set it to {WHOLE}, or leave it out",
        lambda value, given: given.sharded and value not in (None, "", WHOLE),
    ),
    Refusal(
        "load_in_4bit, load_in_8bit",
        "with FSDP the host trains by preference only what is not quantised. Remove {key}, or "
        "fsdp_version and fsdp_config",
        lambda value, given: given.sharded and value,
    ),
)


def refuse(cfg: Mapping[str, Any], sera: SeraConfig) -> None:
    """Raises ValueError for what a table has, naming key, value, and what to do."""
    block_of("trl", cfg.get("trl"))
    given = Given(cfg, sera)
    for mistake in MISTAKES:
        mistake.check(given)
    for refusal in REFUSALS:
        refusal.check(given, "does not work here: ")
    for key in DATASETS:
        for index, entry in enumerate(cfg.get(key) or ()):
            _refuse_entry(f"{key}[{index}]", entry, sera)


def _refuse_entry(where: str, entry: Any, sera: SeraConfig) -> None:
    """Where the host would stumble over a dataset, or read it otherwise than it was meant."""
    from axolotl.utils.schemas import datasets as schemas

    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{where}: {quoted(entry)} is not a block of keys. Write `path:` and `type:` under it."
        )
    kinds = (schemas.SFTDataset, schemas.DPODataset, schemas.KTODataset)
    _refuse_misspelt(where, entry, [name for model in kinds for name in model.model_fields])
    for mistake in ENTRY_MISTAKES:
        mistake.check(Given(entry, sera, f"{where}."))
    if isinstance(block := entry.get("type"), Mapping):
        _refuse_misspelt(f"{where}.type", block, schemas.UserDefinedDPOType.model_fields)
        for name, value in block.items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{where}.type.{name}: {quoted(value)} is not text. Quote it.")


def _refuse_misspelt(where: str, block: Mapping[Any, Any], known: Collection[str]) -> None:
    """The host drops keys that it does not know without a word."""
    for name in block:
        if not isinstance(name, str) or (name not in known and closest(name, known, 0.75)):
            raise ValueError(not_a_key(f"{where}.", name, known))
