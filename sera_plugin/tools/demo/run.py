"""`axolotl sera demo`: the main job on a CPU, with a table at the end."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import click
import yaml

from sera_plugin.config.quoting import plain
from sera_plugin.config.sera import AS_PUBLISHED
from sera_plugin.rundir.store import RunStore
from sera_plugin.rundir.writing import COMMAND, beside, open_own, write_text
from sera_plugin.tools.demo.world import Labelling, label, make_prompt, true_reward
from sera_plugin.tools.report.output import plain_table

PAIRS = 3_000
HELD_OUT = 1_000


def run_demo(directory: Path, config: Path) -> None:
    """Make the world's model and data in `directory`, train with the YAML, and show what it did.

    Plain DPO and SeRA with the paper's reward are trained on the same pairs at the same time, for
    the table. What is there from an earlier demo is used again. The YAML's base_model and dataset
    must be the ones in `directory`; its paths are relative to the working directory, as the host
    reads them.

    Raises:
        ValueError: if the YAML points elsewhere, or an earlier run or prepared data is in the way.
        click.ClickException: if training fails.
    """
    base, pairs = directory / "base-model", directory / "pairs.jsonl"
    run = _check(config, base, pairs)

    click.echo(
        "The world: a prompt is six letters, the best response is the letters sorted."
        "\nThe true reward of any response is known (0 to 1); filler words only make it longer."
        "\nThe labels SeRA sees prefer longer responses a little, and a fifth of them is swapped."
    )
    directory.mkdir(parents=True, exist_ok=True)
    with _step(f"a base model, trained on imperfect answers: {base}", base):
        if not base.exists():
            from sera_plugin.tools.demo.base_model import train_base_model

            with beside(base, COMMAND) as partial:
                train_base_model(partial)
                partial.rename(base)
    with _step(f"pairs of its answers, labelled: {pairs}", pairs):
        if not pairs.exists():
            _write_pairs(base, pairs)
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    better = [row["score_chosen"] - row["score_rejected"] for row in rows]
    right = sum(one > 0 for one in better) / max(1, sum(one != 0 for one in better))
    click.echo(
        f"{len(rows)} pairs; of those that differ in true reward {right:.0%} are labelled right"
    )
    others = compared_with(yaml.safe_load(config.read_text(encoding="utf-8")), directory)
    with _step(f"axolotl train {config}"), trained(others.values()):
        if subprocess.run(_command(config), env=_environment()).returncode:
            raise click.ClickException(f"`axolotl train {config}` failed; its message is above")
    with _step("every policy answers the held-out prompts"):
        table = _table(base, {name: Path(one["output_dir"]) for name, one in others.items()}, run)
    click.echo(f"\n{table}\n")
    click.echo(f"The run's own record is in {run / 'sera'} (docs/run-directory.md).")
    click.echo(f"Open {run / 'sera/report.html'} to see what it did to the data.")


def _command(config: Path) -> list[str]:
    """A process of its own, as a user would start it: this interpreter, and no shell."""
    train = [sys.executable, "-m", "axolotl.cli.main", "train", str(config)]
    return [*train, "--launcher", "python"]


def _environment() -> dict[str, str]:
    """A thread for each of three runs: more of them wait for each other on two cores."""
    ours = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return {"OMP_NUM_THREADS": "1", **os.environ, **ours}


def compared_with(settings: Mapping[str, Any], directory: Path) -> dict[str, dict[str, Any]]:
    """The YAMLs that the demo's is compared with, by what the table calls them."""
    plain_dpo = {key: settings[key] for key in settings if key not in ("plugins", "sera")}
    sera = {**(settings.get("sera") or {}), **AS_PUBLISHED}

    def beside(place: str) -> dict[str, str]:
        return {
            "output_dir": str(directory / place),
            "dataset_prepared_path": str(directory / f"{place}-prepared"),
        }

    return {
        f"plain DPO, {settings.get('num_epochs', 1)} epochs": (
            plain_dpo | {"rl": "dpo"} | beside("plain-dpo")
        ),
        "SeRA with the paper's reward": {**settings, "sera": sera} | beside("paper-sera"),
    }


