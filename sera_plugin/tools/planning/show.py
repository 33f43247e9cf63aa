"""A plan for people and for machines."""

from __future__ import annotations

from dataclasses import asdict
from itertools import repeat
from typing import Any

from sera_plugin.config.quoting import printable
from sera_plugin.model.memory import GIB
from sera_plugin.tools.planning.counts import Work
from sera_plugin.tools.planning.memory import Phase
from sera_plugin.tools.planning.plan import Plan
from sera_plugin.tools.report.output import plain_table

#: Columns of the memory table, in order.
_PARTS = (
    "weights",
    "optimizer",
    "gradients",
    "activations",
    "logits",
    "cache",
    "engine",
    "other",
)
_SAMPLED = ("sample", "score_candidates")
_COUNTED = ("score_offline", "score_evaluation", "sample", "score_candidates", "train")


def text(plan: Plan) -> str:
    """The plan in tables."""
    blocks = [
        "\n".join(f"{name:<10} {printable(value)}" for name, value in plan.inputs.about.items()),
        _iterations(plan),
        _memory(plan),
        _verdict(plan),
        _elsewhere(plan),
        _time(plan),
        "\n".join(plan.inputs.notes),
    ]
    return "\n\n".join(filter(None, blocks))


def _number(phase: str, work: Work | None) -> str:
    if work is None:
        return "-"
    known = work.exact and phase not in _SAMPLED
    return f"{work.tokens:,}" if known else f"~{work.tokens:,}"


def _iterations(plan: Plan) -> str:
    phases = [name for name in _COUNTED if any(name in one.phases for one in plan.iterations)]
    rows = []
    for one in plan.iterations:
        what = f"{one.kept:,} + {one.bootstrapped:,}" if one.number > 1 else f"{one.kept:,}"
        counts = [_number(name, one.phases.get(name)) for name in phases]
        rows.append([str(one.number), what, f"{one.steps:,}", *counts])
    steps = sum(one.steps for one in plan.iterations)
    rows.append(["all", "", f"{steps:,}", *(_number(name, _sum(plan, name)) for name in phases)])
    if any(not work.exact for one in plan.iterations for work in one.phases.values()):
        most = [f"{_sum(plan, name).most:,}" for name in phases]
        rows.append(["at most", "", "", *most])
    head = ["tokens", "pairs", "steps", *(name.replace("_", " ") for name in phases)]
    return plain_table(head, rows)


