"""The tables of docs/claims*.md, each a function of kept records alone."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import isnan
from statistics import mean

from benchmarks.claims import criteria
from benchmarks.claims.estimates import (
    TRUE_REWARD,
    VERDICTS,
    Claim,
    Estimate,
    Figure,
    Record,
    Results,
    after,
    during,
    final,
)
from benchmarks.claims.systems import CORE, FRESH, MAIN, NOISES, SEEDS, SWEEPS
from benchmarks.claims.world import WORLD, WORLDS, World
from benchmarks.harness import markdown
from sera_plugin.rundir.journal import key_of

MISSING = "-"
#: Results of worlds that differ in the size of steps alone, by what a table calls that.
ByRate = Mapping[str, Results]


def compared(
    records: Sequence[Record], world: World = WORLD, seeds: Sequence[int] = SEEDS
) -> Results:
    """Runs of systems in one world, with the tables' seeds or others."""
    return Results(
        [r for r in records if "policies" in r and r["world"] == world.key and r["seed"] in seeds]
    )


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


def claim_table(claims: Sequence[Claim], worlds: ByRate) -> str:
    rows = []
    for claim in claims:
        for number, one in enumerate(claim.comparisons):
            found = [one.estimate(results) for results in worlds.values()]
            cells = [cell for e in found for cell in (shown(e, sign="+"), e.verdict)]
            rows.append(
                [
                    f"**{claim.says}** ({claim.where}); {claim.unit}" if number == 0 else "",
                    one.label,
                    share(one.noise),
                    *cells,
                    _seeds(found),
                ]
            )
    measured = [title for rate in worlds for title in (f"measured, {rate}", "verdict")]
    return markdown(("claim", "difference", "swapped", *measured, "seeds"), rows)


def verdict_table(claims: Sequence[Claim], worlds: ByRate) -> str:
    """A row per claim: how often each verdict was reached, over its differences."""
    rows = []
    for claim in claims:
        cells = []
        for results in worlds.values():
            found = Counter(one.estimate(results).verdict for one in claim.comparisons)
            cells.append(", ".join(f"{found[name]} {name}" for name in VERDICTS if found[name]))
        rows.append([claim.says, claim.where, *cells])
    return markdown(("claim", "in the paper", *worlds), rows)


def _seeds(found: Sequence[Estimate]) -> str:
    """How many seeds each has, once where all have as many."""
    return " and ".join(dict.fromkeys(str(one.seeds) for one in found))


def summary_table(worlds: ByRate) -> str:
    """What a reader needs first: true reward of the last policy at 20% swapped labels."""
    names = ("DPO, 3 epochs", "iterative DPO", "SeRA, selection only", "SeRA")
    rows = [
        [name, *(shown(_finals(results, name, 0.2, "true_reward")) for results in worlds.values())]
        for name in names
    ]
    return markdown(("system", *(f"learning rate {rate}" for rate in worlds)), rows)


def core_table(worlds: ByRate) -> str:
    """A row per system, a column per learning rate and share of swapped labels."""
    columns = list(product(worlds.items(), NOISES))
    head = [f"{rate}, {share(noise)}" for (rate, _), noise in columns]
    parts = []
    for title, name, digits in (
        ("True reward", "true_reward", 3),
        ("Win rate against the base model", "win_rate", 3),
        ("Words", "words", 2),
    ):
        sides = [("DPO, 1 epoch", "iterative DPO", after(1, name))]
        sides += [(system.name, system.name, final(name)) for system in CORE]
        rows = []
        for label, system, figure in sides:
            found = [results.of(system, noise, figure) for (_, results), noise in columns]
            if any(found):
                rows.append([label, *(shown(_over(cell), digits) for cell in found)])
        parts.append(markdown((title, *head), rows))
    return "\n\n".join(parts)


def _over(by_seed: Mapping[int, float]) -> Estimate:
    return Estimate.over(list(by_seed.values()))


def base_table(records: Sequence[Record]) -> str:
    bases = [r for r in records if r.get("system") == "base model" and r["seed"] in SEEDS + FRESH]
    bases = [r for r in bases if r["world"] == WORLD.key]
    if not bases:
        return "No results yet."
    rows = [
        [str(b["seed"]), f"{b['true_reward']:.3f}", f"{b['spread']:.3f}", f"{b['words']:.2f}"]
        for b in sorted(bases, key=lambda b: b["seed"])
    ]
    return markdown(("seed", "true reward", "spread within a prompt", "words"), rows)


