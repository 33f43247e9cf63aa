"""Keys of the model, and of what of it is trained, that take more than a new name."""

from __future__ import annotations

import json
from pathlib import Path

from sera_plugin.config.quoting import quoted
from sera_plugin.tools.convert.settings import Settings

_ATTENTION = {
    "auto": None,
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}


def put_model(settings: Settings) -> None:
    """Raises: ValueError: if no model is named."""
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
    """Raises: ValueError: if it is none of LLaMA-Factory's."""
    asked = settings.text("flash_attn") or "auto"
    if asked not in _ATTENTION:
        raise ValueError(f"flash_attn: {quoted(asked)} is none of {', '.join(_ATTENTION)}")
    if _ATTENTION[asked]:
        settings.out["attn_implementation"] = _ATTENTION[asked]


def put_kind(settings: Settings) -> None:
    """Raises: ValueError: if it is none that SeRA can train."""
    kind = settings.text("finetuning_type")
    if kind == "lora":
        settings.out["adapter"] = "lora"
    elif kind not in ("full", "freeze"):
        raise ValueError(
            f"finetuning_type: {quoted(kind)} has nothing like it for rl: sera; lora, full and "
            "freeze have"
        )


def put_quantization(settings: Settings) -> None:
    """Raises: ValueError: if it is not one of bitsandbytes for LoRA."""
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
    kind, double = settings.text("quantization_type"), settings.switch("double_quantization")
    if (kind, double) != ("nf4", True):
        settings.out["bnb_config_kwargs"] = {
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double,
        }


def put_lora(settings: Settings) -> None:
    """The new adapter. Raises: ValueError: if no module gets one."""
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
    for name, to in (("use_rslora", "peft_use_rslora"), ("use_dora", "peft_use_dora")):
        if settings.switch(name):
            out[to] = True


def put_trained_adapter(settings: Settings) -> None:
    """Raises: ValueError: if an adapter is to be merged first."""
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
    """Some layers, for `finetuning_type: freeze`.

    Raises:
        ValueError: if the number of layers is unknown.
    """
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
