"""`axolotl sera report`, `inspect` and `compare`, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.json as pa_json
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from sera_plugin.algorithm.selection import Annotations
from sera_plugin.cli import sera
from sera_plugin.rundir.store import RunStore
from tests.report_run import WORDS, make_run

ROOT = Path(__file__).parents[1]


def call(*arguments, fails=False):
    result = CliRunner().invoke(sera, [str(one) for one in arguments])
    assert result.exit_code == (2 if fails else 0), result.output
    return result.output if fails else result.stdout


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run", scores={"source": ["web", "book"] * 6})
    return tmp_path / "run"


def test_report_goes_into_the_run_or_where_it_is_told(run, tmp_path):
    found = json.loads(call("report", run, "--json"))
    assert [one["iteration"] for one in found["iterations"]] == [1, 2, 3]
    assert not (run / "sera/report.html").exists()
    assert call("report", run).strip() == str(run / "sera/report.html")
    assert call("report", run / "sera", "--output", tmp_path / "mine.html").strip().endswith("html")
    assert (tmp_path / "mine.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(tmp_path.rglob("*.partial"))


def test_the_commands_run_without_the_host_and_its_banner(run):
    command = [sys.executable, "-m", "sera_plugin", "report", run, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert json.loads(done.stdout)["run"]["pairs"] == 12


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("report {}/nowhere", "no SeRA run there, no such directory"),
        ("report {}/empty", "empty/sera/run.json does not exist"),
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
    output = call(*(one.format(tmp_path) for one in command.split()), fails=True)
    assert said in output
    assert "Traceback" not in output


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
    assert len(doubted) > 2
    for asked, rows in (([], doubted), ([2], doubted[:2])):
        found = json.loads(call("inspect", run, "--mislabelled", *asked, "--json"))
        assert [one["row"] for one in found] == rows
    said = call("inspect", run, "--mislabelled", 2)
    assert f"row {doubted[0]}\n" in said
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
    assert "exists. Remove it" in call(*arguments, fails=True)


def test_an_exported_prompt_gives_its_token_ids_again(run, tmp_path):
    """A tokenizer that puts a token in front by itself would put it there twice."""
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="w4 $A", special_tokens=[("w4", 4)])
    tokenizer.pre_tokenizer = WhitespaceSplit()
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
    make_run(tmp_path / "other", pairs=8, iterations=2, loss="ipo", per_token=True)
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


OLDER = Path(__file__).parent / "run_of_format_1"


def test_a_run_of_the_released_format_is_read_as_it_was(tmp_path):
    """A run directory of format 1 as it was first written, with the figures it had then."""
    figures, then = (
        json.loads(text)
        for text in (call("report", OLDER, "--json"), (OLDER / "figures.json").read_text())
    )
    assert figures | {"run": None} == then | {"run": None}
    assert (figures["run"]["state"], figures["notes"]) == ("finished", [])
    call("report", OLDER, "--output", tmp_path / "report.html")
    assert "w2 w2 w2 </s>" in call("inspect", OLDER, "--row", 1)
    call("inspect", OLDER, "--export", tmp_path / "kept.jsonl", "--which", "bootstrapped")
    make_run(tmp_path / "new", pairs=4)
    assert "Jaccard index of the pairs kept" in call("compare", OLDER, tmp_path / "new")
    assert RunStore(OLDER).description()["end_ids"] == [0]  # what `eval` reads
