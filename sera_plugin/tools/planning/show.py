"""A plan for people and for machines, and what to change where a run does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from sera_plugin.config.quoting import printable
from sera_plugin.model.budget import GIB
from sera_plugin.tools.planning.counts import Speed, flops, iterations
from sera_plugin.tools.planning.model import FOREACH
from sera_plugin.tools.planning.run import Run
from sera_plugin.tools.report.output import plain_table

#: Columns of the tables of memory and of tokens, in order.
_PARTS = (
    *("weights", "optimizer", "gradients", "activations"),
    *("logits", "cache", "engine", "other"),
)
_COUNTS = ("sequences", "tokens", "most_tokens")
_SAMPLED = ("sample", "score_candidates")
_COUNTED = ("score_offline", "score_evaluation", *_SAMPLED, "train")
#: `sequence_len` is tried in steps of this.
_STEP = 64
_FOUR_BITS = {"adapter": "qlora", "load_in_4bit": True}


def figures(
    run: Run,
    speed: Speed | None,
    about: Mapping[str, str],
    device: str,
    room: tuple[int | None, int | None],
    disk: Mapping[str, int],
    **said: Any,
) -> dict[str, Any]:
    """The plan as JSON has it.

    `about` is what the run is, for the reader: name, value. `device` and `room` are what it is
    compared with: its name, and bytes of host memory and disk that are free here. `speed` is None
    where it is not known how fast the machine is; `said` are `speed_from` and `notes`.
    """
    return {
        "about": about,
        "iterations": list(_iterations(run, speed)),
        "memory": {
            "device": device,
            "bytes": run.memory,
            "fits": None if run.memory is None else not run.failing,
            "phases": _phases(run),
            "host": run.host_parts(),
            "host_free": room[0],
        },
        "disk": disk,
        "disk_free": room[1],
        "changes": [
            {
                "keys": change.keys,
                "remark": change.remark,
                "fits": not change.run.failing,
                "phases": _phases(change.run),
            }
            for change in advise(run)
        ],
        "speed": None if speed is None else asdict(speed),
        **said,
    }


def _iterations(run: Run, speed: Speed | None) -> Iterator[dict[str, Any]]:
    for one in iterations(run):
        work = {name: flops(run, name, work) for name, work in one.phases.items()}
        yield {
            "iteration": one.t,
            **{name: getattr(one, name) for name in ("pairs", "kept", "bootstrapped", "steps")},
            "phases": {
                name: dict(zip(_COUNTS, each[:3], strict=True)) | {"flops": work[name]}
                for name, each in one.phases.items()
            },
            "seconds": None if speed is None else speed.seconds(one, work),
        }


def _phases(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "phase": phase.name,
            "bytes": phase.parts,
            "all": phase.total,
            "fits": None if run.memory is None else phase.fits(run.memory),
        }
        for phase in run.phases
    ]


def text(found: Mapping[str, Any], remarks: Iterable[str]) -> str:
    """A plan's JSON in tables, with remarks on its phases of memory."""
    blocks = [
        "\n".join(f"{name:<10} {printable(value)}" for name, value in found["about"].items()),
        _tokens(found["iterations"]),
        "\n".join([_memory(found["memory"]["phases"]), *remarks]),
        "\n".join(_verdict(found["memory"], found["changes"])),
        _elsewhere("host memory", found["memory"]["host"], found["memory"]["host_free"])
        + "\n"
        + _elsewhere("disk", found["disk"], found["disk_free"]),
        _time(found["iterations"], found["speed_from"]),
        "\n".join(found["notes"]),
    ]
    return "\n\n".join(filter(None, blocks))


def _tokens(every: list[dict[str, Any]]) -> str:
    names = [name for name in _COUNTED if any(name in one["phases"] for one in every)]
    counted = {
        name: {
            key: sum(one["phases"][name][key] for one in every if name in one["phases"])
            for key in _COUNTS
        }
        for name in names
    }

    def cells(phases: dict[str, Any]) -> Iterator[str]:
        for name in names:
            work = phases.get(name)
            known = work and name not in _SAMPLED and work["tokens"] == work["most_tokens"]
            yield f"{'' if known else '~'}{work['tokens']:,}" if work else "-"

    rows = []
    for one in every:
        sampled = f" + {one['bootstrapped']:,}" if one["iteration"] > 1 else ""
        what = f"{one['kept']:,}{sampled}"
        rows.append([str(one["iteration"]), what, f"{one['steps']:,}", *cells(one["phases"])])
    rows.append(["all", "", f"{sum(one['steps'] for one in every):,}", *cells(counted)])
    most = [counted[name]["most_tokens"] for name in names]
    if most != [counted[name]["tokens"] for name in names]:
        rows.append(["at most", "", "", *(f"{count:,}" for count in most)])
    return plain_table(_head("tokens", "pairs", "steps", *names), rows)


