"""`axolotl sera ...`: the plugin's commands, found by the host through an entry point."""

import json
import os
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import click

from sera_plugin import __version__
from sera_plugin.tools.command import Refused, refusing
from sera_plugin.tools.evaluation.command import evaluate
from sera_plugin.tools.paper import paper
from sera_plugin.tools.report.commands import compare, inspect, report
from sera_plugin.tools.sharing.command import push

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW_FILE = click.Path(dir_okay=False, path_type=Path)


def _examples(*lines: str) -> str:
    return "\n  ".join(("\b\nExamples:", *lines))


@click.group(help="SeRA: preference tuning that reviews its own data.")
@click.version_option(__version__, prog_name="sera_plugin")
def sera() -> None:
    """The group that the host registers as `axolotl sera`."""


@sera.command(
    epilog=_examples(
        "axolotl sera demo", "axolotl sera demo --directory /tmp/sera-demo --config my-demo.yaml"
    )
)
@click.option(
    "--config", type=_FILE, help="The YAML to train with; the shipped demo-cpu.yaml unless given."
)
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default="sera-demo",
    show_default=True,
    help="Where the demo's model, data and run go.",
)
def demo(config: Path | None, directory: Path) -> None:
    """Train a small model of a world whose true reward is known (a few CPU minutes)."""
    from sera_plugin.tools.demo.run import run_demo

    shipped = Path(__file__).parent / "tools" / "demo" / "demo-cpu.yaml"
    with refusing():
        run_demo(directory, config or shipped)


@sera.command(
    epilog=_examples(
        "axolotl sera plan config.yaml",
        "axolotl sera plan config.yaml --gpu 24",
        "axolotl sera plan config.yaml --gpu 80 --gpus 8",
        "axolotl sera plan config.yaml --measure",
        "python -m sera_plugin plan config.yaml --gpu 24 --json | jq .memory.fits",
    )
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--gpu",
    type=click.FloatRange(min=0, min_open=True, max=10_000),
    metavar="GIB",
    help="Compare with a GPU of this many GiB instead of the one here.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1, max=100_000),
    metavar="N",
    help="Plan for so many of them, a process on each; by default those here, or one with --gpu.",
)
@click.option(
    "--measure", is_flag=True, help="Load the model and time a short run on this machine (minutes)."
)
@click.option("--json", "as_json", is_flag=True, help="Print for machines.")
def plan(config: Path, gpu: float | None, gpus: int | None, measure: bool, as_json: bool) -> None:
    """Say what a run will do, take and need, before it starts.

    Parses CONFIG and prepares its data as `axolotl train` does, then counts pairs, steps and tokens
    and estimates memory, disk and time. No weights are loaded without --measure.

    Exit code 0: it fits, or there is no GPU to compare with; 1: it does not fit; 2: CONFIG or its
    data cannot be used.
    """
    try:
        click.echo(f"Reading {config} and its data, as `axolotl train` does", err=True)
        with redirect_stdout(sys.stderr):  # the figures alone go to stdout
            from sera_plugin.rundir.progress import log_on_stderr
            from sera_plugin.tools.planning.prepare import read_plan  # the host sets up its log

            with log_on_stderr():
                found, remarks = read_plan(config, gpu, measure, gpus)
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error
    except Exception as error:  # 1 would say that it does not fit
        traceback.print_exc()
        raise Refused(f"{type(error).__name__}: {error}") from error
    from sera_plugin.tools.planning.show import text
    from sera_plugin.tools.report.output import json_text

    click.echo(json_text(found) if as_json else text(found, remarks))
    if found["memory"]["fits"] is False:
        raise SystemExit(1)


@sera.command(
    epilog=_examples(
        "axolotl sera schema --output axolotl-schema.json",
        "python -m sera_plugin schema | jq .properties.sera",
    )
)
@click.option(
    "--output",
    type=_NEW_FILE,
    help="Where the schema goes; an earlier one is replaced. Printed unless given.",
)
def schema(output: Path | None) -> None:
    """Write a JSON Schema of an Axolotl YAML with SeRA's keys, for editors.

    With it an editor completes, explains and checks every key as it is typed (docs/editor.md).
    """
    # A library of the host's looks for kernels on the hub as soon as it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with refusing(), redirect_stdout(sys.stderr):  # the host may have something to say
        from sera_plugin.tools.schema import config_schema, write_schema

        text = json.dumps(config_schema(), indent=2)
        if output is not None:
            write_schema(text, output)
    click.echo(text if output is None else output)


@sera.command(
    epilog=_examples(
        "axolotl sera convert examples/train_lora/my_dpo.yaml --output sera.yaml",
        "python -m sera_plugin convert my_dpo.yaml > sera.yaml",
    )
)
@click.argument("file", type=_FILE)
@click.option("--output", type=_NEW_FILE, help="A new file for the YAML; printed unless given.")
def convert(file: Path, output: Path | None) -> None:
    """Turn a LLaMA-Factory YAML for DPO into one for rl: sera.

    What has nothing like it, and what was assumed, goes to standard error, key by key. Paths are
    relative to the working directory, as LLaMA-Factory reads them.
    """
    from sera_plugin.tools.convert.convert import convert as read

    with refusing():
        converted = read(file, output)
        if output is not None:
            converted.write(output)
    click.echo(converted.said, err=True)
    click.echo(converted.text.rstrip() if output is None else output)


@sera.command("agent-docs", epilog=_examples("axolotl sera agent-docs"))
def agent_docs() -> None:
    """Print what a coding agent has to know of rl: sera, on one page."""
    from sera_plugin.tools.agent_docs import text

    click.echo(text().rstrip())


for command in (paper, report, inspect, compare, evaluate, push):
    sera.add_command(command)
