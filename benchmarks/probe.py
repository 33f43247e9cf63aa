"""A plugin that watches the host train: when steps end, what is forwarded without gradients, and
how much memory training takes.

It writes `probe.json` into output_dir and changes nothing.
"""

import json
import time
import warnings
from collections import Counter
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


class Waits(BasePlugin):
    """For `plugins:`, on a GPU: where steps wait for the device. It writes `waits.json`."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        return [_CountWaits()]


class _CountWaits(TrainerCallback):
    """What torch warns of from the third step on, by line: the first ones set things up."""

    def __init__(self) -> None:
        self.steps, self.places = 0, Counter[str]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= 2:
            self.caught = warnings.catch_warnings(record=True)
            self.seen = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 2:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            self.steps += 1
            for one in self.seen:
                if "synchronizing" in str(one.message):
                    place = "/".join(Path(one.filename).parts[-3:])
                    self.places[f"{place}:{one.lineno}"] += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        a_step = {place: round(n / self.steps, 2) for place, n in self.places.most_common(20)}
        found = {"waits_a_step": round(self.places.total() / max(1, self.steps), 2)}
        path = Path(args.output_dir, "waits.json")
        path.write_text(json.dumps(found | {"steps_watched": self.steps, "waits": a_step}))


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
