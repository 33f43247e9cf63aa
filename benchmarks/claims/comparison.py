"""Systems compared where labelled pairs are held out, and the rule that decides the defaults."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean

from benchmarks.claims.estimates import (
    TRUE_REWARD,
    Estimate,
    Figure,
    Record,
    Results,
    after,
    final,
)
from benchmarks.claims.systems import COMPARED as SYSTEMS
from benchmarks.claims.systems import COMPARED_SEEDS as SEEDS
from benchmarks.claims.tables import MISSING, compared, shown
from benchmarks.claims.world import COMPARED as WORLDS
from benchmarks.harness import markdown

BASELINE, NEW = "iterative DPO", "SeRA, fitted, trusted, best kept"
#: In how many of the worlds the candidate has to be better.
BETTER_IN = 2


def kept(record: Record) -> float | None:
    """True reward of the policy that `sera.keep: best` leaves."""
    return after(record["kept"], "true_reward")(record)


#: Whose policies are compared, by what a table calls them.
SIDES: dict[str, tuple[str, Figure]] = {
    **{system.name: (system.name, TRUE_REWARD) for system in SYSTEMS},
    "iterative DPO, best kept": (BASELINE, kept),
    NEW: ("SeRA, fitted and trusted", kept),
}


def results_at(records: Sequence[Record], name: str, rate: float) -> Results:
    world, _ = WORLDS[name]
    return compared(records, replace(world, learning_rate=rate), SEEDS[name])


def by_seed(results: Results, side: str) -> dict[int, float]:
    system, figure = SIDES[side]
    return results.of(system, 0.0, figure)


def gain(results: Results, side: str) -> dict[int, float]:
    """By seed, how much higher one side's true reward is than that of the baseline."""
    one, two = by_seed(results, side), by_seed(results, BASELINE)
    return {seed: one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())}


def reward_table(records: Sequence[Record]) -> str:
    """Mean true reward of each side, world by world and rate by rate."""
    return _table(
        records, lambda results, side: Estimate.over(list(by_seed(results, side).values()))
    )


def gain_table(records: Sequence[Record]) -> str:
    """Differences to the baseline's last policy."""

    def of(results: Results, side: str) -> Estimate:
        return Estimate.over(list(gain(results, side).values()))

    return _table(records, of, sign="+", but=BASELINE)


def _table(
    records: Sequence[Record],
    estimate: Callable[[Results, str], Estimate],
    sign: str = "",
    but: str | None = None,
) -> str:
    sides = [side for side in SIDES if side != but]
    rows = []
    for name, (_, rates) in WORLDS.items():
        for rate in rates:
            found = [estimate(results_at(records, name, rate), side) for side in sides]
            most = max(one.seeds for one in found)
            cells = [
                shown(one, sign=sign)
                + (f", {one.seeds} of the seeds" if 0 < one.seeds < most else "")
                for one in found
            ]
            rows.append([name, f"{rate:g}", *cells, str(most)])
    return markdown(["world", "learning rate", *sides, "seeds"], rows)


def drift_table(records: Sequence[Record]) -> str:
    """Nats per token that the last policies' chosen answers have gained, means over seeds."""
    rows = []
    names = [system.name for system in SYSTEMS]
    for name, (_, rates) in WORLDS.items():
        for rate in rates:
            results = results_at(records, name, rate)
            found = [list(results.of(one, 0.0, final("drift")).values()) for one in names]
            cells = [f"{mean(values):.2f}" if values else MISSING for values in found]
            rows.append([name, f"{rate:g}", *cells])
    return markdown(["world", "learning rate", *names], rows)


def decision(records: Sequence[Record]) -> str:
    """The rule for the defaults, with its figures.

    `fitted`, with trust and the best policy kept, if at no rate of any world its interval to the
    baseline's last policy is below 0, and if in two worlds at least the interval of its mean
    difference over rates is above 0.
    """
    at_rates, worlds = [], {}
    for name, (_, rates) in WORLDS.items():
        gains = [gain(results_at(records, name, rate), NEW) for rate in rates]
        at_rates += [
            (f"{name} {rate:g}", Estimate.over(list(one.values())))
            for rate, one in zip(rates, gains, strict=True)
        ]
        seeds = set.intersection(*map(set, gains))
        worlds[name] = Estimate.over([mean(one[seed] for one in gains) for seed in sorted(seeds)])
    worse = [label for label, one in at_rates if one.verdict == "reversed"]
    better = [name for name, one in worlds.items() if one.verdict == "reproduced"]
    open_ = [label for label, one in at_rates if one.verdict == "not measured"]
    lines = [
        f"- {name}, mean over rates: {shown(one, sign='+')}, {one.seeds} seeds"
        for name, one in worlds.items()
    ]
    lines.append(f"- Worse than {BASELINE} by the interval: {', '.join(worse) or 'nowhere'}.")
    lines.append(f"- Better in: {', '.join(better) or 'none'}.")
    if open_:
        lines.append(f"- Fewer than three seeds yet: {', '.join(open_)}.")
        says = "Not decided: the defaults stay the paper's."
    elif not worse and len(better) >= BETTER_IN:
        says = "So the defaults are `reward: fitted`, `trust: act` and `keep: best`."
    else:
        says = "So the defaults stay the paper's."
    return "\n".join([*lines, "", says])
