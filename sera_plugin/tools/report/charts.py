"""Pictures of a run, as SVG for inside a page: its text is text, its colours are the page's.

Colours are drawn as stand-ins that no chart would use and replaced by the page's CSS variables, so
that one SVG serves light and dark.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.selection import BoolArray

#: The page's variables.
_NAMES = ("ink", "muted", "rule", "kept", "dropped", "chosen", "rejected", "sampled")
_PAGE = {f"#0{place}0{place}0{place}": name for place, name in enumerate(_NAMES, 1)}
INK, MUTED, RULE, KEPT, DROPPED, CHOSEN, REJECTED, SAMPLED = _PAGE
#: What is drawn: its colour, which means the same on the whole page, and its marker, by which it is
#: told from others without colours.
LOOKS = {
    "chosen": (CHOSEN, "o"),
    "rejected": (REJECTED, "x"),
    "sampled": (SAMPLED, "^"),
    "best": (SAMPLED, "D"),
    "held out": (INK, "s"),
    **dict.fromkeys(("", "offline", "train", "this run"), (KEPT, "o")),
    "kept by it": (KEPT, "P"),
    "dropped by it": (DROPPED, "v"),
    **dict.fromkeys(("same choice", "published runs"), (MUTED, ".")),
}
#: Labels carry names of the dataset's columns: nothing in them is a formula.
_STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    "axes.labelsize": 9,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    **dict.fromkeys((f"axes.spines.{side}" for side in ("top", "right", "left")), False),
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.loc": "lower left",
    "legend.frameon": False,
    "legend.borderpad": 0.2,
    "legend.borderaxespad": 0,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.1,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.1,
}
_DASHED: Any = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (3, 2))}
#: Inches at 72 units each. Narrow, so that a phone shows the text at its size.
_WIDTH = 4.6
_BINS = 50
#: Points of a scatter plot and of a curve: enough to see a shape, few enough for a small page.
_POINTS = 400
#: Draws into axes; gives what it has drawn by name, for a legend.
Plot = Callable[[Any], dict[str, Any]]
#: A picture as `svg`, its `title`, and a `note` on how it is made.
Chart = dict[str, str]
#: Lines by name: x, y, and one standard error each way or none.
Lines = Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]


def _draw(
    title: str,
    note: str,
    labels: tuple[str, str],
    height: float,
    plots: Sequence[tuple[tuple[float, float, float], Plot]],
    above: float = 1.0,
) -> Chart:
    """Axes with what is plotted named `above` them; `labels` are those of the last one's x and y.

    Where axes are is left, bottom and top, as shares of the figure, whose height is in inches.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(_WIDTH, height))
        for (left, bottom, top), plot in plots:
            axes: Any = figure.add_axes((left, bottom, 0.97 - left, top - bottom))
            axes.set_axisbelow(True)
            axes.grid(axis="y", color=RULE, linewidth=0.6)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_locator(MaxNLocator(6))
            drawn = plot(axes)
            place: Any = {"bbox_to_anchor": (0, above), "ncols": max(1, len(drawn))}
            axes.legend(list(drawn.values()), list(drawn), **place)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        about = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=about)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style inside a page would be one of the whole page. Groups are named for editors; what is
    # referred to is a path or a clip path, which keep theirs.
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' (width|height)="[0-9.]+pt"', "", text, count=2)
    text = re.sub(r"\n\s*", "\n", text)
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    for stand_in, name in _PAGE.items():
        text = text.replace(stand_in, f"var(--{name})")
    # matplotlib has escaped the text in it.
    return {"title": title, "note": note, "svg": Markup(text)}


def _look(name: str, **more: Any) -> dict[str, Any]:
    """What `plot` draws something with, by its name."""
    colour, marker = LOOKS[name]
    # A cross is nothing but its edge.
    edge = {"markeredgewidth": 1.1 if marker == "x" else 0}
    return {"color": colour, "marker": marker, "markersize": 5, **edge, **more}


def margins(
    title: str, note: str, unit: str, panels: Mapping[str, tuple[FloatArray, BoolArray]]
) -> Chart:
    """Histograms by name, one above the other: (n,) margins, and which are kept."""
    # All but the outermost 0.2% of the values, and 0.
    every = np.concatenate([margin for margin, _ in panels.values()])
    low, high = np.quantile(every, [0.002, 0.998]).tolist()
    low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low or 1.0) * 0.02
    edges = np.linspace(low - room, high + room, _BINS + 1)

    def plot(name: str, axes: Any) -> dict[str, Any]:
        (margin, kept), drawn, base = panels[name], {}, np.zeros(_BINS)
        for what, which, ink in (("dropped", ~kept, DROPPED), ("kept", kept, LOOKS[name][0])):
            if which.any():
                top = base + np.histogram(np.clip(margin[which], *edges[[0, -1]]), edges)[0]
                bars = axes.stairs(top, edges, baseline=base, fill=True, color=ink)
                drawn[f"{int(which.sum()):,} {name} {what}"] = bars
                base = top
        axes.axvline(0, color=INK, linewidth=0.8)
        if len(drawn) > 1:
            axes.axvline(float(margin[kept].min()), **_DASHED)
        axes.set_xlim(*edges[[0, -1]])
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.tick_params(labelbottom=name == list(panels)[-1])
        return drawn

    height = 0.5 + 1.5 * len(panels)
    bottoms = [(0.5 + 1.5 * place) / height for place in reversed(range(len(panels)))]
    boxes = [(0.09, bottom, bottom + 1.2 / height) for bottom in bottoms]
    plots = [partial(plot, name) for name in panels]
    return _draw(title, note, (f"margin, {unit}", ""), height, list(zip(boxes, plots, strict=True)))


