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
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sera_plugin.model.sharding import is_sharded, local, part_of, trainable, whole_weights
from sera_plugin.rundir.checksums import damage, replace_directory
from sera_plugin.rundir.ranks import Ranks
from sera_plugin.rundir.store import RunStore, write_json

Snapshot = dict[str, Tensor]


def take_snapshot(model: nn.Module) -> Snapshot:
    """Copy the trainable weights to host memory, bit for bit, in their own type.

    Of sharded weights this process's part.
    """
    return {name: local(weight).to("cpu", copy=True) for name, weight in trainable(model).items()}


@torch.no_grad()
def restore_snapshot(model: nn.Module, snapshot: Snapshot) -> None:
    """Write a snapshot into the model's own storage.

    One that was taken before the model was sharded holds whole weights, and is cut.

    Raises:
        ValueError: if the snapshot was taken from other trainable weights.
    """
    weights = trainable(model)
    if weights.keys() != snapshot.keys():
        differing = sorted(weights.keys() ^ snapshot.keys())[:3]
        raise ValueError(f"the snapshot's weights are not the model's: {', '.join(differing)}")
    for name, weight in weights.items():
        here, saved = local(weight), snapshot[name]
        here.copy_(saved if saved.shape == here.shape else part_of(saved, weight))


def is_finite(model: nn.Module, ranks: Ranks) -> bool:
    """Whether no trainable weight is NaN or infinite, on any rank; a collective call."""
    found = [local(weight).isfinite().all().cpu() for weight in trainable(model).values()]
    bad = np.array([0.0 if torch.stack(found).all() else 1.0])
    return not ranks.sum(bad).any()


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


class PolicyHistory:
    """theta_0, theta_1, ... of a run, by number.

    Args:
        model: the one loaded model; a PEFT model for adapters.
        store: the run directory.
        base_model: the host's `base_model`, what a fully fine-tuned theta_0 is.
        tokenizer: saved beside the weights, so that a policy loads on its own.
    """

    def __init__(self, model: Any, store: RunStore, base_model: str, tokenizer: Any) -> None:
        self.model = model
        self.store = store
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.is_adapter = hasattr(model, "peft_config")
        #: Which policy the model is now; None in the middle of an iteration.
        self.current: int | None = 0
        self._snapshots: dict[int, Snapshot] = {}

    def keep_initial(self, recorded: bool) -> None:
        """Remember theta_0 before a checkpoint is loaded over it.

        Args:
            recorded: whether this run has begun before. Its own theta_0 is then on disk: another
                version of a library may initialise an adapter differently, and rewards count from
                the one the run began with.
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
        whole: dict[str, Any] = {}
        if is_sharded(self.model) and not self._is_base(policy):
            # Every rank takes part, or the others would wait for it.
            whole = {"state_dict": whole_weights(self.model, trainable_only=self.is_adapter)}
        self.store.ranks.on_main(lambda: self._write(policy, whole))

    def _is_base(self, policy: int) -> bool:
        return policy == 0 and not self.is_adapter

    def _write(self, policy: int, whole: dict[str, Any]) -> None:
        final = self.store.policy(policy + 1)
        if not final.exists() or damage(final) is not None:
            replace_directory(final, lambda directory: self._save(policy, directory, whole))

    def _save(self, policy: int, directory: Path, whole: dict[str, Any]) -> None:
        if self._is_base(policy):
            write_json(directory / "base_model.json", {"base_model": self.base_model})
        else:
            self.model.save_pretrained(str(directory), **whole)
            self.tokenizer.save_pretrained(str(directory))

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
        """Drop policies older than these; adapters are small and stay on disk.

        Args:
            policy: the oldest that this process still needs.
            on_disk: the oldest whose whole weights stay on disk.
        """
        for old in [number for number in self._snapshots if number < policy]:
            del self._snapshots[old]
        if not self.is_adapter:
            self.store.ranks.on_main(lambda: self._remove_before(on_disk))

    def _remove_before(self, policy: int) -> None:
        for old in range(1, policy):
            directory = self.store.policy(old + 1)
            if directory.exists():
                shutil.rmtree(directory)

    def _load(self, policy: int) -> Snapshot:
        """Read a saved policy back (a resumed run); the model keeps its own weights.

        Raises:
            ValueError: if it is not there or damaged, with what to do.
        """
        directory = self.store.policy(policy + 1)
        if policy == 0 and not self.is_adapter:
            raise ValueError(
                "theta_0 is needed, but this process no longer holds it. Start the command again "
                "with `auto_resume_from_checkpoints: true`."
            )
        problem = damage(directory)
        if problem is not None:
            raise ValueError(
                f"theta_{policy} is needed from {directory}, but {problem}. Restore it from a "
                f"copy, or continue from the checkpoint at the end of iteration {policy} or from "
                "an earlier one (resume_from_checkpoint): the run is then trained again from there."
            )
        return self._read(directory)

    def load(self, directory: Path) -> None:
        """Write the policy in a directory into the model.

        Raises:
            FileNotFoundError: if an adapter's weights are not there.
        """
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
        from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

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
