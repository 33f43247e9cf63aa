"""Each system through the real host for three iterations: what makes it that system is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import adapter, summary, table, write_rows
from tests.judge_server import KEY, judge_server

pytestmark = pytest.mark.slow
SIDES = ("chosen", "rejected")
SCORES = ["score_chosen", "score_rejected"]


@pytest.fixture
def config(base_config):
    return base_config | adapter() | {"evals_per_epoch": None, "test_datasets": None}


def system(config, **block):
    return config | {"sera": {**config["sera"], **block}}


def passed_gates(result):
    for iteration in (1, 2, 3):
        gate = summary(result.run, iteration)["step_zero"]
        assert abs(gate["loss"] - gate["expected_loss"]) < 1e-3
        assert gate["nats_per_token"] < 1e-3


def kept(result, iteration):
    return np.flatnonzero(table(result.run, iteration, "offline")["selected"])


@pytest.mark.parametrize("name", ["reference_logp", "score", "random"])
def test_a_selection_trains_on_the_first_of_its_ranking(config, train, name):
    result = train(system(config, selection=name, bootstrap_ratio=0.0, score_columns=SCORES))
    data = pq.read_table(result.run / "dataset.parquet").to_pydict()
    passed_gates(result)
    for iteration in (2, 3):
        offline = table(result.run, iteration, "offline")
        expected = {
            "reference_logp": np.subtract(offline["chosen_logp"], offline["rejected_logp"]),
            "score": np.subtract(data["score_chosen"], data["score_rejected"]),
            "random": np.random.default_rng((11, iteration)).random(24),
        }[name]
        np.testing.assert_allclose(offline["priority"], expected)
        best = np.sort(np.argsort(-expected, kind="stable")[:17])
        assert kept(result, iteration).tolist() == best.tolist()
        trained = result.training_pairs[iteration].to_pydict()
        assert trained["chosen_ids"] == [data["chosen_ids"][row] for row in best]
        assert trained["ref_chosen_logps"] == [offline["chosen_logp"][row] for row in best]


def test_iterative_dpo_keeps_all_pairs_against_the_last_policy(config, train):
    result = train(system(config, selection="all", bootstrap_ratio=0.0))
    passed_gates(result)
    assert [result.training_pairs[t].num_rows for t in (1, 2, 3)] == [24, 24, 24]
    for iteration in (2, 3):
        trained = result.training_pairs[iteration].to_pydict()
        assert trained["ref_chosen_logps"] == table(result.run, iteration, "offline")["chosen_logp"]
        assert (
            trained["ref_chosen_logps"] != result.training_pairs[1].to_pydict()["ref_chosen_logps"]
        )


def test_dpo_over_epochs_keeps_its_first_reference(config, train):
    """The gate compares with the policy itself; the loss there is no longer ln 2."""
    result = train(
        system(
            config, selection="all", bootstrap_ratio=0.0, reference="initial",
            restart_optimizer=False,
        )
        | {"test_datasets": config["datasets"], "evals_per_epoch": 1}
    )  # fmt: skip
    passed_gates(result)
    first = result.training_pairs[1].to_pydict()
    for iteration in (2, 3):
        trained = result.training_pairs[iteration].to_pydict()
        for side in SIDES:
            assert trained[f"ref_{side}_logps"] == first[f"ref_{side}_logps"]
        assert abs(summary(result.run, iteration)["step_zero"]["expected_loss"] - np.log(2)) > 0.003
    # The held-out pairs are those of the training set, and their reference is theta_0 to the end.
    held_out = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert held_out[-1] < held_out[0] - 0.003


def test_curriculum_goes_from_easy_pairs_to_hard_ones(config, world, tmp_path, train):
    """Six prompts with three pairs each, gaps 0.1, 0.2 and 0.3, in no order."""
    rows = []
    for number, row in enumerate(world.rows[:18]):
        prompt = world.rows[number // 3]["prompt"]
        gap = 0.1 * (1 + (number * 2) % 3)
        rows.append({**row, "prompt": prompt, "score_chosen": 0.5 + gap, "score_rejected": 0.5})
    write_rows(tmp_path / "pairs.jsonl", rows)
    config["datasets"] = [{**config["datasets"][0], "path": str(tmp_path / "pairs.jsonl")}]
    result = train(
        system(config, selection="curriculum", bootstrap_ratio=0.0, score_columns=SCORES)
    )
    passed_gates(result)
    data = pq.read_table(result.run / "dataset.parquet").to_pydict()
    gaps = np.round(np.subtract(data["score_chosen"], data["score_rejected"]), 3)
    for iteration, gap in ((1, 0.3), (2, 0.2), (3, 0.1)):
        rows = kept(result, iteration)
        assert len(rows) == 6
        assert set(gaps[rows]) == {gap}
        assert len({tuple(data["prompt_ids"][row]) for row in rows}) == 6
        assert result.training_pairs[iteration].num_rows == 6


def test_spin_trains_on_the_datasets_answers_against_samples_alone(config, train):
    result = train(
        system(config, labeler="spin", selection_ratio=0.0, bootstrap_ratio=1.0, candidates=1)
    )
    passed_gates(result)
    data = pq.read_table(result.run / "dataset.parquet").to_pydict()
    answers = set(map(tuple, data["chosen_ids"]))
    labelled_worse = set(map(tuple, data["rejected_ids"])) - answers
    for iteration in (1, 2, 3):
        trained = result.training_pairs[iteration].to_pydict()
        assert len(trained["chosen_ids"]) > 12
        assert set(map(tuple, trained["chosen_ids"])) <= answers
        candidates = table(result.run, iteration, "candidates")
        sampled = {
            tuple(ids)
            for ids, why in zip(candidates["token_ids"], candidates["finish_reason"], strict=True)
            if why != "dataset"
        }
        assert set(map(tuple, trained["rejected_ids"])) <= sampled
        assert not any(table(result.run, iteration, "offline")["selected"])
        assert summary(result.run, iteration)["samples"]["sampled"] == 24
    assert labelled_worse


@pytest.fixture
def reward_model(world, tmp_path) -> Path:
    """A small random model that gives an answer a number."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.score.weight.normal_(0, 3)
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def test_a_reward_model_ranks_the_samples(config, train, reward_model):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = train(system(config, labeler="reward_model", reward_model=str(reward_model)))
    passed_gates(result)
    judge = AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    data = pq.read_table(result.run / "dataset.parquet").to_pydict()
    for iteration in (2, 3):
        candidates = table(result.run, iteration, "candidates")
        assert {len(one) for one in candidates["logps"]} == {1}
        for place in range(0, len(candidates["row"]), 17):
            row = candidates["row"][place]
            question = tokenizer.decode(data["prompt_ids"][row], skip_special_tokens=True).strip()
            answer = tokenizer.decode(candidates["token_ids"][place], skip_special_tokens=True)
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer.strip()},
            ]
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            with torch.no_grad():
                expected = judge(input_ids=torch.tensor([ids])).logits.item()
            assert candidates["reward"][place] == pytest.approx(expected, abs=1e-4)
        rewards = np.reshape(candidates["reward"], (-1, 4))
        pairs = table(result.run, iteration, "bootstrapped")
        for row, best, worst in zip(
            pairs["row"], pairs["chosen_candidate"], pairs["rejected_candidate"], strict=True
        ):
            assert rewards[row][best] == rewards[row].max()
            assert rewards[row][worst] == rewards[row].min()
        assert summary(result.run, iteration)["labeler"]["name"] == "reward_model"


