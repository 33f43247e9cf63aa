"""Inside a run: where it is, what it does, and its death.

Everything here is wrapped around the host and the plugin from outside; neither knows of it. Each
place where a run may be killed has a name (a phase) and is counted every time the run is there.
What the run does goes to trace.jsonl, line by line past all buffers: the kernel keeps what a
process wrote before it was killed.
"""

import functools
import hashlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import axolotl.train
import peft.peft_model
import pyarrow.parquet as pq
import torch
import transformers.modeling_utils
from axolotl.cli.train import do_cli
from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler

from sera_plugin.host.loop import Loop
from sera_plugin.host.trainer import SeraTrainer
from sera_plugin.model import budget, scoring
from sera_plugin.model.forward import innermost
from sera_plugin.model.memory import SampledBatches
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling import samplers
from sera_plugin.sampling.transformers import TransformersSampler

#: Most tokens of a forward pass: several batches of each kind even with 24 pairs.
TOKEN_BUDGET = 300


def train(directory: Path, kill: tuple[str, int] | None, set_up: Callable[[], None]) -> None:
    """What `axolotl train config.yaml --launcher python` does once it is imported."""
    watch = Watch(directory, kill)
    # Everything is wrapped; `set_up` is called once the host has set the run up.
    watch.files()
    watch.phases(set_up)
    watch.training()
    sys.argv = ["axolotl"]
    do_cli(config="config.yaml")
    watch.settle()
    watch.tell("end", counts=dict(watch.counts))


