"""Systems and the host's features through the real host: each does what makes it that one."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sera_plugin import SeraPlugin
from sera_plugin.host import loop
from sera_plugin.labeling.judging import Answered
from tests.conftest import adapter, summary, table
from tests.servers import KEY, judge_server
from tests.test_reward_model import alone, save
from tests.test_runs import KINDS, rates, weights
from tests.tiny_models import in_segments

pytestmark = pytest.mark.slow
SIDES = ("chosen", "rejected")
SCORES = ["score_chosen", "score_rejected"]


@pytest.fixture
def run(base_config, train):
    """Train for two iterations with these keys and the block's; every iteration's gate is passed.

    With LoRA, and nothing held out, unless `keys` say otherwise.
    """

    def run(keys=None, **block):
        config = base_config | {"evals_per_epoch": None, "test_datasets": None, "num_epochs": 2}
        config |= {"sera": base_config["sera"] | block, **(adapter() if keys is None else keys)}
        result = train(config)
        for iteration in result.training_pairs:
            gate = summary(result.run, iteration)["step_zero"]
            assert abs(gate["loss"] - gate["expected_loss"]) < 1e-3
            assert gate["nats_per_token"] < 1e-3
        return result

    return run


@pytest.mark.nightly
def test_a_run_without_padding_is_the_same(run, monkeypatch, tmp_path):
    """Its kernel needs a GPU; here each sequence goes through SDPA by itself."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_in_segments", in_segments)
    found = []
    for free in (False, True):

        def as_with_the_kernel(_, cfg, model, free=free):
            cfg.dpo_padding_free = free
            model.config._attn_implementation = "flash_in_segments"

        monkeypatch.setattr(SeraPlugin, "post_model_load", as_with_the_kernel)
        output = {"output_dir": str(tmp_path / f"free-{free}"), "dpo_use_liger_kernel": free}
        # It has no cache, so nothing is sampled.
        result = run(adapter(micro_batch_size=4, **output), bootstrap_ratio=0.0)
        assert result.trainer._objective.padding_free == free
        assert not result.trainer.args.padding_free  # TRL would warn that it pads all the same
        found.append(weights(result.output))
    assert_close(*found, rtol=1e-3, atol=1e-6)


def dataset(result):
    return pq.read_table(result.run / "dataset.parquet").to_pydict()


def test_a_run_against_the_first_policy_is_dpo_over_epochs(run, base_config):
    """Its gate compares with the policy itself."""
    block = {"selection": "all", "bootstrap_ratio": 0.0, "reference": "initial"}
    evaluated = {"test_datasets": base_config["datasets"], "evals_per_epoch": 1}
    result = run(adapter(**evaluated), **block, restart_optimizer=False)
    first, second = (pairs.to_pydict() for pairs in result.training_pairs.values())
    assert len(first["prompt_ids"]) == len(second["prompt_ids"]) == 24
    for side in SIDES:
        expected = table(result.run, 1, "offline")[f"{side}_logp"]
        assert first[f"ref_{side}_logps"] == second[f"ref_{side}_logps"] == expected
    assert table(result.run, 1, "offline")["chosen_logp"] != second["policy_chosen_logps"]
    assert abs(summary(result.run, 2)["step_zero"]["expected_loss"] - np.log(2)) > 0.003
    # For the held-out pairs, those of the training set, to the end.
    held_out = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert held_out[-1] < held_out[0] - 0.003


def test_spin_trains_on_the_datasets_answers_against_samples_alone(run):
    result = run(labeler="spin", selection_ratio=0.0, bootstrap_ratio=1.0, candidates=1)
    answers = set(map(tuple, dataset(result)["chosen_ids"]))
    for iteration, pairs in result.training_pairs.items():
        chosen, rejected = (pairs[f"{side}_ids"].to_pylist() for side in SIDES)
        assert len(chosen) > 12
        assert set(map(tuple, chosen)) <= answers
        candidates = table(result.run, iteration, "candidates")
        given = zip(candidates["token_ids"], candidates["finish_reason"], strict=True)
        assert set(map(tuple, rejected)) <= {tuple(ids) for ids, why in given if why != "dataset"}
        assert not any(table(result.run, iteration, "offline")["selected"])
        assert summary(result.run, iteration)["samples"]["sampled"] == 24


