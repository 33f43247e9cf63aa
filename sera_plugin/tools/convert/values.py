"""Keys that take more than a new name: each function reads some and writes what they become.

They raise ValueError, naming key and value, for what has nothing like it here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import plain, quoted
from sera_plugin.tools.convert.names import ATTENTION, OWN_TEMPLATE, TEMPLATES
from sera_plugin.tools.convert.settings import Settings

_SAME = ("ipo", "simpo", "kto_pair", "orpo")
_LOSSES = {"sigmoid": "dpo", "hinge": "slic"} | dict(zip(_SAME, _SAME, strict=True))
_TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")

# ------------------------------------------------------------------ the model


def put_model(settings: Settings) -> None:
    model = settings.text("model_name_or_path")
    if not model:
        raise ValueError("model_name_or_path is not set")
    settings.out["base_model"] = model
    if (revision := settings.text("model_revision")) not in (None, "main"):
        settings.out["revision_of_model"] = revision


def put_tokens(settings: Settings) -> None:
    if tokens := settings.texts("add_tokens"):
        settings.out["tokens"] = tokens
    if special := settings.texts("add_special_tokens"):
        settings.out["special_tokens"] = {"additional_special_tokens": special}


def put_attention(settings: Settings) -> None:
    asked = settings.text("flash_attn") or "auto"
    if asked not in ATTENTION:
        raise ValueError(f"flash_attn: {quoted(asked)} is none of {', '.join(ATTENTION)}")
    if ATTENTION[asked]:
        settings.out["attn_implementation"] = ATTENTION[asked]


def put_kind(settings: Settings) -> None:
    kind = settings.text("finetuning_type")
    if kind == "lora":
        settings.out["adapter"] = "lora"
    elif kind not in ("full", "freeze"):
        raise ValueError(
            f"finetuning_type: {quoted(kind)} has nothing like it for rl: sera; lora, full and "
            "freeze have"
        )


def put_quantization(settings: Settings) -> None:
    bits = settings.whole("quantization_bit")
    if bits is None:
        return
    method = settings.text("quantization_method")
    if bits not in (4, 8) or method not in ("bnb", "bitsandbytes"):
        raise ValueError(
            f"quantization_bit: {bits} with quantization_method: {quoted(method)} has nothing like "
            "it here; bitsandbytes' 4 and 8 bits have"
        )
    if "adapter" not in settings.out:
        raise ValueError(f"quantization_bit: {bits} needs finetuning_type: lora")
    if bits == 8:
        settings.out["load_in_8bit"] = True
        return
    settings.out |= {"adapter": "qlora", "load_in_4bit": True}
    asked = {
        "bnb_4bit_quant_type": settings.text("quantization_type"),
        "bnb_4bit_use_double_quant": settings.switch("double_quantization"),
    }
    if list(asked.values()) != ["nf4", True]:
        settings.out["bnb_config_kwargs"] = asked


def put_lora(settings: Settings) -> None:
    out = settings.out
    if "adapter" not in out:
        return
    rank = settings.whole("lora_rank") or 0
    out["lora_r"] = rank
    # LLaMA-Factory's default, 0 included.
    out["lora_alpha"] = settings.whole("lora_alpha") or 2 * rank
    out["lora_dropout"] = settings.number("lora_dropout")
    targets = settings.texts("lora_target")
    if not targets:
        raise ValueError(f"lora_target: {quoted(settings.given['lora_target'])} names no module")
    if targets == ["all"]:
        out["lora_target_linear"] = True
    else:
        out["lora_target_modules"] = targets
    if more := settings.texts("additional_target"):
        out["lora_modules_to_save"] = more
    for name in ("use_rslora", "use_dora"):
        if settings.switch(name):
            out[f"peft_{name}"] = True


def put_trained_adapter(settings: Settings) -> None:
    adapters = settings.texts("adapter_name_or_path") if "adapter" in settings.out else []
    if not adapters:
        return
    if len(adapters) > 1 or settings.switch("create_new_adapter"):
        raise ValueError(
            "adapter_name_or_path: LLaMA-Factory merges adapters into the model and trains a new "
            "one. Merge them first, set model_name_or_path to the result and remove this key"
        )
    settings.out["lora_model_dir"] = adapters[0]
    settings.notes.append(
        "adapter_name_or_path: the first reference is the model with this adapter; "
        "LLaMA-Factory's is the model without it."
    )


def put_layers(settings: Settings) -> None:
    """Patterns of the parameters that `finetuning_type: freeze` trains."""
    if settings.text("finetuning_type") != "freeze":
        return
    count = settings.whole("freeze_trainable_layers") or 0
    layers = _layers(str(settings.text("model_name_or_path")))
    numbers = range(max(0, layers - count), layers) if count > 0 else range(min(-count, layers))
    named = f"({'|'.join(map(str, numbers))})"
    modules = settings.texts("freeze_trainable_modules")
    # The host takes every dot for a dot.
    patterns = [f"[a-z_.]+.{named}.{'' if one == 'all' else one}" for one in modules]
    patterns += [f"[a-z0-9_.]*{one}" for one in settings.texts("freeze_extra_modules")]
    if not numbers or not modules:
        raise ValueError(
            "freeze_trainable_layers and freeze_trainable_modules leave nothing to train"
        )
    settings.out["unfrozen_parameters"] = patterns


def _layers(model: str) -> int:
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if isinstance(config.get(name), int):
                return int(config[name])
    except (OSError, ValueError, AttributeError):
        pass
    raise ValueError(
        "finetuning_type: freeze needs the model's number of layers, and there is no "
        f"{quoted(str(path), 200)} that says it. Download the model and set model_name_or_path to "
        "its directory"
    )


# ------------------------------------------------------------------ the method and the data


def put_method(settings: Settings) -> None:
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
    out |= {"plugins": ["sera_plugin.SeraPlugin"], "rl": "sera", "sera": block}
    out["rl_beta"] = settings.number("pref_beta")
    if smoothing := settings.number("dpo_label_smoothing"):
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
    elif size:
        out["val_set_size"] = size
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


# ------------------------------------------------------------------ training


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


def put_precision(settings: Settings) -> None:
    full = settings.switch("pure_bf16") or False
    bf16 = settings.switch("bf16") or full
    settings.out |= {"bf16": bf16, "fp16": settings.switch("fp16") or False}
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
    reentrant = bool(settings.switch("use_reentrant_gc"))
    if on:
        # The host refuses reentrant checkpointing where some layers are frozen.
        partly = "unfrozen_parameters" in settings.out
        settings.out["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant and not partly}


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
        if name:
            settings.out["wandb_name"] = name
        settings.notes.append("report_to: wandb's project is `wandb_project`.")
    elif name:
        settings.lose("run_name", "only wandb has a name for a run here.")