def test_a_first_iteration_of_fewer_samples_has_a_schedule_of_its_own_length(
    config, train, reward_model, tmp_path
):
    """One token a candidate leaves so few distinct ones that some prompts give no pair."""
    block = {"selection_ratio": 0.0, "bootstrap_ratio": 1.0, "max_new_tokens": 1}
    block |= {"labeler": "reward_model", "reward_model": str(reward_model), "temperature": 0.2}
    settings = system(config, **block) | {
        "num_epochs": 1, "lr_scheduler": "linear", "warmup_steps": 0,
        "micro_batch_size": 1, "gradient_accumulation_steps": 1,
        "saves_per_epoch": None, "save_steps": 1, "save_total_limit": 9,
    }  # fmt: skip
    result = train(settings)
    steps = result.trainer.state.global_step
    assert 1 < steps == summary(result.run, 1)["pairs"]["trained"] < 24

    def rates(one):
        return [entry["learning_rate"] for entry in one.history if "learning_rate" in entry]

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
        settings = system(config, labeler="judge", judge=judge) | {"num_epochs": 3}
        result = train(settings)
        passed_gates(result)
        for iteration in (2, 3):
            candidates = table(result.run, iteration, "candidates")
            words = np.reshape(list(map(len, candidates["token_ids"])), (-1, 4))
            pairs = table(result.run, iteration, "bootstrapped")
            assert len(pairs["row"]) > 12
            for row, best, worst in zip(
                pairs["row"], pairs["chosen_candidate"], pairs["rejected_candidate"], strict=True
            ):
                assert words[row][best] > words[row][worst]
            took = summary(result.run, iteration)["labeler"]["usage"]
            assert took["asked"]["count"] > 24
        assert KEY not in (result.run / "judgements.jsonl").read_text()
        assert KEY not in (result.run / "run.json").read_text()
        # The last iteration's samples are made and ranked again, as after a crash.
        before = table(result.run, 3, "candidates")
        shutil.rmtree(max(result.output.glob("checkpoint-*"), key=lambda one: one.stat().st_mtime))
        for name in ("candidates", "bootstrapped"):
            (result.run / f"iteration-03/{name}.parquet").unlink()
        server.plan()
        again = train(settings | {"auto_resume_from_checkpoints": True})
        assert server.calls == 0
    assert table(again.run, 3, "candidates") == before


