"""The tables of docs/claims.md, each a function of kept records alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import isnan
from statistics import mean

from benchmarks.claims import criteria
from benchmarks.claims.estimates import (
    Claim,
    Estimate,
    Figure,
    Record,
    Results,
    after,
    during,
    final,
)
from benchmarks.claims.systems import CORE, NOISES, SWEEPS
from benchmarks.harness import markdown

MISSING = "-"
_MAIN = ("DPO, 3 epochs", "iterative DPO", "SeRA, selection only", "SeRA", "SeRA, length control")


def compared(records: Sequence[Record]) -> Results:
    """Runs of systems, without those of the seeds that only criteria use."""
    return Results([r for r in records if "policies" in r and r["seed"] not in criteria.SEEDS])


def shown(estimate: Estimate, digits: int = 3, sign: str = "") -> str:
    """Mean and interval; the mean alone of one seed."""
    if isnan(estimate.mean):
        return MISSING
    centre = f"{estimate.mean:{sign}.{digits}f}"
    if isnan(estimate.low):
        return centre
    return f"{centre} ({estimate.low:{sign}.{digits}f} to {estimate.high:{sign}.{digits}f})"


def share(noise: float) -> str:
    return f"{noise:.0%}".replace("%", " %")


def criteria_table(records: Sequence[Record]) -> str:
    of_seeds = [one for one in records if one.get("seed") in criteria.SEEDS]
    bases = sorted((r for r in of_seeds if r["system"] == "base model"), key=lambda r: r["seed"])
    runs = [r for r in of_seeds if r["system"] == criteria.SYSTEM and r["noise"] == 0]
    noisy = [r for r in of_seeds if r["system"] == criteria.SYSTEM and r["noise"] == 0.2]
    if len(runs) < len(criteria.SEEDS) or not noisy:
        return "Not checked yet."
    found = criteria.check(bases, sorted(runs, key=lambda r: r["seed"]))
    rows = [
        [
            one.says,
            f"{one.least:g} to {one.most:g}",
            f"{one.figure:.3f}",
            "yes" if one.holds else "no",
        ]
        for one in found
    ]
    seeds = " and ".join(map(str, criteria.SEEDS))
    words = mean(r["policies"][-1]["words"] for r in noisy)
    table = markdown(("criterion", "wanted", "found", "holds"), rows)
    return (
        f"{table}\n\nSeeds {seeds}. With a fifth of the labels swapped, which is no criterion, "
        f"plain DPO's answers have {words:.2f} words after 3 epochs."
    )


def claim_table(claims: Sequence[Claim], results: Results) -> str:
    rows = []
    for claim in claims:
        for number, one in enumerate(claim.comparisons):
            estimate = one.estimate(results)
            rows.append(
                [
                    f"**{claim.says}** ({claim.where}); {claim.unit}" if number == 0 else "",
                    one.label,
                    share(one.noise),
                    shown(estimate, sign="+"),
                    str(estimate.seeds),
                    estimate.verdict,
                ]
            )
    head = ("claim", "difference", "swapped", "measured", "seeds", "verdict")
    return markdown(head, rows)


def core_table(results: Results) -> str:
    """A row per system, a column per share of swapped labels."""
    parts = []
    for title, name, digits in (
        ("True reward", "true_reward", 3),
        ("Win rate against the base model", "win_rate", 3),
        ("Words", "words", 2),
    ):
        rows = [
            [label, *(shown(Estimate.over(list(by_seed.values())), digits) for by_seed in cells)]
            for label, cells in _core_rows(results, name)
        ]
        head = (title, *(f"{share(noise)} swapped" for noise in NOISES))
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


def _core_rows(results: Results, name: str) -> list[tuple[str, list[dict[int, float]]]]:
    first = [results.of("iterative DPO", noise, after(1, name)) for noise in NOISES]
    rows = [("DPO, 1 epoch", first)]
    for system in CORE:
        rows.append((system.name, [results.of(system.name, n, final(name)) for n in NOISES]))
    return [(label, cells) for label, cells in rows if any(cells)]


def base_table(records: Sequence[Record]) -> str:
    bases = [r for r in records if r["system"] == "base model" and r["seed"] not in criteria.SEEDS]
    if not bases:
        return "No results yet."
    rows = [
        [str(b["seed"]), f"{b['true_reward']:.3f}", f"{b['spread']:.3f}", f"{b['words']:.2f}"]
        for b in sorted(bases, key=lambda b: b["seed"])
    ]
    return markdown(("seed", "true reward", "spread within a prompt", "words"), rows)


def iteration_table(results: Results) -> str:
    """What happens from iteration to iteration."""
    columns: tuple[tuple[str, Callable[[int], Figure]], ...] = (
        ("true reward after", lambda t: after(t, "true_reward")),
        ("words after", lambda t: after(t, "words")),
        ("sampled pairs in true order", lambda t: during(t, "order_found")),
        ("of those kept", lambda t: during(t, "order_kept")),
        ("swapped labels dropped", lambda t: during(t, "recall")),
        ("wrong among kept", lambda t: during(t, "wrong_kept")),
        ("wrong among dropped", lambda t: during(t, "wrong_dropped")),
    )
    rows = []
    for name in ("SeRA", "SeRA, length control", "SeRA, selection only", "iterative DPO"):
        for noise in NOISES:
            for t in (1, 2, 3):
                cells = [list(results.of(name, noise, make(t)).values()) for _, make in columns]
                if cells[0]:
                    text = [f"{mean(cell):.3f}" if cell else MISSING for cell in cells]
                    rows.append([name, share(noise), str(t), *text])
    return markdown(("system", "swapped", "t", *(title for title, _ in columns)), rows)


def jaccard_table(results: Results) -> str:
    names = {
        "previous iteration's": "jaccard_previous",
        "score's": "jaccard_score",
        "reference's": "jaccard_reference",
    }
    rows = []
    for noise in NOISES:
        for t in (2, 3):
            cells = [
                Estimate.over(list(results.of("SeRA", noise, during(t, name)).values()))
                for name in names.values()
            ]
            if cells[1].seeds:
                rows.append([share(noise), str(t), *(shown(cell) for cell in cells)])
    return markdown(("swapped", "t", *(f"with the {name}" for name in names)), rows)


def reward_table(results: Results) -> str:
    """Fig. 2: what the implicit reward of the last policy follows, on the base model's answers."""
    rows = []
    for system in _MAIN:
        for noise in NOISES:
            cells = [
                Estimate.over(list(results.of(system, noise, final(name)).values()))
                for name in ("r2_true", "r2_words", "order")
            ]
            if cells[0].seeds:
                rows.append([system, share(noise), *(shown(cell) for cell in cells)])
    head = ("system", "swapped", "R^2 with true reward", "R^2 with words", "pairs in true order")
    return markdown(head, rows)


