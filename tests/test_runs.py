"""Short runs through the real host: every loss, every ratio, adapters, resuming, errors."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sera_plugin.host.loop import LOG
from sera_plugin.model.policies import take_snapshot
from tests.conftest import adapter, summary, table, write_rows

pytestmark = pytest.mark.slow


def files(run: Path) -> dict[str, str]:
    """Content hashes of the files whose content is ours."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*.parquet")
    }


@pytest.mark.parametrize(
    ("keys", "block"),
    [({}, {"loss": "ipo"}), ({"simpo_gamma": 0.5, "cpo_alpha": 0.1}, {"loss": "simpo"})],
    ids=["ipo", "simpo-gamma-nll"],
)
def test_rewards_of_a_run_are_those_of_its_loss(base_config, train, keys, block):
    """Per token, with a reference and without; test_losses.py has the other losses."""
    base_config["sera"] |= block
    result = train(base_config | keys | {"num_epochs": 2})
    for iteration in (1, 2):
        step_zero = summary(result.run, iteration)["step_zero"]
        assert step_zero["loss"] == pytest.approx(step_zero["expected_loss"], abs=1e-4)
    offline = table(result.run, 2, "offline")
    before = table(result.run, 1, "offline")
    for side in ("chosen", "rejected"):
        free = block["loss"] == "simpo"
        ratio = offline[f"{side}_logp"][0] - (0 if free else before[f"{side}_logp"][0])
        assert offline[f"{side}_reward"][0] == pytest.approx(ratio / offline[f"{side}_length"][0])


def test_the_hosts_own_losses_train_through_dpo_loss_type(base_config, train):
    base_config |= {"dpo_loss_type": ["apo_zero"], "num_epochs": 2}
    result = train(base_config)
    assert summary(result.run, 2)["step_zero"]["nats_per_token"] < 1e-4
    # At zero margin: 1 - sigmoid(0) + sigmoid(0) = 1.
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("selection", "bootstrap", "pairs"), [(0.7, 2.0, 65), (0.0, 1.0, 24)])
def test_epochs_of_unequal_length_have_right_totals(
    base_config, train, selection, bootstrap, pairs
):
    base_config["sera"] |= {"selection_ratio": selection, "bootstrap_ratio": bootstrap}
    base_config |= {"num_epochs": 2, "lr_scheduler": "linear", "warmup_steps": 0}
    result = train(base_config)
    trained = result.training_pairs[2].num_rows
    assert summary(result.run, 2)["pairs"]["trained"] == trained
    if bootstrap <= 1.0:
        assert trained == pairs
    # Micro-batches of 4, two a step; N = 24 gives 3 steps.
    steps = 3 + math.ceil(math.ceil(trained / 4) / 2)
    assert result.trainer.state.global_step == result.trainer.state.max_steps == steps
    rates = [entry["learning_rate"] for entry in result.history if "learning_rate" in entry]
    # Each iteration starts at the peak and decays to the end of its own steps.
    assert rates[0] == rates[3] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 / (steps - 3))
    assert sum("eval_loss" in entry for entry in result.history) >= 1


def test_one_schedule_runs_over_all_iterations_if_asked(base_config, train):
    base_config["sera"] |= {"restart_optimizer": False, "bootstrap_ratio": 0.0}
    base_config |= {"num_epochs": 2, "lr_scheduler": "linear", "warmup_steps": 0}
    result = train(base_config)
    rates = [entry["learning_rate"] for entry in result.history if "learning_rate" in entry]
    assert rates == sorted(rates, reverse=True)
    # 3 steps on 24 pairs, then 3 on 17.
    assert rates[3] == pytest.approx(1e-3 * 3 / 6)


def test_fewer_sampled_pairs_than_asked_for_are_used_and_said(base_config, train, world):
    # One token a candidate leaves so few distinct ones that not every prompt gives two pairs.
    base_config["sera"] |= {"bootstrap_ratio": 2.0, "max_new_tokens": 1, "temperature": 0.2}
    result = train(base_config | {"num_epochs": 2})
    pairs = summary(result.run, 2)["pairs"]
    assert pairs["bootstrapped_kept"] < pairs["bootstrapped_wanted"] == 48
    assert result.trainer.state.global_step == result.trainer.state.max_steps
    assert pairs["trained"] == result.training_pairs[2].num_rows


def test_the_same_seed_gives_the_same_run_directory(base_config, train, tmp_path):
    one = train(base_config | adapter())
    other = train(base_config | adapter() | {"output_dir": str(tmp_path / "again")})
    assert files(one.run) == files(other.run)
    assert len(files(one.run)) == 11
    third = train(base_config | adapter() | {"output_dir": str(tmp_path / "seed"), "seed": 12})
    assert files(one.run) != files(third.run)


