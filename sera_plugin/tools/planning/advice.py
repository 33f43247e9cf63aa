"""What to change where a run does not fit: which key, which value, and what it comes to then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sera_plugin.tools.planning.model import FOREACH
from sera_plugin.tools.planning.run import Run

#: `sequence_len` is tried in steps of this.
_STEP = 64
_FOUR_BITS = {"adapter": "qlora", "load_in_4bit": True}


class Change(NamedTuple):
    """One change on top of those before it: what to write in the YAML, what else it means, and the
    run with it."""

    keys: str
    remark: str
    run: Run


#: Keys that may help a run, and what else they mean; None where there is nothing to change.
Trial = Callable[[Run], tuple[Mapping[str, Any], str] | None]


def advise(run: Run) -> list[Change]:
    """Changes that make a run fit, each on top of the one before; none where it fits.

    Tried in an order that leaves the result of training alone as long as possible. A change that
    turns out to be needless once a later one is made is left out. If not even the last one's run
    fits, nothing that is tried here helps.
    """
    trials: list[Trial] = []
    best = run
    for trial in _TRIALS:
        if not best.failing:
            break
        for change in _apply([trial], best):
            if change.run.excess < best.excess:
                trials.append(trial)
                best = change.run
    for trial in trials[-2::-1]:
        fewer = [one for one in trials if one is not trial]
        if not _apply(fewer, run)[-1].run.failing:
            trials = fewer
    return _apply(trials, run)


def _apply(trials: Sequence[Trial], run: Run) -> list[Change]:
    changes: list[Change] = []
    for trial in trials:
        if (found := trial(run)) is not None:
            run = run.changed(found[0])
            keys = {key: "(remove)" if value is None else str(value).lower()
                    for key, value in found[0].items()}  # fmt: skip
            written = ", ".join(f"{key}: {value}" for key, value in keys.items())
            changes.append(Change(written, found[1], run))
    return changes


def _set(keys: Mapping[str, Any], remark: str, when: Callable[[Run], object]) -> Trial:
    return lambda run: (keys, remark) if when(run) else None


def _micro_batch(run: Run) -> tuple[Mapping[str, Any], str] | None:
    if "train" not in run.failing:
        return None
    effective, keys = run.micro_batch * run.accumulation, None
    for size in range(run.micro_batch - 1, 0, -1):
        if effective % size == 0:
            keys = {"micro_batch_size": size, "gradient_accumulation_steps": effective // size}
            if "train" not in run.changed(keys).failing:
                break
    return None if keys is None else (keys, "the same effective batch")


def _shorter(run: Run) -> tuple[Mapping[str, Any], str] | None:
    for length in range((run.longest - 1) // _STEP * _STEP, 0, -_STEP):
        dropped = int((run.pairs.longer > length).sum())
        if dropped == len(run.pairs):
            return None
        if not run.changed({"sequence_len": length}).failing:
            return {"sequence_len": length}, f"drops {dropped} longer pairs"
    return None


_TRIALS: tuple[Trial, ...] = (
    _set(
        {"vllm.gpu_memory_utilization": None},
        "derived from what is free",
        lambda run: run.utilization is not None and "sample" in run.failing,
    ),
    _micro_batch,
    _set(
        {"gradient_checkpointing": True},
        "one more forward pass per step",
        lambda run: not run.checkpointing,
    ),
    _set(
        {"optimizer": "adamw_torch_fused"},
        "the same without copies",
        lambda run: run.optimizer in FOREACH and "update" in run.failing,
    ),
    _set(
        {"optimizer": "paged_adamw_8bit"},
        "states in 8 bits",
        lambda run: "8bit" not in run.optimizer,
    ),
    _set(
        {"sera.sampler": "transformers"},
        "slower sampling",
        lambda run: run.sampler == "vllm" and "sample" in run.failing,
    ),
    _set(_FOUR_BITS, "the base in 4 bits", lambda run: run.model.adapter and run.bits != 4),
    _shorter,
    _set(
        _FOUR_BITS | {"lora_r": 16, "lora_alpha": 32, "lora_target_linear": True},
        "trains an adapter instead of all weights",
        lambda run: not run.model.adapter,
    ),
)
