"""Snapshots of the trainable weights, swapped in place into the one loaded model.

The base model is loaded once. A policy is a copy of what training changes: an adapter, or all
weights for full fine-tuning. `PolicyHistory` keeps those that the next iterations still need, in
host memory and as `policy/` directories that PEFT, transformers and vLLM load.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from sera_plugin.model.weights import (
    Snapshot,
    is_sharded,
    part_of,
    restore_snapshot,
    take_snapshot,
    trainable,
    whole_weights,
)
from sera_plugin.rundir.checksums import damage, replace_directory
from sera_plugin.rundir.store import RunStore, write_json


@contextmanager
def _before_interrupt(action: Callable[[], object]) -> Iterator[None]:
    """Do something on Ctrl-C before whoever handles it: the host saves the model as it is then."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or current_thread() is not main_thread():
        yield
        return

    def first(number: int, frame: FrameType | None) -> None:
        action()
        handler(number, frame)

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@dataclass
class PolicyHistory:
    """theta_0, theta_1, ... of a run, by number.

    Attributes:
        model: the one loaded model; a PEFT model for adapters.
        store: the run directory.
        base_model: the host's `base_model`, what a fully fine-tuned theta_0 is.
        tokenizer: saved beside the weights, so that a policy loads on its own.
        current: which policy the model is now; None in the middle of an iteration.
    """

    model: Any
    store: RunStore
    base_model: str
    tokenizer: Any
    current: int | None = 0
    _snapshots: dict[int, Snapshot] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def keep_initial(self, recorded: bool) -> None:
        """Remember theta_0 before a checkpoint is loaded over it.

        A run that has begun before, `recorded`, has its own on disk: another version of a library
        may initialise an adapter differently, and rewards count from the one the run began with.
        """
        directory = self.store.policy(1)
        recorded = recorded and self.is_adapter and damage(directory) is None
        self._snapshots[0] = self._load(0) if recorded else take_snapshot(self.model)
        restore_snapshot(self.model, self._snapshots[0])

    def keep_current(self, policy: int) -> None:
        """The model is theta_policy now: keep it in memory and in iteration-XX/policy.

        Weights are safetensors. Of a base model that is fully fine-tuned theta_0 is a pointer; on
        a quantised base only the adapter is written, so the base is never dequantised.
        """
        self.current = policy
        if policy not in self._snapshots:
            self._snapshots[policy] = take_snapshot(self.model)
        is_base = policy == 0 and not self.is_adapter
        whole: dict[str, Any] = {}
        if is_sharded(self.model) and not is_base:
            # Every rank takes part, or the others would wait for it.
            whole = {"state_dict": whole_weights(self.model, trainable_only=self.is_adapter)}

        def save(directory: Path) -> None:
            if is_base:
                write_json(directory / "base_model.json", {"base_model": self.base_model})
            else:
                self.model.save_pretrained(str(directory), **whole)
                self.tokenizer.save_pretrained(str(directory))

        def write() -> None:
            final = self.store.policy(policy + 1)
            if not final.exists() or damage(final) is not None:
                replace_directory(final, save)

        self.store.ranks.on_main(write)

    @contextmanager
    def at(self, policy: int) -> Iterator[None]:
        """The model is theta_policy inside the block, and itself again afterwards."""
        if policy == self.current:
            yield
            return
        if policy not in self._snapshots:
            self._snapshots[policy] = self._load(policy)
        here = take_snapshot(self.model) if self.current is None else self._snapshots[self.current]
        restore_snapshot(self.model, self._snapshots[policy])
        try:
            with _before_interrupt(lambda: restore_snapshot(self.model, here)):
                yield
        finally:
            restore_snapshot(self.model, here)

    def forget_before(self, policy: int, on_disk: int) -> None:
        """Drop the snapshots of older policies, and whole weights older than `on_disk` there.

        Adapters are small and stay on disk.
        """
        for old in [number for number in self._snapshots if number < policy]:
            del self._snapshots[old]

        def remove() -> None:
            for old in range(1, on_disk):
                if self.store.policy(old + 1).exists():
                    shutil.rmtree(self.store.policy(old + 1))

        if not self.is_adapter:
            self.store.ranks.on_main(remove)

    def _load(self, policy: int) -> Snapshot:
        """Read a policy of this run back; the model keeps its own weights."""
        if policy == 0 and not self.is_adapter:
            raise ValueError(
                "theta_0 is needed, but this process no longer holds it. Start the command again "
                "with `auto_resume_from_checkpoints: true`."
            )
        directory = self.store.policy(policy + 1)
        problem = damage(directory)
        if problem is not None:
            raise ValueError(
                f"theta_{policy} is needed from {directory}, but {problem}. Restore it from a "
                f"copy, or continue from the checkpoint at the end of iteration {policy} or from "
                "an earlier one (resume_from_checkpoint): the run is then trained again from there."
            )
        return self._read(directory)

    def load(self, directory: Path) -> None:
        """Write the policy in a directory into the model; FileNotFoundError if it is not there."""
        restore_snapshot(self.model, self._read(directory))

    def _read(self, directory: Path) -> Snapshot:
        if not self.is_adapter:
            saved = type(self.model).from_pretrained(
                str(directory), dtype="auto", use_safetensors=True, trust_remote_code=False
            )
            return self._parts(saved.state_dict())
        if not (directory / "adapter_model.safetensors").is_file():
            # PEFT would go on to a pickled adapter_model.bin, then to a hub.
            raise FileNotFoundError(
                f"{directory} has no adapter_model.safetensors. Restore it, or train anew in "
                "another output_dir."
            )
        weights = load_peft_weights(str(directory), device="cpu")
        if is_sharded(self.model):
            # PEFT cannot load into parts, but it knows what it calls each weight in a file.
            names = {id(weight): name for name, weight in trainable(self.model).items()}
            called = get_peft_model_state_dict(
                self.model, state_dict=trainable(self.model), save_embedding_layers=False
            )
            return self._parts({names[id(w)]: weights[key] for key, w in called.items()})
        current = take_snapshot(self.model)
        try:
            set_peft_model_state_dict(self.model, weights)
            return take_snapshot(self.model)
        finally:
            restore_snapshot(self.model, current)

    def _parts(self, saved: dict[str, Tensor]) -> Snapshot:
        """This process's part of whole weights, as rank 0 has read them."""
        return {
            name: part_of(saved[name], weight, source=0).to("cpu", copy=True)
            for name, weight in trainable(self.model).items()
        }
