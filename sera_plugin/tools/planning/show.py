"""A plan for people and for machines, and what to change where a run does not fit."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from sera_plugin.config.quoting import printable
from sera_plugin.model.budget import GIB
from sera_plugin.tools.planning.counts import Speed, flops, iterations
from sera_plugin.tools.planning.model import FOREACH
from sera_plugin.tools.planning.run import Run
from sera_plugin.tools.report.output import fill, plain_table

#: Columns of the tables of memory and of tokens, in order.
_PARTS = (
    *("weights", "optimizer", "gradients", "activations"),
    *("logits", "cache", "engine", "judge", "other"),
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

    `about` is what the run is, for the reader. It is compared with a `device` of that name, and
    with bytes of host memory and disk that are free. `said` are `speed_from` and `notes`.
    """
    return {
        "about": about,
        "iterations": list(_iterations(run, speed)),
        "memory": {
            "device": device,
            "bytes": run.memory,
            "fits": None if run.memory is None else not run.failing,
            # Of a CPU it is not known: what `malloc` keeps is half as much again, or more.
            "phases": [] if run.memory is None else _phases(run),
            "host": {} if run.memory is None else run.host_parts(),
            "host_free": room[0],
        },
        "disk": disk,
        "disk_free": room[1],
        "changes": [
            {"keys": keys, "remark": remark, "fits": not then.failing, "phases": _phases(then)}
            for keys, remark, then in advise(run)
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
            "seconds": None if speed is None else speed.seconds(one, work, run),
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
    """A plan's JSON in tables and sentences, with remarks on its phases of memory."""
    every, memory = found["iterations"], found["memory"]
    return fill(
        "plan.txt",
        plan=found,
        remarks=remarks,
        tokens=_tokens(every),
        parts=memory["phases"] and _memory(memory["phases"]),
        gpu=f"{(memory['bytes'] or 0) / GIB:.2f} GiB ({memory['device']})",
        time=f"{_time(every)}\n" if found["speed"] else "",
        operations=sum(work["flops"] for one in every for work in one["phases"].values()),
        printable=printable,
        size=size,
        elsewhere=_elsewhere,
    ).strip()


def _table(title: str, names: list[str], rows: dict[str, Any], form: Callable[[Any], str]) -> str:
    """A line of values by name for each label."""
    lines = []
    for label, values in rows.items():
        cells = [values.get(name) for name in names]
        lines.append([label, *("-" if cell is None else form(cell) for cell in cells)])
    return plain_table([title, *(name.replace("_", " ") for name in names)], lines)


def _tokens(every: list[dict[str, Any]]) -> str:
    names = [name for name in _COUNTED if any(name in one["phases"] for one in every)]

    def total(name: str, key: str) -> int:
        return sum(one["phases"][name][key] for one in every if name in one["phases"])

    def cells(steps: int, phases: dict[str, Any], pairs: str = "") -> dict[str, str]:
        found = {"pairs": pairs, "steps": f"{steps:,}"}
        for name, work in phases.items():
            known = name not in _SAMPLED and work["tokens"] == work["most_tokens"]
            found[name] = f"{'' if known else '~'}{work['tokens']:,}"
        return found

    rows = {}
    for one in every:
        sampled = f" + {one['bootstrapped']:,}" if one["iteration"] > 1 else ""
        pairs = f"{one['kept']:,}{sampled}"
        rows[str(one["iteration"])] = cells(one["steps"], one["phases"], pairs)
    counted = {name: {key: total(name, key) for key in _COUNTS} for name in names}
    rows["all"] = cells(sum(one["steps"] for one in every), counted)
    if any(work["most_tokens"] != work["tokens"] for work in counted.values()):
        most = {name: f"{work['most_tokens']:,}" for name, work in counted.items()}
        rows["at most"] = {"pairs": "", "steps": ""} | most
    return _table("tokens", ["pairs", "steps", *names], rows, str)


def size(amount: float) -> str:
    """Bytes in GiB, or in MiB where there are few."""
    return f"{amount / GIB:.2f} GiB" if amount >= GIB else f"{amount / 2**20:.1f} MiB"


def _memory(phases: list[dict[str, Any]]) -> str:
    rows = {phase["phase"]: phase["bytes"] | {"all": phase["all"]} for phase in phases}
    names = [name for name in (*_PARTS, "all") if any(parts.get(name) for parts in rows.values())]
    small = max(phase["all"] for phase in phases) < GIB
    unit, title = (2**20, "MiB") if small else (GIB, "GiB")
    return _table(title, names, rows, lambda amount: f"{amount / unit:.2f}")


def _elsewhere(name: str, parts: Mapping[str, int], free: int | None) -> str:
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


def _time(every: list[dict[str, Any]]) -> str:
    rows = {str(one["iteration"]): dict(one["seconds"]) for one in every}
    names = list(dict.fromkeys(name for each in rows.values() for name in each))
    rows["all"] = {name: sum(each.get(name, 0.0) for each in rows.values()) for name in names}
    for each in rows.values():
        each["all"] = sum(each.values())
    return _table("time", [*names, "all"], rows, duration)


class Change(NamedTuple):
    """What to write in the YAML on top of earlier changes, what else it means, the run with it."""

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
        found = trial(best) if best.failing else None
        if found and (then := best.changed(found[0])).excess < best.excess:
            trials.append(trial)
            best = then
    for trial in trials[-2::-1]:
        fewer = [one for one in trials if one is not trial]
        if not _apply(fewer, run)[-1].run.failing:
            trials = fewer
    return _apply(trials, run)


def _apply(trials: Sequence[Trial], run: Run) -> list[Change]:
    changes: list[Change] = []
    for trial in trials:
        if (found := trial(run)) is not None:
            keys, remark = found
            run = run.changed(keys)
            values = ["(remove)" if one is None else str(one).lower() for one in keys.values()]
            written = ", ".join(map("{}: {}".format, keys, values))
            changes.append(Change(written, remark, run))
    return changes


def _set(keys: Mapping[str, Any], remark: str, when: Callable[[Run], object]) -> Trial:
    return lambda run: (keys, remark) if when(run) else None


def _micro_batch(run: Run) -> tuple[Mapping[str, Any], str] | None:
    before, accumulation = run.cfg.micro_batch_size, run.cfg.gradient_accumulation_steps
    trials = [
        {"micro_batch_size": size, "gradient_accumulation_steps": before * accumulation // size}
        for size in range(before - 1, 0, -1)
        if before * accumulation % size == 0
    ]
    if "train" not in run.failing or not trials:
        return None
    fitting = (keys for keys in trials if "train" not in run.changed(keys).failing)
    return next(fitting, trials[-1]), "the same effective batch"


def _shorter(run: Run) -> tuple[Mapping[str, Any], str] | None:
    for length in range((run.longest - 1) // _STEP * _STEP, 0, -_STEP):
        dropped = int((run.pairs.longer > length).sum())
        if dropped < len(run.pairs) and not run.changed({"sequence_len": length}).failing:
            return {"sequence_len": length}, f"drops {dropped} longer pairs"
    return None


_TRIALS: tuple[Trial, ...] = (
    _set({"vllm.gpu_memory_utilization": None}, "derived from what is free",
         lambda run: (run.cfg.vllm or {}).get("gpu_memory_utilization")
         and "sample" in run.failing),
    _micro_batch,
    _set({"gradient_checkpointing": True}, "one more forward pass per step",
         lambda run: not run.cfg.gradient_checkpointing),
    _set({"optimizer": "adamw_torch_fused"}, "the same without copies",
         lambda run: run.optimizer in FOREACH and "update" in run.failing),
    _set({"optimizer": "paged_adamw_8bit"}, "states in 8 bits",
         lambda run: "8bit" not in run.optimizer and run.placement.stage == 0),
    _set({"fsdp_config.offload_params": True}, "weights and optimizer in host memory; slower",
         lambda run: run.cfg.fsdp_config and not run.placement.weights_on_host),
    _set({"sera.sampler": "transformers"}, "slower sampling",
         lambda run: run.sampler == "vllm" and "sample" in run.failing),
    _set(_FOUR_BITS, "the base in 4 bits",
         lambda run: run.model.adapter and run.bits != 4 and not run.cfg.fsdp_config),
    _shorter,
    _set(_FOUR_BITS | {"lora_r": 16, "lora_alpha": 32, "lora_target_linear": True},
         "trains an adapter instead of all weights",
         lambda run: not run.model.adapter and not run.cfg.fsdp_config),
)  # fmt: skip
