"""The table of a crash test, and where it stands in the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from sera_plugin import __version__
from tests.crash.points import LABELS, Verdict

BEGIN, END = "<!-- crash table: begin -->", "<!-- crash table: end -->"
_PACKAGES = ("axolotl", "trl", "transformers", "peft", "torch")
_COLUMNS = (
    *("killed", "training", "points", "survived"),
    *("rows sampled twice", "differences", "steps made again (most)"),
)


def make_table(verdicts: Sequence[Verdict]) -> str:
    """One row per phase, the totals, and what was not killed as planned."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.point.phase, []).append(verdict)
    rows = [_COLUMNS, tuple("---" if column < 2 else "--:" for column in range(len(_COLUMNS)))]
    for phase in [phase for phase in LABELS if phase in groups]:
        kinds = sorted({f"`{verdict.point.kind}`" for verdict in groups[phase]})
        rows.append((LABELS[phase], ", ".join(kinds), *_figures(groups[phase])))
    rows.append(("**all**", "", *_figures(verdicts)))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    missed = sum(verdict.missed for verdict in verdicts)
    return f"{table}\n\nKills that came too late, after the end of the run: {missed}."


def _figures(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    numbers = (
        len(verdicts),
        sum(verdict.survived for verdict in verdicts),
        sum(verdict.sampled_twice for verdict in verdicts),
        sum(len(verdict.differences) for verdict in verdicts),
        max(verdict.repeated_steps for verdict in verdicts),
    )
    return tuple(map(str, numbers))


def write_table(page: Path, table: str, command: str, seed: int, seconds: float) -> None:
    """Put a table between its markers in a page, which is made if there is none."""
    heading = f"# Reliability\n\n## Killed and continued\n\n{BEGIN}\n{END}\n"
    text = page.read_text(encoding="utf-8") if page.exists() else heading
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END}; put them where it belongs.")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    about = (
        f"`{command}` on {date.today().isoformat()} in {seconds / 60:.0f} minutes: sera_plugin "
        f"{__version__}, {versions}, CPU, float32, seed {seed}."
    )
    page.write_text(f"{before}{BEGIN}\n{about}\n\n{table}\n{END}{after}", encoding="utf-8")