def ranked(result):
    """Iteration 2's candidates, and (prompt, best, worst) of each sampled pair."""
    candidates, pairs = (table(result.run, 2, name) for name in ("candidates", "bootstrapped"))
    places = [pairs[name] for name in ("row", "chosen_candidate", "rejected_candidate")]
    return candidates, np.transpose(places)


@pytest.fixture
def reward_model(tmp_path) -> dict:
    """A small random model that gives answers numbers far enough apart."""
    model = save(tmp_path / "reward", initializer_range=0.5)
    return {"labeler": "reward_model", "reward_model": str(model)}


def test_a_reward_model_ranks_the_samples(run, reward_model, monkeypatch):
    """The policy and its optimizer, which has state by then, wait for it where they must."""
    waited = []

    def waiting(model, device, optimizer, wanted, guest):
        waited.append((model, len(optimizer.state) > 0, guest))
        return nullcontext()

    monkeypatch.setattr(loop, "waiting", waiting)
    result = run(**reward_model)
    assert waited[0] == (result.trainer.model, True, "the reward model")
    prompts, (candidates, pairs) = dataset(result)["prompt_ids"], ranked(result)
    assert {len(one) for one in candidates["logps"]} == {1}

    def text(ids):
        return result.trainer.processing_class.decode(ids, skip_special_tokens=True).strip()

    few = slice(0, None, 17)
    asked = zip(candidates["row"][few], candidates["token_ids"][few], strict=True)
    asked = [Answered(text(prompts[row]), text(answer)) for row, answer in asked]
    expected = alone(reward_model["reward_model"], asked)
    np.testing.assert_allclose(candidates["reward"][few], expected, atol=1e-4)
    rewards = np.reshape(candidates["reward"], (-1, 4))
    for row, best, worst in pairs:
        assert rewards[row][best] == rewards[row].max()
        assert rewards[row][worst] == rewards[row].min()
    assert summary(result.run, 2)["labeler"]["name"] == "reward_model"


def test_a_first_iteration_of_fewer_samples_has_a_schedule_of_its_own_length(
    run, reward_model, tmp_path
):
    """One token a candidate leaves so few distinct ones that some prompts give no pair."""
    block = {"selection_ratio": 0.0, "bootstrap_ratio": 1.0, "max_new_tokens": 1}
    block |= {**reward_model, "temperature": 0.2}
    keys = adapter(num_epochs=1, lr_scheduler="linear", warmup_steps=0, micro_batch_size=1)
    keys |= {"gradient_accumulation_steps": 1}
    keys |= {"saves_per_epoch": None, "save_steps": 1, "save_total_limit": 9}
    result = run(keys, **block)
    steps = result.trainer.state.global_step
    assert 1 < steps == summary(result.run, 1)["pairs"]["trained"] < 24
    assert rates(result) == pytest.approx([1e-3 * (steps - step) / steps for step in range(steps)])
    cut = Path(shutil.copytree(result.output, tmp_path / "cut"))
    for step in range(2, steps + 1):
        shutil.rmtree(cut / f"checkpoint-{step}")
    resume = {"output_dir": str(cut), "auto_resume_from_checkpoints": True}
    assert rates(run(keys | resume, **block)) == rates(result)


def test_an_endpoint_ranks_the_samples_and_is_asked_nothing_twice(run, monkeypatch):
    """It prefers the answer with more words; equally long ones tie."""
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    with judge_server(counted=" ") as server:
        server.plan("fine", ["say", "I cannot say."], ["status", 429, {"Retry-After": "0"}])
        judge = {"base_url": server.url, "model": "some", "api_key_env": "JUDGE_TEST_KEY"}
        result = run(labeler="judge", judge=judge)
        candidates, pairs = ranked(result)
        words = np.reshape(list(map(len, candidates["token_ids"])), (-1, 4))
        assert len(pairs) > 12
        for row, best, worst in pairs:
            assert words[row][best] > words[row][worst]
        assert summary(result.run, 2)["labeler"]["usage"]["asked"]["count"] > 24
        for name in ("judgements.jsonl", "run.json"):
            assert KEY not in (result.run / name).read_text()
        # The last iteration's samples are made and ranked again, as after a crash.
        shutil.rmtree(max(result.output.glob("checkpoint-*"), key=lambda one: one.stat().st_mtime))
        for name in ("candidates", "bootstrapped"):
            (result.run / f"iteration-02/{name}.parquet").unlink()
        server.plan()
        again = run(adapter(auto_resume_from_checkpoints=True), labeler="judge", judge=judge)
        assert server.calls == 0
    assert table(again.run, 2, "candidates") == candidates