@pytest.mark.nightly
def test_a_policy_that_cannot_judge_itself_adds_no_pair(config, train):
    """This model knows no word of the judge's prompt, and writes no score."""
    result = train(system(config | {"sequence_len": 600}, labeler="self_judge"))
    passed_gates(result)
    for iteration in (2, 3):
        found = summary(result.run, iteration)
        assert found["labeler"]["replies"] == 3 * 96
        assert found["labeler"]["unparsed"] == 3 * 96
        assert found["samples"]["unranked"] == 96
        assert found["pairs"]["bootstrapped_kept"] == 0
        assert result.training_pairs[iteration].num_rows == 17


def test_answers_that_are_too_long_to_judge_are_in_no_pair(config, train):
    """The judge's prompt alone is longer than this model's context."""
    result = train(system(config, labeler="self_judge") | {"num_epochs": 2})
    found = summary(result.run, 2)
    assert found["labeler"]["too_long"] == found["samples"]["unranked"] == 96
    assert found["labeler"]["replies"] == 0
    assert result.training_pairs[2].num_rows == 17


def test_length_control_makes_sampled_pairs_equally_long(config, train):
    result = train(system(config, length_control="auto", offline_length_control="auto"))
    passed_gates(result)
    for iteration in (2, 3):
        alpha = summary(result.run, iteration)["samples"]["length_control"]
        candidates, pairs = (
            table(result.run, iteration, n) for n in ("candidates", "bootstrapped")
        )
        lengths = np.reshape(list(map(len, candidates["token_ids"])), (-1, 4))
        rewards = np.reshape(candidates["reward"], (-1, 4)) - alpha * lengths
        rows = np.array(pairs["row"])
        best, worst = (np.array(pairs[f"{side}_candidate"]) for side in SIDES)
        np.testing.assert_allclose(pairs["margin"], rewards[rows, best] - rewards[rows, worst])
        assert abs((lengths[rows, best] - lengths[rows, worst]).mean()) < 0.5
        offline = table(result.run, iteration, "offline")
        longer = np.subtract(offline["chosen_length"], offline["rejected_length"])
        if np.ptp(longer):
            assert abs(np.corrcoef(offline["priority"], longer)[0, 1]) < 1e-6


@pytest.mark.parametrize("loss", ["kto_pair", "orpo"])
def test_a_loss_trains_and_its_margin_follows_it(config, train, loss):
    result = train(system(config, loss=loss) | {"learning_rate": 3e-3})
    passed_gates(result)
    run = json.loads((result.run / "run.json").read_text())
    assert run["per_token"] == (loss == "orpo")
    assert len(table(result.run, 3, "candidates")["logps"][0]) == (2 if loss == "orpo" else 3)
    gaps = []
    for iteration in (1, 2, 3):
        offline = table(result.run, iteration, "offline")
        chosen, rejected = (
            np.divide(offline[f"{side}_logp"], offline[f"{side}_length"]) for side in SIDES
        )
        gaps.append((chosen - rejected).mean())
    assert gaps == sorted(gaps)


def test_swapped_labels_are_recorded_and_trained_as_they_are(config, train, tmp_path):
    clean = train(system(config, score_columns=SCORES) | {"num_epochs": 1})
    noisy = train(
        system(config, score_columns=SCORES, label_noise=0.25)
        | {"output_dir": str(tmp_path / "noisy")}
    )
    before, after = (
        pq.read_table(one.run / "dataset.parquet").to_pydict() for one in (clean, noisy)
    )
    swapped = np.array(table(noisy.run, 3, "offline")["swapped"])
    assert swapped.sum() == 6
    for row in range(24):
        sides = SIDES[::-1] if swapped[row] else SIDES
        for side, source in zip(SIDES, sides, strict=True):
            assert after[f"{side}_ids"][row] == before[f"{source}_ids"][row]
            assert after[f"score_{side}"][row] == before[f"score_{source}"][row]
    dropped = ~np.array(table(noisy.run, 3, "offline")["selected"])
    found = summary(noisy.run, 3)["label_noise"]
    assert found["recall"] == (swapped & dropped).sum() / 6
    assert found["precision"] == (swapped & dropped).sum() / dropped.sum()
