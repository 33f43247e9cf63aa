"""Pictures of the results, as SVG that is the same for the same results."""

import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Picture

from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.estimates import FEWEST_SEEDS, Estimate, Results, after
from benchmarks.claims.systems import NOISES

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "claims",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_COLOURS = {"reproduced": "#1a7f5a", "not reproduced": "#777777", "reversed": "#b3402e"}
#: Of what, where it is neither true reward nor a share.
_UNITS = {
    "win rate": ": win rate",
    "R^2 with words, the baseline's less SeRA's": ": R^2 with words",
    "R^2 with true reward": ": R^2 with true reward",
}
_LINES = {
    "DPO, 3 epochs": "#777777",
    "iterative DPO": "#111111",
    "SeRA, selection only": "#2f6fb0",
    "SeRA": "#b3402e",
    "SeRA, length control": "#1a7f5a",
}


def draw(results: Results) -> dict[str, str]:
    """The page's pictures, by name; none without results."""
    with mpl.rc_context(_STYLE):
        return {"differences": differences(results), "iterations": iterations(results)}


def differences(results: Results) -> str:
    """Every claim's differences with their intervals, in the verdict's colour."""
    rows = [
        (f"{one.label}, {one.noise:.0%}{_UNITS.get(claim.unit, '')}", estimate)
        for claim in CLAIMS
        for one in claim.comparisons
        if (estimate := one.estimate(results)).seeds >= FEWEST_SEEDS
    ]
    picture = Picture(figsize=(7.5, 0.6 + 0.17 * max(1, len(rows))))
    axes = picture.add_axes((0.46, 0.06, 0.52, 0.92))
    for place, (_, estimate) in enumerate(rows):
        colour = _COLOURS[estimate.verdict]
        axes.plot([estimate.low, estimate.high], [place, place], color=colour, linewidth=1.4)
        axes.plot(estimate.mean, place, "o", color=colour, markersize=3.5)
    axes.axvline(0, color="#444444", linewidth=0.7)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("difference, as claimed above 0; 95% interval over seeds")
    return _svg(picture)


def iterations(results: Results) -> str:
    """True reward after every iteration, a panel per share of swapped labels."""
    picture = Picture(figsize=(7.5, 2.7))
    panels = picture.subplots(1, len(NOISES), sharey=True)
    for axes, noise in zip(panels, NOISES, strict=True):
        for name, colour in _LINES.items():
            found = [
                Estimate.over(list(results.of(name, noise, after(t, "true_reward")).values()))
                for t in (1, 2, 3)
            ]
            if not found[-1].seeds:
                continue
            means = [one.mean for one in found]
            axes.plot([1, 2, 3], means, "o-", color=colour, markersize=3, label=name)
            for t, one in enumerate(found, start=1):
                if one.seeds >= FEWEST_SEEDS:
                    axes.plot([t, t], [one.low, one.high], color=colour, linewidth=0.8)
        axes.set_title(f"{noise:.0%} swapped", fontsize=8)
        axes.set_xticks([1, 2, 3])
        axes.set_xlabel("after iteration")
    panels[0].set_ylabel("true reward")
    if panels[0].lines:
        panels[0].legend(frameon=False, fontsize=6)
    picture.tight_layout()
    return _svg(picture)


def _svg(picture: Picture) -> str:
    buffer = io.StringIO()
    picture.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