def sweep_table(results: Results) -> str:
    rows = []
    for sweep, systems in SWEEPS.items():
        for system in systems:
            for noise in system.noises:
                cells = [
                    Estimate.over(list(results.of(system.name, noise, final(name)).values()))
                    for name in ("true_reward", "words")
                ]
                if cells[0].seeds:
                    rows.append(
                        [sweep, system.name, *(shown(cell) for cell in cells), str(cells[0].seeds)]
                    )
    if not rows:
        return "No sweep has been run."
    default = [
        Estimate.over(list(results.of("SeRA", 0.2, final(name)).values()))
        for name in ("true_reward", "words")
    ]
    rows.insert(0, ["", "SeRA", *map(shown, default), str(default[0].seeds)])
    return markdown(("sweep", "system", "true reward", "words", "seeds"), rows)


def cost_table(results: Results) -> str:
    """Forwards and seconds of a run, by phase; one core, others busy beside it."""
    phases = ("score_offline", "sample", "score_candidates", "select", "label", "train")
    rows = []
    for name in ("iterative DPO", "SeRA, selection only", "SeRA", "SeRA, length control", "SPIN"):
        found = [r for r in results.records if r["system"] == name and r["noise"] == 0.2]
        if not found:
            continue
        seconds = {phase: mean(_total(r, "seconds", phase) for r in found) for phase in phases}
        forwards = mean(sum(sum(i["sequences"].values()) for i in r["iterations"]) for r in found)
        whole = sum(seconds.values())
        rows.append(
            [
                name,
                f"{forwards:,.0f}",
                f"{whole:.1f}",
                *(f"{s / whole:.1%}" for s in seconds.values()),
            ]
        )
    head = ("system", "sequences forwarded", "seconds", *(f"`{phase}`" for phase in phases))
    return markdown(head, rows)


