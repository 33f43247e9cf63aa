"""A plan for people and for machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import repeat
from typing import Any

from sera_plugin.config.quoting import printable
from sera_plugin.model.budget import GIB
from sera_plugin.tools.planning.advice import Case
from sera_plugin.tools.planning.counts import Iteration, Work
from sera_plugin.tools.planning.memory import Phase
from sera_plugin.tools.planning.plan import Plan
from sera_plugin.tools.report.output import plain_table

#: Columns of the tables of memory and of tokens, in order.
_PARTS = (
    *("weights", "optimizer", "gradients", "activations"),
    *("logits", "cache", "engine", "other"),
)
_SAMPLED = ("sample", "score_candidates")
_COUNTED = ("score_offline", "score_evaluation", *_SAMPLED, "train")


def text(plan: Plan) -> str:
    """The plan in tables."""
    blocks = [
        "\n".join(f"{name:<10} {printable(value)}" for name, value in plan.about.items()),
        _iterations(plan),
        _memory(plan.phases),
        "\n".join(_verdict(plan)),
        _elsewhere(plan),
        _time(plan),
        "\n".join(plan.notes),
    ]
    return "\n\n".join(filter(None, blocks))


def _iterations(plan: Plan) -> str:
    phases = [name for name in _COUNTED if any(name in one.phases for one in plan.iterations)]
    every = {
        name: Work.sum(one.phases[name] for one in plan.iterations if name in one.phases)
        for name in phases
    }

    def counts(work: dict[str, Work]) -> Iterable[str]:
        for name in phases:
            if name not in work:
                yield "-"
            else:
                known = work[name].exact and name not in _SAMPLED
                yield f"{'' if known else '~'}{work[name].tokens:,}"

    rows = []
    for one in plan.iterations:
        what = f"{one.kept:,} + {one.bootstrapped:,}" if one.number > 1 else f"{one.kept:,}"
        rows.append([str(one.number), what, f"{one.steps:,}", *counts(one.phases)])
    steps = sum(one.steps for one in plan.iterations)
    rows.append(["all", "", f"{steps:,}", *counts(every)])
    if not all(work.exact for work in every.values()):
        rows.append(["at most", "", "", *(f"{every[name].most:,}" for name in phases)])
    return plain_table(_head("tokens", "pairs", "steps", *phases), rows)


def _head(*names: str) -> list[str]:
    return [name.replace("_", " ") for name in names]


def size(amount: float) -> str:
    """Bytes in GiB, or in MiB where there are few."""
    return f"{amount / GIB:.2f} GiB" if amount >= GIB else f"{amount / 2**20:.1f} MiB"


def _memory(phases: list[Phase]) -> str:
    parts = [name for name in _PARTS if any(phase.parts.get(name) for phase in phases)]
    small = max(phase.total for phase in phases) < GIB
    unit, name = (2**20, "MiB") if small else (GIB, "GiB")
    rows = [
        [
            phase.name,
            *(f"{phase.parts[p] / unit:.2f}" if p in phase.parts else "-" for p in parts),
            f"{phase.total / unit:.2f}",
        ]
        for phase in phases
    ]
    notes = [f"{phase.name}: {phase.note}" for phase in phases if phase.note]
    return "\n".join([plain_table([name, *parts, "all"], rows), *notes])


def _most(case: Case) -> str:
    largest = max(case.phases, key=lambda phase: phase.total)
    return f"{size(largest.total)} in `{largest.name}`"


def _verdict(plan: Plan) -> Iterable[str]:
    most = _most(plan.case).replace(" in `", ", in `")
    if plan.run.memory is None:
        yield (
            f"At most {most}. There is no GPU here to compare with; --gpu GIB compares with one of "
            "that size."
        )
        return
    memory = f"of {plan.run.memory / GIB:.2f} GiB ({plan.device})"
    if plan.fits:
        yield f"Fits: at most {most.replace(',', f' {memory},')}."
        return
    failing = ", ".join(phase.name for phase in plan.phases if phase.name in plan.case.failing)
    yield f"Does not fit: {_most(plan.case)}, {memory}. Phases that do not: {failing}."
    if plan.changes:
        yield "What to change, each on top of those above it:"
    for change in plan.changes:
        fits = "fits" if change.case.fits else "not yet"
        yield f"  {change.keys}\n    {change.remark}; then {_most(change.case)}: {fits}"
    if not plan.changes or not plan.changes[-1].case.fits:
        yield (
            "No change that is known here makes it fit. Take a smaller base_model or a larger GPU."
        )


def _elsewhere(plan: Plan) -> str:
    lines = []
    every = zip(
        ("host memory", "disk"), (plan.host, plan.disk), plan.room or (None, None), strict=True
    )
    for name, parts, free in every:
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
    counted = f"{flops:.2e} floating-point operations. {plan.speed_from}"
    if plan.seconds is None:
        return f"Time: {counted}"
    names = list(dict.fromkeys(name for one in plan.seconds for name in one))
    totals = {name: sum(one.get(name, 0.0) for one in plan.seconds) for name in names}
    rows = [
        [
            label,
            *(duration(each[name]) if name in each else "-" for name in names),
            duration(sum(each.values())),
        ]
        for label, each in [
            *((str(t), one) for t, one in enumerate(plan.seconds, 1)),
            ("all", totals),
        ]
    ]
    return f"{plain_table(_head('time', *names, 'all'), rows)}\n{counted}"


def data(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it."""
    memory = plan.run.memory
    memory_free, disk_free = plan.room or (None, None)

    def phases(case: Case) -> list[dict[str, Any]]:
        return [
            {
                "phase": phase.name,
                "bytes": phase.parts,
                "all": phase.total,
                "fits": None if memory is None else phase.fits(memory),
            }
            for phase in case.phases
        ]

    def iteration(one: Iteration, flops: dict[str, float], seconds: Any) -> dict[str, Any]:
        counts = ("pairs", "kept", "bootstrapped", "steps")
        phases = {
            name: {
                "sequences": work.sequences,
                "tokens": work.tokens,
                "most_tokens": work.most,
                "flops": flops[name],
            }
            for name, work in one.phases.items()
        }
        found = {"iteration": one.number, **{name: getattr(one, name) for name in counts}}
        return found | {"phases": phases, "seconds": seconds}

    seconds = plan.seconds or repeat(None)
    return {
        "about": dict(plan.about),
        "iterations": list(map(iteration, plan.iterations, plan.flops, seconds)),
        "memory": {
            "device": plan.device,
            "bytes": memory,
            "fits": plan.fits,
            "phases": phases(plan.case),
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
                "phases": phases(change.case),
            }
            for change in plan.changes
        ],
        "speed": None if plan.speed is None else asdict(plan.speed),
        "speed_from": plan.speed_from,
        "notes": plan.notes,
    }
