"""The table: which key of LLaMA-Factory becomes what, and why some become nothing.

docs/llama-factory.md is written from it. Names and defaults are those of LLaMA-Factory's `hparams`
and of transformers' training arguments, which it takes too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sera_plugin.tools.convert import data, values
from sera_plugin.tools.convert.names import LEFT_OUT
from sera_plugin.tools.convert.settings import Settings


@dataclass(frozen=True)
class Rule:
    """Keys that are read together.

    Attributes:
        names: of LLaMA-Factory, separated by commas.
        to: what they become, for a reader.
        put: writes it.
        about: what a reader should know of it.
    """

    names: str
    to: str
    put: Callable[[Settings], None]
    about: str = ""

    @property
    def keys(self) -> list[str]:
        """The names, one by one."""
        return self.names.split(", ")


def _renamed(name: str, to: str, read: Callable[[Settings, str], object]) -> Rule:
    def put(settings: Settings) -> None:
        if (value := read(settings, name)) is not None:
            settings.out[to] = value

    return Rule(name, f"`{to}`", put)


def _also(read: Callable[[Settings, str], object], *names: str) -> list[Rule]:
    return [_renamed(name, name, read) for name in names]


_TEXT, _NUMBER, _WHOLE, _SWITCH = Settings.text, Settings.number, Settings.whole, Settings.switch

#: In the order of the YAML to be written; None begins a paragraph.
RULES: tuple[Rule | None, ...] = (
    Rule(
        "model_name_or_path, model_revision",
        "`base_model`, `revision_of_model`",
        values.put_model,
    ),
    Rule("add_tokens, add_special_tokens", "`tokens`, `special_tokens`", values.put_tokens),
    _renamed("use_fast_tokenizer", "tokenizer_use_fast", _SWITCH),
    None,
    Rule(
        "stage, pref_loss, pref_beta, dpo_label_smoothing, pref_ftx, simpo_gamma",
        "`rl: sera`, `sera.loss`, `rl_beta`, `dpo_label_smoothing`, `simpo_gamma`",
        values.put_method,
        "`stage: dpo` alone. `sigmoid` is `dpo`, `hinge` is `slic`, the others keep their "
        "names. `pref_ftx` becomes `dpo_loss_type: [sigmoid, "
        "sft]` with `dpo_loss_weights`, for SimPO `cpo_alpha`.",
    ),
    None,
    Rule(
        "finetuning_type",
        "`adapter`",
        values.put_kind,
        "`full` has no adapter; `oft` is refused.",
    ),
    Rule(
        "quantization_bit, quantization_method, quantization_type, double_quantization",
        "`adapter: qlora` with `load_in_4bit`, or `load_in_8bit`; `bnb_config_kwargs`",
        values.put_quantization,
        "bitsandbytes' 4 and 8 bits alone.",
    ),
    Rule(
        "lora_rank, lora_alpha, lora_dropout, lora_target, additional_target, use_rslora, use_dora",
        "`lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_linear` or `lora_target_modules`, "
        "`lora_modules_to_save`, `peft_use_rslora`, `peft_use_dora`",
        values.put_lora,
        "`lora_alpha` is twice the rank unless set, as there.",
    ),
    Rule(
        "adapter_name_or_path, create_new_adapter",
        "`lora_model_dir`",
        values.put_trained_adapter,
        "One adapter, to be continued.",
    ),
    Rule(
        "freeze_trainable_layers, freeze_trainable_modules, freeze_extra_modules",
        "`unfrozen_parameters`",
        values.put_layers,
        "Where the model is a directory, whose config.json says how many layers it has.",
    ),
    *_also(_NUMBER, "loraplus_lr_ratio", "loraplus_lr_embedding"),
    None,
    Rule(
        "dataset, eval_dataset, dataset_dir, max_samples",
        "`datasets`, `test_datasets`",
        data.put_datasets,
        "See [datasets](#datasets).",
    ),
    Rule("template", "`chat_template`", values.put_template, "See [templates](#templates)."),
    _renamed("cutoff_len", "sequence_len", _WHOLE),
    _renamed("preprocessing_num_workers", "dataset_num_proc", _WHOLE),
    Rule(
        "val_size, eval_strategy, evaluation_strategy, eval_steps",
        "`val_set_size`, `eval_strategy`, `eval_steps`",
        values.put_held_out,
        "A share; a number of pairs is left out, because the host takes none for preferences.",
    ),
    *_also(_TEXT, "output_dir"),
    None,
    Rule(
        "num_train_epochs",
        "`num_epochs`",
        values.put_epochs,
        "T, the number of iterations: see [what differs](#what-differs).",
    ),
    _renamed("per_device_train_batch_size", "micro_batch_size", _WHOLE),
    _renamed("per_device_eval_batch_size", "eval_batch_size", _WHOLE),
    *_also(_WHOLE, "gradient_accumulation_steps"),
    Rule(
        "learning_rate, lr_scheduler_type, lr_scheduler_kwargs, warmup_ratio, warmup_steps",
        "`learning_rate`, `lr_scheduler`, `lr_scheduler_kwargs`, `warmup_ratio` or `warmup_steps`",
        values.put_schedule,
        "Of each iteration.",
    ),
    _renamed("optim", "optimizer", _TEXT),
    _renamed("optim_args", "optim_args", _TEXT),
    *_also(_NUMBER, "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *_also(_WHOLE, "seed"),
    None,
    Rule(
        "bf16, fp16, pure_bf16, tf32",
        "`bf16`, `fp16`, `tf32`",
        values.put_precision,
        "Neither is float32, as there.",
    ),
    Rule(
        "disable_gradient_checkpointing, use_reentrant_gc",
        "`gradient_checkpointing`, `gradient_checkpointing_kwargs`",
        values.put_checkpointing,
        "On unless switched off, as there.",
    ),
    Rule(
        "flash_attn",
        "`attn_implementation`",
        values.put_attention,
        "`auto` is unset; `disabled` is `eager`.",
    ),
    *_also(_SWITCH, "torch_compile"),
    *_also(_WHOLE, "dataloader_num_workers", "dataloader_prefetch_factor"),
    *_also(_SWITCH, "dataloader_pin_memory"),
    *_also(_WHOLE, "ddp_timeout"),
    None,
    *_also(_WHOLE, "logging_steps"),
    Rule(
        "save_strategy, save_steps, resume_from_checkpoint, overwrite_output_dir",
        "`save_strategy` or `save_steps`, `auto_resume_from_checkpoints`, `resume_from_checkpoint`",
        values.put_saving,
        "A run that is there is continued, never overwritten.",
    ),
    *_also(_WHOLE, "save_total_limit"),
    Rule(
        "report_to, run_name",
        "`use_wandb`, `use_tensorboard`, `use_mlflow`, `use_trackio`, `wandb_name`",
        values.put_trackers,
    ),
    *_also(_TEXT, "hub_model_id", "hub_strategy"),
)

RULE_KEYS = frozenset(name for rule in RULES if rule for name in rule.keys)
#: Every key that is known by its whole name.
KNOWN = RULE_KEYS | {one for names, _ in LEFT_OUT for one in names.split() if "*" not in one}


def why_left_out(name: str) -> str | None:
    """Why a key became nothing; None for one that LLaMA-Factory has not, as far as this knows."""
    if name in RULE_KEYS:
        return "it has no effect beside the other keys."
    found = (why for names, why in LEFT_OUT if any(fnmatchcase(name, n) for n in names.split()))
    return next(found, None)