def iteration_table(worlds: ByRate) -> str:
    """What happens from iteration to iteration."""
    columns: tuple[tuple[str, Callable[[int], Figure]], ...] = (
        ("true reward after", lambda t: after(t, "true_reward")),
        ("words after", lambda t: after(t, "words")),
        ("sampled pairs in true order", lambda t: during(t, "order_found")),
        ("of those kept", lambda t: during(t, "order_kept")),
        ("if ranked by log π - log π_0", lambda t: during(t, "order_since_initial")),
        ("by log π per token", lambda t: during(t, "order_likelihood")),
        ("swapped labels dropped", lambda t: during(t, "recall")),
        ("wrong among kept", lambda t: during(t, "wrong_kept")),
        ("wrong among dropped", lambda t: during(t, "wrong_dropped")),
    )
    rows = []
    for (rate, results), name, noise in product(
        worlds.items(),
        ("SeRA", "SeRA, length control", "SeRA, selection only", "iterative DPO"),
        NOISES,
    ):
        cells = [
            [list(results.of(name, noise, make(t)).values()) for t in (1, 2, 3)]
            for _, make in columns
        ]
        if cells[0][0]:
            text = [
                " / ".join(f"{mean(one):.3f}" for one in cell if one) or MISSING for cell in cells
            ]
            rows.append([rate, name, share(noise), *text])
    head = ("", "system", "swapped", *(title for title, _ in columns))
    return markdown(head, rows)


def jaccard_table(worlds: ByRate) -> str:
    names = {
        "previous iteration's": "jaccard_previous",
        "score's": "jaccard_score",
        "reference's": "jaccard_reference",
    }
    rows = []
    for (rate, results), noise, t in product(worlds.items(), NOISES, (2, 3)):
        cells = [
            Estimate.over(list(results.of("SeRA", noise, during(t, name)).values()))
            for name in names.values()
        ]
        if cells[1].seeds:
            rows.append([rate, share(noise), str(t), *map(shown, cells)])
    return markdown(("", "swapped", "t", *(f"with the {name}" for name in names)), rows)


def reward_table(worlds: ByRate) -> str:
    """Fig. 2: what the implicit reward of the last policy follows, on the base model's answers."""
    rows = []
    for (rate, results), system, noise in product(worlds.items(), MAIN, NOISES):
        cells = [_finals(results, system, noise, name) for name in ("r2_true", "r2_words", "order")]
        if cells[0].seeds:
            rows.append([rate, system, share(noise), *map(shown, cells)])
    head = ("", "system", "swapped", "R^2 with true reward", "R^2 with words", "in true order")
    return markdown(head, rows)


def sweep_table(worlds: ByRate) -> str:
    """What a user may turn, at 20% swapped labels."""

    figures = {
        "true reward": final("true_reward"),
        "words": final("words"),
        "in true order, t = 3": during(3, "order_found"),
    }

    def cells(system: str) -> list[str]:
        found = [
            [Estimate.over(list(results.of(system, 0.2, one).values())) for one in figures.values()]
            for results in worlds.values()
        ]
        return [*(shown(one) for row in found for one in row), _seeds([row[0] for row in found])]

    rows = [
        [sweep if number == 0 else "", system.name, *cells(system.name)]
        for sweep, systems in SWEEPS.items()
        for number, system in enumerate(systems)
        if any(results.of(system.name, 0.2, TRUE_REWARD) for results in worlds.values())
    ]
    if not rows:
        return "No sweep has been run."
    rows = [["", name, *cells(name)] for name in ("SeRA", "iterative DPO")] + rows
    head = [f"{title}, {rate}" for rate in worlds for title in figures]
    return markdown(("sweep", "system", *head, "seeds"), rows)


def world_table(records: Sequence[Record]) -> str:
    """The main systems in every world: what steps, the number of pairs and length change."""
    worlds = {
        f"{one.pairs:,} pairs, {step_size(one)}, length bonus {one.labelling.length_bonus:g}": found
        for one in WORLDS.values()
        if (found := compared(records, one)).records
    }
    rows = []
    for noise, system in product(NOISES, MAIN):
        cells = [_finals(results, system, noise, "true_reward") for results in worlds.values()]
        if any(one.seeds for one in cells):
            rows.append([share(noise), system, *map(shown, cells)])
    return markdown(("swapped", "system", *worlds), rows)


