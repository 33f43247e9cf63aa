"""`axolotl sera push`."""

from pathlib import Path

import click

from sera_plugin.tools.command import refusing


@click.command(
    epilog="""\b
Examples:
  axolotl sera push outputs/my-run --to user/my-model --dry-run
  axolotl sera push outputs/my-run --to user/my-model
  axolotl sera push outputs/my-run --to user/my-model --pairs-to user/my-pairs --public
"""
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="USER/NAME", help="The model's repository.")
@click.option(
    "--pairs-to", metavar="USER/NAME", help="The dataset's; USER/NAME-pairs unless given."
)
@click.option("--no-pairs", is_flag=True, help="Push no dataset.")
@click.option("--public", is_flag=True, help="Make new repositories public; private unless given.")
@click.option("--dry-run", is_flag=True, help="Say what would go where, and ask nobody.")
def push(
    run: Path, to: str, pairs_to: str | None, no_pairs: bool, public: bool, dry_run: bool
) -> None:
    """Upload a run to the Hugging Face hub: its policies as revisions, its pairs as a dataset.

    `main` has the policy that was kept with its card, `iteration-t` the one that iteration t
    trained. The same command again adds nothing, and goes on after one that was broken off.
    """
    if no_pairs and pairs_to is not None:
        raise click.UsageError("--no-pairs pushes no dataset, so leave --pairs-to out.")
    with refusing():
        from sera_plugin.tools.sharing.hub import push_run

        pairs = None if no_pairs else pairs_to or ""
        push_run(run, to, pairs=pairs, public=public, dry_run=dry_run, say=click.echo)
