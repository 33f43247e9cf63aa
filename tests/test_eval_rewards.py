"""Pairs that implicit rewards rank: how they are read, scored, and what is said of the rewards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import binomtest

from sera_plugin.algorithm.fit import Reward
from sera_plugin.cli import sera
from sera_plugin.rundir.checksums import seal
from sera_plugin.rundir.journal import Journal
from sera_plugin.rundir.store import RunStore
from sera_plugin.tools.demo.base_model import load_model
from sera_plugin.tools.evaluation import rewards as module
from sera_plugin.tools.evaluation.accuracy import by_category, figures, page, shown
from sera_plugin.tools.evaluation.models import Model, find_models
from sera_plugin.tools.evaluation.rewards import (
    CATEGORIES,
    Labelled,
    Ranking,
    find_rewards,
    outcomes,
    read_pairs,
    scored,
)
from sera_plugin.tools.evaluation.winrate import share
from tests.conftest import write_rows
from tests.report_run import make_run
from tests.test_eval_inputs import make_adapter, make_model

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad", "subset": "hep-go", "id": 3}


def test_rows_of_rewardbench_and_ones_own_are_pairs(tmp_path):
    own = {"prompt": "ü", "chosen": "", "rejected": "🙂"}  # an answer may be empty
    second = {**PAIR, "chosen": ["good"], "rejected": ["bad", "worse"], "subset": "Math"}
    write_rows(tmp_path / "p.jsonl", [PAIR, own, second])
    assert read_pairs(tmp_path / "p.jsonl") == [
        Labelled("p", "good", ("bad",), "hep-go", 0),
        Labelled("ü", "", ("🙂",), "", 1),
        Labelled("p", "good", ("bad", "worse"), "Math", 2),
    ]
    assert len(read_pairs(tmp_path / "p.jsonl", limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (None, r"holds no pairs"),
        ({"prompt": "p", "choosen": "a", "rejected": "b"}, r"row 0 has no chosen.*'choosen'"),
        (PAIR | {"prompt": None}, r"row 0: prompt is None, not text"),
        (PAIR | {"prompt": " "}, r"row 0: prompt is empty"),
        (PAIR | {"chosen": float("nan")}, r"row 0: chosen is nan, not text"),
        (PAIR | {"rejected": "\ud800"}, r"row 0: rejected is .*, not text"),
        (PAIR | {"rejected": []}, r"row 0: rejected is a list of 0 answers, not at least one"),
        (PAIR | {"chosen": ["a", "b"]}, r"row 0: chosen is a list of 2 answers.*Ties.*remove"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(tmp_path, row, said):
    write_rows(tmp_path / "p.jsonl", [] if row is None else [row])
    with pytest.raises(ValueError, match=rf"p\.jsonl.*{said}"):
        read_pairs(tmp_path / "p.jsonl")


def test_shares_have_wilsons_interval():
    expected = binomtest(8, 10).proportion_ci(method="wilson")
    found = share([1] * 8 + [0, 0, np.nan])
    assert (found.rate, found.number, found.missing) == (0.8, 10, 1)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert share([1, 1, 1]).low < 0.5  # three of three is no proof
    assert np.isnan(share([]).rate)


def test_categories_are_weighted_as_on_rewardbenchs_leaderboard():
    # math-prm counts as much as all six subsets of code, whatever their numbers of pairs.
    assert by_category({"math-prm": 1.0, **dict.fromkeys(["hep-cpp", "hep-go"], 0.0)}) == {
        "Reasoning": pytest.approx(984 / (984 + 2 * 164))
    }
    code = [name for name in CATEGORIES["Reasoning"] if name.startswith("hep-")]
    assert by_category({"math-prm": 1.0, **dict.fromkeys(code, 0.0)})["Reasoning"] == 0.5
    # Chat: (100 x 0.9 + 28 x 0.4) / 128
    chat = by_category({"alpacaeval-easy": 0.9, "mt-bench-easy": 0.4, "mine": 0.0})
    assert chat == {"Chat": pytest.approx(0.790625)}
    assert sum(map(len, CATEGORIES.values())) == 23


def test_the_chosen_answer_has_to_be_the_best_of_all():
    pairs = [Labelled("p", "c", ("r",) * n, "", n) for n in (1, 1, 2, 2, 1)]
    logps = np.array([3, 1, 1, 1, 3, 2, 1, 3, 2, 4, np.nan, 1.0])
    model = Model("m", "m", "m")
    ranking = Ranking("r", (model,), Reward((1.0,)), per_token=False)
    model.__dict__["identity"] = "m"
    found = outcomes(ranking, pairs, {"m": (logps, np.ones(12))})
    assert found == pytest.approx([1, 0.5, 1, 0, np.nan], nan_ok=True)
    # Half the likelihood per token: -6 nats on 12 tokens beat -2 on 2.
    per_token = Ranking("r", (model,), Reward((1.0,)), per_token=True)
    scores = {"m": (np.array([-6.0, -2.0]), np.array([12.0, 2.0]))}
    assert outcomes(per_token, pairs[:1], scores) == [1]
    # A fitted reward counts length too: -6 + 12 x 0.5 against -2 + 2 x 0.5.
    fitted = Ranking("r", (model,), Reward((1.0,), 0.5), per_token=False)
    assert outcomes(fitted, pairs[:1], scores) == [1]


@pytest.fixture
def run(tmp_path):
    """A finished run of three different adapters, whose reward was fitted in each iteration."""
    return run_of_adapters(tmp_path, reward="fitted")


def run_of_adapters(tmp_path, **sera):
    base = make_model(tmp_path / "base")
    store = make_run(tmp_path / "run", sera=sera, config={"base_model": str(base)})
    for iteration in (1, 2, 3):
        place = make_adapter(store.policy(iteration), base)
        (place / "adapter_model.safetensors").write_text(f"theta_{iteration - 1}")
        seal(place)
    make_adapter(tmp_path / "run", base)
    return tmp_path / "run"


def described(found: list[Ranking]) -> dict[str, dict[str, float]]:
    return {one.name: one.weights for one in found}


def test_rewards_of_a_run_are_dpos_and_those_that_iterations_ranked_by(run):
    store = RunStore(run)
    rewards, notes = find_rewards(find_models([str(run)]))
    recorded = store.summary(3)["reward"]["weights"]
    newest = {f"run@{p}": recorded[f"theta_{p}"] for p in (2, 1, 0)}
    assert not notes
    assert described(rewards) == {
        "run: implicit": {"run": 1.0, "run@0": -1.0},
        "run: Eq. 7 in iteration 3": {"run@2": 0.7, "run@1": pytest.approx(-0.4), "run@0": -0.3},
        "run: fitted in iteration 3": newest | {"length": recorded["length"]},
    }
    every, _ = find_rewards(find_models([str(run)], iterations=True))
    # Eq. 7 of iteration 2 is the implicit reward of run@1, and stands there once.
    assert [one.name for one in every] == [
        "run@1: implicit", "run: fitted in iteration 2", "run@2: implicit",
        "run: Eq. 7 in iteration 3", "run: fitted in iteration 3", "run: implicit",
    ]  # fmt: skip
    (run / "sera/iteration-02/policy/adapter_model.safetensors").write_bytes(b"damaged")
    rewards, (note,) = find_rewards(find_models([str(run)]))
    assert list(described(rewards)) == ["run: implicit"]
    assert note.startswith("run: only its implicit reward, because")


def test_a_loss_without_reference_has_a_reward_without_one(tmp_path):
    rewards, _ = find_rewards(find_models([str(run_of_adapters(tmp_path, loss="simpo"))]))
    expected = {"run: implicit": {"run": 1.0}}
    expected["run: Eq. 17 in iteration 3"] = {"run@2": 0.7, "run@1": 0.3}
    assert described(rewards) == expected
    assert all(one.per_token for one in rewards)


class Counting:
    """In place of a model: an answer's likelihood is its length; may stop after `left` answers."""

    def __init__(self, left: int = 1_000) -> None:
        self.left, self.asked = left, 0

    def __call__(self) -> Any:
        return self.score

    def score(self, asked):
        for index, (_, answer) in enumerate(asked):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.asked += 1
            yield index, None if answer == "huge" else (-float(len(answer)), len(answer))


