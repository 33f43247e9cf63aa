"""What to change where a run does not fit: which key, which value, and what it comes to then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sera_plugin.tools.planning.memory import Phase, device_phases
from sera_plugin.tools.planning.run import FOREACH, Run

#: `sequence_len` is tried in steps of this.
_STEP = 64
_FOUR_BITS = {"adapter": "qlora", "load_in_4bit": True}


class Case:
    """A run with some changes, and its phases."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.phases: list[Phase] = device_phases(run)
        over = [phase for phase in self.phases if not phase.fits(run.memory)]
        self.failing = {phase.name for phase in over}
        #: How many phases do not fit, and by how many bytes together.
        self.excess = len(over), sum(max(0, p.total - (run.memory or 0)) for p in over)

    @property
    def fits(self) -> bool:
        return not self.failing


@dataclass(frozen=True)
class Change:
    """One change on top of those before it: what to write in the YAML, what else it means, and the
    run with it."""

    keys: str
    remark: str
    case: Case


#: Takes a case to a change of it, or to None where there is nothing to change.
Trial = Callable[[Case], Change | None]


def advise(case: Case) -> list[Change]:
    """Changes that make a run fit, each on top of the one before.

    Tried in an order that leaves the result of training alone as long as possible. A change that
    turns out to be needless once a later one is made is left out. If not even the last one's case
    fits, nothing that is tried here helps.
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


def _change(case: Case, remark: str, keys: Mapping[str, Any]) -> Change:
    written = [
        f"{key}: {'(remove)' if value is None else str(value).lower()}"
        for key, value in keys.items()
    ]
    return Change(", ".join(written), remark, Case(case.run.changed(keys)))


def _set(remark: str, when: Callable[[Case], bool], keys: Mapping[str, Any]) -> Trial:
    return lambda case: _change(case, remark, keys) if when(case) else None


def _micro_batch(case: Case) -> Change | None:
    run = case.run
    if "train" not in case.failing:
        return None
    effective = run.micro_batch * run.accumulation
    for size in range(run.micro_batch - 1, 0, -1):
        if effective % size == 0:
            keys = {"micro_batch_size": size, "gradient_accumulation_steps": effective // size}
            change = _change(case, "the same effective batch", keys)
            if size == 1 or "train" not in change.case.failing:
                return change
    return None


def _shorter(case: Case) -> Change | None:
    pairs = case.run.counting.pairs
    for length in range((case.run.longest - 1) // _STEP * _STEP, 0, -_STEP):
        kept = len(pairs.within(length))
        if not kept:
            return None
        remark = f"drops {len(pairs) - kept} longer pairs"
        change = _change(case, remark, {"sequence_len": length})
        if change.case.fits:
            return change
    return None


_TRIALS: tuple[Trial, ...] = (
    _set(
        "derived from what is free",
        lambda case: case.run.utilization is not None and "sample" in case.failing,
        {"vllm.gpu_memory_utilization": None},
    ),
    _micro_batch,
    _set(
        "one more forward pass per step",
        lambda case: not case.run.checkpointing,
        {"gradient_checkpointing": True},
    ),
    _set(
        "the same without copies",
        lambda case: case.run.optimizer in FOREACH and "update" in case.failing,
        {"optimizer": "adamw_torch_fused"},
    ),
    _set(
        "states in 8 bits",
        lambda case: "8bit" not in case.run.optimizer,
        {"optimizer": "paged_adamw_8bit"},
    ),
    _set(
        "slower sampling",
        lambda case: case.run.sampler == "vllm" and "sample" in case.failing,
        {"sera.sampler": "transformers"},
    ),
    _set(
        "the base in 4 bits",
        lambda case: bool(case.run.model.adapter) and case.run.bits != 4,
        _FOUR_BITS,
    ),
    _shorter,
    _set(
        "trains an adapter instead of all weights",
        lambda case: not case.run.model.adapter,
        _FOUR_BITS | {"lora_r": 16, "lora_alpha": 32, "lora_target_linear": True},
    ),
)
