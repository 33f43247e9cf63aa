"""How far a long phase is: a bar on a terminal, lines in a log that goes elsewhere.

The bar is tqdm's, as the host's own training bar is: the two share the screen.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import TextIOBase
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LOG = logging.getLogger("axolotl.sera")

#: Seconds between two lines about a phase in a log.
EVERY = 60.0
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
    """SeRA's log on standard error alone, for a command whose answer goes to standard output."""
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


class _Log(TextIOBase):
    """The log as a file that tqdm writes to."""

    def write(self, text: str) -> int:
        if line := text.strip():
            LOG.info("%s", line)
        return len(text)


@contextmanager
def progress(what: str, total: int, unit: str, quiet: bool = False) -> Iterator[Advance]:
    """A phase under way; yields what to call with the units (in the singular) that are done.

    On a terminal it is a bar that stays. Elsewhere it is one line in the log when the phase begins,
    one a minute while it lasts, and one at its end if it lasted that long. An estimate of the total
    will do. Quiet where another rank shows all this.
    """
    how: dict[str, Any] = {"desc": f"SeRA: {what}", "unit": f" {unit}", "disable": quiet}
    if not sys.stderr.isatty():
        # The average rate, and nothing at the end of a phase that fails.
        how |= {"file": _Log(), "bar_format": _LINE, "smoothing": 0, "leave": False}
        # Not below the host's bar, if one lives: the cursor stays where it is.
        how |= {"mininterval": EVERY, "delay": EVERY, "miniters": 1, "position": 0}
        if not quiet:
            LOG.info("%s: %s %ss", how["desc"], f"{total:,}", unit)
    # Large numbers are shown as 12.3k.
    with tqdm(total=total, unit_scale=total > 9_999, **how) as bar:

        def advance(done: int, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(done)

        yield advance
        bar.total, bar.leave = bar.n, True
    with above_bars():  # clears what is left of the bar
        pass


def told(rows: Sequence[Row], what: str, unit: str, quiet: bool = False) -> Iterator[Row]:
    """The rows one by one, with progress over them; arguments as in `progress`."""
    with progress(what, len(rows), unit, quiet) as advance:
        for row in rows:
            yield row
            advance(1)
