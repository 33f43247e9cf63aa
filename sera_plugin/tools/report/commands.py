"""`axolotl sera report`, `inspect` and `compare`."""

from pathlib import Path
from typing import Any

import click

from sera_plugin.tools.command import refusing

_RUN, _FILE = click.Path(path_type=Path), click.Path(dir_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print for machines.")


def _read(path: Path) -> Any:
    from sera_plugin.tools.report.reading import Run, find_run

    return Run(find_run(path))


def _say(value: Any, text: str, as_json: bool) -> None:
    from sera_plugin.tools.report.output import json_text

    click.echo(json_text(value) if as_json else text)


@click.command(
    epilog="""\b
Examples:
  axolotl sera report outputs/my-run
  axolotl sera report outputs/my-run --output for-a-colleague.html
  python -m sera_plugin report outputs/my-run --json | jq .jaccard
"""
)
@click.argument("output_dir", type=_RUN)
@click.option(
    "--output", type=_FILE, help="Where the page goes; OUTPUT_DIR/sera/report.html unless given."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures instead of a page.")
def report(output_dir: Path, output: Path | None, as_json: bool) -> None:
    """Write a page on a run: what it did to its data, in charts and in pairs to read.

    One HTML file that needs no network and no other file. Works while the run is going on, and on
    one that was cut off.
    """
    if as_json and output is not None:
        raise click.UsageError("--json prints; it writes no page, so leave --output out.")
    with refusing():
        if as_json:
            from sera_plugin.tools.report.figures import figures

            _say(figures(_read(output_dir)), "", as_json)
        else:
            from sera_plugin.tools.report.page import write_report

            click.echo(write_report(output_dir, output))


@click.command(
    epilog="""\b
Examples:
  axolotl sera inspect outputs/my-run --row 17
  axolotl sera inspect outputs/my-run --mislabelled 50
  axolotl sera inspect outputs/my-run --export kept.jsonl --which kept --iteration 3
  axolotl sera inspect outputs/my-run --export sampled.parquet --which bootstrapped
"""
)
@click.argument("run", type=_RUN)
@click.option("--row", type=int, help="Show one pair under every policy.")
@click.option(
    "--mislabelled",
    type=_COUNT,
    is_flag=False,
    flag_value=20,
    metavar="[N]",
    help="List the N pairs (20 unless given) whose label the policy disagrees with most.",
)
@click.option(
    "--export",
    "path",
    type=_FILE,
    help="Write pairs to a new .jsonl or .parquet file with prompt, chosen and rejected.",
)
@click.option(
    "--which",
    type=click.Choice(("kept", "dropped", "bootstrapped")),
    help="With --export: offline pairs that were kept or dropped, or sampled pairs that were kept.",
)
@click.option(
    "--iteration", type=_COUNT, help="With --export: of which iteration; the newest unless given."
)
@_JSON
def inspect(
    run: Path,
    row: int | None,
    mislabelled: int | None,
    path: Path | None,
    which: str | None,
    iteration: int | None,
    as_json: bool,
) -> None:
    """Look at single pairs of a run, or take pairs out of it."""
    if sum(one is not None for one in (row, mislabelled, path)) != 1:
        raise click.UsageError("give one of --row, --mislabelled and --export.")
    if (path is None) != (which is None) or (iteration is not None and path is None):
        raise click.UsageError("--export and --which go together; --iteration needs --export.")
    with refusing():
        from sera_plugin.tools.report import pairs
        from sera_plugin.tools.report.reading import Texts

        found = _read(run)
        texts = Texts(found)
        if row is not None:
            pair = pairs.describe_pair(found, row, texts)
            _say(pair, pairs.show_pair(pair, texts), as_json)
        elif mislabelled is not None:
            listed = pairs.suspects(found, mislabelled, texts)
            _say(listed, pairs.show_suspects(found, listed), as_json)
        elif path is not None and which is not None:
            written, number = pairs.export(found, texts, path, which, iteration)
            done = {"path": str(path), "which": which, "iteration": number, "pairs": written}
            _say(done, f"{written} {which} pairs of iteration {number} in {path}", as_json)
        for note in () if as_json else found.notes:
            click.echo(note, err=True)


@click.command(
    epilog="""\b
Examples:
  axolotl sera compare outputs/iterative-dpo outputs/sera
  axolotl sera compare outputs/sera-* --html comparison.html
"""
)
@click.argument("runs", type=_RUN, nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--html", type=_FILE, help="Write a page instead of printing.")
@_JSON
def compare(runs: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Runs side by side: settings that differ, metrics, how alike their selections are."""
    if len(runs) < 2:
        raise click.UsageError("give two runs or more.")
    if as_json and html is not None:
        raise click.UsageError("--json prints; it writes no page, so leave --html out.")
    with refusing():
        from sera_plugin.tools.report import compare as comparison

        compared = comparison.compare([_read(path) for path in runs])
        if html is None:
            _say(compared, comparison.show(compared), as_json)
        else:
            comparison.write(compared, html)
            click.echo(html)
