"""Keys of the method and of training that take more than a new name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sera_plugin.config.quoting import plain, quoted
from sera_plugin.tools.convert.settings import Settings
from sera_plugin.tools.convert.templates import OWN, TEMPLATES

_LOSSES = {
    "sigmoid": "dpo",
    "hinge": "slic",
    "ipo": "ipo",
    "simpo": "simpo",
    "kto_pair": "kto_pair",
    "orpo": "orpo",
}
_TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")


def put_method(settings: Settings) -> None:
    """`rl: sera` and the loss.

    Raises:
        ValueError: if the YAML does not train DPO, or a loss that SeRA has not.
    """
    stage, loss = settings.text("stage"), str(settings.text("pref_loss"))
    if stage != "dpo":
        raise ValueError(
            f"stage: {quoted(stage)} trains no preference pairs as rl: sera does; dpo does"
        )
    if loss not in _LOSSES:
        raise ValueError(
            f"pref_loss: {quoted(loss)} is not a loss that rl: sera has; {', '.join(_LOSSES)} are"
        )
    block: dict[str, Any] = {"selection_ratio": 0.7, "bootstrap_ratio": 0.3}
    out = settings.out
    out["plugins"] = ["sera_plugin.SeraPlugin"]
    out["rl"] = "sera"
    out["sera"] = block
    out["rl_beta"] = settings.number("pref_beta")
    smoothing = settings.number("dpo_label_smoothing")
    if smoothing:
        out["dpo_label_smoothing"] = smoothing
    weight = settings.number("pref_ftx") or 0.0
    if weight and loss in ("kto_pair", "orpo"):
        raise ValueError(f"pref_ftx has nothing like it with pref_loss: {loss}. Remove pref_ftx")
    if weight and loss != "simpo":
        if smoothing:
            raise ValueError(
                "pref_ftx with dpo_label_smoothing: the host has no loss of both. Remove one"
            )
        out["dpo_loss_type"], out["dpo_loss_weights"] = [loss, "sft"], [1.0, weight]
    else:
        block["loss"] = _LOSSES[loss]
    if loss == "orpo":
        settings.notes.append(
            "pref_loss: orpo counts the prompt's tokens in its likelihood term, as TRL does; "
            "LLaMA-Factory counts the answer's alone."
        )
    if loss == "simpo":
        out["simpo_gamma"] = settings.number("simpo_gamma")
        if weight:
            out["cpo_alpha"] = weight
    settings.notes.append(
        "sera: selection_ratio 0.7 and bootstrap_ratio 0.3 are the paper's. 1.0 and 0 train on all "
        "pairs and on no others, as LLaMA-Factory does, with a reference that moves every epoch; "
        "`reference: initial` beside them leaves it where LLaMA-Factory's is."
    )


def put_template(settings: Settings) -> None:
    template = settings.text("template")
    own = "the chat template of the model's own tokenizer"
    if template is None:
        settings.out["chat_template"] = OWN
        settings.notes.append(f"template: not set, so {own} is used, as LLaMA-Factory does.")
        return
    name, differs = TEMPLATES.get(template, (OWN, ""))
    settings.out["chat_template"] = name
    if name == OWN:
        settings.notes.append(
            f"template: {plain(template)} has no name in the host, so {own} is used. See that it "
            "renders what you trained with; a model without one needs `chat_template` set."
        )
    else:
        settings.notes.append(f"template: {template} is the host's {name}. {differs}".rstrip())


def put_held_out(settings: Settings) -> None:
    """How much of the data is held out, and when it is evaluated."""
    size = settings.number("val_size") or 0.0
    if size > 1:
        settings.lose(
            "val_size",
            "the host takes a share of the pairs here, not a number of them. Set val_set_size to "
            f"{size:g} divided by their number.",
        )
    elif size:
        settings.out["val_set_size"] = size
    held_out = "val_set_size" in settings.out or "test_datasets" in settings.out
    old = settings.text("evaluation_strategy")
    strategy = settings.text("eval_strategy") or old or "no"
    if strategy == "no":
        return
    if not held_out:
        for name in ("eval_strategy", "evaluation_strategy", "eval_steps"):
            settings.lose(name, "no pairs are held out.")
        return
    settings.out["eval_strategy"] = strategy
    if strategy == "steps":
        steps = settings.number("eval_steps")
        settings.out["eval_steps"] = steps or settings.number("logging_steps")


def put_epochs(settings: Settings) -> None:
    """Raises: ValueError: if there is no epoch to train."""
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


def put_schedule(settings: Settings) -> None:
    out = settings.out
    out["learning_rate"] = settings.number("learning_rate")
    out["lr_scheduler"] = settings.text("lr_scheduler_type")
    if settings.has("lr_scheduler_kwargs"):
        kwargs = settings.value("lr_scheduler_kwargs")
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"lr_scheduler_kwargs: {quoted(kwargs)} is not a block of keys")
        out["lr_scheduler_kwargs"] = dict(kwargs)
    ratio, steps = settings.number("warmup_ratio") or 0.0, settings.number("warmup_steps") or 0.0
    # transformers 5 takes a share for `warmup_steps` too.
    if ratio and steps:
        settings.lose("warmup_ratio", "warmup_steps wins.")
    if steps >= 1:
        out["warmup_steps"] = int(steps)
    elif steps or ratio:
        out["warmup_ratio"] = steps or ratio
    else:
        out["warmup_steps"] = 0
    settings.notes.append(
        "lr_scheduler_type and warm-up: each iteration has its own. `restart_optimizer: false` in "
        "`sera:` gives one schedule over all of them, as LLaMA-Factory has."
    )


def put_precision(settings: Settings) -> None:
    full = settings.switch("pure_bf16") or False
    bf16 = settings.switch("bf16") or full
    settings.out["bf16"] = bf16
    settings.out["fp16"] = settings.switch("fp16") or False
    if settings.has("tf32"):
        settings.out["tf32"] = settings.switch("tf32")
    if bf16 and not full and settings.text("finetuning_type") != "lora":
        settings.notes.append(
            "bf16: the host loads the weights in bfloat16; LLaMA-Factory trains them in float32, "
            "and has pure_bf16 for this."
        )


def put_checkpointing(settings: Settings) -> None:
    on = not settings.switch("disable_gradient_checkpointing")
    settings.out["gradient_checkpointing"] = on
    reentrant = settings.switch("use_reentrant_gc")
    if on:
        # The host refuses reentrant checkpointing where some layers are frozen.
        partly = "unfrozen_parameters" in settings.out
        settings.out["gradient_checkpointing_kwargs"] = {
            "use_reentrant": bool(reentrant) and not partly
        }


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
    if settings.has("resume_from_checkpoint"):
        asked = settings.value("resume_from_checkpoint")
        if isinstance(asked, str) and asked.lower() not in ("true", "false"):
            out["resume_from_checkpoint"] = asked
    if settings.switch("overwrite_output_dir"):
        settings.lose(
            "overwrite_output_dir",
            "a run here never overwrites another one. It continues the one in output_dir if that "
            "has the same settings, and else says what differs.",
        )


def put_trackers(settings: Settings) -> None:
    asked = [one for one in settings.texts("report_to") if one not in ("none", "all")]
    for one in asked:
        if one in _TRACKERS:
            settings.out[f"use_{one}"] = True
        else:
            settings.lose("report_to", f"{plain(one)} is not switched on by a key of this name.")
    if settings.texts("report_to") == ["all"]:
        settings.lose("report_to", "name the trackers.")
    name = settings.text("run_name")
    if name and "wandb" in asked:
        settings.out["wandb_name"] = name
    elif name:
        settings.lose("run_name", "only wandb has a name for a run here.")
    if "wandb" in asked:
        settings.notes.append("report_to: wandb's project is `wandb_project`.")