def scatter(
    title: str,
    note: str,
    labels: tuple[str, str],
    x: FloatArray,
    y: FloatArray,
    marks: Mapping[str, BoolArray],
    cuts: tuple[float, float] | None = None,
    around: BoolArray | None = None,
) -> Chart:
    """Points (n,) in groups by name, which may be ""; a few hundred of each, chosen evenly.

    Lines are drawn at the `cuts`; the chart zooms in on them and on the points `around`, if any.
    """
    finite = np.isfinite(x) & np.isfinite(y)

    def plot(axes: Any) -> dict[str, Any]:
        drawn = {}
        axes.axhline(0, color=RULE, linewidth=0.8)
        if np.nanmin(x) < 0:
            axes.axvline(0, color=RULE, linewidth=0.8)
        if cuts is not None:
            axes.axvline(cuts[0], **_DASHED)
            axes.axhline(cuts[1], **_DASHED)
        for name, which in marks.items():
            at = np.flatnonzero(which & finite)
            at = at[np.linspace(0, len(at) - 1, min(len(at), _POINTS)).astype(int)]
            small: Any = _look(name, markersize=4, linestyle="none")
            axes.plot(x[at], y[at], **small, alpha=0.55)
            if name:
                drawn[name] = Line2D([], [], **small)
        if cuts is not None and around is not None and around.any():
            for values, cut, limit in ((x, cuts[0], axes.set_xlim), (y, cuts[1], axes.set_ylim)):
                inside = [*values[around], cut]
                room = (max(inside) - min(inside) or 1.0) * 0.8
                limit(min(inside) - room, max(inside) + room)
        return drawn

    return _draw(title, note, labels, 3.1, [((0.15, 0.17, 0.9), plot)])


def lines(
    title: str,
    note: str,
    ylabel: str,
    series: Lines,
    reference: tuple[float, str] | None = None,
    decimals: int = 2,
) -> Chart:
    """Figures over iterations, each line named with its last value."""

    def plot(axes: Any) -> dict[str, Any]:
        drawn = {}
        for name, (x, y, error) in series.items():
            (line,) = axes.plot(x, y, **_look(name))
            if error:
                axes.errorbar(x, y, yerr=error, fmt="none", ecolor=LOOKS[name][0], elinewidth=0.9)
            drawn[f"{name} {y[-1]:.{decimals}f}"] = line
        if reference is not None:
            drawn[reference[1]] = axes.axhline(reference[0], **_DASHED)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.margins(y=0.12)
        numbers = [number for x, _, _ in series.values() for number in x]
        axes.set_xlim(min(numbers) - 0.25, max(numbers) + 0.25)
        return drawn

    return _draw(title, note, ("iteration", ylabel), 2.6, [((0.14, 0.18, 0.89), plot)])


def strips(
    title: str,
    note: str,
    xlabel: str,
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    band: tuple[float, float],
) -> Chart:
    """Values in rows by label, from the top, in groups by name; from the `band` a grey ground."""
    labels = [label for rows in groups.values() for label in rows]

    def plot(axes: Any) -> dict[str, Any]:
        drawn = {}
        axes.axvspan(*band, color=RULE, alpha=0.6, linewidth=0)
        axes.axvline(0, **_DASHED)
        for name, rows in groups.items():
            look = _look(name, markersize=8 if LOOKS[name][1] == "." else 6, linestyle="none")
            drawn[name] = Line2D([], [], **look)
            for label, values in rows.items():
                axes.plot(values, [labels.index(label)] * len(values), **look, alpha=0.8)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        return drawn

    height = 0.75 + 0.2 * len(labels)
    box = (0.18, 0.5 / height, 1 - 0.25 / height)
    return _draw(title, note, (xlabel, ""), height, [(box, plot)])


def curves(title: str, ylabel: str, series: Lines, boundaries: Mapping[int, int]) -> Chart:
    """Training curves over steps, with the first step of each iteration marked."""

    def plot(axes: Any) -> dict[str, Any]:
        drawn = {}
        for name, (x, y, _) in series.items():
            # Means of neighbours, so that a long run's curve stays small; gaps (nan) stay.
            parts = np.array_split(np.array([x, y]), min(len(x), _POINTS), axis=1)
            means = np.transpose([part.mean(axis=1) for part in parts])
            look = _look(name, markersize=4, linewidth=1.3)
            if len(parts) >= 12:
                look["marker"] = "none"
            (drawn[name],) = axes.plot(*means, **look)
        axes.margins(x=0.01)
        left, right = axes.get_xlim()
        shown = {t: step for t, step in boundaries.items() if left <= step <= right}
        each = max(1, len(shown) // 10)
        for place, (iteration, step) in enumerate(shown.items()):
            axes.axvline(step, color=RULE, linewidth=0.9, zorder=0)
            mark = f" {iteration}" if place else f" iteration {iteration}"
            if not place or ((place > 1 or len(shown) < 6) and place % each == 0):
                axes.text(step, 1.03, mark, transform=axes.get_xaxis_transform(), color=MUTED)
        return drawn

    return _draw(title, "", ("step", ylabel), 2.6, [((0.14, 0.18, 0.82), plot)], above=1.1)