def test_a_continued_adapter_starts_where_it_ended(base_config, train, tmp_path, world):
    first = train(base_config | adapter() | {"num_epochs": 1})
    trained = load_file(first.output / "adapter_model.safetensors")
    keys = {"lora_model_dir": str(first.output), "output_dir": str(tmp_path / "second")}
    second = train(base_config | adapter(**keys) | {"num_epochs": 2})
    start = load_file(second.run / "iteration-01/policy/adapter_model.safetensors")
    assert start.keys() == trained.keys()
    assert all(torch.equal(start[name], trained[name]) for name in trained)
    assert list(second.model.peft_config) == ["default"]
    assert summary(second.run, 2)["step_zero"]["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_an_adapter_with_tied_embeddings_is_saved_and_nothing_else(base_config, train, world):
    """The base model inside the adapter, whose tied weights have two names, cannot be saved."""
    keys = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
    result = train(base_config | adapter(**keys) | {"num_epochs": 1})
    assert result.model is result.trainer.model
    assert not list(result.output.glob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(world.base)
    assert base.config.tie_word_embeddings
    loaded = take_snapshot(PeftModel.from_pretrained(base, result.output, is_trainable=True))
    trained = take_snapshot(result.model)
    assert len([name for name in trained if "modules_to_save" in name]) > 0
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)


@pytest.mark.parametrize("keys", [{}, adapter()], ids=["full", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(base_config, train, tmp_path, keys):
    base_config |= keys | {"save_steps": 1, "saves_per_epoch": None, "save_total_limit": 9}
    whole = train(base_config)
    name = "adapter_model.safetensors" if keys else "model.safetensors"
    theirs = load_file(whole.output / name)
    for stop in (1, 4):  # in iteration 1 and in iteration 2
        cut = Path(shutil.copytree(whole.output, tmp_path / f"cut-{stop}"))
        for checkpoint in cut.glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) > stop:
                shutil.rmtree(checkpoint)
        # What later iterations left behind came from another continuation and must not be used.
        (cut / "sera/iteration-03/offline.parquet").write_bytes(b"stale")
        resume = {"output_dir": str(cut), "auto_resume_from_checkpoints": True}
        resumed = train(base_config | resume)
        assert resumed.trainer.state.global_step == whole.trainer.state.global_step
        assert files(resumed.run) == files(whole.run)
        mine = load_file(resumed.output / name)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_run_that_stopped_before_any_checkpoint_starts_over_with_what_is_there(
    base_config, train, monkeypatch
):
    from sera_plugin.model.budget import TokenBudget
    from sera_plugin.sampling.transformers import TransformersSampler

    base_config |= {"save_strategy": "no", "saves_per_epoch": None}
    sample = TransformersSampler.sample

    def interrupted(self, *args, **kwargs):
        self.budget = TokenBudget(200)
        for number, chunk in enumerate(sample(self, *args, **kwargs)):
            if number == 2:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(TransformersSampler, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(base_config)
    monkeypatch.undo()
    run = Path(base_config["output_dir"]) / "sera"
    assert len(list((run / "iteration-02/samples").iterdir())) == 2
    result = train(base_config | {"auto_resume_from_checkpoints": True})
    assert result.trainer.state.global_step == 9
    assert not (run / "iteration-02/samples").exists()


def test_a_finished_run_that_begins_again_chooses_a_sampler_and_counts_its_own_time(
    base_config, train, monkeypatch
):
    """Iterations that come after the checkpoint are discarded with their candidates."""
    from sera_plugin.rundir.store import RunStore
    from sera_plugin.sampling.samplers import Samplers

    base_config |= adapter() | {"num_epochs": 2}
    first = train(base_config)
    for checkpoint in first.output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    # Iteration 1 is trained anew, and what it took before does not count.
    store = RunStore(first.output)
    store.write_summary(1, store.summary(1) | {"seconds": {"score_offline": 7.0, "train": 1e6}})
    chosen = []
    choose = Samplers.choose
    monkeypatch.setattr(Samplers, "choose", lambda *args: chosen.append(choose(*args)))
    again = train(base_config | {"auto_resume_from_checkpoints": True})
    assert len(chosen) == 1
    assert files(again.run) == files(first.run)
    seconds = summary(again.run, 1)["seconds"]
    assert seconds["score_offline"] == 7.0
    assert 0 < seconds["train"] < 1e3


@pytest.mark.parametrize("keys", [{}, adapter()], ids=["full", "lora"])
def test_one_model_is_loaded_and_a_training_step_is_one_forward_pass(
    base_config, train, monkeypatch, keys
):
    from axolotl.loaders import ModelLoader

    from sera_plugin.host.trainer import SeraTrainer

    loads, forwards = [], []
    load, step = ModelLoader.load, SeraTrainer.training_step

    def counted_load(self):
        loads.append(self)
        return load(self)

    def counted_step(self, *args, **kwargs):
        calls = []
        head = self.model.get_output_embeddings()
        handle = head.register_forward_hook(lambda *_: calls.append(1))
        loss = step(self, *args, **kwargs)
        handle.remove()
        forwards.append(len(calls))
        return loss

    monkeypatch.setattr(ModelLoader, "load", counted_load)
    monkeypatch.setattr(SeraTrainer, "training_step", counted_step)
    result = train(base_config | keys)
    assert len(loads) == 1
    assert result.trainer.ref_model is None
    # 24 pairs in micro-batches of 4, three iterations.
    assert forwards == [1] * 18


def test_old_weights_are_removed_and_trackers_get_sera_metrics(base_config, train):
    base_config |= {"num_epochs": 5, "save_total_limit": 1}
    result = train(base_config)
    kept = sorted(path.parent.name for path in result.run.glob("*/policy"))
    # Iteration 1 is a pointer to the base model. A run cut off in iteration 5 would compare
    # theta_4, theta_3 and theta_2; nothing needs theta_1.
    assert kept == [f"iteration-0{number}" for number in (1, 3, 4, 5)]
    names = {name for entry in result.history for name in entry}
    for name in (
        "sera/pairs/kept",
        "sera/pairs/dropped",
        "sera/pairs/bootstrapped_found",
        "sera/pairs/bootstrapped_kept",
        "sera/margins/offline/0.5",
        "sera/samples/duplicates",
        "sera/samples/ties",
        "sera/samples/unfinished",
        "sera/lengths/sampled",
        "sera/drift/chosen",
        "sera/seconds/sample",
        "sera/seconds/train",
        "rewards/margins",
        "eval_rewards/accuracies",
    ):
        assert name in names


def test_a_raised_alarm_is_in_the_log_the_summary_and_the_trackers(base_config, train, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(LOG, "warning", lambda text, *args: warnings.append(text % args))
    # One token a candidate: all are cut, and most of them equal.
    base_config["sera"] |= {"max_new_tokens": 1, "temperature": 0.2}
    result = train(base_config | {"num_epochs": 2})
    alarms = {alarm["name"]: alarm for alarm in summary(result.run, 2)["alarms"]}
    assert {"unfinished", "duplicates", "without_pair"} <= alarms.keys()
    assert summary(result.run, 1)["alarms"] == []
    said = [text for text in warnings if text.startswith("SeRA alarm")]
    assert said == [f"SeRA alarm {name}: {alarm['text']}" for name, alarm in alarms.items()]
    logged = {name: value for entry in result.history for name, value in entry.items()}
    judged = {name: value for name, value in logged.items() if name.startswith("sera/alarm/")}
    assert {name.split("/")[-1] for name, value in judged.items() if value} == alarms.keys()
    assert judged["sera/alarm/sampled_length"] == 0.0
    assert "sera/alarm/length_growth" not in judged  # iteration 2 samples first


def test_evaluation_refers_to_the_iterations_own_reference(base_config, train):
    base_config |= {"num_epochs": 2, "eval_steps": 1, "evals_per_epoch": None}
    result = train(base_config)
    evaluated = table(result.run, 2, "evaluation")
    assert result.trainer.eval_dataset["ref_chosen_logps"][:] == evaluated["chosen_logp"]
    before = table(result.run, 1, "evaluation")
    assert before["chosen_logp"] != evaluated["chosen_logp"]


def test_one_pair_and_duplicate_pairs_train(base_config, train, world, tmp_path):
    write_rows(tmp_path / "rows.jsonl", world.rows[:1] * 2)
    base_config["datasets"][0]["path"] = str(tmp_path / "rows.jsonl")
    result = train(base_config | {"num_epochs": 2, "test_datasets": None, "evals_per_epoch": None})
    assert result.training_pairs[1].num_rows == 2


def test_ratios_that_come_to_no_pair_are_told_before_training(base_config, train, world, tmp_path):
    write_rows(tmp_path / "one.jsonl", world.rows[:1])
    base_config["datasets"] = [{**base_config["datasets"][0], "path": str(tmp_path / "one.jsonl")}]
    base_config["sera"] |= {"selection_ratio": 0.4}
    words = r"iteration 2 would train on nothing: of the 1 usable pairs selection_ratio: 0\.4 keeps"
    with pytest.raises(ValueError, match=words):
        train(base_config)
    assert not (Path(base_config["output_dir"]) / "sera").exists()


def test_a_step_that_is_saved_again_keeps_its_whole_checkpoint(base_config, train):
    """Without its first one a run that is killed while it saves again would have none."""
    result = train(base_config | {"num_epochs": 1})
    [saved] = result.output.glob("checkpoint-*")
    before = {path: path.stat().st_mtime_ns for path in saved.iterdir()}
    result.trainer._save_checkpoint(result.trainer.model, None)
    assert {path: path.stat().st_mtime_ns for path in saved.iterdir()} == before
