"""Commands as a user types them: `report`, `inspect`, `compare`, and what all have in common."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pyarrow.json as pa_json
import pyarrow.parquet as pq
import pytest
import yaml
from click.shell_completion import BashComplete
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from sera_plugin.algorithm.selection import Annotations
from sera_plugin.cli import sera
from sera_plugin.rundir.format import read_json
from sera_plugin.rundir.store import RunStore, write_json
from sera_plugin.tools.command import refusing
from tests.conftest import fill, write_rows
from tests.report_run import WORDS, make_run

ROOT = Path(__file__).parents[1]


def call(*arguments, command=sera, code=0):
    """What a command prints: on standard error where it does not end with 0."""
    result = CliRunner().invoke(command, [str(one) for one in arguments])
    assert result.exit_code == code, result.output
    assert code != 2 or not result.stdout
    return result.stderr if code else result.stdout


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run", scores={"source": ["web", "book"] * 6})
    return tmp_path / "run"


def test_report_goes_into_the_run_or_where_it_is_told(run, tmp_path):
    assert call("report", run).strip() == str(run / "sera/report.html")
    assert call("report", run / "sera", "--output", tmp_path / "mine.html").strip().endswith("html")
    assert (tmp_path / "mine.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(tmp_path.rglob("*.partial"))


def test_the_commands_are_quick_and_need_no_host(run):
    """Neither the host and its banner nor torch; of libraries only what they draw and read with."""

    def imported(*arguments):
        command = [sys.executable, "-X", "importtime", "-m", "sera_plugin", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        return done.stdout, {line.split("|")[-1].strip() for line in done.stderr.splitlines()}

    _, names = imported("report", "--help")
    assert "click" in names
    assert not names & {"numpy", "pyarrow", "matplotlib"}
    figures, _ = imported("report", run, "--json")
    assert json.loads(figures)["run"]["pairs"] == 12
    assert not (run / "sera/report.html").exists()
    page, names = imported("report", run)
    assert page == f"{run / 'sera/report.html'}\n"
    assert "matplotlib" in names
    assert not names & {"torch", "transformers", "trl", "axolotl", "matplotlib.pyplot"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("report {}/nowhere", "no SeRA run there, no such directory"),
        ("report {}/empty", "empty/sera/run.json does not exist"),
        ("report {}/newer", "format version 2; this sera_plugin reads 1"),
        ("report {}/run --output {}/no/such/place.html", "No such file or directory"),
        ("report {}/run --json --output x", "leave --output out"),
        ("inspect {}/run", "give one of --row, --mislabelled and --export"),
        ("inspect {}/run --row 1 --mislabelled", "give one of"),
        ("inspect {}/run --row 12", "12 is not in the run; it has rows 0 to 11"),
        ("inspect {}/run --row -1", "-1 is not in the run"),
        ("inspect {}/run --export {}/x.jsonl", "--export and --which go together"),
        ("inspect {}/run --row 1 --iteration 2", "--iteration needs --export"),
        ("inspect {}/run --export {}/x.csv --which kept", ".jsonl or .parquet"),
        ("inspect {}/run --export {}/x.jsonl --which kept --iteration 9",
         "iteration 9 is not in"),
        ("inspect {}/run --export {}/x.jsonl --which bootstrapped --iteration 1",
         "1 has no bootstrapped pairs"),
        ("inspect {}/bare --export {}/x.jsonl --which kept", "there is no tokenizer.json"),
        ("compare {}/run", "give two runs or more"),
        ("compare {}/run {}/nowhere", "no SeRA run there"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(run, tmp_path, command, said):
    (tmp_path / "empty").mkdir()
    if "bare" in command:
        make_run(tmp_path / "bare", words=None)
    if "newer" in command:
        file = make_run(tmp_path / "newer", iterations=1).run_file
        write_json(file, read_json(file) | {"format_version": 2})
    assert said in call(*command.replace("{}", str(tmp_path)).split(), code=2)


def test_inspect_shows_a_pair_under_every_policy(run):
    pair = json.loads(call("inspect", run, "--row", 3, "--json"))
    assert (pair["prompt"], pair["chosen"]) == ("w4 w4", "w4 w4 w4 </s>")
    assert pair["columns"] == {"source": "book"}
    store = RunStore(run)
    for iteration, thought in enumerate(pair["iterations"], start=1):
        recorded = store.read(iteration, "offline").to_pylist()[3]
        for name in ("chosen_logp", "rejected_logp", "chosen_reward", "margin", "selected"):
            if name in recorded:
                assert thought[name] == recorded[name]
    third = pair["iterations"][2]["candidates"]
    assert [one["text"].split()[0] for one in third] == ["w1", "w2", "w3", "w4"]
    rewards = [one["reward"] for one in third]
    best, worst = (third[rewards.index(f(rewards))] for f in (max, min))
    assert (best["paired_as"], worst["paired_as"]) == ("chosen", "rejected")
    assert best["pair_margin"] == pytest.approx(max(rewards) - min(rewards))
    said = call("inspect", run, "--row", 3)
    assert "w4 w4 w4 </s>" in said
    assert f"{pair['iterations'][2]['margin']:.3f}" in said


def test_inspect_lists_the_pairs_whose_label_the_policy_doubts(run):
    margins = RunStore(run).read(3, "offline")["margin"].to_numpy()
    doubted = [int(row) for row in margins.argsort() if margins[row] < 0]
    found = json.loads(call("inspect", run, "--mislabelled", "--json"))
    assert [one["row"] for one in found] == doubted
    said = call("inspect", run, "--mislabelled", 2)
    assert f"row {doubted[1]}\n" in said
    assert f"row {doubted[2]}\n" not in said
    assert f"{margins[doubted[0]]:+.3f}" in said


def test_no_terminal_obeys_what_inspect_shows(tmp_path):
    words = ["</s>", *(f"\x1b]0;{n}\x07\u202e\x9b" for n in range(39))]
    make_run(tmp_path, words=words, scores={"\x1b[2J": ["\x07"] * 12})
    for arguments in (("--row", 3), ("--mislabelled",), ("--row", 3, "--json")):
        said = call("inspect", tmp_path, *arguments)
        assert all(one.isprintable() or one == "\n" for one in said)


@pytest.mark.parametrize(
    ("suffix", "read"), [("jsonl", pa_json.read_json), ("parquet", pq.read_table)]
)
@pytest.mark.parametrize("which", ["kept", "dropped", "bootstrapped"])
def test_exports_are_preference_datasets(tmp_path, suffix, read, which):
    """Answers are as trained, and of a run with label noise it is said which were swapped."""
    swapped = np.arange(12) % 4 == 0
    store = make_run(tmp_path, annotations=Annotations(swapped=swapped))
    arguments = ("inspect", tmp_path, "--export", tmp_path / f"p.{suffix}", "--which", which)
    call(*arguments)
    rows = read(tmp_path / f"p.{suffix}").to_pylist()
    table = store.read(3, "bootstrapped" if which == "bootstrapped" else "offline")
    wanted = [one for one in table.to_pylist() if one["selected"] == (which != "dropped")]
    for one, expected in zip(rows, wanted, strict=True):
        word = WORDS[1 + expected["row"]]
        first = expected.get("chosen_candidate", -1) + 1
        assert (one["row"], one["margin"]) == (expected["row"], expected["margin"])
        assert one["prompt"] == f"{word} {word}"
        assert one["chosen"] == " ".join([f"w{first}"] * first if first else [word] * 3)
        assert one.get("swapped") == (None if first else swapped[one["row"]])
    assert len(rows) == 6
    assert "exists. Remove it" in call(*arguments, code=2)


def test_an_exported_prompt_gives_its_token_ids_again(run, tmp_path):
    """A tokenizer that puts a token in front by itself would put it there twice."""
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="w4 $A", special_tokens=[("w4", 4)])
    tokenizer.save(str(run / "tokenizer.json"))
    path = tmp_path / "kept.jsonl"
    said = call("inspect", run, "--export", path, "--which", "kept", "--iteration", 1)
    assert said == f"12 kept pairs of iteration 1 in {path}\n"
    pair = json.loads(path.read_text().splitlines()[3])
    assert (pair["prompt"], pair["margin"]) == ("w4", None)
    assert tokenizer.encode(pair["prompt"]).ids == [4, 4]


def test_compare_says_what_differs_and_how_alike_selections_are(tmp_path):
    for name, logps, gamma in (("one", [-5, -6, -7, -8], 0.3), ("two", [-8, -6, -7, -5], 0.1)):
        both = {0: ([-9] * 4, [-9] * 4), 1: (logps, [-9] * 4)}
        make_run(tmp_path / name, logps=both, sera={"gamma": gamma}, pairs=4, iterations=2)
    make_run(tmp_path / "other", pairs=8, iterations=2, sera={"loss": "ipo"})
    runs = [tmp_path / name for name in ("one", "two", "other")]
    found = json.loads(call("compare", *runs, "--json"))
    assert [one["name"] for one in found["runs"]] == ["one", "two", "other"]
    assert found["settings"]["sera.gamma"] == [0.3, 0.1, 0.3]
    assert found["settings"]["pairs"] == [4, 4, 8]
    assert "output_dir" not in found["settings"]
    # Rows 0 and 1 against rows 3 and 1; the third run has other data.
    third = pytest.approx(1 / 3)
    matrix = [[1.0, third, None], [third, 1.0, None], [None, None, 1.0]]
    assert found["selections"] == [{"iteration": 2, "matrix": matrix}]
    threshold = [one for one in found["metrics"] if one["name"] == "kept above (margin)"]
    assert threshold[0]["values"][:2] == [3.0, 3.0]
    assert call("compare", *runs, "--html", tmp_path / "x.html").strip() == str(tmp_path / "x.html")
    for said in (call("compare", *runs), (tmp_path / "x.html").read_text()):
        assert "Jaccard index of the pairs kept in iteration 2" in said
        assert "Settings that differ" in said
        assert "sera.gamma" in said
        assert "0.33" in said
        assert "Margins are not comparable: one nats, two nats, other nats per token." in said
    # Runs of one name are told apart by their paths.
    (tmp_path / "deep").mkdir()
    (tmp_path / "two").rename(tmp_path / "deep/one")
    assert f"{tmp_path}/deep/one nats" in call("compare", tmp_path / "deep/one", runs[2], runs[0])


OLDER = ROOT / "tests/run_of_format_1"


def test_a_run_of_the_released_format_is_read_as_it_was(tmp_path):
    """A run directory of format 1 as it was first written, with the figures it had then."""
    figures, then = json.loads(call("report", OLDER, "--json")), read_json(OLDER / "figures.json")
    assert figures | {"run": None} == then | {"run": None, "ending": None}
    assert (figures["run"]["state"], figures["notes"]) == ("finished", [])
    call("report", OLDER, "--output", tmp_path / "report.html")
    assert "w2 w2 w2 </s>" in call("inspect", OLDER, "--row", 1)
    call("inspect", OLDER, "--export", tmp_path / "kept.jsonl", "--which", "bootstrapped")
    make_run(tmp_path / "new", pairs=4)
    assert "Jaccard index of the pairs kept" in call("compare", OLDER, tmp_path / "new")
    assert RunStore(OLDER).description()["end_ids"] == [0]  # what `eval` reads


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a key"), 2),
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

    assert call(command=command, code=code) == f"Error: {error}\n"


@pytest.mark.parametrize("command", sorted(sera.commands))
def test_every_command_has_examples_and_refuses_an_option_that_is_not_there(command):
    assert "No such option" in call(command, "--no-such-option", code=2)
    examples = call(command, "--help").partition("Examples:\n")[2]
    assert f"  axolotl sera {command}" in examples
    assert f"  {command} " in call(code=2)  # no command shows help


@pytest.mark.parametrize("text", ["a: [", "base_model: x", "[]", "datasets: [{path: 1}]"])
def test_a_wrong_yaml_for_the_demo_is_2(text, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(text)
    said = call("demo", "--config", config, "--directory", tmp_path / "demo", code=2)
    assert "has to be a YAML with base_model, datasets and output_dir" in said
    assert not (tmp_path / "demo").exists()


@pytest.mark.nightly
def test_a_training_that_fails_is_1(tmp_path, monkeypatch):
    """The host is started for real, and refuses the YAML."""
    monkeypatch.chdir(tmp_path)
    demo, config = tmp_path / "demo", tmp_path / "mine.yaml"
    (demo / "base-model").mkdir(parents=True)
    write_rows(demo / "pairs.jsonl", [{"score_chosen": 1, "score_rejected": 0}])
    keys = {"base_model": str(demo / "base-model"), "output_dir": "out", "rl": "seraa"}
    keys |= {"datasets": [{"path": str(demo / "pairs.jsonl")}]}
    config.write_text(yaml.safe_dump(keys | {"plugins": ["sera_plugin.SeraPlugin"]}))
    said = call("demo", "--config", config, "--directory", demo, code=1)
    assert "its message is above" in said


def test_a_full_disk_is_1_and_the_remedy_is_the_command_s_own(run, small_disk):
    fill(small_disk)
    said = call("report", run, "--output", small_disk / "page.html", code=1)
    assert f"{small_disk} takes no more files: No space left on device. Free some space, " in said
    assert "then run `axolotl sera report` again." in said
    assert "auto_resume" not in said
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_commands_options_and_choices_are_completed():
    def complete(words, begun):
        found = BashComplete(sera, {}, "axolotl sera", "_X").get_completions(words, begun)
        return [one.value if one.type == "plain" else one.type for one in found]

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
