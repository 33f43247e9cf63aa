"""Policies by number: snapshots of the trainable weights, swapped in place into one loaded model.

The base model is loaded once. A policy is a copy of what training changes: an adapter, or all
weights for full fine-tuning. `PolicyHistory` keeps those that the next iterations still need, in
host memory and as `policy/` directories that PEFT, transformers and vLLM load.
"""

import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import Tensor, nn

from sera_plugin.model.parts import is_sharded, local, part_of, trainable, whole_weights
from sera_plugin.rundir.checksums import damage, replace_directory
from sera_plugin.rundir.ranks import Ranks
from sera_plugin.rundir.store import RunStore, write_json

#: Trainable weights by name in host memory, which the ranks of a machine hold once; of sharded ones
#: this process's part.
Snapshot = dict[str, Tensor]

#: Where weights lie in the memory of a snapshot: at multiples of so many bytes.
_ALIGNED = 64


def take_snapshot(model: nn.Module) -> Snapshot:
    """Copy the trainable weights to host memory, bit for bit, in their own type."""
    return {name: local(weight).to("cpu", copy=True) for name, weight in trainable(model).items()}


@torch.no_grad()
def shared_snapshot(
    model: nn.Module, ranks: Ranks, saved: Callable[[], Mapping[str, Tensor]] | None = None
) -> Snapshot:
    """A snapshot that a machine's ranks hold once; a collective call.

    Of the model's weights as they are, or of `saved` ones, which then its first rank alone reads.
    Sharded weights are each rank's own part.
    """
    weights = {name: weight.detach() for name, weight in trainable(model).items()}
    if is_sharded(model):
        return take_snapshot(model) if saved is None else dict(saved())
    ends = np.cumsum([-(-weight.nbytes // _ALIGNED) * _ALIGNED for weight in weights.values()])

    def views(memory: npt.NDArray[np.uint8]) -> Snapshot:
        found = {}
        for (name, weight), part in zip(weights.items(), np.split(memory, ends), strict=False):
            place = torch.from_numpy(part[: weight.nbytes])
            found[name] = place.view(weight.dtype).view(weight.shape)
        return found

    def fill(memory: npt.NDArray[np.uint8]) -> None:
        source = weights if saved is None else saved()
        for name, place in views(memory).items():
            place.copy_(source[name])

    return views(ranks.share(int(ends[-1]) if len(ends) else 0, fill))


@torch.no_grad()
def restore_snapshot(model: nn.Module, snapshot: Snapshot) -> None:
    """Write a snapshot of the same weights, or of whole ones, into the model's own storage."""
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


def continue_adapter(model: Any, directory: str | None) -> tuple[Any, Snapshot | None]:
    """The model with the adapter in `lora_model_dir`, which axolotl 0.19 ignores for DPO.

    And the weights of its adapter where it has one.
    """
    if directory and not isinstance(model, PeftModel):
        model = PeftModel.from_pretrained(model, directory, is_trainable=True)
    return model, take_snapshot(model) if isinstance(model, PeftModel) else None


def tidy_adapters(model: PeftModel, continued: Snapshot | None) -> None:
    """Undo what TRL 1.9 does to adapters for a reference that we keep as data.

    TRL copies a continued adapter to a second one named `ref`, which a resumed run then restores
    instead of the policy; and it rounds adapters on a quantised base to bfloat16, where updates of
    5e-6 vanish. `continued` are the weights from before.
    """
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for weight in trainable(model).values():
            weight.data = weight.data.float()
        never_repack(model)
    if continued is not None:
        restore_snapshot(model, continued)


def never_repack(model: nn.Module) -> None:
    """Leave quantised layers trainable on CPUs that have AVX512-BF16.

    There bitsandbytes 0.50 repacks a layer's weights for good on its first forward pass in eval
    mode; from then on no gradient passes through it, and no error says so.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@contextmanager
def before_interrupt(action: Callable[[], object]) -> Iterator[None]:
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
    """theta_0, theta_1, ... of a run, by number."""

    model: Any  # the one loaded model; a PEFT model for adapters
    store: RunStore
    base_model: str  # the host's, what a fully fine-tuned theta_0 is
    tokenizer: Any  # saved beside the weights, so that a policy loads on its own
    current: int | None = 0  # which policy the model is now; None in the middle of an iteration
    _snapshots: dict[int, Snapshot] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def keep_initial(self, recorded: bool) -> None:
        """Remember theta_0 before a checkpoint is loaded over it.

        A run that has begun before, `recorded`, has its adapter's on disk: another version of a
        library may initialise it differently.
        """
        recorded = recorded and self.is_adapter and damage(self.store.policy(1)) is None
        self._snapshots[0] = self._snapshot(0 if recorded else None)
        restore_snapshot(self.model, self._snapshots[0])

    def keep_current(self, policy: int) -> None:
        """The model is theta_policy now: keep it in memory and, as safetensors, on disk.

        Of an adapter the base is not written; theta_0 of a full fine-tune is a pointer to it.
        """
        self.current = policy
        if policy not in self._snapshots:
            self._snapshots[policy] = self._snapshot()
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
        """The model is theta_policy inside the block, and itself again afterwards.

        All ranks enter together. Nothing of the way back is a collective call: Ctrl-C may take it.
        """
        if policy == self.current:
            yield
            return
        if policy not in self._snapshots:
            self._snapshots[policy] = self._snapshot(policy)
        here = self._snapshot() if self.current is None else self._snapshots[self.current]
        restore_snapshot(self.model, self._snapshots[policy])
        try:
            with before_interrupt(lambda: restore_snapshot(self.model, here)):
                yield
        finally:
            restore_snapshot(self.model, here)

    def become(self, policy: int) -> None:
        """The model is theta_policy, which is read from its directory, from now on."""
        restore_snapshot(self.model, self._snapshot(policy))
        self.current = policy

    def forget_before(self, policy: int, on_disk: int, but: Collection[int] = ()) -> None:
        """Drop the snapshots of older policies, and whole weights older than `on_disk` there.

        Adapters are small and stay on disk; so do the policies `but`.
        """
        self._snapshots = {n: kept for n, kept in self._snapshots.items() if n >= policy}

        def remove() -> None:
            for old in sorted({*range(1, on_disk)} - {*but}):
                if self.store.policy(old + 1).exists():
                    shutil.rmtree(self.store.policy(old + 1))

        if not self.is_adapter:
            self.store.ranks.on_main(remove)

    def load(self, directory: Path) -> None:
        """Write the policy in a directory into the model; FileNotFoundError if it is not there."""
        restore_snapshot(self.model, self._read(directory))

    def _snapshot(self, policy: int | None = None) -> Snapshot:
        """Of theta_policy as it is on disk, or of the model as it is now; a collective call."""
        saved = None if policy is None else partial(self._load, policy)
        return shared_snapshot(self.model, self.store.ranks, saved)

    def _load(self, policy: int) -> Snapshot:
        """A policy of this run from its directory."""
        if policy == 0 and not self.is_adapter:
            raise ValueError(
                "theta_0 is needed, but this process no longer holds it. Start the command again "
                "with `auto_resume_from_checkpoints: true`."
            )
        directory = self.store.policy(policy + 1)
        if (problem := damage(directory)) is not None:
            raise ValueError(
                f"theta_{policy} is needed from {directory}, but {problem}. Restore it from a "
                f"copy, or continue from the checkpoint at the end of iteration {policy} or from "
                "an earlier one (resume_from_checkpoint): the run is then trained again from there."
            )
        return self._read(directory)

    def _read(self, directory: Path) -> Snapshot:
        """The weights in a directory, by this process's part; the model keeps its own."""
        mine = trainable(self.model)
        if self.is_adapter:
            if not (directory / "adapter_model.safetensors").is_file():
                # PEFT would go on to a pickled adapter_model.bin, then to a hub.
                raise FileNotFoundError(
                    f"{directory} has no adapter_model.safetensors. Restore it, or train anew in "
                    "another output_dir."
                )
            weights = load_peft_weights(str(directory), device="cpu")
            # PEFT cannot load into parts, but it knows what it calls each weight in a file.
            called = get_peft_model_state_dict(
                self.model, state_dict=dict(mine), save_embedding_layers=False
            )
            names = {id(weight): name for name, weight in mine.items()}
            saved = {names[id(weight)]: weights[key] for key, weight in called.items()}
        else:
            # Of all its types: in mixed precision `auto` would round to that of the first weight.
            types = {weight.dtype for weight in self.model.parameters()}
            loaded = type(self.model).from_pretrained(
                str(directory),
                dtype=reduce(torch.promote_types, types),
                use_safetensors=True,
                trust_remote_code=False,
            )
            saved = dict(loaded.named_parameters(remove_duplicate=False))
        return {
            name: part_of(saved[name], weight, source=0).to("cpu", copy=True)
            for name, weight in mine.items()
        }
