"""`axolotl sera eval`: with real models and a true reward, and with answers made up."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from sera_plugin.cli import sera
from sera_plugin.tools.demo.base_model import load_model
from sera_plugin.tools.demo.world import make_prompt, true_reward
from tests.conftest import fill, write_rows
from tests.servers import KEY, judge_server
from tests.test_eval_figures import Engine
from tests.test_eval_inputs import make_model

TRUTH = "sera_plugin.tools.demo.world:true_reward"


def call(*arguments, code=0):
    result = CliRunner().invoke(sera, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.output


def figures_of(*arguments):
    return json.loads(call(*arguments, "--json"))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Letters(Engine):
    """Answers with the first letters of the prompt, in order; the better model with more."""

    def answer(self, model, said, number):
        return " ".join(sorted(said.split())[: 2 if model.name == "base" else 3 + number % 2])


@pytest.fixture
def letters(monkeypatch) -> Letters:
    engine = Letters()
    monkeypatch.setattr("sera_plugin.tools.evaluation.run._engine", engine)
    return engine


@pytest.fixture
def names(tmp_path) -> list[Path]:
    """Two directories that look like models."""
    return [make_model(tmp_path / name) for name in ("base", "better")]


@pytest.fixture
def prompts(tmp_path) -> Path:
    """60 prompts of the world in two categories."""
    random = Random(8)
    rows = [{"prompt": make_prompt(random), "category": "ab"[n % 2]} for n in range(60)]
    write_rows(tmp_path / "prompts.jsonl", rows)
    return tmp_path / "prompts.jsonl"


def options(prompts: Path, output: Path, judge: Path | str | None = TRUTH) -> list:
    given = ["--prompts", prompts, "--output", output, "--max-new-tokens", 12]
    return given if judge is None else [*given, "--judge", judge]


def test_models_are_compared_and_a_rerun_needs_no_torch(world, prompts, tmp_path):
    model, tokenizer = load_model(world.base)
    model.model.norm.weight.data *= 2  # tokens that are likely become more so
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "better")
    out = tmp_path / "eval"
    arguments = [world.base, tmp_path / "better", *options(prompts, out), "--json"]
    found = json.loads(call(*arguments))
    assert found == json.loads((out / "results.json").read_text())
    base, better = found["models"]
    assert (base["name"], better["name"]) == ("base", "better")
    assert list(better["categories"]) == ["a", "b"]

    # The figures are those of the answers, by the world's own reward.
    rewards = {}
    for name in ("base", "better"):
        answers = json.loads((out / f"outputs/{name}.json").read_text())
        assert [one["instruction"] for one in answers] == [r["prompt"] for r in rows_of(prompts)]
        rewards[name] = np.array([true_reward(a["instruction"], a["output"]) for a in answers])
    outcomes = (np.sign(rewards["better"] - rewards["base"]) + 1) / 2
    assert better["score"]["mean"] == pytest.approx(rewards["better"].mean())
    assert better["win_rate"]["rate"] == pytest.approx(outcomes.mean())
    assert 0 < better["win_rate"]["wins"] == (outcomes > 0.5).sum() < 60
    assert [one["outcome"] for one in rows_of(out / "verdicts.jsonl")] == outcomes.tolist()
    assert (out / "eval.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(tmp_path.rglob("*.partial"))

    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft'): sys.modules[name] = None\n"
        "from sera_plugin.cli import sera\nsera()"
    )
    command = [sys.executable, "-c", script, "eval", *map(str, arguments)]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    usage = result["judge"].pop("usage"), found["judge"].pop("usage")
    assert result == found
    assert usage[0]["asked"]["count"] == usage[1]["cached"]["count"] == 0
    assert usage[0]["cached"] == usage[1]["asked"]


def test_progress_goes_to_stderr_and_counts_what_is_left(letters, names, prompts, tmp_path):
    arguments = map(str, ["eval", *names, *options(prompts, tmp_path / "eval"), "--json"])
    results = [CliRunner().invoke(sera, each) for each in [list(arguments)] * 2]
    first, second = (json.loads(one.stdout) for one in results)
    assert first["judge"].pop("usage")["asked"] == second["judge"].pop("usage")["cached"]
    assert first == second
    sampled = [f"answers of {name}: 60 answers" for name in ("base", "better")]
    lines = [re.findall(r"\[INFO\] \[axolotl.sera\] SeRA: (.*)", one.stderr) for one in results]
    assert lines == [[*sampled, "judging: 120 answers"], ["judging: 120 answers"]]


def test_answers_alone_and_answers_that_were_exported(letters, names, prompts, tmp_path):
    out = tmp_path / "eval"
    assert "win" not in call(*names, *options(prompts, out, judge=None))
    assert not (out / "verdicts.jsonl").exists()
    files = [out / "outputs/base.json", out / "outputs/better.json"]
    # AlpacaEval's format, which other tools read: a list of rows, no byte before it.
    rows = json.loads(files[0].read_text())
    assert [list(row) for row in rows] == [["instruction", "output", "generator"]] * 60
    again = options(prompts, tmp_path / "again")
    by_file, by_model = (figures_of(*those, *again)["models"][1] for those in (files, names))
    assert by_file["answers"].pop("mean_tokens") is None
    assert by_model["answers"].pop("mean_tokens") > 1
    for name in ("win_rate", "length_controlled", "answers"):
        assert by_file[name] == by_model[name]


def test_an_api_judge_judges_and_is_asked_once(letters, names, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("EVAL_TEST_KEY", KEY)
    with judge_server() as server:
        judge = {"base_url": server.url, "model": "some-model", "api_key_env": "EVAL_TEST_KEY"}
        judge |= {"prompt_price": 10, "completion_price": 100, "template": "stars.txt"}
        (tmp_path / "judge.yaml").write_text(yaml.safe_dump(judge))
        # The longer answer has more stars in this template.
        (tmp_path / "stars.txt").write_text(
            "{question}\n===== ANSWER A =====\n{answer_a}*\n===== ANSWER B =====\n{answer_b}\n"
            "===== END ====="
        )
        given = options(prompts, tmp_path / "eval", tmp_path / "judge.yaml")
        arguments = [*names, *given, "--limit", 20]
        found = figures_of(*arguments)
        usage = found["judge"]["usage"]
        # Whatever stands first wins; equal answers are not shown.
        assert found["models"][1]["win_rate"]["rate"] == 0.5
        assert found["models"][1]["inconsistent"] > 0.5
        assert usage["asked"]["count"] == server.calls > 20
        cost = (100 * 10 + 10 * 100) * server.calls / 1e6
        assert found["judge"]["cost"] == pytest.approx(cost)
        server.plan()
        again = figures_of(*arguments)
        assert server.calls == 0
        assert again["judge"]["cached_cost"] == pytest.approx(cost)
        assert again["models"] == found["models"]
        said = call(*arguments)
        assert f"0 replies asked for, {usage['asked']['count']} were there" in said
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [key for key in (KEY, json.dumps(KEY)[1:-1]) if key.encode() in kept]


def test_the_docs_name_every_file_option_and_column(letters, names, prompts, tmp_path):
    """tests/test_doc_commands.py runs their example."""
    text = (Path(__file__).parents[1] / "docs/eval.md").read_text()
    said = call(*names, *options(prompts, tmp_path / "eval"))
    shown, printed = (re.search(r"^model .*", one, re.MULTILINE)[0].split() for one in (text, said))
    assert shown == printed
    for name in re.findall(r"^\| `([\w./]+)` \|", text[text.index("## Files") :], re.MULTILINE):
        # Of other judges and samplers, of checks, of --rewards and of benchmarks.
        elsewhere = ("judge.jsonl", "vllm.log", "scores.jsonl", "outcomes.jsonl", "checks.jsonl")
        if name not in (*elsewhere, "model_answer/NAME.jsonl"):
            assert list((tmp_path / "eval").glob(name.replace("NAME", "better"))), name
    for option in sera.commands["eval"].params:
        if option.param_type_name == "option":
            assert option.opts[0] in text
            if isinstance(option.default, int | float) and not isinstance(option.default, bool):
                assert f"| `{option.opts[0]}` | `{option.default}` |" in text


CHECKS = """
def sorted_right(row, answer):
    return None if row["row"] == 3 else answer.split() == sorted(row["prompt"].split())
