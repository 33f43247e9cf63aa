"""How the commands of `axolotl sera` end: 0 done, 1 failed, 2 wrong usage.

Wrong usage is for the reader to fix: an option, a YAML, a run that is not there, a
file that is. What failed was asked for rightly: training stopped, a disk was full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

#: Errors of files that the caller has named.
_NAMED_FILES = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


class Refused(click.ClickException):
    """Wrong usage; the message says what to change."""

    exit_code = 2


@contextmanager
def refusing() -> Iterator[None]:
    """Turn the errors of a command's work into a message and its exit code."""
    try:
        yield
    except (ValueError, *_NAMED_FILES) as error:
        raise Refused(str(error)) from error
    except OSError as error:
        raise click.ClickException(str(error)) from error