@contextmanager
def trained(configs: Iterable[Mapping[str, Any]]) -> Iterator[None]:
    """Train what was not trained yet by the same YAML, beside what is done inside.

    The YAML is left beside `output_dir`, and so is what the host prints.

    Raises:
        click.ClickException: if one fails.
    """
    running = {}
    for lines in configs:
        output, text = Path(lines["output_dir"]), yaml.safe_dump(dict(lines))
        config, log = output.with_suffix(".yaml"), output.with_suffix(".log")
        done = (output / "model.safetensors").exists() and config.is_file()
        if done and config.read_text(encoding="utf-8") == text:
            continue
        shutil.rmtree(output, ignore_errors=True)  # of a demo that was stopped, or of another YAML
        write_text(config, text)
        with os.fdopen(open_own(log, os.O_WRONLY | os.O_CREAT), "wb") as file:
            file.truncate()  # one of an earlier time
            running[config, log] = subprocess.Popen(
                _command(config), env=_environment(), stdout=file, stderr=subprocess.STDOUT
            )
    try:
        yield
        for (config, log), process in running.items():
            if process.wait():
                raise click.ClickException(f"`axolotl train {config}` failed; see {log}")
    finally:
        for process in running.values():
            process.terminate()


@contextmanager
def _step(what: str, made: Path | None = None) -> Iterator[None]:
    """Say what a step does, and how long it took unless what it makes is there."""
    done = made is not None and made.exists()
    click.echo(f"-> {what}{' (already there)' if done else ''}")
    start = perf_counter()
    yield
    if not done:
        click.echo(f"   took {perf_counter() - start:.0f} s")


def _check(config: Path, base: Path, pairs: Path) -> Path:
    """The YAML's output_dir, once the YAML and the demo's directory agree."""
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        paths = settings["base_model"], settings["datasets"][0]["path"], settings["output_dir"]
        model, data, run = map(Path, paths)
    except (yaml.YAMLError, LookupError, TypeError) as error:
        raise ValueError(
            f"{config} has to be a YAML with base_model, datasets and output_dir: "
            f"{type(error).__name__}: {plain(str(error), 200)}"
        ) from error
    for key, given, expected in (("base_model", model, base), ("datasets[0].path", data, pairs)):
        if given.resolve() != expected.resolve():
            raise ValueError(
                f"{config} has {key}: {given}, but the demo writes {expected}. Change the YAML, "
                "or give the matching --directory."
            )
    if (run / "sera").exists():
        raise ValueError(f"{run} holds an earlier run. Remove it, or set another output_dir.")
    # The host names prepared data by the configuration, not by what is in the file: it would
    # train on pairs that are gone.
    prepared = settings.get("dataset_prepared_path")
    if prepared and not pairs.exists() and Path(prepared).exists():
        raise ValueError(
            f"{prepared} was prepared from another {pairs}, and the host would use it. Remove it."
        )
    return run


def make_pairs(
    prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[dict[str, Any]]:
    """Label two responses to each prompt; equal responses give no pair."""
    random, rows = Random(2), []
    for prompt, one, other in zip(prompts, first, second, strict=True):
        if not one.strip() or not other.strip() or one == other:
            continue
        chosen, rejected, swapped = label(prompt, one, other, Labelling(), random)
        rows.append(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected, "swapped": swapped}
            | {"score_chosen": true_reward(prompt, chosen)}
            | {"score_rejected": true_reward(prompt, rejected)}
        )
    return rows


def _write_pairs(base: Path, path: Path) -> None:
    from sera_plugin.tools.demo.base_model import load_model, respond

    random = Random(1)
    prompts = [make_prompt(random) for _ in range(PAIRS)]
    model, tokenizer = load_model(base)
    rows = make_pairs(prompts, *(respond(model, tokenizer, prompts, seed=seed) for seed in (1, 2)))
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _table(base: Path, others: Mapping[str, Path], run: Path) -> str:
    """True reward, win rate against the base model and length, policy by policy."""
    from sera_plugin.tools.demo.base_model import load_model, respond

    _, *policies = RunStore(run).policies()  # the first is the base
    after = [
        (f"after iteration {t}{' (kept)' if path == run else ''}", path)
        for t, path in enumerate(policies, start=1)
    ]
    random = Random(3)
    prompts = [make_prompt(random) for _ in range(HELD_OUT)]
    rows: list[list[str]] = []
    reference: list[float] = []
    for name, directory in [("base model", base), *others.items(), *after]:
        responses = respond(*load_model(directory), prompts)
        rewards = [true_reward(p, r) for p, r in zip(prompts, responses, strict=True)]
        reference = reference or rewards
        wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(rewards, reference, strict=True))
        won = f"{wins / HELD_OUT:.1%}" if rows else ""
        words = sum(len(response.split()) for response in responses) / HELD_OUT
        rows.append([name, f"{sum(rewards) / HELD_OUT:.3f}", won, f"{words:.2f}"])
    table = plain_table(("policy", "true reward", "wins against base", "words"), rows)
    return f"{HELD_OUT} held-out prompts, one sample each at temperature 1.0\n\n{table}"
