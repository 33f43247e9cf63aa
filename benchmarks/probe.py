"""A plugin that watches the host train: when steps end, and what is forwarded without gradients.

It writes `probe.json` into output_dir and changes nothing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from sera_plugin.forward import _KNOWN, innermost


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
        }
        Path(args.output_dir, "probe.json").write_text(json.dumps(found), encoding="utf-8")