class Watch:
    """Counts where the run is, and kills it at the chosen place, (phase, n)."""

    def __init__(self, directory: Path, kill: tuple[str, int] | None) -> None:
        self.output = directory / "out"
        self.kill = kill
        self.counts: Counter[str] = Counter()
        self.trained, self.iteration = False, 0
        self._step = (-1, 0)
        self._scoring = ""
        self._pending: str | None = None
        self._removing: str | None = None
        trace = directory / "trace.jsonl"
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.tell("start")

    def tell(self, event: str, **details: Any) -> None:
        """Add a line to the trace."""
        line = json.dumps({"event": event, "at": time.monotonic(), **details})
        os.write(self._trace, (line + "\n").encode())

    def hit(self, phase: str, just_before: Callable[[], object] = lambda: None) -> None:
        """The run is here; the end if this is the place."""
        self.counts[phase] += 1
        if self.kill == (phase, self.counts[phase]):
            just_before()
            os.kill(os.getpid(), signal.SIGKILL)

    def place(self, path: Any) -> str | None:
        """What part of the output a path belongs to."""
        try:
            parts = Path(os.path.abspath(os.fsdecode(path))).relative_to(self.output).parts
        except (TypeError, ValueError):
            parts = ()
        if not parts:
            return None
        if "checkpoint" in parts[0]:
            return "checkpoint"
        if parts[0] == "sera":
            return "policy" if any("policy" in part for part in parts) else "run"
        return "final" if self.trained else "output"

    def wrote(self, path: Any) -> None:
        """A file is complete: the end between two files, or in the middle of this one."""
        place = self.place(path)
        if place is not None:
            self.hit(f"{place}-file")
            half = os.path.getsize(path) // 2
            self.hit(f"{place}-half", lambda: os.truncate(path, half))

    def settle(self, *_: Any) -> None:
        """The file that Python opened last is complete once something else is written."""
        path, self._pending = self._pending, None
        if path is not None and os.path.exists(path):
            self.wrote(path)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Python's own files as they are opened, and whatever is removed."""
        if event == "open":
            path, mode, flags = args
            writes = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if writes and self.place(path) is not None:
                self.settle()
                self._pending = path
        elif event == "shutil.rmtree":
            self._removing = self.place(args[0])
        elif event in ("os.remove", "os.rmdir") and self._removing and args[1] != -1:
            # Only a tree that is being removed has its entries named below an open directory.
            self.hit("rotation" if self._removing == "checkpoint" else "clean")

    def _renaming(self, target: Any, when: str) -> None:
        place = self.place(target)
        if place == "checkpoint":
            self.hit("checkpoint-file")
        elif place in ("run", "policy"):
            self.hit(f"rename-{when}")

    def files(self) -> None:
        sys.addaudithook(self.audit)

        def renames(source: Any, target: Any) -> None:
            self.settle()
            self._renaming(target, "before")

        for name in ("rename", "replace"):
            wrap(os, name, renames, lambda _, source, target: self._renaming(target, "after"))

        def wrote(_: Any, what: Any, path: Any, *rest: Any) -> None:
            self.wrote(path)

        # These write without Python's `open`.
        wrap(transformers.modeling_utils, "safe_save_file", self.settle, wrote)
        wrap(peft.peft_model, "safe_save_file", self.settle, wrote)
        wrap(torch, "save", self.settle, wrote)
        wrap(pq, "write_table", self.settle, wrote)
        # The last file of a checkpoint is complete here, not when the next one is opened.
        wrap(TrainerState, "save_to_json", after=self.settle)

    def phases(self, set_up: Callable[[], None]) -> None:
        batches = SampledBatches(TOKEN_BUDGET)
        budget.plan_tokens = lambda *_, **__: TOKEN_BUDGET  # type: ignore[assignment]
        samplers.sampled_batches = lambda *_, **__: batches  # type: ignore[assignment]

        def begins(loop: Any, iteration: int, *_: Any) -> None:
            self.iteration = iteration
            self.hit("boundary")

        def began(prepared: Any, loop: Any, iteration: int, *_: Any) -> None:
            if prepared[0] is not None:  # training ends before this iteration
                digest = sha(json.dumps(prepared[0].to_pydict()).encode())
                self.tell("begin", iteration=iteration, pairs=digest)

        def scores(scorer: Any, policy: int, prompts: Any, completions: Any, phase: str) -> None:
            self._scoring = phase.replace("_", "-")

        def sampling(sampler: Any, *_: Any) -> None:
            model = innermost(sampler.model)
            self._hook = model.register_forward_pre_hook(lambda *_: self.hit("sample-token"))

        def sampled(store: Any, iteration: int, table: Any, event: str = "sampled") -> None:
            self.tell(event, iteration=iteration, rows=sorted(set(table["row"].to_pylist())))

        def kept(_: Any, *call: Any) -> None:
            sampled(*call, event="kept")
            self.hit("sample-chunk")

        wrap(Loop, "open", before=lambda *_: (self.tell("open"), set_up()))
        wrap(Loop, "begin", before=begins, after=began)
        wrap(Loop, "end", *[lambda *_: self.hit("boundary")] * 2)
        wrap(scoring.PolicyScorer, "__call__", before=scores)
        wrap(scoring, "forward_logps", before=lambda *_: self.hit(self._scoring))
        wrap(TransformersSampler, "_generate", sampling, lambda *_: self._hook.remove())
        wrap(RunStore, "append_samples", before=sampled, after=kept)

    def training(self) -> None:
        def steps(trainer: Any, model: Any, inputs: Any, *_: Any) -> None:
            self.hit("micro-batch")
            self._batch = sha(*(inputs[key].cpu().numpy().tobytes() for key in sorted(inputs)))

        def stepped(loss: Any, trainer: Any, *_: Any) -> None:
            step = trainer.state.global_step
            self._step = (step, self._step[1] + 1 if self._step[0] == step else 0)
            at = {"iteration": self.iteration, "step": self._step}
            self.tell("step", **at, batch=self._batch, loss=float(loss).hex())

        def evaluated(metrics: Any, trainer: Any, *_: Any) -> None:
            # Before its first epoch the host evaluates what it has loaded, wherever that is.
            if self.iteration:
                loss = float(metrics["eval_loss"]).hex()
                self.tell("evaluation", step=trainer.state.global_step, loss=loss)

        def trained(*_: Any) -> None:
            self.settle()
            self.hit("before-final")
            self.trained = True

        wrap(SeraTrainer, "training_step", before=steps, after=stepped)
        wrap(SeraTrainer, "evaluate", after=evaluated)
        for name in ("on_pre_optimizer_step", "on_optimizer_step"):
            wrap(CallbackHandler, name, before=lambda *_: self.hit("optimizer"))
        wrap(CallbackHandler, "on_epoch_end", before=lambda *_: self.hit("boundary"))
        wrap(CallbackHandler, "on_save", after=lambda *_: self.hit("checkpoint-after"))
        wrap(CallbackHandler, "on_train_end", after=lambda *_: self.hit("before-final"))
        wrap(axolotl.train, "save_trained_model", before=trained)


def sha(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def wrap(
    owner: Any,
    name: str,
    before: Callable[..., object] = lambda *_: None,
    after: Callable[..., object] = lambda *_: None,
) -> None:
    """Call something before a function, and after it with its result first.

    Both get the positional arguments.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        result = original(*args, **kwargs)
        after(result, *args)
        return result

    setattr(owner, name, wrapped)