def test_answers_that_are_too_long_to_judge_are_in_no_pair(run):
    """The judge's prompt alone is longer than this model's context."""
    result = run(labeler="self_judge")
    found = summary(result.run, 2)
    assert found["labeler"]["too_long"] == found["samples"]["unranked"] == 96
    assert found["labeler"]["replies"] == 0
    assert result.training_pairs[2].num_rows == 17


def test_orpo_trains_and_its_margin_follows_it(run):
    result = run(adapter(learning_rate=3e-3, num_epochs=3), loss="orpo")
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


def test_swapped_labels_are_recorded_and_trained_as_they_are(run, world):
    result = run(score_columns=SCORES, label_noise=0.25)
    data, offline = dataset(result), table(result.run, 2, "offline")
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


def test_accumulated_micro_batches_train_like_whole_batches(run, tmp_path):
    # Plain SGD: a gradient of the wrong size moves the weights by the wrong amount. The last step
    # of iteration 2 has one pair, in a micro-batch of its own.
    results, norms = [], []
    for size, micro_batches in ((8, 1), (4, 2)):
        keys = {"micro_batch_size": size, "gradient_accumulation_steps": micro_batches}
        keys |= {"optimizer": "sgd", "learning_rate": 0.01, "output_dir": str(tmp_path / f"{size}")}
        results.append(run(keys, bootstrap_ratio=0.0))
        norms.append([log["grad_norm"] for log in results[-1].history if "grad_norm" in log])
    first, second = results
    assert first.trainer.state.global_step == second.trainer.state.global_step == len(norms[0]) == 6
    for iteration, pairs in first.training_pairs.items():
        assert pairs["chosen_ids"] == second.training_pairs[iteration]["chosen_ids"]
    np.testing.assert_allclose(*norms, rtol=1e-3)
    assert_close(weights(first.output), weights(second.output), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_and_offloading_change_memory_and_nothing_else(
    run, tmp_path, monkeypatch, kind
):
    import trl.trainer.dpo_trainer as trl_dpo

    entered = []

    class OnCpu(torch.autograd.graph.save_on_cpu):
        """TRL's own needs an accelerator; this one keeps what it is given in host memory too."""

        def __enter__(self):
            entered.append(1)
            return super().__enter__()

    monkeypatch.setattr(trl_dpo, "get_act_offloading_ctx_manager", lambda model: OnCpu())
    plain = run(KINDS[kind] | {"output_dir": str(tmp_path / "plain")}, bootstrap_ratio=0.0)
    assert entered == []
    keys = {"gradient_checkpointing_kwargs": {"use_reentrant": kind == "full"}}
    keys |= {"gradient_checkpointing": True, "activation_offloading": kind == "lora"}
    again = run(KINDS[kind] | keys, bootstrap_ratio=0.0)
    assert again.trainer.model.is_gradient_checkpointing
    assert len(entered) == (6 + 5 if kind == "lora" else 0)  # micro-batches
    assert_close(weights(plain.output), weights(again.output), rtol=0, atol=1e-6)
    assert summary(again.run, 2)["step_zero"]["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_paged_eight_bit_optimizers_train_and_restart(run):
    result = run(adapter(optimizer="paged_adamw_8bit"), bootstrap_ratio=0.0)
    inner = result.trainer.optimizer.optimizer
    assert type(inner).__module__.startswith("bitsandbytes"), type(inner)
    # What the second iteration has done: its optimizer is a new one.
    assert max(int(state["step"]) for state in inner.state.values()) == 3


def test_full_fine_tuning_in_bf16_is_continued(base_config, train):
    """The host keeps norms, embeddings and output layer in float32: only autocast joins the two."""
    base_config |= {"bf16": True, "num_epochs": 1, "auto_resume_from_checkpoints": True}
    model = train(base_config).trainer.model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16, torch.float32}
    # Nothing is left to train, but the model is first compared with the one that began.
    assert train(base_config).trainer.state.global_step == 3