def share(row, answer):
    return len(set(answer.split())) / len(set(row["prompt"].split()))
def wrong(row, answer):
    return 7
def broken(row, answer):
    return row["nope"]
"""


def test_functions_check_answers_by_the_whole_row(letters, names, tmp_path):
    """`Letters` answers with the first of the prompt's letters, sorted: two of them, or more."""
    (tmp_path / "checks.py").write_text(CHECKS)
    rows = [{"row": n, "prompt": " ".join("dcba"[: 2 + n % 3]), "category": "ab"[n % 2]}
            for n in range(12)]  # fmt: skip
    write_rows(tmp_path / "p.jsonl", rows)
    checks = [f"{tmp_path}/checks.py:{name}" for name in ("sorted_right", "share")]
    given = ["--prompts", tmp_path / "p.jsonl", "--output", tmp_path / "eval"]
    both = [*given, "--check", checks[0], "--check", checks[1]]
    base, better = figures_of(*names, *both)["models"]
    # Of prompts of two letters alone; that of row 3 it cannot tell.
    right = base["checks"][checks[0]]
    assert (right["rate"], right["number"], right["missing"]) == (pytest.approx(3 / 11), 11, 1)
    assert {name: one["number"] for name, one in right["categories"].items()} == {"a": 6, "b": 5}
    assert base["checks"][checks[1]]["rate"] == pytest.approx((1 + 2 / 3 + 2 / 4) / 3)
    assert better["checks"][checks[1]]["rate"] > base["checks"][checks[1]]["rate"]
    said = call(*names, *both)
    assert f"Check {checks[0][:57]}" in said.replace("...", "")
    assert "27.3%" in said
    assert "cannot tell of 1 of 12 answers" in said
    lines = rows_of(tmp_path / "eval/outcomes.jsonl")
    assert len(lines) == 2 * 2 * 12
    unknown = {"row": 3, "category": "b", "model": "base", "check": checks[0], "outcome": None}
    assert lines[3] == unknown
    assert 'class="best"' in (tmp_path / "eval/eval.html").read_text()
    call(*names, *given)  # without checks, of which nothing stays then
    assert not (tmp_path / "eval/outcomes.jsonl").exists()
    for name, code, problem in (
        ("wrong", 1, "returned 7.0 on row "),
        ("broken", 1, "raised KeyError: 'nope' on the question"),
        ("none", 2, "none is no function of that file"),
    ):
        assert problem in call(*names, *given, "--check", f"{tmp_path}/checks.py:{name}", code=code)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"uid": "u", "category": "hard_prompt", "prompt": "b a"},
            {
                "uid": "u",
                "model": "base",
                "messages": [
                    {"role": "user", "content": "b a"},
                    {"role": "assistant", "content": {"answer": "a b"}},
                ],
            },
        ),
        (
            {"question_id": "q", "category": "v0.1", "turns": [{"content": "b a"}]},
            {
                "question_id": "q",
                "model_id": "base",
                "choices": [{"index": 0, "turns": [{"content": "a b"}]}],
            },
        ),
        (
            {"question_id": 81, "category": "writing", "turns": ["b a", "d c"]},
            {
                "question_id": 81,
                "model_id": "base",
                "choices": [{"index": 0, "turns": ["a b", "c d"]}],
            },
        ),
        ({"prompt": "b a"}, None),
    ],
    ids=["Arena-Hard v2.0", "Arena-Hard v0.1", "MT-Bench", "one's own"],
)
def test_answers_are_written_as_the_benchmarks_own_judges_read_them(
    letters, names, tmp_path, row, line
):
    write_rows(tmp_path / "p.jsonl", [row])
    call(*names, *options(tmp_path / "p.jsonl", tmp_path / "eval", judge=None))
    path = tmp_path / "eval/model_answer/base.jsonl"
    assert (rows_of(path) if path.exists() else None) == (line and [line])
    if line:  # and such a file is read as a model's answers, too
        again = tmp_path / "eval/model_answer/better.jsonl"
        given = options(tmp_path / "p.jsonl", tmp_path / "again")
        by_file, by_model = (
            figures_of(*those, *given)["models"][1] for those in ((path, again), names)
        )
        assert by_file["score"] == by_model["score"]