def _head(*names: str) -> list[str]:
    return [name.replace("_", " ") for name in names]


def size(amount: float) -> str:
    """Bytes in GiB, or in MiB where there are few."""
    return f"{amount / GIB:.2f} GiB" if amount >= GIB else f"{amount / 2**20:.1f} MiB"


def _memory(phases: list[dict[str, Any]]) -> str:
    parts = [name for name in _PARTS if any(phase["bytes"].get(name) for phase in phases)]
    small = max(phase["all"] for phase in phases) < GIB
    unit, name = (2**20, "MiB") if small else (GIB, "GiB")
    rows = []
    for phase in phases:
        each = [phase["bytes"].get(part) for part in parts] + [phase["all"]]
        rows.append([phase["phase"], *("-" if n is None else f"{n / unit:.2f}" for n in each)])
    return plain_table([name, *parts, "all"], rows)


def _verdict(memory: dict[str, Any], changes: list[dict[str, Any]]) -> Iterator[str]:
    def most(phases: list[dict[str, Any]], between: str = " ") -> str:
        largest = max(phases, key=lambda phase: phase["all"])
        return f"{size(largest['all'])}{between}in `{largest['phase']}`"

    phases = memory["phases"]
    if memory["bytes"] is None:
        yield (
            f"At most {most(phases, ', ')}. There is no GPU here to compare with; --gpu GIB "
            "compares with one of that size."
        )
        return
    device = f"of {memory['bytes'] / GIB:.2f} GiB ({memory['device']})"
    if memory["fits"]:
        yield f"Fits: at most {most(phases, f' {device}, ')}."
        return
    failing = ", ".join(phase["phase"] for phase in phases if not phase["fits"])
    yield f"Does not fit: {most(phases)}, {device}. Phases that do not: {failing}."
    if changes:
        yield "What to change, each on top of those above it:"
    for change in changes:
        fits = "fits" if change["fits"] else "not yet"
        yield f"  {change['keys']}\n    {change['remark']}; then {most(change['phases'])}: {fits}"
    if not changes or not changes[-1]["fits"]:
        yield (
            "No change that is known here makes it fit. Take a smaller base_model or a larger GPU."
        )


def _elsewhere(name: str, parts: dict[str, int], free: int | None) -> str:
    each = ", ".join(f"{part} {size(amount)}" for part, amount in parts.items() if amount)
    needed = sum(parts.values())
    line = f"{name:<12}{size(needed)}: {each}"
    if free is not None:
        line += f"; {size(free)} are free here{', which is too little' if needed > free else ''}"
    return line


def duration(seconds: float) -> str:
    """Hours and minutes, or what is left of them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _time(every: list[dict[str, Any]], speed_from: str) -> str:
    operations = sum(sum(each["flops"] for each in one["phases"].values()) for one in every)
    counted = f"{operations:.2e} floating-point operations. {speed_from}"
    if every[0]["seconds"] is None:
        return f"Time: {counted}"
    taken = {str(one["iteration"]): one["seconds"] for one in every}
    names = list(dict.fromkeys(name for each in taken.values() for name in each))
    taken["all"] = {name: sum(each.get(name, 0.0) for each in taken.values()) for name in names}
    rows = []
    for label, each in taken.items():
        cells = [each.get(name) for name in names] + [sum(each.values())]
        rows.append([label, *("-" if n is None else duration(n) for n in cells)])
    return f"{plain_table(_head('time', *names, 'all'), rows)}\n{counted}"


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
    _set({"vllm.gpu_memory_utilization": None}, "derived from what is free",
         lambda run: run.utilization is not None and "sample" in run.failing),
    _micro_batch,
    _set({"gradient_checkpointing": True}, "one more forward pass per step",
         lambda run: not run.checkpointing),
    _set({"optimizer": "adamw_torch_fused"}, "the same without copies",
         lambda run: run.optimizer in FOREACH and "update" in run.failing),
    _set({"optimizer": "paged_adamw_8bit"}, "states in 8 bits",
         lambda run: "8bit" not in run.optimizer),
    _set({"sera.sampler": "transformers"}, "slower sampling",
         lambda run: run.sampler == "vllm" and "sample" in run.failing),
    _set(_FOUR_BITS, "the base in 4 bits", lambda run: run.model.adapter and run.bits != 4),
    _shorter,
    _set(_FOUR_BITS | {"lora_r": 16, "lora_alpha": 32, "lora_target_linear": True},
         "trains an adapter instead of all weights", lambda run: not run.model.adapter),
)  # fmt: skip
