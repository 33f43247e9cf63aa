"""`axolotl sera eval`: with real models and a true reward, and with answers made up."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from sera_plugin.cli import sera
from sera_plugin.rundir.checksums import seal
from sera_plugin.rundir.store import write_json
from sera_plugin.tools.demo.world import make_prompt, true_reward
from sera_plugin.tools.evaluation.answers import Turn
from tests.conftest import adapter, fill, write_rows
from tests.judge_server import KEY, judge_server
from tests.report_run import make_run
from tests.test_eval_inputs import make_model

TRUTH = "sera_plugin.tools.demo.world:true_reward"


def call(*arguments, code=0):
    result = CliRunner().invoke(sera, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.output


class Letters:
    """Answers at once, with the first letters of the prompt, in order; may stop on the way."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.left: int | None = None

    def load(self, model, decoding, vllm_python, log):
        def sample(conversations, done, seed):
            for index in sorted(set(range(len(conversations))).difference(done)):
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left = None if self.left is None else self.left - 1
                self.asked.append(model.name)
                words = sorted(conversations[index][-1].split())
                kept = words[: 2 if model.name == "base" else 3 + (index + seed) % 2]
                yield index, Turn(" ".join(kept), len(kept) + 1, "stop")

        return sample


@pytest.fixture
def letters(monkeypatch) -> Letters:
    """In place of the engine that loads a model."""
    engine = Letters()
    monkeypatch.setattr("sera_plugin.tools.evaluation.run._engine", engine.load)
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


def options(prompts: Path, output: Path, judge: str | None = TRUTH) -> list:
    given = ["--prompts", prompts, "--output", output, "--max-new-tokens", 12]
    return given if judge is None else [*given, "--judge", judge]


# ------------------------------------------------------------------ from end to end


def test_models_are_compared_by_the_true_reward_and_a_rerun_needs_no_torch(
    world, prompts, tmp_path
):
    from sera_plugin.tools.demo.base_model import train_base_model

    out = tmp_path / "eval"
    train_base_model(tmp_path / "better", steps=80, batch_size=32, seed=1)
    arguments = [world.base, tmp_path / "better", *options(prompts, out), "--json"]
    printed = call(*arguments)
    found = json.loads(printed)
    assert found == json.loads((out / "results.json").read_text())
    base, better = found["models"]
    assert (base["name"], better["name"]) == ("base", "better")
    rate = better["win_rate"]
    assert rate["low"] < rate["rate"] < rate["high"]
    assert rate["wins"] + rate["ties"] + rate["losses"] == 60
    assert list(better["categories"]) == ["a", "b"]

    # The figures are those of the answers, by the world's own reward.
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    rewards = {}
    for name in ("base", "better"):
        answers = json.loads((out / f"outputs/{name}.json").read_text())
        assert [one["instruction"] for one in answers] == [row["prompt"] for row in rows]
        rewards[name] = np.array([true_reward(a["instruction"], a["output"]) for a in answers])
    outcomes = (np.sign(rewards["better"] - rewards["base"]) + 1) / 2
    assert better["score"]["mean"] == pytest.approx(rewards["better"].mean())
    assert rate["rate"] == pytest.approx(outcomes.mean())
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [one["outcome"] for one in verdicts] == outcomes.tolist()
    assert (out / "eval.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(tmp_path.rglob("*.partial"))

    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft'): sys.modules[name] = None\n"
        "from sera_plugin.cli import sera\nsera()"
    )
    command = [sys.executable, "-c", script, "eval", *map(str, arguments)]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == printed, again.stderr


def test_progress_goes_to_stderr_and_counts_what_is_left(letters, names, prompts, tmp_path):
    arguments = [*names, *options(prompts, tmp_path / "eval"), "--json"]
    lines = []
    for _ in range(2):
        result = CliRunner().invoke(sera, ["eval", *map(str, arguments)])
        json.loads(result.stdout)
        lines.append(re.findall(r"\[INFO\] \[axolotl.sera\] SeRA: (.*)", result.stderr))
    sampled = [f"answers of {name}: 60 answers" for name in ("base", "better")]
    judged = "judging: 120 answers"
    assert lines == [[*sampled, judged], [judged]]


