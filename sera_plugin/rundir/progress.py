"""How far a long phase is: a bar on a terminal, lines in a log that goes elsewhere.

The bar is tqdm's, as the host's own training bar is: the two know of each other and share the
screen. It shows the rate and the time left.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LOG = logging.getLogger("axolotl.sera")

#: Seconds between two lines about a phase in a log.
EVERY = 60.0
#: Larger numbers are shown as 12.3k.
_COUNTED = 9_999
#: tqdm's, without the bar.
_LINE = "{desc}: {percentage:.0f}% of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

Row = TypeVar("Row")
#: Called with what is done since the last call, and something else worth showing.
Advance = Callable[..., None]


def above_bars() -> AbstractContextManager[None]:
    """What is printed inside goes above a terminal's bars, which are then drawn again."""
    return tqdm.external_write_mode() if sys.stderr.isatty() else nullcontext()


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """SeRA's log on standard error, for a command whose answer goes to standard output.

    The host would print it there too, and without the host nobody would.
    """
    handler = logging.StreamHandler(sys.stderr)
    # The host's own, so that a run's lines and a command's look the same.
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [%(name)s] %(message)s"))
    level, propagate = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    try:
        with logging_redirect_tqdm([LOG]):  # lines go above a bar
            yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = propagate


@contextmanager
def progress(what: str, total: int, unit: str, quiet: bool = False) -> Iterator[Advance]:
    """A phase under way; yields what to call with the units that are done.

    On a terminal it is a bar that stays when the phase is over. Elsewhere it is one line in the log
    when the phase begins, one a minute while it lasts, and one at its end if it lasted that long.

    Args:
        what: the phase, as a reader knows it.
        total: how many units it has. An estimate will do.
        unit: what is counted, in the singular.
        quiet: neither bar nor lines: another rank shows them.
    """
    description = f"SeRA: {what}"
    if quiet:
        yield lambda done, note="": None
    elif sys.stderr.isatty():
        with tqdm(
            total=total, unit=f" {unit}", unit_scale=total > _COUNTED, desc=description
        ) as bar:

            def advance(done: int, note: str = "") -> None:
                if note:
                    bar.set_postfix_str(note, refresh=False)
                bar.update(done)

            yield advance
            bar.total = bar.n
        with above_bars():  # clears what is left of the bar
            pass
    else:
        lines = _Lines(description, total, unit)
        yield lines.advance
        lines.end()


def told(rows: Sequence[Row], what: str, unit: str, quiet: bool = False) -> Iterator[Row]:
    """The rows one by one, with progress over them; arguments as in `progress`."""
    with progress(what, len(rows), unit, quiet) as advance:
        for row in rows:
            yield row
            advance(1)


class _Lines:
    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note = 0, ""
        self.began = self.told = monotonic()
        LOG.info("%s: %s %ss", description, f"{total:,}", unit)

    def advance(self, done: int, note: str = "") -> None:
        self.done += done
        self.note = note
        if monotonic() - self.told >= EVERY:
            self._tell()

    def end(self) -> None:
        if self.told > self.began:
            self.total = self.done
            self._tell()

    def _tell(self) -> None:
        self.told = monotonic()
        line = tqdm.format_meter(
            self.done,
            self.total,
            self.told - self.began,
            prefix=self.description,
            unit=f" {self.unit}",
            unit_scale=self.total > _COUNTED,
            bar_format=_LINE,
            postfix=self.note,
        )
        LOG.info("%s", line)