def _sum(plan: Plan, phase: str) -> Work:
    found = [one.phases[phase] for one in plan.iterations if phase in one.phases]
    return Work(
        *(sum(values) for values in zip(*(vars(work).values() for work in found), strict=True))
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def size(amount: float) -> str:
    """Bytes in GiB, or in MiB where there are few."""
    return f"{_gib(amount)} GiB" if amount >= GIB else f"{amount / 2**20:.1f} MiB"


def _memory(plan: Plan) -> str:
    parts = [name for name in _PARTS if any(phase.parts.get(name) for phase in plan.phases)]
    small = max(phase.total for phase in plan.phases) < GIB
    unit, name = (2**20, "MiB") if small else (GIB, "GiB")
    rows = [
        [
            phase.name,
            *(f"{phase.parts[p] / unit:.2f}" if p in phase.parts else "-" for p in parts),
            f"{phase.total / unit:.2f}",
        ]
        for phase in plan.phases
    ]
    notes = [f"{phase.name}: {phase.note}" for phase in plan.phases if phase.note]
    return "\n".join([plain_table([name, *parts, "all"], rows), *notes])


def _largest(phases: list[Phase]) -> Phase:
    return max(phases, key=lambda phase: phase.total)


def _verdict(plan: Plan) -> str:
    device, most = plan.inputs.device, _largest(plan.phases)
    if device.memory is None:
        return (
            f"At most {size(most.total)}, in `{most.name}`. There is no GPU here to compare with; "
            "--gpu GIB compares with one of that size."
        )
    if plan.fits:
        return (
            f"Fits: at most {size(most.total)} of {_gib(device.memory)} GiB ({device.name}), in "
            f"`{most.name}`."
        )
    failing = [phase.name for phase in plan.phases if not phase.fits(device.memory)]
    lines = [
        f"Does not fit: {size(most.total)} in `{most.name}`, of {_gib(device.memory)} GiB "
        f"({device.name}). Phases that do not: {', '.join(failing)}."
    ]
    if plan.changes:
        lines.append("What to change, each on top of those above it:")
    for change in plan.changes:
        most = _largest(change.case.phases)
        fits = "fits" if change.case.fits else "not yet"
        lines.append(f"  {change.keys}")
        lines.append(f"    {change.remark}; then {size(most.total)} in `{most.name}`: {fits}")
    if not plan.changes or not plan.changes[-1].case.fits:
        lines.append(
            "No change that is known here makes it fit. Take a smaller base_model or a larger GPU."
        )
    return "\n".join(lines)


def _elsewhere(plan: Plan) -> str:
    lines = []
    room = plan.inputs.room or (None, None)
    for name, parts, free in zip(
        ("host memory", "disk"), (plan.host, plan.disk), room, strict=True
    ):
        each = ", ".join(f"{part} {size(amount)}" for part, amount in parts.items() if amount)
        needed = sum(parts.values())
        line = f"{name:<12}{size(needed)}: {each}"
        if free is not None:
            line += f"; {size(free)} are free here"
            line += ", which is too little" if needed > free else ""
        lines.append(line)
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Hours and minutes, or what is left of them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _time(plan: Plan) -> str:
    flops = sum(sum(one.values()) for one in plan.flops)
    counted = f"{flops:.2e} floating-point operations."
    if plan.seconds is None:
        return f"Time: {counted} {plan.inputs.speed_from}"
    names = list(dict.fromkeys(name for one in plan.seconds for name in one))
    rows = [
        [
            str(one.number),
            *(duration(s[name]) if name in s else "-" for name in names),
            duration(sum(s.values())),
        ]
        for one, s in zip(plan.iterations, plan.seconds, strict=True)
    ]
    totals = [sum(one.get(name, 0.0) for one in plan.seconds) for name in names]
    rows.append(["all", *map(duration, totals), duration(sum(totals))])
    head = ["time", *(name.replace("_", " ") for name in names), "all"]
    return f"{plain_table(head, rows)}\n{counted} {plan.inputs.speed_from}"


def data(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it."""
    device, inputs = plan.inputs.device, plan.inputs
    memory_free, disk_free = inputs.room or (None, None)

    def phases(found: list[Phase]) -> list[dict[str, Any]]:
        return [
            {
                "phase": phase.name,
                "bytes": phase.parts,
                "all": phase.total,
                "fits": None if device.memory is None else phase.fits(device.memory),
            }
            for phase in found
        ]

    return {
        "about": dict(inputs.about),
        "iterations": [
            {
                "iteration": one.number,
                "pairs": one.pairs,
                "kept": one.kept,
                "bootstrapped": one.bootstrapped,
                "steps": one.steps,
                "phases": {
                    name: {
                        "sequences": work.sequences,
                        "tokens": work.tokens,
                        "most_tokens": work.most,
                        "flops": flops[name],
                    }
                    for name, work in one.phases.items()
                },
                "seconds": seconds,
            }
            for one, flops, seconds in zip(
                plan.iterations, plan.flops, plan.seconds or repeat(None), strict=False
            )
        ],
        "memory": {
            "device": device.name,
            "bytes": device.memory,
            "fits": plan.fits,
            "phases": phases(plan.phases),
            "host": plan.host,
            "host_free": memory_free,
        },
        "disk": plan.disk,
        "disk_free": disk_free,
        "changes": [
            {
                "keys": change.keys,
                "remark": change.remark,
                "fits": change.case.fits,
                "phases": phases(change.case.phases),
            }
            for change in plan.changes
        ],
        "speed": None if inputs.speed is None else asdict(inputs.speed),
        "speed_from": inputs.speed_from,
        "notes": inputs.notes,
    }
