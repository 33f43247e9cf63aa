"""The YAML being read, the YAML being written, and what there is to say about both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted

#: LLaMA-Factory's defaults, and those of the trainer under it, where the host's differ.
DEFAULTS: dict[str, Any] = {
    "cutoff_len": 2048,
    "dataset_dir": "data",
    "double_quantization": True,
    "finetuning_type": "lora",
    "freeze_trainable_layers": 2,
    "freeze_trainable_modules": "all",
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "logging_steps": 500,
    "lora_dropout": 0.0,
    "lora_rank": 8,
    "lora_target": "all",
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3,
    "optim": "adamw_torch",
    "per_device_train_batch_size": 8,
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "quantization_method": "bnb",
    "quantization_type": "nf4",
    "save_steps": 500,
    "save_strategy": "steps",
    "seed": 42,
    "simpo_gamma": 0.5,
    "stage": "sft",
    "use_reentrant_gc": True,
}


@dataclass
class Settings:
    """A conversion under way.

    Attributes:
        given: the keys of the YAML being read.
        output: where the new one will go, None if nowhere.
        out: the keys of the YAML being written, in order.
        read: the keys that have become something.
        lost: keys that become nothing -> why.
        notes: what a reader should know, a sentence or two each.
        rows: files to be written beside the new YAML -> their rows.
    """

    given: Mapping[str, Any]
    output: Path | None = None
    out: dict[str, Any] = field(default_factory=dict)
    read: dict[str, None] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: dict[Path, list[Any]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the YAML sets a key to something else than null."""
        return self.given.get(name) is not None

    def value(self, name: str) -> Any:
        """What LLaMA-Factory would use: the YAML's value, else its default, else None."""
        self.read[name] = None
        return self.given[name] if self.has(name) else DEFAULTS.get(name)

    def text(self, name: str) -> str | None:
        """A value as text, None where there is none.

        Raises:
            ValueError: if it is a list or a block.
        """
        value = self.value(name)
        if isinstance(value, Mapping | list):
            raise ValueError(f"{name}: {quoted(value)} is not text")
        return None if value is None else str(value)

    def texts(self, name: str) -> list[str]:
        """A value that names several things, separated by commas or as a list."""
        value = self.value(name)
        parts = value if isinstance(value, list) else str(value or "").split(",")
        return [str(part).strip() for part in parts if str(part).strip()]

    def number(self, name: str) -> float | None:
        """A number, None where there is none. 5e-6 is text to YAML 1.1, and a number here.

        Raises:
            ValueError: if it is none.
        """
        value = self.value(name)
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{name}: {quoted(value)} is not a number")
        return value if isinstance(value, int) else number

    def whole(self, name: str) -> int | None:
        """A whole number, None where there is none.

        Raises:
            ValueError: if it is none.
        """
        number = self.number(name)
        if number is not None and not float(number).is_integer():
            raise ValueError(f"{name}: {quoted(self.given.get(name))} is not a whole number")
        return None if number is None else int(number)

    def switch(self, name: str) -> bool | None:
        """True, false, or None where there is none.

        Raises:
            ValueError: if it is neither.
        """
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(f"{name}: {quoted(value)} is neither true nor false")

    def lose(self, name: str, why: str) -> None:
        """A key that is there becomes nothing, and this is why."""
        if self.has(name):
            self.lost[name] = why

    @property
    def defaults(self) -> dict[str, Any]:
        """LLaMA-Factory's defaults that the new YAML has because the old one did not say."""
        return {
            name: DEFAULTS[name] for name in self.read if not self.has(name) and name in DEFAULTS
        }
