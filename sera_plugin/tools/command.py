"""How the commands of `axolotl sera` end: 0 done, 1 failed, 2 wrong usage.

Wrong usage is for the reader to fix: an option, a YAML, a run that is not there, a
file that is. Everything else that fails is a failure: training stopped, a disk was full.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import yaml

from sera_plugin.config.quoting import plain, quoted

#: Errors of files that the caller has named.
_NAMED_FILES = (
    *(FileExistsError, FileNotFoundError, PermissionError),
    *(IsADirectoryError, NotADirectoryError),
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


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        ValueError: if it is not YAML, or holds something else than keys.
        OSError: if it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {plain(str(error), 300)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a configuration: it holds {quoted(content)}, not keys.")
    return content
