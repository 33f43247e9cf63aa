"""The model, its adapter and the method: which of LLaMA-Factory's keys become what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.tools.convert.settings import Settings, paragraph, renamed, rule, same

_LOSSES = {"sigmoid": "dpo", "hinge": "slic"}
_LOSSES |= {loss: loss for loss in ("ipo", "simpo", "kto_pair", "orpo")}


@rule("model_name_or_path, model_revision", "`base_model`, `revision_of_model`")
def put_model(settings: Settings) -> None:
    model = settings.text("model_name_or_path")
    if not model:
        raise ValueError("model_name_or_path is not set")
    revision = settings.text("model_revision")
    settings.put("base_model", model)
    settings.put("revision_of_model", None if revision == "main" else revision)


@rule("add_tokens, add_special_tokens", "`tokens`, `special_tokens`")
def put_tokens(settings: Settings) -> None:
    special = settings.texts("add_special_tokens")
    settings.put("tokens", settings.texts("add_tokens"))
    settings.put("special_tokens", special and {"additional_special_tokens": special})


renamed("use_fast_tokenizer", "tokenizer_use_fast", Settings.switch)
paragraph()


@rule(
    "stage, pref_loss, pref_beta, dpo_label_smoothing, pref_ftx, simpo_gamma",
    "`rl: sera`, `sera.loss`, `rl_beta`, `dpo_label_smoothing`, `simpo_gamma`",
    "`stage: dpo` alone. `sigmoid` is `dpo`, `hinge` is `slic`, the others keep their "
    "names. `pref_ftx` becomes `dpo_loss_type: [sigmoid, "
    "sft]` with `dpo_loss_weights`, for SimPO `cpo_alpha`.",
)
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
    smoothing = settings.number("dpo_label_smoothing")
    settings.put("dpo_label_smoothing", smoothing or None)
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
        settings.put("cpo_alpha", weight or None)
    settings.notes.append(
        "sera: selection_ratio 0.7 and bootstrap_ratio 0.3 are the paper's. 1.0 and 0 train on all "
        "pairs and on no others, as LLaMA-Factory does, with a reference that moves every epoch; "
        "`reference: initial` beside them leaves it where LLaMA-Factory's is."
    )


paragraph()


@rule("finetuning_type", "`adapter`", "`full` has no adapter; `oft` is refused.")
def put_kind(settings: Settings) -> None:
    kind = settings.text("finetuning_type")
    if kind == "lora":
        settings.out["adapter"] = "lora"
    elif kind not in ("full", "freeze"):
        raise ValueError(
            f"finetuning_type: {quoted(kind)} has nothing like it for rl: sera; lora, full and "
            "freeze have"
        )


@rule(
    "quantization_bit, quantization_method, quantization_type, double_quantization",
    "`adapter: qlora` with `load_in_4bit`, or `load_in_8bit`; `bnb_config_kwargs`",
    "bitsandbytes' 4 and 8 bits alone.",
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


@rule(
    "lora_rank, lora_alpha, lora_dropout, lora_target, additional_target, use_rslora, use_dora",
    "`lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_linear` or `lora_target_modules`, "
    "`lora_modules_to_save`, `peft_use_rslora`, `peft_use_dora`",
    "`lora_alpha` is twice the rank unless set, as there.",
)
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
    linear = targets == ["all"]
    out["lora_target_linear" if linear else "lora_target_modules"] = linear or targets
    settings.put("lora_modules_to_save", settings.texts("additional_target"))
    for name in ("use_rslora", "use_dora"):
        settings.put(f"peft_{name}", settings.switch(name) or None)


@rule(
    "adapter_name_or_path, create_new_adapter", "`lora_model_dir`", "One adapter, to be continued."
)
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


@rule(
    "freeze_trainable_layers, freeze_trainable_modules, freeze_extra_modules",
    "`unfrozen_parameters`",
    "Where the model is a directory, whose config.json says how many layers it has.",
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
        found = [config.get(name) for name in ("num_hidden_layers", "num_layers", "n_layer")]
        return next(count for count in found if isinstance(count, int))
    except (OSError, ValueError, AttributeError, StopIteration):
        raise ValueError(
            "finetuning_type: freeze needs the model's number of layers, and there is no "
            f"{quoted(str(path), 200)} that says it. Download the model and set "
            "model_name_or_path to its directory"
        ) from None


same(Settings.number, "loraplus_lr_ratio", "loraplus_lr_embedding")
