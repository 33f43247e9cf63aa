"""A plugin that watches the host train: when steps end, what is forwarded without gradients, and
how much memory training takes.

It writes `probe.json` into output_dir and changes nothing.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from benchmarks.harness import highest_resident
from sera_plugin.model.forward import _KNOWN, innermost


class Probe(BasePlugin):
    """For `plugins:`, last."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        watch = _Watch(trainer.model, bool(cfg.get("sera")))
        trainer.model.register_forward_pre_hook(watch.forward, with_kwargs=True)
        return [watch]


class _Watch(TrainerCallback):
    def __init__(self, model: Any, sera: bool) -> None:
        self.base = innermost(model)
        self.sera = sera
        self.step_ends: list[float] = []
        self.tokens = {True: 0, False: 0}
        self.memory = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        # Linux forgets the highest resident size so far (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.memory = highest_resident()

    def forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.sera and self.base not in _KNOWN:
            return  # a few tokens, once, to find out what the model takes
        filled = kwargs["input_ids"] != self.base.config.pad_token_id
        self.tokens[torch.is_grad_enabled()] += int(filled.sum())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_ends.append(time.perf_counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        found = {
            "step_ends": self.step_ends,
            "trained_tokens": self.tokens[True],
            "forwarded_tokens": self.tokens[False],
            "memory": self._peak(),
        }
        Path(args.output_dir, "probe.json").write_text(json.dumps(found), encoding="utf-8")

    def _peak(self) -> int:
        """Bytes that training took: on a GPU all that torch had, on a CPU beyond what was there."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_reserved()
        return highest_resident() - self.memory
