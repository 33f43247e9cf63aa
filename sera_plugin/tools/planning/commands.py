"""`axolotl sera plan`."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import click

from sera_plugin.tools.command import Refused

#: The host's handlers that print.
_CONSOLES = ("console", "color_console")


@contextmanager
def _figures_alone() -> Iterator[None]:
    """What the host says meanwhile goes to stderr, and of its log only warnings."""
    with redirect_stdout(sys.stderr):
        import axolotl.cli.config  # noqa: F401  sets up its log, if the host has not yet

        for handler in [*logging.getLogger().handlers, *logging.getLogger("axolotl").handlers]:
            if isinstance(handler, logging.StreamHandler) and handler.name in _CONSOLES:
                handler.setStream(sys.stderr)
                handler.setLevel(logging.WARNING)
        yield


@click.command(
    epilog="""\b
Examples:
  axolotl sera plan config.yaml
  axolotl sera plan config.yaml --gpu 24
  axolotl sera plan config.yaml --measure
  python -m sera_plugin plan config.yaml --gpu 24 --json | jq .memory.fits
"""
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--gpu",
    type=click.FloatRange(min=0, min_open=True, max=10_000),
    default=None,
    metavar="GIB",
    help="Compare with a GPU of this many GiB instead of the one here.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Load the model and time a short run on this machine (minutes).",
)
@click.option("--json", "as_json", is_flag=True, help="Print for machines.")
def plan(config: Path, gpu: float | None, measure: bool, as_json: bool) -> None:
    """Say what a run will do, take and need, before it starts.

    Parses CONFIG and prepares its data as `axolotl train` does, then counts pairs, steps and tokens
    and estimates memory, disk and time. No weights are loaded without --measure.

    Exit code 0: it fits, or there is no GPU to compare with; 1: it does not fit; 2: CONFIG or its
    data cannot be used.
    """
    try:
        with _figures_alone():
            from sera_plugin.tools.planning.prepare import read_plan

            found = read_plan(config, gpu, measure)
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error
    except Exception as error:  # 1 would say that it does not fit
        traceback.print_exc()
        raise Refused(f"{type(error).__name__}: {error}") from error
    from sera_plugin.tools.planning import show
    from sera_plugin.tools.report.output import json_text

    click.echo(json_text(show.data(found)) if as_json else show.text(found))
    if found.fits is False:
        raise SystemExit(1)