def real_table(records: Sequence[Record]) -> str:
    """What rewards follow and what ways to select keep, on a dataset with scores."""
    if not records:
        return "No run on a dataset yet."
    rewards, kept = [], []
    for one in records:
        for found in one["iterations"]:
            place = [one["real"], str(one["seed"]), str(found["iteration"])]
            figures = (found["r2_score"], found["r2_length"], found["accuracy"])
            rewards.append([*place, *(f"{figure:.3f}" for figure in figures)])
            kept += [
                [
                    *place,
                    name,
                    f"{which['score_gap']:+.3f}",
                    f"{which['length_gap']:+.1f}",
                    f"{which['longer']:.3f}",
                    f"{which['jaccard_irm']:.3f}",
                ]
                for name, which in found["kept"].items()
                # What else the same policies would keep says nothing new of the second iteration.
                if found["iteration"] > 2 or one is records[0]
            ]
    head = ("run", "seed", "t")
    one = records[-1]
    return "\n\n".join(
        (
            f"{one['pairs']} pairs of `{one['data']}`, model `{one['model']}`, "
            f"{mean(r['seconds'] for r in records):.0f} s a run; `{json.dumps(one['settings'])}`.",
            markdown(
                (*head, "R^2 with score", "R^2 with length", "margins above 0"),
                rewards,
            ),
            markdown(
                (*head, "would keep by", "score gap", "length gap", "longer", "Jaccard with irm"),
                kept,
            ),
        )
    )


def _total(record: Record, what: str, phase: str) -> float:
    return float(sum(one[what].get(phase, 0.0) for one in record["iterations"]))


def run_table(records: Sequence[Record]) -> str:
    """What the results are from."""
    abouts = [one["about"] for one in records if "about" in one]
    runs = compared(records).records
    if not runs:
        return "No results yet."
    seeds = sorted({r["seed"] for r in runs})
    settings = sorted({(r["system"], r["noise"]) for r in runs})
    counts = [sum(1 for r in runs if (r["system"], r["noise"]) == one) for one in settings]
    expected = sum(len(system.noises) for system in CORE)
    known = {system.name for system in CORE}
    core = sum(1 for system, _ in settings if system in known)
    versions = ", ".join(f"{name} {number}" for name, number in runs[-1]["versions"].items())
    commits = ", ".join(dict.fromkeys(one["commit"] for one in abouts))
    world = json.dumps(abouts[-1]["world"])
    return (
        f"{len(runs)} runs; seeds {', '.join(map(str, seeds))}. Of the {expected} settings of the "
        f"core table {core} have results, from {min(counts)} to {max(counts)} seeds each. A run "
        f"took {mean(r['seconds'] for r in runs):.0f} s on one core, with other work on the "
        f"machine.\n\n{abouts[-1]['date'][:10]}; {abouts[-1]['cpu']}, {abouts[-1]['cores']} cores; "
        f"Python {abouts[-1]['python']}, {versions}; at {commits}.\n\nThe world's parameters:\n\n"
        f"```json\n{world}\n```"
    )
