"""`axolotl sera ...`: the plugin's commands, found by the host through an entry point."""

from __future__ import annotations

from pathlib import Path

import click

from sera_plugin import __version__
from sera_plugin.planning.commands import plan
from sera_plugin.report.commands import compare, inspect, report


@click.group(help="SeRA: preference tuning that reviews its own data.")
@click.version_option(__version__, prog_name="sera_plugin")
def sera() -> None:
    """The group that the host registers as `axolotl sera`."""


@sera.command()
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="The YAML to train with; the shipped demo-cpu.yaml unless given.",
)
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("sera-demo"),
    show_default=True,
    help="Where the demo's model, data and run go.",
)
def demo(config: Path | None, directory: Path) -> None:
    """Train a small model of a world whose true reward is known (a few CPU minutes)."""
    from sera_plugin.demo.run import run_demo

    shipped = Path(__file__).parent / "demo" / "demo-cpu.yaml"
    try:
        run_demo(directory, config or shipped)
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


for command in (plan, report, inspect, compare):
    sera.add_command(command)
