"""Systems through the real host: what makes each of them that system is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sera_plugin.labeling.judging import Answered
from tests.conftest import adapter, summary, table
from tests.judge_server import KEY, judge_server
from tests.test_reward_model import alone, save
from tests.test_runs import rates

pytestmark = pytest.mark.slow
SIDES = ("chosen", "rejected")
SCORES = ["score_chosen", "score_rejected"]


@pytest.fixture
def config(base_config):
    unset = {"evals_per_epoch": None, "test_datasets": None}
    return base_config | adapter() | unset | {"num_epochs": 2}


def system(config, **block):
    return config | {"sera": {**config["sera"], **block}}


def passed_gates(result):
    for iteration in result.training_pairs:
        gate = summary(result.run, iteration)["step_zero"]
        assert abs(gate["loss"] - gate["expected_loss"]) < 1e-3
        assert gate["nats_per_token"] < 1e-3


def trained(result):
    """What each iteration trained on, as columns."""
    return {t: pairs.to_pydict() for t, pairs in result.training_pairs.items()}


def test_a_run_against_the_first_policy_is_dpo_over_epochs(config, train):
    """Its gate compares with the policy itself."""
    block = {"selection": "all", "bootstrap_ratio": 0.0, "reference": "initial"}
    evaluated = {"test_datasets": config["datasets"], "evals_per_epoch": 1}
    result = train(system(config, **block, restart_optimizer=False) | evaluated)
    passed_gates(result)
    first, second = trained(result).values()
    assert len(first["prompt_ids"]) == len(second["prompt_ids"]) == 24
    for side in SIDES:
        expected = table(result.run, 1, "offline")[f"{side}_logp"]
        assert first[f"ref_{side}_logps"] == second[f"ref_{side}_logps"] == expected
    assert table(result.run, 1, "offline")["chosen_logp"] != second["policy_chosen_logps"]
    assert abs(summary(result.run, 2)["step_zero"]["expected_loss"] - np.log(2)) > 0.003
    # For the held-out pairs, those of the training set, to the end.
    held_out = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert held_out[-1] < held_out[0] - 0.003


def test_spin_trains_on_the_datasets_answers_against_samples_alone(config, train):
    result = train(
        system(config, labeler="spin", selection_ratio=0.0, bootstrap_ratio=1.0, candidates=1)
    )
    passed_gates(result)
    data = pq.read_table(result.run / "dataset.parquet").to_pydict()
    answers = set(map(tuple, data["chosen_ids"]))
    for iteration, pairs in trained(result).items():
        assert len(pairs["chosen_ids"]) > 12
        assert set(map(tuple, pairs["chosen_ids"])) <= answers
        candidates = table(result.run, iteration, "candidates")
        sampled = {
            tuple(ids)
            for ids, why in zip(candidates["token_ids"], candidates["finish_reason"], strict=True)
            if why != "dataset"
        }
        assert set(map(tuple, pairs["rejected_ids"])) <= sampled
        assert not any(table(result.run, iteration, "offline")["selected"])
        assert summary(result.run, iteration)["samples"]["sampled"] == 24


def ranked(result, iteration):
    """The candidates by prompt, and (prompt, best, worst) of each sampled pair."""
    candidates, pairs = (table(result.run, iteration, n) for n in ("candidates", "bootstrapped"))
    places = [pairs[name] for name in ("row", "chosen_candidate", "rejected_candidate")]
    return candidates, np.transpose(places)


@pytest.fixture
def reward_model(tmp_path) -> Path:
    """A small random model that gives answers numbers far enough apart."""
    return save(tmp_path / "reward", initializer_range=0.5)


def test_a_reward_model_ranks_the_samples(config, train, reward_model):
    result = train(system(config, labeler="reward_model", reward_model=str(reward_model)))
    passed_gates(result)
    data = pq.read_table(result.run / "dataset.parquet").to_pydict()
    candidates, pairs = ranked(result, 2)
    assert {len(one) for one in candidates["logps"]} == {1}

    def text(ids):
        return result.trainer.processing_class.decode(ids, skip_special_tokens=True).strip()

    few = slice(0, None, 17)
    asked = zip(candidates["row"][few], candidates["token_ids"][few], strict=True)
    asked = [Answered(text(data["prompt_ids"][row]), text(answer)) for row, answer in asked]
    expected = alone(reward_model, asked)
    np.testing.assert_allclose(candidates["reward"][few], expected, atol=1e-4)
    rewards = np.reshape(candidates["reward"], (-1, 4))
    for row, best, worst in pairs:
        assert rewards[row][best] == rewards[row].max()
        assert rewards[row][worst] == rewards[row].min()
    assert summary(result.run, 2)["labeler"]["name"] == "reward_model"


def test_a_first_iteration_of_fewer_samples_has_a_schedule_of_its_own_length(
    config, train, reward_model, tmp_path
):
    """One token a candidate leaves so few distinct ones that some prompts give no pair."""
    block = {"selection_ratio": 0.0, "bootstrap_ratio": 1.0, "max_new_tokens": 1}
    block |= {"labeler": "reward_model", "reward_model": str(reward_model), "temperature": 0.2}
    settings = system(config, **block) | {"num_epochs": 1, "lr_scheduler": "linear"}
    settings |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0}
    settings |= {"saves_per_epoch": None, "save_steps": 1, "save_total_limit": 9}
    result = train(settings)
    steps = result.trainer.state.global_step
    assert 1 < steps == summary(result.run, 1)["pairs"]["trained"] < 24
    assert rates(result) == pytest.approx([1e-3 * (steps - step) / steps for step in range(steps)])
    cut = Path(shutil.copytree(result.output, tmp_path / "cut"))
    for step in range(2, steps + 1):
        shutil.rmtree(cut / f"checkpoint-{step}")
    resume = {"output_dir": str(cut), "auto_resume_from_checkpoints": True}
    assert rates(train(settings | resume)) == rates(result)


def test_an_endpoint_ranks_the_samples_and_is_asked_nothing_twice(config, train, monkeypatch):
    """It prefers the answer with more words; equally long ones tie."""
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    with judge_server(counted=" ") as server:
        server.plan("fine", ["say", "I cannot say."], ["status", 429, {"Retry-After": "0"}])
        judge = {"base_url": server.url, "model": "some", "api_key_env": "JUDGE_TEST_KEY"}
        settings = system(config, labeler="judge", judge=judge)
        result = train(settings)
        passed_gates(result)
        candidates, pairs = ranked(result, 2)
        words = np.reshape(list(map(len, candidates["token_ids"])), (-1, 4))
        assert len(pairs) > 12
        for row, best, worst in pairs:
            assert words[row][best] > words[row][worst]
        assert summary(result.run, 2)["labeler"]["usage"]["asked"]["count"] > 24
        assert KEY not in (result.run / "judgements.jsonl").read_text()
        assert KEY not in (result.run / "run.json").read_text()
        # The last iteration's samples are made and ranked again, as after a crash.
        shutil.rmtree(max(result.output.glob("checkpoint-*"), key=lambda one: one.stat().st_mtime))
        for name in ("candidates", "bootstrapped"):
            (result.run / f"iteration-02/{name}.parquet").unlink()
        server.plan()
        again = train(settings | {"auto_resume_from_checkpoints": True})
        assert server.calls == 0
    assert table(again.run, 2, "candidates") == candidates


def test_answers_that_are_too_long_to_judge_are_in_no_pair(config, train):
    """The judge's prompt alone is longer than this model's context."""
    result = train(system(config, labeler="self_judge"))
    found = summary(result.run, 2)
    assert found["labeler"]["too_long"] == found["samples"]["unranked"] == 96
    assert found["labeler"]["replies"] == 0
    assert result.training_pairs[2].num_rows == 17


def test_orpo_trains_and_its_margin_follows_it(config, train):
    result = train(system(config, loss="orpo") | {"learning_rate": 3e-3, "num_epochs": 3})
    passed_gates(result)
    assert json.loads((result.run / "run.json").read_text())["per_token"]
    assert len(table(result.run, 3, "candidates")["logps"][0]) == 2
    gaps = []
    for iteration in (1, 2, 3):
        offline = table(result.run, iteration, "offline")
        chosen, rejected = (
            np.divide(offline[f"{side}_logp"], offline[f"{side}_length"]) for side in SIDES
        )
        gaps.append((chosen - rejected).mean())
    assert gaps == sorted(gaps)


def test_swapped_labels_are_recorded_and_trained_as_they_are(config, train, world):
    result = train(system(config, score_columns=SCORES, label_noise=0.25))
    data = pq.read_table(result.run / "dataset.parquet").to_pydict()
    offline = table(result.run, 2, "offline")
    swapped, dropped = np.array(offline["swapped"]), ~np.array(offline["selected"])
    assert swapped.sum() == 6
    names = [*SIDES, *SCORES]
    given = {tuple(row[name] for name in names) for row in world.rows}
    decode = result.trainer.processing_class.decode
    for row in range(24):
        sides = SIDES[::-1] if swapped[row] else SIDES
        texts = [decode(data[f"{side}_ids"][row], skip_special_tokens=True) for side in sides]
        scores = [data[f"score_{side}"][row] for side in sides]
        assert (*map(str.strip, texts), *scores) in given
    found = summary(result.run, 2)["label_noise"]
    assert found["recall"] == (swapped & dropped).sum() / 6
    assert found["precision"] == (swapped & dropped).sum() / dropped.sum()
