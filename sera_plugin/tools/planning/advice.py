"""What to change where a run does not fit: which key, which value, and what it comes to then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sera_plugin.tools.planning.counts import Lengths
from sera_plugin.tools.planning.memory import Phase, device_phases
from sera_plugin.tools.planning.optimizers import FOREACH
from sera_plugin.tools.planning.setting import Setting
from sera_plugin.tools.planning.shape import Shape

#: Of a LoRA that takes the place of full fine-tuning.
_RANK = 16
#: `sequence_len` is tried in steps of this.
_STEP = 64


@dataclass(frozen=True)
class Case:
    """A run with some changes, and its phases on a device of `memory` bytes."""

    shape: Shape
    setting: Setting
    pairs: Lengths
    memory: int

    @property
    def phases(self) -> list[Phase]:
        return device_phases(self.shape, self.setting, self.memory)

    @property
    def fits(self) -> bool:
        return all(phase.fits(self.memory) for phase in self.phases)

    @property
    def excess(self) -> tuple[int, int]:
        """How many phases do not fit, and by how many bytes together."""
        over = [phase for phase in self.phases if not phase.fits(self.memory)]
        return len(over), sum(max(0, phase.total - self.memory) for phase in over)

    def fails(self, name: str) -> bool:
        return any(phase.name == name and not phase.fits(self.memory) for phase in self.phases)


@dataclass(frozen=True)
class Change:
    """One change, on top of those before it.

    Attributes:
        keys: what to write in the YAML.
        remark: what else it means, or "".
        case: the run with it.
    """

    keys: str
    remark: str
    case: Case


#: Takes a case to a change of it, or to None where there is nothing to change.
Trial = Callable[[Case], Change | None]


def advise(case: Case) -> list[Change]:
    """Changes that make a run fit, each on top of the one before.

    Tried in an order that leaves the result of training alone as long as possible. A change that
    turns out to be needless once a later one is made is left out.

    Args:
        case: a run that does not fit.

    Returns:
        The changes. If not even the last one's case fits, nothing that is tried here helps.
    """
    trials: list[Trial] = []
    best = case
    for trial in _TRIALS:
        change = trial(best)
        if change is not None and change.case.excess < best.excess:
            trials.append(trial)
            best = change.case
        if best.fits:
            break
    for trial in trials[-2::-1]:
        fewer = [one for one in trials if one is not trial]
        if _apply(fewer, case)[-1].case.fits:
            trials = fewer
    return _apply(trials, case)


def _apply(trials: Sequence[Trial], case: Case) -> list[Change]:
    changes: list[Change] = []
    for trial in trials:
        change = trial(changes[-1].case if changes else case)
        if change is not None:
            changes.append(change)
    return changes


def _changed(keys: str, remark: str, when: Callable[[Case], bool], **changes: Any) -> Trial:
    """A trial that changes nothing but settings."""

    def trial(case: Case) -> Change | None:
        if not when(case):
            return None
        return Change(keys, remark, replace(case, setting=replace(case.setting, **changes)))

    return trial


def _micro_batch(case: Case) -> Change | None:
    setting = case.setting
    if setting.micro_batch == 1 or not case.fails("train"):
        return None
    effective = setting.micro_batch * setting.accumulation
    sizes = [size for size in range(setting.micro_batch - 1, 0, -1) if effective % size == 0]
    for size in sizes:
        accumulation = effective // size
        smaller = replace(setting, micro_batch=size, accumulation=accumulation)
        changed = replace(case, setting=smaller)
        if size == 1 or not changed.fails("train"):
            keys = f"micro_batch_size: {size}, gradient_accumulation_steps: {accumulation}"
            return Change(keys, "the same effective batch", changed)
    return None


def _qlora(case: Case) -> Change | None:
    if case.shape.adapter:
        return None
    setting = replace(case.setting, bits=4, double_quantised=True, wide_norms=False)
    changed = replace(case, shape=case.shape.with_lora(_RANK), setting=setting)
    keys = (
        f"adapter: qlora, load_in_4bit: true, lora_r: {_RANK}, lora_alpha: {2 * _RANK}, "
        "lora_target_linear: true"
    )
    return Change(keys, "trains an adapter instead of all weights", changed)


def _shorter(case: Case) -> Change | None:
    longest = case.setting.longest
    for length in range((longest - 1) // _STEP * _STEP, 0, -_STEP):
        kept = case.pairs.within(length)
        if not len(kept):
            return None
        setting = replace(
            case.setting,
            longest=length,
            completion=min(case.setting.completion, length),
            sample=min(case.setting.sample, length),
            sequence_len=length,
        )
        changed = replace(case, setting=setting, pairs=kept)
        if changed.fits:
            lost = len(case.pairs) - len(kept)
            return Change(f"sequence_len: {length}", f"drops {lost} longer pairs", changed)
    return None


_TRIALS: tuple[Trial, ...] = (
    _changed(
        "vllm.gpu_memory_utilization: (remove)",
        "derived from what is free",
        lambda case: case.setting.utilization is not None and case.fails("sample"),
        utilization=None,
    ),
    _micro_batch,
    _changed(
        "gradient_checkpointing: true",
        "one more forward pass per step",
        lambda case: not case.setting.checkpointing,
        checkpointing=True,
    ),
    _changed(
        "optimizer: adamw_torch_fused",
        "the same without copies",
        lambda case: case.setting.optimizer in FOREACH and case.fails("update"),
        optimizer="adamw_torch_fused",
    ),
    _changed(
        "optimizer: paged_adamw_8bit",
        "states in 8 bits",
        lambda case: "8bit" not in case.setting.optimizer,
        optimizer="paged_adamw_8bit",
    ),
    _changed(
        "sera.sampler: transformers",
        "slower sampling",
        lambda case: case.setting.sampler == "vllm" and case.fails("sample"),
        sampler="transformers",
    ),
    _changed(
        "adapter: qlora, load_in_4bit: true",
        "the base in 4 bits",
        lambda case: bool(case.shape.adapter) and case.setting.bits != 4,
        bits=4,
        double_quantised=True,
    ),
    _shorter,
    _qlora,
)
