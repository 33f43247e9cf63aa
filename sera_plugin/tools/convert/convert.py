"""Which of LLaMA-Factory's keys become what, and a YAML of them as an Axolotl one for `rl: sera`.

Names and defaults are those of LLaMA-Factory's `hparams` and of transformers' training arguments,
which it takes too. docs/llama-factory.md is written from `RULES`.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import yaml

from sera_plugin.config.block import closest
from sera_plugin.config.credentials import MASK, is_secret
from sera_plugin.config.quoting import plain
from sera_plugin.data.text import encodable
from sera_plugin.rundir.writing import write_text
from sera_plugin.tools.command import read_yaml
from sera_plugin.tools.convert import data, rules
from sera_plugin.tools.convert.settings import DEFAULTS, LEFT_OUT, Settings


class Rule(NamedTuple):
    """Keys that are read together; `to` and `about` say what becomes of them.

    `read` returns keys of the new YAML, where None and an empty list are nothing. It raises
    ValueError, naming key and value, for what has nothing like it here.
    """

    keys: str
    to: str
    read: Callable[[Settings], dict[str, Any]]
    about: str = ""

    @property
    def names(self) -> list[str]:
        return self.keys.split(", ")


def _renamed(name: str, to: str, read: Callable[[Settings, str], object]) -> Rule:
    return Rule(name, f"`{to}`", lambda settings: {to: read(settings, name)})


def _same(read: Callable[[Settings, str], object], names: str) -> list[Rule]:
    return [_renamed(name, name, read) for name in names.split()]


#: In the order of the YAML to be written; None begins a paragraph.
RULES: list[Rule | None] = [
    Rule("model_name_or_path, model_revision", "`base_model`, `revision_of_model`", rules.model),
    Rule("add_tokens, add_special_tokens", "`tokens`, `special_tokens`", rules.tokens),
    _renamed("use_fast_tokenizer", "tokenizer_use_fast", Settings.switch),
    None,
    Rule("stage, pref_loss, pref_beta, dpo_label_smoothing, pref_ftx, simpo_gamma",
         "`rl: sera`, `sera.loss`, `rl_beta`, `dpo_label_smoothing`, `simpo_gamma`", rules.method,
         "`stage: dpo` alone. `sigmoid` is `dpo`, `hinge` is `slic`, the others keep their names. "
         "`pref_ftx` becomes `dpo_loss_type: [sigmoid, sft]` with `dpo_loss_weights`, for SimPO "
         "`cpo_alpha`."),
    None,
    Rule("finetuning_type", "`adapter`", rules.adapter,
         "`full` has no adapter; `oft` is refused."),
    Rule("quantization_bit, quantization_method, quantization_type, double_quantization",
         "`adapter: qlora` with `load_in_4bit`, or `load_in_8bit`; `bnb_config_kwargs`",
         rules.quantization, "bitsandbytes' 4 and 8 bits alone."),
    Rule("lora_rank, lora_alpha, lora_dropout, lora_target, additional_target, use_rslora, "
         "use_dora",
         "`lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_linear` or `lora_target_modules`, "
         "`lora_modules_to_save`, `peft_use_rslora`, `peft_use_dora`", rules.lora,
         "`lora_alpha` is twice the rank unless set, as there."),
    Rule("adapter_name_or_path, create_new_adapter", "`lora_model_dir`", rules.trained_adapter,
         "One adapter, to be continued."),
    Rule("freeze_trainable_layers, freeze_trainable_modules, freeze_extra_modules",
         "`unfrozen_parameters`", rules.unfrozen,
         "Where the model is a directory, whose config.json says how many layers it has."),
    *_same(Settings.number, "loraplus_lr_ratio loraplus_lr_embedding"),
    None,
    Rule("dataset, eval_dataset, dataset_dir, max_samples", "`datasets`, `test_datasets`",
         data.datasets, "See [datasets](#datasets)."),
    Rule("template", "`chat_template`", rules.template, "See [templates](#templates)."),
    _renamed("cutoff_len", "sequence_len", Settings.whole),
    _renamed("preprocessing_num_workers", "dataset_num_proc", Settings.whole),
    Rule("val_size, eval_strategy, evaluation_strategy, eval_steps",
         "`val_set_size`, `eval_strategy`, `eval_steps`", rules.held_out,
         "A share; a number of pairs is left out, because the host takes none for preferences."),
    *_same(Settings.text, "output_dir"),
    None,
    Rule("num_train_epochs", "`num_epochs`", rules.epochs,
         "T, the number of iterations: see [what differs](#what-differs)."),
    _renamed("per_device_train_batch_size", "micro_batch_size", Settings.whole),
    _renamed("per_device_eval_batch_size", "eval_batch_size", Settings.whole),
    *_same(Settings.whole, "gradient_accumulation_steps"),
    Rule("learning_rate, lr_scheduler_type, lr_scheduler_kwargs, warmup_ratio, warmup_steps",
         "`learning_rate`, `lr_scheduler`, `lr_scheduler_kwargs`, `warmup_ratio` or "
         "`warmup_steps`", rules.schedule, "Of each iteration."),
    _renamed("optim", "optimizer", Settings.text),
    *_same(Settings.text, "optim_args"),
    *_same(Settings.number, "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm"),
    *_same(Settings.whole, "seed"),
    None,
    Rule("bf16, fp16, pure_bf16, tf32", "`bf16`, `fp16`, `tf32`", rules.precision,
         "Neither is float32, as there."),
    Rule("disable_gradient_checkpointing, use_reentrant_gc",
         "`gradient_checkpointing`, `gradient_checkpointing_kwargs`", rules.checkpointing,
         "On unless switched off, as there."),
    Rule("flash_attn", "`attn_implementation`", rules.attention,
         "`auto` is unset; `disabled` is `eager`."),
    *_same(Settings.switch, "torch_compile"),
    *_same(Settings.whole, "dataloader_num_workers dataloader_prefetch_factor"),
    *_same(Settings.switch, "dataloader_pin_memory"),
    *_same(Settings.whole, "ddp_timeout"),
    *_same(Settings.text, "deepspeed"),
    None,
    *_same(Settings.whole, "logging_steps"),
    Rule("save_strategy, save_steps, resume_from_checkpoint, overwrite_output_dir",
         "`save_strategy` or `save_steps`, `auto_resume_from_checkpoints`, "
         "`resume_from_checkpoint`", rules.saving,
         "A run that is there is continued, never overwritten."),
    *_same(Settings.whole, "save_total_limit"),
    *_same(Settings.switch, "load_best_model_at_end"),
    Rule("report_to, run_name",
         "`use_wandb`, `use_tensorboard`, `use_mlflow`, `use_trackio`, `wandb_name`",
         rules.trackers),
    *_same(Settings.text, "hub_model_id hub_strategy"),
]  # fmt: skip
RULE_KEYS = frozenset(name for rule in RULES if rule for name in rule.names)
_WHYS = {pattern: why for patterns, why in LEFT_OUT.items() for pattern in patterns.split()}
#: Every key that is known by its whole name.
KNOWN = RULE_KEYS | {name for name in _WHYS if "*" not in name}


@dataclass(frozen=True)
class Converted:
    """The new YAML, files to be written beside it -> their rows, and what to tell about it."""

    text: str
    rows: Mapping[Path, list[Any]]
    said: str

    def write(self, path: Path) -> None:
        """Write the YAML, and its rows beside it: all of the files, or none.

        Raises:
            FileExistsError: if any of the files is there.
            OSError: if one cannot be written, with what to do about it.
        """
        for each in (path, *self.rows):
            if os.path.lexists(each):
                raise FileExistsError(f"{each} is there, and nothing is overwritten. Move it away.")
        texts = {each: "".join(map(_line, rows)) for each, rows in self.rows.items()}
        with ExitStack() as undo:
            for each, text in (texts | {path: self.text}).items():
                write_text(each, text)
                undo.callback(each.unlink)
            undo.pop_all()


def _line(row: Any) -> str:
    line = json.dumps(row, ensure_ascii=False)
    # Half of a surrogate pair cannot be written as itself; training names the row.
    return (line if encodable(line) else json.dumps(row)) + "\n"


def convert(path: Path, output: Path | None = None) -> Converted:
    """Read a LLaMA-Factory YAML and the datasets it names.

    Paths in the YAML are relative to the working directory, as LLaMA-Factory reads them. `output`
    is where the new one will go, for the paths in it.

    Raises:
        ValueError: if there is nothing like what it trains here, naming the key and its value.
        OSError: if something cannot be read.
    """
    settings = Settings(read_yaml(path), output)
    ends = [0]
    for rule in RULES:
        if rule is None:
            ends.append(len(settings.out))
        else:
            made = rule.read(settings).items()
            settings.out |= {key: value for key, value in made if value is not None and value != []}
    items = list(settings.out.items())
    text = f"# {path.name}, converted by `axolotl sera convert`.\n" + "\n".join(
        yaml.safe_dump(dict(items[first:last]), sort_keys=False, allow_unicode=True, width=100)
        for first, last in pairwise([*ends, len(items)])
        if last > first
    )
    return Converted(text, settings.rows, _say(path, settings))


def _say(path: Path, settings: Settings) -> str:
    unknown, lost = {}, dict(settings.lost)
    for name, value in settings.given.items():
        if value is None or name in settings.read or name in lost:
            continue
        whys = [why for pattern, why in _WHYS.items() if fnmatchcase(str(name), pattern)]
        if name in RULE_KEYS:
            lost[name] = "it has no effect beside the other keys."
        elif whys:
            lost[name] = whys[0]
        else:
            close = closest(str(name), KNOWN, cutoff=0.75)
            unknown[name] = f"Did you mean {close}?" if close else "Not a key that this knows."
    converted = sum(settings.has(name) and name not in lost for name in settings.read)
    lines = [f"{path}: {converted} of {len(settings.given)} keys converted."]
    for title, found in (("Left out:", lost), ("Unknown and left out:", unknown)):
        if found:
            lines += ["", title]
        for name, why in found.items():
            lines += [f"  {plain(str(name))}: {_shown(name, settings.given[name])}"]
            lines += wrap(why, 98, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "To know:"]
    unset = [name for name in settings.read if name in DEFAULTS and not settings.has(name)]
    defaults = ", ".join(f"{name} {_shown(name, DEFAULTS[name])}" for name in unset)
    for note in [*settings.notes, f"What the YAML does not say is LLaMA-Factory's: {defaults}."]:
        lines += wrap(note, 98, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def _shown(name: object, value: Any) -> str:
    """A value of the YAML as the YAML has it, escaped; never a secret."""
    if is_secret(str(name)):
        return MASK
    return str(value).lower() if isinstance(value, bool) else plain(str(value))
