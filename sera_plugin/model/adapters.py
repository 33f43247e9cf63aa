"""PEFT adapters as SeRA needs them: one per model, in float32, bit for bit as loaded."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from sera_plugin.model.policies import Snapshot, restore_snapshot, take_snapshot


def continue_adapter(model: Any, directory: str | None) -> tuple[Any, Snapshot | None]:
    """Load the adapter in `lora_model_dir`, which axolotl 0.19 ignores for DPO.

    Args:
        model: the base model, or a PEFT model that the host has made already.
        directory: `lora_model_dir`, or None.

    Returns:
        The model, and the weights of its adapter where it has one.
    """
    if directory and not isinstance(model, PeftModel):
        model = PeftModel.from_pretrained(model, directory, is_trainable=True)
    return model, take_snapshot(model) if isinstance(model, PeftModel) else None


def tidy_adapters(model: PeftModel, continued: Snapshot | None) -> None:
    """Undo what TRL 1.9 does to adapters for a reference that we keep as data.

    TRL copies a continued adapter to a second one named `ref`, which a resumed run then restores
    instead of the policy; and it rounds adapters on a quantised base to bfloat16, where updates of
    5e-6 vanish.

    Args:
        model: as TRL left it.
        continued: the adapter's weights before TRL saw them, from `continue_adapter`.
    """
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        # On a CPU bitsandbytes 0.50 repacks a layer's weights for good on its first forward pass
        # in eval mode, and cannot train it afterwards. Scoring comes before training.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if continued is not None:
        restore_snapshot(model, continued)
