"""Data, training, saving and trackers: which of LLaMA-Factory's keys become what."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sera_plugin.config.quoting import plain, quoted
from sera_plugin.tools.convert.data import put_datasets
from sera_plugin.tools.convert.names import ATTENTION, OWN_TEMPLATE, TEMPLATES
from sera_plugin.tools.convert.settings import Settings, paragraph, renamed, rule, same

_TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")


paragraph()


rule(
    "dataset, eval_dataset, dataset_dir, max_samples",
    "`datasets`, `test_datasets`",
    "See [datasets](#datasets).",
)(put_datasets)


@rule("template", "`chat_template`", "See [templates](#templates).")
def put_template(settings: Settings) -> None:
    template = settings.text("template")
    own = "the chat template of the model's own tokenizer"
    name, differs = TEMPLATES.get(str(template), (OWN_TEMPLATE, ""))
    settings.out["chat_template"] = name
    if template is None:
        note = f"not set, so {own} is used, as LLaMA-Factory does."
    elif name == OWN_TEMPLATE:
        note = (
            f"{plain(template)} has no name in the host, so {own} is used. See that it "
            "renders what you trained with; a model without one needs `chat_template` set."
        )
    else:
        note = f"{template} is the host's {name}. {differs}".rstrip()
    settings.notes.append(f"template: {note}")


renamed("cutoff_len", "sequence_len", Settings.whole)
renamed("preprocessing_num_workers", "dataset_num_proc", Settings.whole)


@rule(
    "val_size, eval_strategy, evaluation_strategy, eval_steps",
    "`val_set_size`, `eval_strategy`, `eval_steps`",
    "A share; a number of pairs is left out, because the host takes none for preferences.",
)
def put_held_out(settings: Settings) -> None:
    """How much of the data is held out, and when it is evaluated."""
    out = settings.out
    size = settings.number("val_size") or 0.0
    if size > 1:
        settings.lose(
            "val_size",
            "the host takes a share of the pairs here, not a number of them. Set val_set_size to "
            f"{size:g} divided by their number.",
        )
    else:
        settings.put("val_set_size", size or None)
    old = settings.text("evaluation_strategy")
    strategy = settings.text("eval_strategy") or old or "no"
    if strategy == "no":
        return
    if "val_set_size" not in out and "test_datasets" not in out:
        for name in ("eval_strategy", "evaluation_strategy", "eval_steps"):
            settings.lose(name, "no pairs are held out.")
        return
    out["eval_strategy"] = strategy
    if strategy == "steps":
        out["eval_steps"] = settings.number("eval_steps") or settings.number("logging_steps")


same(Settings.text, "output_dir")
paragraph()


@rule(
    "num_train_epochs",
    "`num_epochs`",
    "T, the number of iterations: see [what differs](#what-differs).",
)
def put_epochs(settings: Settings) -> None:
    asked = settings.number("num_train_epochs") or 0.0
    epochs = math.ceil(asked)
    if epochs < 1:
        raise ValueError(f"num_train_epochs: {asked:g} trains nothing")
    settings.out["num_epochs"] = epochs
    part = "" if epochs == asked else f" {asked:g} is rounded up: iterations are whole."
    if epochs == 1:
        part += " With one iteration there is only the first, which is plain DPO; the paper has 3."
    settings.notes.append(
        f"num_train_epochs: {asked:g} passes over the same pairs become num_epochs: {epochs}, "
        "that many iterations. The first trains on all pairs, every other one on those it keeps "
        f"and on sampled ones, against the policy it starts from.{part}"
    )


renamed("per_device_train_batch_size", "micro_batch_size", Settings.whole)
renamed("per_device_eval_batch_size", "eval_batch_size", Settings.whole)
same(Settings.whole, "gradient_accumulation_steps")


@rule(
    "learning_rate, lr_scheduler_type, lr_scheduler_kwargs, warmup_ratio, warmup_steps",
    "`learning_rate`, `lr_scheduler`, `lr_scheduler_kwargs`, `warmup_ratio` or `warmup_steps`",
    "Of each iteration.",
)
def put_schedule(settings: Settings) -> None:
    out = settings.out
    out["learning_rate"] = settings.number("learning_rate")
    out["lr_scheduler"] = settings.text("lr_scheduler_type")
    if (kwargs := settings.value("lr_scheduler_kwargs")) is not None:
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"lr_scheduler_kwargs: {quoted(kwargs)} is not a block of keys")
        out["lr_scheduler_kwargs"] = dict(kwargs)
    ratio, steps = settings.number("warmup_ratio") or 0.0, settings.number("warmup_steps") or 0.0
    # transformers 5 takes a share for `warmup_steps` too.
    if ratio and steps:
        settings.lose("warmup_ratio", "warmup_steps wins.")
    if 0 < steps < 1 or (ratio and not steps):
        out["warmup_ratio"] = steps or ratio
    else:
        out["warmup_steps"] = int(steps)
    settings.notes.append(
        "lr_scheduler_type and warm-up: each iteration has its own. `restart_optimizer: false` in "
        "`sera:` gives one schedule over all of them, as LLaMA-Factory has."
    )


renamed("optim", "optimizer", Settings.text)
renamed("optim_args", "optim_args", Settings.text)
same(Settings.number, "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
same(Settings.whole, "seed")
paragraph()


@rule("bf16, fp16, pure_bf16, tf32", "`bf16`, `fp16`, `tf32`", "Neither is float32, as there.")
def put_precision(settings: Settings) -> None:
    full = settings.switch("pure_bf16") or False
    bf16 = settings.switch("bf16") or full
    settings.out |= {"bf16": bf16, "fp16": settings.switch("fp16") or False}
    settings.put("tf32", settings.switch("tf32"))
    if bf16 and not full and settings.text("finetuning_type") != "lora":
        settings.notes.append(
            "bf16: the host loads the weights in bfloat16; LLaMA-Factory trains them in float32, "
            "and has pure_bf16 for this."
        )


@rule(
    "disable_gradient_checkpointing, use_reentrant_gc",
    "`gradient_checkpointing`, `gradient_checkpointing_kwargs`",
    "On unless switched off, as there.",
)
def put_checkpointing(settings: Settings) -> None:
    on = not settings.switch("disable_gradient_checkpointing")
    settings.out["gradient_checkpointing"] = on
    reentrant = bool(settings.switch("use_reentrant_gc"))
    if on:
        # The host refuses reentrant checkpointing where some layers are frozen.
        partly = "unfrozen_parameters" in settings.out
        settings.out["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant and not partly}


@rule("flash_attn", "`attn_implementation`", "`auto` is unset; `disabled` is `eager`.")
def put_attention(settings: Settings) -> None:
    asked = settings.text("flash_attn") or "auto"
    if asked not in ATTENTION:
        raise ValueError(f"flash_attn: {quoted(asked)} is none of {', '.join(ATTENTION)}")
    settings.put("attn_implementation", ATTENTION[asked])


same(Settings.switch, "torch_compile")
same(Settings.whole, "dataloader_num_workers", "dataloader_prefetch_factor")
same(Settings.switch, "dataloader_pin_memory")
same(Settings.whole, "ddp_timeout")
paragraph()
same(Settings.whole, "logging_steps")


@rule(
    "save_strategy, save_steps, resume_from_checkpoint, overwrite_output_dir",
    "`save_strategy` or `save_steps`, `auto_resume_from_checkpoints`, `resume_from_checkpoint`",
    "A run that is there is continued, never overwritten.",
)
def put_saving(settings: Settings) -> None:
    out = settings.out
    strategy = settings.text("save_strategy")
    if strategy == "steps":
        out["save_steps"] = settings.number("save_steps")
    elif strategy == "best":
        settings.lose("save_strategy", "the host has `best` for supervised fine-tuning only.")
    else:
        out["save_strategy"] = strategy
    out["auto_resume_from_checkpoints"] = True
    asked = settings.value("resume_from_checkpoint")
    if isinstance(asked, str) and asked.lower() not in ("true", "false"):
        out["resume_from_checkpoint"] = asked
    if settings.switch("overwrite_output_dir"):
        settings.lose(
            "overwrite_output_dir",
            "a run here never overwrites another one. It continues the one in output_dir if that "
            "has the same settings, and else says what differs.",
        )


same(Settings.whole, "save_total_limit")


@rule(
    "report_to, run_name",
    "`use_wandb`, `use_tensorboard`, `use_mlflow`, `use_trackio`, `wandb_name`",
)
def put_trackers(settings: Settings) -> None:
    named = settings.texts("report_to")
    for one in named:
        if one in _TRACKERS:
            settings.out[f"use_{one}"] = True
        elif one not in ("none", "all"):
            settings.lose("report_to", f"{plain(one)} is not switched on by a key of this name.")
    if named == ["all"]:
        settings.lose("report_to", "name the trackers.")
    name = settings.text("run_name")
    if "wandb" in named:
        settings.put("wandb_name", name or None)
        settings.notes.append("report_to: wandb's project is `wandb_project`.")
    elif name:
        settings.lose("run_name", "only wandb has a name for a run here.")


same(Settings.text, "hub_model_id", "hub_strategy")
