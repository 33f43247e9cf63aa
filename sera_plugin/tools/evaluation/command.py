"""`axolotl sera eval`."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from sera_plugin.tools.command import Refused, refusing

_SHARE, _COUNT = click.FloatRange(min=0, max=1, min_open=True), click.IntRange(min=1)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    "eval",
    context_settings={"show_default": True},
    epilog="""\b
Examples:
  axolotl sera eval outputs/my-run --prompts alpaca_eval.json --judge judge.yaml
  axolotl sera eval outputs/my-run --iterations --prompts mine.jsonl --judge truth.py:score
  axolotl sera eval gpt4_baseline.json outputs/dpo outputs/sera@2 --prompts alpaca_eval.json \\
      --judge judge.yaml --vllm-python ~/vllm/bin/python
  axolotl sera eval outputs/my-run --prompts ifeval.jsonl --check checks.py:strict
  axolotl sera eval outputs/my-run --iterations --rewards reward_bench.parquet
""",
)
@click.argument("models", nargs=-1, required=True, metavar="RUN_OR_MODEL...")
@click.option(
    "--prompts",
    type=_FILE,
    help="JSON lines, JSON or parquet: AlpacaEval, Arena-Hard, MT-Bench, Vicuna, IFEval, "
    "Evol-Instruct, UltraFeedback, or rows with `prompt` and perhaps `category`.",
)
@click.option(
    "--rewards",
    type=_FILE,
    help="In place of prompts, pairs that the models' implicit rewards rank: RewardBench, or rows "
    "with `prompt`, `chosen`, `rejected` and perhaps `subset`.",
)
@click.option(
    "--judge",
    help="judge.yaml (an API judge), module:function or file.py:function, or the directory of a "
    "reward model. Without judge and check, answers are only sampled and exported.",
)
@click.option(
    "--check",
    "checks",
    multiple=True,
    help="module:function or file.py:function, which says of a prompt's row and an answer whether "
    "it passes; may be given several times.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("sera-eval"),
    help="Where answers, verdicts, figures and the page are kept. The same command goes on there.",
)
@click.option("--iterations", is_flag=True, help="All policies of a run in place of its last one.")
@click.option("--limit", type=_COUNT, help="At most this many prompts, drawn with the seed.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, max=10),
    default=0.7,
    help="Of the answers; 0 takes the likeliest token each time.",
)
@click.option("--top-p", type=_SHARE, default=0.95, help="Nucleus sampling of the answers.")
@click.option("--max-new-tokens", type=_COUNT, default=1024, help="Longest answer in tokens.")
@click.option(
    "--prompt-format", help="A text with {prompt} in place of the models' chat templates."
)
@click.option(
    "--vllm-python",
    type=click.Path(dir_okay=False),
    help="The Python of an environment with vLLM, to sample with it.",
)
@click.option("--seed", type=int, default=0, help="Of all that is drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures for machines.")
@click.pass_context
def evaluate(
    context: click.Context,
    /,
    models: tuple[str, ...],
    prompts: Path | None,
    rewards: Path | None,
    judge: str | None,
    checks: tuple[str, ...],
    output: Path,
    as_json: bool,
    iterations: bool,
    limit: int | None,
    vllm_python: str | None,
    **decoding: Any,
) -> None:
    """Win rates of models on a set of prompts, against the first one.

    Or the share of their answers that passes a check, or the accuracy of their implicit rewards.

    A model is a run's output_dir (the policy in it), RUN@t (its policy after t iterations; 0 is
    what it started from), the directory of a model or adapter, a model in the local hub cache, or a
    file of answers (AlpacaEval's, Arena-Hard's or MT-Bench's). A run alone is compared with what it
    started from.
    """
    from sera_plugin.labeling.judging import JudgeFailed
    from sera_plugin.rundir.progress import log_on_stderr
    from sera_plugin.sampling.child import SamplingFailed
    from sera_plugin.tools.evaluation import accuracy, results
    from sera_plugin.tools.evaluation.answers import Decoding
    from sera_plugin.tools.evaluation.run import evaluate, rate_rewards
    from sera_plugin.tools.report.output import json_text

    if (prompts is None) == (rewards is None):
        raise Refused("Give --prompts, which models answer, or --rewards, pairs that they rank.")
    how, shown = Decoding(**decoding), results.shown
    try:
        with refusing(), log_on_stderr():
            if rewards is not None:
                _refuse_unused(context)
                asked = how.prompt_format, iterations, limit, how.seed
                figures = rate_rewards(models, rewards, output, *asked)
                shown = accuracy.shown
            elif prompts is not None:
                chosen = iterations, limit, vllm_python, checks
                figures = evaluate(models, prompts, judge, output, how, *chosen)
    except SamplingFailed as error:
        raise click.ClickException(
            f"{error}\nIn this command: leave --vllm-python out to sample without vLLM. It goes on "
            "from what was sampled."
        ) from error
    except JudgeFailed as error:
        raise click.ClickException(str(error)) from error
    click.echo(json_text(figures) if as_json else f"{shown(figures)}\n\n{output / 'eval.html'}")


#: Options that are about answers, which nobody gives with --rewards.
_OF_ANSWERS = ("judge", "checks", "temperature", "top_p", "max_new_tokens", "vllm_python")


def _refuse_unused(context: click.Context) -> None:
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name in _OF_ANSWERS:
            raise ValueError(
                f"{option.opts[0]} is about answers, and with --rewards models answer nothing. "
                "Leave it out, or give --prompts."
            )