JUDGE = """
import pathlib
from sera_plugin.tools.demo.world import true_reward
def score(prompt, answer):
    if pathlib.Path(__file__).with_name("judging").exists():
        raise RuntimeError("not now")
    return true_reward(prompt, answer)
"""


def test_an_evaluation_that_stops_goes_on_to_the_same_figures(letters, names, prompts, tmp_path):
    """Within each model's answers and before any verdict; no answer is sampled twice."""
    expected = figures_of(*names, *options(prompts, tmp_path / "whole"))
    letters.asked.clear()
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "judging").touch()
    arguments = [*names, *options(prompts, tmp_path / "eval", f"{tmp_path}/judge.py:score")]
    for left in (20, 70, None):
        letters.left = left
        call(*arguments, code=1)
        assert not (tmp_path / "eval/results.json").exists()
    (tmp_path / "judging").unlink()
    assert figures_of(*arguments)["models"] == expected["models"]
    assert set(Counter(letters.asked).values()) == {2}  # once each model


def test_a_full_disk(letters, names, prompts, small_disk):
    arguments = [*names, *options(prompts, small_disk / "eval")]
    fill(small_disk)
    said = call(*arguments, code=1)
    assert "takes no more files" in said
    assert "start the same command again" in said
    (small_disk / "filler").unlink()
    found = figures_of(*arguments)
    fill(small_disk)
    before = (small_disk / "eval/results.json").read_text()
    assert "takes no more files" in call(*arguments, "--seed", 1, code=1)
    assert (small_disk / "eval/results.json").read_text() == before
    (small_disk / "filler").unlink()
    again = figures_of(*arguments)
    assert again["judge"].pop("usage").keys() == found["judge"].pop("usage").keys()
    assert again == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--prompts": "{}/none.jsonl"}, "none.jsonl' does not exist"),
        ({"--judge": "nobody"}, "'nobody' is neither a YAML file"),
        ({"--judge": "{}/judge.yaml"}, "judge.yaml: base_url is missing"),
        ({"--prompt-format": "no place"}, "--prompt-format has no {prompt}"),
        ({"--limit": "0"}, "Invalid value for '--limit'"),
        ({"--vllm-python": "/no/such"}, "--vllm-python: '/no/such' is not a program"),
        ({"--seed": "1", "{}/a.json": None}, "no row answers any of these prompts"),
    ],
)
def test_wrong_usage_ends_with_2(names, prompts, tmp_path, changes, said):
    (tmp_path / "judge.yaml").write_text("model: m")
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "another", "output": "b"}]))
    given = dict(zip(*[iter(options(prompts, tmp_path / "eval"))] * 2, strict=True)) | changes
    words = [one for pair in given.items() for one in pair if one is not None]
    output = call(*names, *(str(one).replace("{}", str(tmp_path)) for one in words), code=2)
    assert said in output
    assert not (tmp_path / "eval").exists()
