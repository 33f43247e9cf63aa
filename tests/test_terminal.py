"""What docs/terminal.md promises: exit codes, help, completion."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.shell_completion import BashComplete
from click.testing import CliRunner

from sera_plugin.cli import sera
from sera_plugin.tools.command import refusing
from tests.conftest import fill
from tests.report_run import make_run

COMMANDS = sorted(sera.commands)


def call(*arguments):
    return CliRunner().invoke(sera, [str(one) for one in arguments])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a key"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2),
        (FileExistsError("it is there"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
    ],
)
def test_what_is_asked_for_wrongly_is_2_and_what_fails_is_1(error, code):
    @click.command()
    def command():
        with refusing():
            raise error

    result = CliRunner().invoke(command)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"Error: {error}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_and_refuses_an_option_that_is_not_there(command):
    result = call(command, "--no-such-option")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "No such option" in result.stderr
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"  axolotl sera {command}" in result.output.partition("Examples:\n")[2]
    assert f"  {command} " in call().output  # no command shows help


@pytest.mark.parametrize("text", ["a: [", "base_model: x", "[]", "datasets: [{path: 1}]"])
def test_a_wrong_yaml_for_the_demo_is_2(text, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(text)
    result = call("demo", "--config", config, "--directory", tmp_path / "demo")
    assert result.exit_code == 2
    assert "has to be a YAML with base_model, datasets and output_dir" in result.output
    assert not (tmp_path / "demo").exists()


def test_a_training_that_fails_is_1(tmp_path, monkeypatch):
    """The host is started for real, and refuses the YAML."""
    monkeypatch.chdir(tmp_path)
    demo, config = tmp_path / "demo", tmp_path / "mine.yaml"
    (demo / "base-model").mkdir(parents=True)
    (demo / "pairs.jsonl").write_text('{"score_chosen": 1, "score_rejected": 0}\n')
    keys = {"base_model": str(demo / "base-model"), "output_dir": "out", "rl": "seraa"}
    keys |= {
        "datasets": [{"path": str(demo / "pairs.jsonl")}],
        "plugins": ["sera_plugin.SeraPlugin"],
    }
    config.write_text(yaml.safe_dump(keys))
    result = call("demo", "--config", config, "--directory", demo)
    assert result.exit_code == 1
    assert "its message is above" in result.output


@pytest.mark.parametrize(
    ("arguments", "again"),
    [
        ("report {}/run --output {}/disk/page.html", "run `axolotl sera report` again"),
        ("compare {}/run {}/run --html {}/disk/page.html", "start the same command again"),
        ("convert {}/llama.yaml --output {}/disk/sera.yaml", "start the same command again"),
    ],
)
def test_a_full_disk_is_1_and_the_remedy_is_the_commands(arguments, again, tmp_path, small_disk):
    make_run(tmp_path / "run", pairs=4, iterations=2)
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "chosen": "b", "rejected": "c"}\n')
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {"file_name": "data.jsonl", "ranking": True, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": info}))
    keys = {"model_name_or_path": "x", "stage": "dpo", "dataset": "mine", "template": "chatml"}
    (tmp_path / "llama.yaml").write_text(yaml.safe_dump(keys | {"dataset_dir": str(tmp_path)}))
    fill(small_disk)
    result = call(*arguments.replace("{}", str(tmp_path)).split())
    assert result.exit_code == 1
    said = f"{small_disk} takes no more files: No space left on device. Free some space, then "
    assert f"{said}{again}." in result.stderr
    assert "auto_resume" not in result.stderr
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def complete(words: list[str], begun: str) -> list[str]:
    found = BashComplete(sera, {}, "axolotl sera", "_X").get_completions(words, begun)
    return [one.value if one.type == "plain" else one.type for one in found]


def test_commands_options_and_choices_are_completed():
    assert complete([], "rep") == ["report"]
    assert "--mislabelled" in complete(["inspect", "out"], "--mis")
    assert complete(["inspect", "out", "--which"], "k") == ["kept"]
    assert complete(["report"], "out") == ["file"]
    # The host passes it on; its banner on standard output would be taken for a completion.
    words = {"COMP_WORDS": "axolotl sera rep", "COMP_CWORD": "2"}
    environment = os.environ | words | {"_AXOLOTL_COMPLETE": "bash_complete"}
    axolotl = Path(sys.executable).with_name("axolotl")
    done = subprocess.run([axolotl], capture_output=True, text=True, env=environment)
    assert done.stdout == "plain,report\n"