def test_answers_alone_and_answers_that_were_exported(letters, names, prompts, tmp_path):
    out = tmp_path / "eval"
    said = call(*names, *options(prompts, out, judge=None))
    assert "win" not in said
    assert not (out / "verdicts.jsonl").exists()
    files = [out / "outputs/base.json", out / "outputs/better.json"]
    # AlpacaEval's format, which other tools read: a list of rows, no byte before it.
    rows = json.loads(files[0].read_text())
    assert [list(row) for row in rows] == [["instruction", "output", "generator"]] * 60
    by_file, by_model = (
        json.loads(call(*compared, *options(prompts, tmp_path / "again"), "--json"))["models"][1]
        for compared in (files, names)
    )
    assert by_file["win_rate"] == by_model["win_rate"]
    assert by_file["length_controlled"] == by_model["length_controlled"]
    assert by_file["answers"].pop("mean_tokens") is None
    assert by_model["answers"].pop("mean_tokens") > 1
    assert by_file["answers"] == by_model["answers"]


def test_a_file_of_other_answers_stops_it_before_sampling(letters, names, prompts, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "another", "output": "b"}]))
    said = call(names[0], tmp_path / "a.json", *options(prompts, tmp_path / "eval"), code=2)
    assert "no row answers any of these prompts" in said
    assert not letters.asked
    assert not (tmp_path / "eval").exists()


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
        arguments = [*names, *options(prompts, tmp_path / "eval")]
        arguments[-1] = tmp_path / "judge.yaml"
        arguments += ["--limit", 20]
        found = json.loads(call(*arguments, "--json"))
        usage = found["judge"]["usage"]
        # Whatever stands first wins; equal answers are not shown.
        assert found["models"][1]["win_rate"]["rate"] == 0.5
        assert found["models"][1]["inconsistent"] > 0.5
        assert usage["asked"]["count"] == server.calls > 20
        cost = (100 * 10 + 10 * 100) * server.calls / 1e6
        assert found["judge"]["cost"] == pytest.approx(cost)
        server.plan()
        again = json.loads(call(*arguments, "--json"))
        assert server.calls == 0
        assert again["judge"]["cached_cost"] == pytest.approx(cost)
        assert again["models"] == found["models"]
        said = call(*arguments)
        assert f"0 replies asked for, {usage['asked']['count']} were there" in said
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [key for key in (KEY, json.dumps(KEY)[1:-1]) if key.encode() in kept]