def grid_table(records: Sequence[Record]) -> str:
    """SeRA by step size and by the temperature of what is sampled, at 20% swapped labels."""
    temperatures = {"0.7": "SeRA, temperature 0.7", "1": "SeRA", "1.3": "SeRA, temperature 1.3"}
    worlds = [WORLDS[f"{name}-steps"] for name in ("smaller", "small")]
    worlds += [WORLD, WORLDS["large-steps"]]
    parts = []
    for title, figure in (
        ("True reward", final("true_reward")),
        ("Sampled pairs in true order, t = 2", during(2, "order_found")),
        ("Sampled pairs in true order, t = 3", during(3, "order_found")),
    ):
        rows = []
        for world in worlds:
            results = compared(records, world)
            found = [
                Estimate.over(list(results.of(name, 0.2, figure).values()))
                for name in temperatures.values()
            ]
            if any(one.seeds for one in found):
                rows.append([f"learning rate {step_size(world)}", *map(shown, found)])
        parts.append(markdown((title, *(f"temperature {t}" for t in temperatures)), rows))
    return "\n\n".join(parts)


def fresh_table(records: Sequence[Record]) -> str:
    """The main systems with five other seeds: do the intervals overlap?"""
    first, second = compared(records), compared(records, seeds=FRESH)
    rows, apart = [], 0
    for noise in NOISES:
        for system in MAIN:
            one, other = (_finals(found, system, noise, "true_reward") for found in (first, second))
            if one.seeds == other.seeds == len(FRESH):
                overlap = one.low <= other.high and other.low <= one.high
                apart += not overlap
                cells = [shown(one), shown(other), "yes" if overlap else "no"]
                rows.append([share(noise), system, *cells])
    if not rows:
        return "Not run yet."
    names = ["seeds " + ", ".join(map(str, seeds)) for seeds in (SEEDS, FRESH)]
    table = markdown(("swapped", "system", *names, "overlap"), rows)
    return f"{table}\n\nOf {len(rows)} pairs of intervals {len(rows) - apart} overlap."


def again_table(records: Sequence[Record]) -> str:
    """What a second run with the same seeds found."""
    found = [one["again"] for one in records if "again" in one]
    if not found:
        return "Not run yet."
    rows = [
        [
            one["date"],
            str(one["runs"]),
            str(one["differ"]),
            f"{one['seconds'] / 60:.0f}",
            str(one["at_a_time"]),
            f"{one['load']:g}",
        ]
        for one in found
    ]
    head = ("date", "runs", "with other figures", "minutes", "runs at a time", "load before")
    return markdown(head, rows)


def _finals(results: Results, system: str, noise: float, name: str) -> Estimate:
    return Estimate.over(list(results.of(system, noise, final(name)).values()))


def step_size(world: World) -> str:
    """A world's learning rate as tables call it."""
    return f"{world.learning_rate:.0e}".replace("e-0", "e-")


def cost_table(results: Results) -> str:
    """Forwards and seconds of a run, by phase; of seeds whose systems were run side by side."""
    phases = ("score_offline", "sample", "score_candidates", "select", "train")
    rows = []
    for name in ("iterative DPO", "SeRA, selection only", "SeRA"):
        found = [r for r in results.records if r["system"] == name]
        if not found:
            return "Not measured yet."
        seconds = {phase: mean(_seconds_of(r, phase) for r in found) for phase in phases}
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


def _seconds_of(record: Record, phase: str) -> float:
    return float(sum(one["seconds"].get(phase, 0.0) for one in record["iterations"]))


def run_table(records: Sequence[Record]) -> str:
    """What the results are from."""
    abouts = [one["about"] for one in records if "about" in one]
    runs = [r for r in records if "policies" in r and r["seed"] not in criteria.SEEDS]
    if not runs:
        return "No results yet."
    rows = []
    for name, world in WORLDS.items():
        found = [r for r in runs if r["world"] == world.key]
        if found:
            settings = {(r["system"], r["noise"]) for r in found}
            seeds = sorted({r["seed"] for r in found})
            seconds = [r["seconds"] for r in found]
            cells = (len(found), len(settings), ", ".join(map(str, seeds)), f"{mean(seconds):.0f}")
            rows.append([f"`{name}`", *map(str, cells)])
    versions = ", ".join(f"{name} {number}" for name, number in runs[-1]["versions"].items())
    commits = ", ".join(dict.fromkeys(one["commit"] for one in abouts))
    dates = sorted({one["date"][:10] for one in abouts})
    fixed = next(one for one in abouts if key_of(one["world"])[:8] == WORLD.key)
    return "\n\n".join(
        (
            markdown(("world", "runs", "settings", "seeds", "seconds a run"), rows),
            f"{' and '.join(dates)}; {abouts[-1]['cpu']}, {abouts[-1]['cores']} cores; Python "
            f"{abouts[-1]['python']}, {versions}; at {commits}.",
            "The world's parameters:",
            f"```json\n{json.dumps(fixed['world'])}\n```",
        )
    )
