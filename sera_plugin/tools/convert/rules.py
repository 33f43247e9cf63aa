"""What becomes of LLaMA-Factory's keys that are more than renamed.

Each rule returns keys of the new YAML; None and an empty list are nothing. It raises ValueError,
naming key and value, for what has nothing like it here.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import plain, quoted
from sera_plugin.tools.convert.settings import ATTENTION, OWN_TEMPLATE, TEMPLATES, Settings

_LOSSES = {"sigmoid": "dpo", "hinge": "slic"}
_LOSSES |= {loss: loss for loss in ("ipo", "simpo", "kto_pair", "orpo")}
_TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")


def model(settings: Settings) -> dict[str, Any]:
    path, revision = settings.text("model_name_or_path"), settings.text("model_revision")
    if not path:
        raise ValueError("model_name_or_path is not set")
    return {"base_model": path, "revision_of_model": None if revision == "main" else revision}


def tokens(settings: Settings) -> dict[str, Any]:
    special = settings.texts("add_special_tokens")
    special_tokens = {"additional_special_tokens": special} if special else None
    return {"tokens": settings.texts("add_tokens"), "special_tokens": special_tokens}


def method(settings: Settings) -> dict[str, Any]:
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
    out: dict[str, Any] = {"plugins": ["sera_plugin.SeraPlugin"], "rl": "sera", "sera": block}
    out["rl_beta"] = settings.number("pref_beta")
    out["dpo_label_smoothing"] = smoothing = settings.number("dpo_label_smoothing") or None
    weight = settings.number("pref_ftx") or None
    if weight and loss in ("kto_pair", "orpo"):
        raise ValueError(f"pref_ftx has nothing like it with pref_loss: {loss}. Remove pref_ftx")
    if weight and loss != "simpo":
        if smoothing:
            raise ValueError(
                "pref_ftx with dpo_label_smoothing: the host has no loss of both. Remove one"
            )
        out |= {"dpo_loss_type": [loss, "sft"], "dpo_loss_weights": [1.0, weight]}
    else:
        block["loss"] = _LOSSES[loss]
    if loss == "orpo":
        settings.notes.append(
            "pref_loss: orpo counts the prompt's tokens in its likelihood term, as TRL does; "
            "LLaMA-Factory counts the answer's alone."
        )
    if loss == "simpo":
        out |= {"simpo_gamma": settings.number("simpo_gamma"), "cpo_alpha": weight}
    settings.notes.append(
        "sera: selection_ratio 0.7 and bootstrap_ratio 0.3 are the paper's. 1.0 and 0 train on all "
        "pairs and on no others, as LLaMA-Factory does, with a reference that moves every epoch; "
        "`reference: initial` beside them leaves it where LLaMA-Factory's is."
    )
    return out


def adapter(settings: Settings) -> dict[str, Any]:
    kind = settings.text("finetuning_type")
    if kind not in ("lora", "full", "freeze"):
        raise ValueError(
            f"finetuning_type: {quoted(kind)} has nothing like it for rl: sera; lora, full and "
            "freeze have"
        )
    return {"adapter": "lora" if kind == "lora" else None}


def quantization(settings: Settings) -> dict[str, Any]:
    bits = settings.whole("quantization_bit")
    if bits is None:
        return {}
    library = settings.text("quantization_method")
    if bits not in (4, 8) or library not in ("bnb", "bitsandbytes"):
        raise ValueError(
            f"quantization_bit: {bits} with quantization_method: {quoted(library)} has nothing "
            "like it here; bitsandbytes' 4 and 8 bits have"
        )
    if "adapter" not in settings.out:
        raise ValueError(f"quantization_bit: {bits} needs finetuning_type: lora")
    if bits == 8:
        return {"load_in_8bit": True}
    kind, double = settings.text("quantization_type"), settings.switch("double_quantization")
    given = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    usual = kind == "nf4" and double
    kwargs = {} if usual else {"bnb_config_kwargs": given}
    return {"adapter": "qlora", "load_in_4bit": True, **kwargs}


def lora(settings: Settings) -> dict[str, Any]:
    if "adapter" not in settings.out:
        return {}
    rank = settings.whole("lora_rank") or 0
    # LLaMA-Factory's default, 0 included.
    alpha = settings.whole("lora_alpha") or 2 * rank
    dropout, targets = settings.number("lora_dropout"), settings.texts("lora_target")
    if not targets:
        raise ValueError(f"lora_target: {quoted(settings.given['lora_target'])} names no module")
    linear = targets == ["all"]
    return {
        "lora_r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "lora_target_linear": linear or None,
        "lora_target_modules": None if linear else targets,
        "lora_modules_to_save": settings.texts("additional_target"),
        "peft_use_rslora": settings.switch("use_rslora") or None,
        "peft_use_dora": settings.switch("use_dora") or None,
    }


def trained_adapter(settings: Settings) -> dict[str, Any]:
    adapters = settings.texts("adapter_name_or_path") if "adapter" in settings.out else []
    if not adapters:
        return {}
    if len(adapters) > 1 or settings.switch("create_new_adapter"):
        raise ValueError(
            "adapter_name_or_path: LLaMA-Factory merges adapters into the model and trains a new "
            "one. Merge them first, set model_name_or_path to the result and remove this key"
        )
    settings.notes.append(
        "adapter_name_or_path: the first reference is the model with this adapter; "
        "LLaMA-Factory's is the model without it."
    )
    return {"lora_model_dir": adapters[0]}


def unfrozen(settings: Settings) -> dict[str, Any]:
    """Patterns of the parameters that `finetuning_type: freeze` trains."""
    if settings.text("finetuning_type") != "freeze":
        return {}
    count = settings.whole("freeze_trainable_layers") or 0
    layers = _layers(str(settings.text("model_name_or_path")))
    numbers = range(max(0, layers - count), layers) if count > 0 else range(min(-count, layers))
    named = f"({'|'.join(map(str, numbers))})"
    modules = settings.texts("freeze_trainable_modules")
    if not numbers or not modules:
        raise ValueError(
            "freeze_trainable_layers and freeze_trainable_modules leave nothing to train"
        )
    # The host takes every dot for a dot.
    patterns = [f"[a-z_.]+.{named}.{'' if one == 'all' else one}" for one in modules]
    patterns += [f"[a-z0-9_.]*{one}" for one in settings.texts("freeze_extra_modules")]
    return {"unfrozen_parameters": patterns}


def _layers(model: str) -> int:
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        found = [config.get(name) for name in ("num_hidden_layers", "num_layers", "n_layer")]
        return next(count for count in found if isinstance(count, int))
    except (OSError, ValueError, AttributeError, StopIteration):
        raise ValueError(
            "finetuning_type: freeze needs the model's number of layers, and there is no "
            f"{quoted(str(path), 200)} that says it. Download the model and set "
            "model_name_or_path to its directory"
        ) from None


def template(settings: Settings) -> dict[str, Any]:
    given = settings.text("template")
    own = "so the chat template of the model's own tokenizer is used"
    name, differs = TEMPLATES.get(str(given), (OWN_TEMPLATE, ""))
    note = f"{given} is the host's {name}. {differs}".rstrip()
    if given is None:
        note = f"not set, {own}, as LLaMA-Factory does."
    elif name == OWN_TEMPLATE:
        note = f"{plain(given)} has no name in the host, {own}. See that it renders what you "
        note += "trained with; a model without one needs `chat_template` set."
    settings.notes.append(f"template: {note}")
    return {"chat_template": name}


def held_out(settings: Settings) -> dict[str, Any]:
    """How much of the data is held out, and when it is evaluated."""
    size = settings.number("val_size") or None
    if size and size > 1:
        settings.lose(
            "val_size",
            "the host takes a share of the pairs here, not a number of them. Set val_set_size to "
            f"{size:g} divided by their number.",
        )
        size = None
    old = settings.text("evaluation_strategy")
    strategy = settings.text("eval_strategy") or old or "no"
    if strategy != "no" and size is None and "test_datasets" not in settings.out:
        for name in ("eval_strategy", "evaluation_strategy", "eval_steps"):
            settings.lose(name, "no pairs are held out.")
        strategy = "no"
    out: dict[str, Any] = {
        "val_set_size": size,
        "eval_strategy": None if strategy == "no" else strategy,
    }
    if strategy == "steps":
        out["eval_steps"] = settings.number("eval_steps") or settings.number("logging_steps")
    return out


def epochs(settings: Settings) -> dict[str, Any]:
    asked = settings.number("num_train_epochs") or 0.0
    whole = math.ceil(asked)
    if whole < 1:
        raise ValueError(f"num_train_epochs: {asked:g} trains nothing")
    part = "" if whole == asked else f" {asked:g} is rounded up: iterations are whole."
    if whole == 1:
        part += " With one iteration there is only the first, which is plain DPO; the paper has 3."
    settings.notes.append(
        f"num_train_epochs: {asked:g} passes over the same pairs become num_epochs: {whole}, "
        "that many iterations. The first trains on all pairs, every other one on those it keeps "
        f"and on sampled ones, against the policy it starts from.{part}"
    )
    return {"num_epochs": whole}


def schedule(settings: Settings) -> dict[str, Any]:
    out: dict[str, Any] = {"learning_rate": settings.number("learning_rate")}
    out["lr_scheduler"] = settings.text("lr_scheduler_type")
    out["lr_scheduler_kwargs"] = kwargs = settings.value("lr_scheduler_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"lr_scheduler_kwargs: {quoted(kwargs)} is not a block of keys")
    ratio, steps = settings.number("warmup_ratio") or 0.0, settings.number("warmup_steps") or 0.0
    if ratio and steps:
        settings.lose("warmup_ratio", "warmup_steps wins.")
    settings.notes.append(
        "lr_scheduler_type and warm-up: each iteration has its own. `restart_optimizer: false` in "
        "`sera:` gives one schedule over all of them, as LLaMA-Factory has."
    )
    # transformers 5 takes a share for `warmup_steps` too.
    share = steps if 0 < steps < 1 else ratio if not steps else 0.0
    return out | ({"warmup_ratio": share} if share else {"warmup_steps": int(steps)})


def precision(settings: Settings) -> dict[str, Any]:
    full = settings.switch("pure_bf16") or False
    bf16 = settings.switch("bf16") or full
    if bf16 and not full and settings.text("finetuning_type") != "lora":
        settings.notes.append(
            "bf16: the host loads the weights in bfloat16; LLaMA-Factory trains them in float32, "
            "and has pure_bf16 for this."
        )
    return {"bf16": bf16, "fp16": settings.switch("fp16") or False, "tf32": settings.switch("tf32")}


def checkpointing(settings: Settings) -> dict[str, Any]:
    on = not settings.switch("disable_gradient_checkpointing")
    # The host refuses reentrant checkpointing where some layers are frozen.
    partly = "unfrozen_parameters" in settings.out
    how = {"use_reentrant": bool(settings.switch("use_reentrant_gc")) and not partly}
    return {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": how if on else None}


def attention(settings: Settings) -> dict[str, Any]:
    asked = settings.text("flash_attn") or "auto"
    if asked not in ATTENTION:
        raise ValueError(f"flash_attn: {quoted(asked)} is none of {', '.join(ATTENTION)}")
    return {"attn_implementation": ATTENTION[asked]}


def saving(settings: Settings) -> dict[str, Any]:
    out: dict[str, Any] = {}
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
    return out


def trackers(settings: Settings) -> dict[str, Any]:
    named, name = settings.texts("report_to"), settings.text("run_name")
    for one in named:
        if one not in (*_TRACKERS, "none", "all"):
            settings.lose("report_to", f"{plain(one)} is not switched on by a key of this name.")
    if named == ["all"]:
        settings.lose("report_to", "name the trackers.")
    out: dict[str, Any] = {f"use_{one}": True for one in named if one in _TRACKERS}
    if "wandb" in named:
        settings.notes.append("report_to: wandb's project is `wandb_project`.")
        return out | {"wandb_name": name or None}
    if name:
        settings.lose("run_name", "only wandb has a name for a run here.")
    return out