def test_scoring_that_stopped_goes_on_in_the_same_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 4)
    model = Model("m", "m", str(make_model(tmp_path / "model")))
    pairs = [Labelled("p", "a" * (1 + n), ("huge" if n == 2 else "b",), "", n) for n in range(5)]
    with Journal(tmp_path / "scores.jsonl") as journal:
        with pytest.raises(KeyboardInterrupt):
            scored(model, pairs, None, journal, Counting(left=6))
        rest = Counting()
        logps, tokens = scored(model, pairs, None, journal, rest)
        assert rest.asked == 6  # the second block again from its beginning, and the third
        again = Counting()
        scored(model, pairs, None, journal, again)
        assert not again.asked
        scored(model, pairs, "{prompt}", journal, again)  # asked otherwise, it is scored anew
        assert again.asked == 10
    expected = [-1, -1, -2, -1, -3, np.nan, -4, -1, -5, -1]
    assert logps == pytest.approx(expected, nan_ok=True)
    assert tokens == pytest.approx(-np.array(expected), nan_ok=True)


HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e {{ 7*7 }}"


def test_figures_page_and_terminal(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("x")
    subsets = ["hep-go", "math-prm", HOSTILE, HOSTILE]
    pairs = [Labelled("p", "c", ("r",), subsets[n % 4], n) for n in range(8)]
    model = Model("<i>", "m", "m")
    ranking = Ranking("<i>: implicit", (model, model), Reward((1.0, -1.0)), per_token=True)
    right = np.array([1, 1, 0, 0, 1, 0, 0, np.nan])
    found = figures(path, pairs, None, [(ranking, right)], ["a note"])
    (one,) = found["rewards"]
    assert (one["accuracy"]["rate"], one["accuracy"]["missing"]) == (pytest.approx(3 / 7), 1)
    assert {name: each["rate"] for name, each in one["subsets"].items()} == {
        "hep-go": 1.0, "math-prm": 0.5, HOSTILE: 0.0,
    }  # fmt: skip
    reasoning = (164 * 1.0 + 984 * 0.5) / (164 + 984)
    assert (one["categories"], one["average"]) == ({"Reasoning": reasoning}, reasoning)
    # One of eight is more than a few.
    assert found["notes"] == ["a note", found["notes"][1]]
    assert "1 of 8 pairs do not fit" in found["notes"][1]
    html, text = page(found, {"<i>": "m"}), shown(found)
    for part in ("42.9%", "57.1%", "a note", "not in the file: Chat, Chat Hard, Safety."):
        assert part in text
    assert not {"\x1b", "\u202e"} & {*text, *html}
    assert html.count("<script>") == 1
    assert "<i>" not in html
    assert "log-probabilities per token" in html


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(sera, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.output


def test_accuracy_is_that_of_the_models_log_ratios(world, tmp_path):
    """Against log-probabilities from transformers' own forward pass, token by token."""
    model, tokenizer = load_model(world.base)
    other, _ = load_model(world.base)
    other.model.norm.weight.data *= 2
    for part in (other, tokenizer):
        part.save_pretrained(tmp_path / "better")
    rows = [{**row, "subset": "ab"[n % 2]} for n, row in enumerate(world.rows)]
    rows.append({"prompt": " ".join("a" * 70), "chosen": "a", "rejected": "b", "subset": "a"})
    write_rows(tmp_path / "pairs.jsonl", rows)

    def logp(policy: Any, row: dict[str, str], side: str) -> float:
        text = f"<s> <|user|> {row['prompt']} <|assistant|>"
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = tokenizer(row[side], add_special_tokens=False)["input_ids"]
        after = [*after, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = policy(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum())

    margins = []
    for row in rows[:-1]:
        ratio = {side: logp(other, row, side) - logp(model, row, side)
                 for side in ("chosen", "rejected")}  # fmt: skip
        margins.append(ratio["chosen"] - ratio["rejected"])
    out = tmp_path / "eval"
    given = ["--rewards", tmp_path / "pairs.jsonl", "--output", out]
    found = json.loads(call(world.base, tmp_path / "better", *given, "--json"))
    assert found == json.loads((out / "results.json").read_text())
    (reward,) = found["rewards"]
    assert reward["name"] == "better: implicit"
    accuracy = reward["accuracy"]
    assert (accuracy["rate"], accuracy["missing"]) == (np.mean(np.array(margins) > 0), 1)
    assert {name: one["number"] for name, one in reward["subsets"].items()} == {"a": 20, "b": 20}
    assert "1 of 41 pairs do not fit" in found["remarks"][0]
    written = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    expected = [float(margin > 0) for margin in margins]
    assert [one["outcome"] for one in written] == [*expected, None]
    assert written[1].items() >= {"row": 1, "subset": "b", "reward": "better: implicit"}.items()
    lines = (out / "scores.jsonl").read_text().splitlines()
    assert "Accuracy of rewards" in call(world.base, tmp_path / "better", *given)
    assert (out / "scores.jsonl").read_text().splitlines() == lines  # scored once


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Give --prompts, which models answer, or --rewards"),
        (["--prompts", "{}/p.jsonl", "--rewards", "{}/p.jsonl"], "Give --prompts, which"),
        (["--rewards", "{}/p.jsonl", "--temperature", "1"], "--temperature is about answers"),
        (["--rewards", "{}/p.jsonl", "--check", "a.py:b"], "--check is about answers"),
        (["--rewards", "{}/none.jsonl"], "none.jsonl' does not exist"),
        (["--rewards", "{}/p.jsonl", "--prompt-format", "x"], "--prompt-format has no {prompt}"),
        (["--rewards", "{}/p.jsonl", "{}/a.json"], "a.json has answers, and no weights"),
        (["--reward", "{}/p.jsonl"], "--rewards"),
    ],
)
def test_wrong_usage_ends_with_2(tmp_path, options, said):
    names = [make_model(tmp_path / name) for name in ("one", "two")]
    write_rows(tmp_path / "p.jsonl", [PAIR])
    Path(tmp_path / "a.json").write_text("[]")
    given = [str(option).replace("{}", str(tmp_path)) for option in options]
    assert said in call(*names, *given, "--output", tmp_path / "eval", code=2)
    assert not (tmp_path / "eval").exists()