def test_the_example_in_the_docs_runs(letters, names, tmp_path, monkeypatch):
    """docs/eval.md, word for word, with a run of policies that answer at once."""
    text = (Path(__file__).parents[1] / "docs/eval.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"```sh\n(axolotl sera eval sera-demo/run .*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    store = make_run(Path("sera-demo/run"), iterations=2, config={"base_model": "base"})
    write_json(store.policy(1) / "base_model.json", {"base_model": "base"})
    make_model(store.policy(2))
    for iteration in (1, 2):
        seal(store.policy(iteration))
    make_model(Path("sera-demo/run"))
    subprocess.run([sys.executable, "-c", script], check=True)
    said = call(*shlex.split(command.replace("\\\n", " "))[3:])
    shown = re.search(r"^model .*", text, re.MULTILINE)[0].split()
    assert re.search(r"^model .*", said, re.MULTILINE)[0].split() == shown
    assert re.findall(r"^(run\S*) .* [\d,]+$", said, re.MULTILINE) == ["run@0", "run@1", "run"]
    assert "on 1000 prompts" in said
    for name in re.findall(r"^\| `([\w./]+)` \|", text[text.index("## Files") :], re.MULTILINE):
        if name not in ("judge.jsonl", "vllm.log"):  # of other judges and samplers
            assert list(Path("sera-eval").glob(name.replace("NAME", "run@1"))), name


def test_the_docs_name_every_option():
    text = (Path(__file__).parents[1] / "docs/eval.md").read_text()
    for option in sera.commands["eval"].params:
        if option.param_type_name == "option":
            assert option.opts[0] in text
            if isinstance(option.default, int | float) and not isinstance(option.default, bool):
                assert f"| `{option.opts[0]}` | `{option.default}` |" in text


# ------------------------------------------------------------------ a trained run


@pytest.mark.slow
def test_a_trained_run_and_its_iterations(base_config, train, prompts, tmp_path):
    output = train(base_config | adapter() | {"num_epochs": 2}).output
    found = json.loads(call(output, "--iterations", *options(prompts, tmp_path / "eval"), "--json"))
    assert [one["name"] for one in found["models"]] == ["out@0", "out@1", "out"]
    texts = [
        [one["output"] for one in json.loads((tmp_path / f"eval/outputs/{name}.json").read_text())]
        for name in ("out@0", "out@1", "out")
    ]
    assert texts[0] != texts[1] != texts[2]
    # theta_0 is the base model: the same seed gives the same answers.
    alone = json.loads(
        call(base_config["base_model"], output, *options(prompts, tmp_path / "two"), "--json")
    )
    base = json.loads((tmp_path / "two/outputs/base.json").read_text())
    assert [one["output"] for one in base] == texts[0]
    assert alone["models"][1]["win_rate"] == found["models"][2]["win_rate"]


# ------------------------------------------------------------------ bad luck


JUDGE = """
import pathlib
from sera_plugin.tools.demo.world import true_reward
mark, left = pathlib.Path(__file__).with_name("judging"), [30]
def score(prompt, answer):
    left[0] -= 1
    if mark.exists() and not left[0]:
        raise KeyboardInterrupt
    return true_reward(prompt, answer)
"""


def test_an_evaluation_that_stops_goes_on_to_the_same_figures(letters, names, prompts, tmp_path):
    """Within each model's answers and within the verdicts; no answer is sampled twice."""
    arguments = [*names, *options(prompts, tmp_path / "eval")]
    whole = [*arguments[:4], "--output", tmp_path / "whole", *arguments[6:]]
    expected = json.loads(call(*whole, "--json"))
    letters.asked.clear()
    for left in (20, 70):
        letters.left = left
        assert CliRunner().invoke(sera, ["eval", *map(str, arguments)]).exit_code == 1
        assert not (tmp_path / "eval/results.json").exists()
    letters.left = None
    judge, mark = tmp_path / "judge.py", tmp_path / "judging"
    judge.write_text(JUDGE)
    mark.touch()
    arguments[-1] = f"{judge}:score"
    assert CliRunner().invoke(sera, ["eval", *map(str, arguments)]).exit_code == 1
    assert not (tmp_path / "eval/results.json").exists()
    mark.unlink()
    found = json.loads(call(*arguments, "--json"))
    assert found["models"] == expected["models"]
    assert letters.asked == ["base"] * 60 + ["better"] * 60


def test_a_full_disk(letters, names, prompts, small_disk):
    arguments = [*names, *options(prompts, small_disk / "eval")]
    fill(small_disk)
    said = call(*arguments, code=1)
    assert "takes no more files" in said
    assert "start the same command again" in said
    (small_disk / "filler").unlink()
    found = json.loads(call(*arguments, "--json"))
    fill(small_disk)
    before = (small_disk / "eval/results.json").read_text()
    assert "takes no more files" in call(*arguments, "--seed", 1, code=1)
    assert (small_disk / "eval/results.json").read_text() == before
    (small_disk / "filler").unlink()
    assert json.loads(call(*arguments, "--json")) == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--prompts": "{}/none.jsonl"}, "No such file or directory"),
        ({"--prompts": "{}/empty.jsonl"}, "holds no prompts"),
        ({"--judge": "nobody"}, "'nobody' is neither a YAML file"),
        ({"--judge": "{}/judge.yaml"}, "judge.yaml: base_url is missing"),
        ({"--prompt-format": "no place"}, "--prompt-format has no {prompt}"),
        ({"--temperature": "-1"}, "Invalid value for '--temperature'"),
        ({"--limit": "0"}, "Invalid value for '--limit'"),
        ({"--vllm-python": "/no/such"}, "--vllm-python: '/no/such' is not a program"),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_sampled(
    names, prompts, tmp_path, changes, said
):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "judge.yaml").write_text("model: m")
    given = dict(zip(*[iter(options(prompts, tmp_path / "eval"))] * 2, strict=True))
    given |= {key: value.replace("{}", str(tmp_path)) for key, value in changes.items()}
    output = call(*names, *(one for pair in given.items() for one in pair), code=2)
    assert said in output
    assert not (tmp_path / "eval").exists()
