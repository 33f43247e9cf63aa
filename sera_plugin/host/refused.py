"""What a YAML may not say with `rl: sera`, refused before anything is loaded.

With the key, its value and what to do. Here is what is wrong by itself or beside something else;
`keys` has what never works. Keys inside `sera:` are checked by its own model (config/sera.py).
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

from sera_plugin.config.block import block_of, closest, not_a_key
from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.given import Given, Refusal, deepspeed_config, number
from sera_plugin.host.keys import REFUSALS

DATASETS = ("datasets", "test_datasets")
#: Losses of TRL's DPO trainer.
HOST_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
#: Those of them that read label smoothing; `sigmoid` does not.
_SMOOTHED_BY_HOST = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})
#: Optimizers with state beside `Optimizer.state`, or that step within the backward pass.
_NOT_RESTARTED = ("polora", "lomo", "adalomo")
_ZERO = "zero_optimization."
_DEVICES = (f"{_ZERO}offload_param.device", f"{_ZERO}offload_optimizer.device")
_NOT_IN_ZERO = (
    *(f"{_ZERO}{key}" for key in ("zero_hpz_partition_size", "zero_quantized_weights")),
    *(f"{_ZERO}{key}" for key in ("zero_quantized_nontrainable_weights", "mics_shard_size")),
    "tensor_parallel",
)
#: Every iteration has its files and its place in the schedule; more is a slip of the keyboard.
_MOST_EPOCHS = 10_000


def _not_of_host(value: Any, given: Given) -> bool:
    losses = value if isinstance(value, (list, tuple)) else ()
    return value is not None and not (losses and all(one in HOST_LOSSES for one in losses))


#: In the whole configuration, or in an entry of `datasets`.
_NO_TEMPLATE = Refusal(
    "chat_template_jinja",
    "is neither a file that is here nor a template",
    lambda value, _: value is not None and "{" not in str(value) and not os.path.isfile(str(value)),
)
#: What is wrong by itself, or beside something else.
MISTAKES = (
    _NO_TEMPLATE,
    Refusal(
        "num_epochs",
        "is not a whole number of iterations: rl: sera runs one iteration per epoch; set "
        "num_epochs to 1, 2, 3 or more",
        lambda value, _: value is not None and number(value) not in range(1, _MOST_EPOCHS + 1),
    ),
    Refusal(
        "dpo_padding_free",
        "needs a kernel that is told where each sequence ends. Set attn_implementation: "
        "flash_attention_2, or remove dpo_padding_free",
        lambda value, given: (
            value
            and not given.get("flash_attention")
            and "flash" not in str(given.get("attn_implementation"))
        ),
    ),
    Refusal(
        "dpo_padding_free, dpo_use_liger_kernel",
        "does not go with dpo_loss_type, whose loss the host computes with padding and whole "
        "logits. Remove {key}, or set sera.loss instead of dpo_loss_type",
        lambda value, given: value and given.loss is None,
    ),
    Refusal(
        "sera.sampler",
        "needs an adapter: the weights of full fine-tuning cannot be loaded into a running server. "
        "Set sera.sampler to vllm, or set `adapter: lora`",
        lambda value, given: value == "vllm-server" and not given.get("adapter"),
    ),
    Refusal(
        "vllm.host, vllm.port",
        "names one server beside those of sera.servers. Remove {key}, and list all of them there",
        lambda value, given: value is not None and given.sera.servers,
    ),
    Refusal(
        "sera.held_out",
        "beside val_set_size or test_datasets: those pairs are the held-out ones. Keep one of them",
        lambda value, given: (
            value is not None and (given.get("val_set_size") or given.get("test_datasets"))
        ),
    ),
    Refusal(
        "hub_model_id, hub_strategy, hub_revision",
        "pushes output_dir as the host does, beside what sera.push_to_hub pushes. Keep one of them "
        "(docs/sharing.md)",
        lambda value, given: value is not None and given.sera.push_to_hub,
    ),
    Refusal(
        "fsdp_config",
        "is not a block of keys: write `fsdp_version: 2` and `fsdp_config:` with its keys indented "
        "(docs/many-gpus.md)",
        lambda value, given: given.sharded and not (isinstance(value, Mapping) and value),
    ),
    Refusal(
        "optimizer",
        "keeps what an iteration cannot start anew (sera.restart_optimizer: true). Set another "
        "optimizer, or sera.restart_optimizer: false",
        lambda value, given: (
            given.sera.restart_optimizer
            and (value in _NOT_RESTARTED or str(value).endswith("_layerwise"))
        ),
    ),
    Refusal(
        "deepspeed",
        "is neither a file of DeepSpeed's configuration (JSON) nor a block of its keys; `axolotl "
        "fetch deepspeed_configs` brings some",
        lambda value, _: value and deepspeed_config(value) is None,
    ),
    Refusal(
        "deepspeed",
        "has no zero_optimization.stage of 1, 2 or 3. Set it, or remove deepspeed "
        "(docs/many-gpus.md)",
        lambda value, given: value and given.zero("zero_optimization.stage") not in (1, 2, 3),
    ),
    Refusal(
        "deepspeed",
        "has an optimizer or a scheduler of its own, and each iteration starts anew with the "
        "YAML's. Remove them there, and set optimizer, learning_rate and lr_scheduler",
        lambda _, given: given.zero("optimizer") or given.zero("scheduler"),
    ),
    Refusal(
        "deepspeed",
        "leaves no whole weights. Set zero_optimization.stage3_gather_16bit_weights_on_model_save "
        "to true there",
        lambda _, given: (
            given.zero("zero_optimization.stage") == 3
            and not given.zero("zero_optimization.stage3_gather_16bit_weights_on_model_save")
        ),
    ),
    Refusal(
        "deepspeed",
        "keeps weights or optimizer state on a disk or quantised, or a second time (nvme, ZeRO++), "
        "or shares layers out (tensor_parallel), of which no snapshot is taken. Remove that there; "
        "device: cpu works",
        lambda _, given: any(map(given.zero, _NOT_IN_ZERO)) or "nvme" in map(given.zero, _DEVICES),
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
        "dpo_use_weighting, dpo_loss_weights",
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
    _NO_TEMPLATE,
    Refusal(
        "roles, message_property_mappings",
        "is not a block of names: write for example `roles: {{assistant: [gpt]}}`, or "
        "`message_property_mappings: {{role: from, content: value}}`",
        lambda value, _: value is not None and not isinstance(value, Mapping),
    ),
    Refusal("preprocess_shards", _SEVERAL),
    Refusal(
        "shards, shards_idx",
        "is read in supervised fine-tuning only, and every row would be trained: write the part "
        "as `split: train[:10%]`",
    ),
    Refusal(
        "drop_system_message",
        "is read in supervised fine-tuning only, and system messages would stay: leave them out of "
        "the file, or write a template that does",
    ),
    Refusal(
        "field_thinking, template_thinking_key, split_thinking",
        "is read in supervised fine-tuning only: name the column in message_property_mappings, "
        "for example {{reasoning_content: thinking}}",
    ),
    Refusal("name", _SEVERAL, lambda value, _: isinstance(value, (list, tuple))),
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
    for index, entry in enumerate(sera.prompts):
        _refuse_entry(f"sera.prompts[{index}]", entry, sera)


def _refuse_entry(where: str, entry: Any, sera: SeraConfig) -> None:
    """Where the host would stumble over a dataset, or read it otherwise than it was meant."""
    from axolotl.utils.schemas.datasets import UserDefinedDPOType, UserDefinedKTOType

    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{where}: {quoted(entry)} is not a block of keys. Write `path:` and `type:` under it."
        )
    _refuse_misspelt(where, entry, entry_keys())
    for mistake in ENTRY_MISTAKES:
        mistake.check(Given(entry, sera, f"{where}."))
    if isinstance(block := entry.get("type"), Mapping):
        known = [*UserDefinedDPOType.model_fields, *UserDefinedKTOType.model_fields]
        _refuse_misspelt(f"{where}.type", block, dict.fromkeys(known))
        for name, value in block.items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{where}.type.{name}: {quoted(value)} is not text. Quote it.")


def entry_keys() -> list[str]:
    """What the host takes in an entry of `datasets`, in any of its models of one."""
    from axolotl.utils.schemas import datasets as schemas

    kinds = (schemas.SFTDataset, schemas.DPODataset, schemas.KTODataset)
    return [name for model in kinds for name in model.model_fields]


def _refuse_misspelt(where: str, block: Mapping[Any, Any], known: Collection[str]) -> None:
    """The host drops keys that it does not know without a word."""
    for name in block:
        if not isinstance(name, str) or (name not in known and closest(name, known, 0.75)):
            raise ValueError(not_a_key(f"{where}.", name, known))
