"""Short runs through the real host: losses, ratios, adapters, resuming, errors."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sera_plugin.host.loop import LOG
from sera_plugin.model.policies import take_snapshot
from tests.conftest import adapter, make_config, summary, table, train_config, write_rows

pytestmark = pytest.mark.slow
KINDS = {"full": {}, "lora": adapter()}
of_lora = pytest.mark.parametrize("whole", ["lora"], indirect=True)
LINEAR = {"num_epochs": 2, "lr_scheduler": "linear", "warmup_steps": 0}


def files(run: Path) -> dict[str, bytes]:
    """The files whose content is ours."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.parquet")}


def weights(output: Path) -> dict[str, torch.Tensor]:
    [path] = output.glob("*model.safetensors")
    return load_file(path)


IN_BF16 = {"full-bf16": {"bf16": True}, "lora-bf16": adapter(bf16=True)}


@pytest.fixture(
    scope="module",
    params=[*KINDS, *(pytest.param(one, marks=pytest.mark.nightly) for one in IN_BF16)],
)
def whole(request, world, tmp_path_factory) -> SimpleNamespace:
    """A run that saves and evaluates at every step, and counts what it loads and forwards."""
    from axolotl.loaders import ModelLoader

    from sera_plugin.host.trainer import SeraTrainer

    directory = tmp_path_factory.mktemp(request.param)
    config = make_config(world.directory, directory) | (KINDS | IN_BF16)[request.param]
    config |= {"save_steps": 1, "saves_per_epoch": None, "save_total_limit": 9}
    config |= {"eval_steps": 1, "evals_per_epoch": None}
    loads, forwards = [], []
    load, step = ModelLoader.load, SeraTrainer.training_step

    def counted_load(self):
        loads.append(self)
        return load(self)

    def counted_step(self, *args, **kwargs):
        forwards.append(0)

        def count(*_):
            forwards[-1] += 1

        handle = self.model.get_output_embeddings().register_forward_hook(count)
        loss = step(self, *args, **kwargs)
        handle.remove()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelLoader, "load", counted_load)
        patch.setattr(SeraTrainer, "training_step", counted_step)
        result = train_config(config, directory)
    return SimpleNamespace(config=config, loads=loads, forwards=forwards, **vars(result))


def test_one_model_is_loaded_and_each_iteration_has_a_reference_of_its_own(whole):
    assert len(whole.loads) == 1
    assert whole.trainer.ref_model is None
    # A step is one forward pass: 24 pairs in micro-batches of 4, three iterations.
    assert whole.forwards == [1] * 18
    evaluated = [table(whole.run, t, "evaluation")["chosen_logp"] for t in (1, 2, 3)]
    assert whole.trainer.eval_dataset["ref_chosen_logps"][:] == evaluated[2]
    assert evaluated[0] != evaluated[1] != evaluated[2]
    assert sum("eval_loss" in entry for entry in whole.history) >= 9


def test_a_resumed_run_equals_an_uninterrupted_one(whole, train, tmp_path):
    for stop in (1, 4):  # in iteration 1 and in iteration 2
        cut = Path(shutil.copytree(whole.output, tmp_path / f"cut-{stop}"))
        for checkpoint in cut.glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) > stop:
                shutil.rmtree(checkpoint)
        # What later iterations left behind came from another continuation and must not be used.
        (cut / "sera/iteration-03/offline.parquet").write_bytes(b"stale")
        resume = {"output_dir": str(cut), "auto_resume_from_checkpoints": True}
        resumed = train(whole.config | resume)
        assert resumed.trainer.state.global_step == whole.trainer.state.global_step
        assert files(resumed.run) == files(whole.run)
        assert_close(weights(resumed.output), weights(whole.output), rtol=0, atol=0)


@of_lora
def test_a_finished_run_that_begins_again_chooses_a_sampler_and_counts_its_own_time(
    whole, train, tmp_path, monkeypatch
):
    """Iterations that come after the checkpoint are discarded with their candidates."""
    from sera_plugin.rundir.store import RunStore
    from sera_plugin.sampling.samplers import Samplers

    output = Path(shutil.copytree(whole.output, tmp_path / "again"))
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    # Iteration 1 is trained anew, and what it took before does not count.
    store = RunStore(output)
    store.write_summary(1, store.summary(1) | {"seconds": {"score_offline": 7.0, "train": 1e6}})
    chosen = []
    choose = Samplers.choose
    monkeypatch.setattr(Samplers, "choose", lambda *args: chosen.append(choose(*args)))
    resume = {"output_dir": str(output), "auto_resume_from_checkpoints": True}
    again = train(whole.config | resume)
    assert len(chosen) == 1
    assert files(again.run) == files(whole.run)
    assert len(files(again.run)) == 11
    seconds = summary(again.run, 1)["seconds"]
    assert seconds["score_offline"] == 7.0
    assert 0 < seconds["train"] < 1e3
    # Without its first checkpoint a run that is killed while it saves again would have none.
    saved = max(again.output.glob("checkpoint-*"))
    before = {path: path.stat().st_mtime_ns for path in saved.iterdir()}
    again.trainer._save_checkpoint(again.trainer.model, None)
    assert {path: path.stat().st_mtime_ns for path in saved.iterdir()} == before


def rates(result) -> list[float]:
    return [entry["learning_rate"] for entry in result.history if "learning_rate" in entry]


@pytest.mark.parametrize(
    ("loss", "keys"), [("ipo", {}), ("simpo", {"simpo_gamma": 0.5, "cpo_alpha": 0.1})]
)
def test_rewards_are_those_of_the_loss_and_epochs_of_unequal_length_have_right_totals(
    base_config, train, loss, keys
):
    """Per token, with a reference and without; test_losses.py has the other losses."""
    base_config["sera"] |= {"loss": loss, "bootstrap_ratio": 2.0}
    result = train(base_config | LINEAR | keys)
    for iteration in (1, 2):
        step_zero = summary(result.run, iteration)["step_zero"]
        assert step_zero["loss"] == pytest.approx(step_zero["expected_loss"], abs=1e-4)
    before, offline = (table(result.run, iteration, "offline") for iteration in (1, 2))
    for side in ("chosen", "rejected"):
        ratio = offline[f"{side}_logp"][0] - (before[f"{side}_logp"][0] if loss == "ipo" else 0)
        assert offline[f"{side}_reward"][0] == pytest.approx(ratio / offline[f"{side}_length"][0])
    trained = result.training_pairs[2].num_rows
    assert summary(result.run, 2)["pairs"]["trained"] == trained > 24
    # Micro-batches of 4, two a step; N = 24 gives 3 steps.
    steps = 3 + math.ceil(math.ceil(trained / 4) / 2)
    assert result.trainer.state.global_step == result.trainer.state.max_steps == steps
    # Each iteration starts at the peak and decays to the end of its own steps.
    assert rates(result)[0] == rates(result)[3] == pytest.approx(1e-3)
    assert rates(result)[-1] == pytest.approx(1e-3 / (steps - 3))
    assert sum("eval_loss" in entry for entry in result.history) >= 1


def test_a_loss_of_the_hosts_and_one_schedule_over_all_iterations(base_config, train):
    base_config["sera"] |= {"restart_optimizer": False, "bootstrap_ratio": 0.0}
    result = train(base_config | LINEAR | {"dpo_loss_type": ["apo_zero"]})
    assert summary(result.run, 2)["step_zero"]["nats_per_token"] < 1e-4
    # At zero margin: 1 - sigmoid(0) + sigmoid(0) = 1.
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[0] == pytest.approx(1.0, abs=1e-4)
    # 3 steps on 24 pairs, then 3 on 17.
    assert rates(result) == pytest.approx([1e-3 * (6 - step) / 6 for step in range(6)])


def test_fewer_sampled_pairs_than_asked_for_are_used_and_raise_alarms(
    base_config, train, monkeypatch
):
    warnings: list[str] = []
    monkeypatch.setattr(LOG, "warning", lambda text, *args: warnings.append(text % args))
    # One token a candidate: all are cut, and so few are distinct that not every prompt gives two
    # pairs.
    base_config["sera"] |= {"bootstrap_ratio": 2.0, "max_new_tokens": 1, "temperature": 0.2}
    result = train(base_config | {"num_epochs": 2})
    pairs = summary(result.run, 2)["pairs"]
    assert pairs["bootstrapped_kept"] < pairs["bootstrapped_wanted"] == 48
    assert result.trainer.state.global_step == result.trainer.state.max_steps
    assert pairs["trained"] == result.training_pairs[2].num_rows
    alarms = {alarm["name"]: alarm for alarm in summary(result.run, 2)["alarms"]}
    assert {"unfinished", "duplicates", "without_pair"} <= alarms.keys()
    assert summary(result.run, 1)["alarms"] == []
    said = [text for text in warnings if text.startswith("SeRA alarm")]
    assert said == [f"SeRA alarm {name}: {alarm['text']}" for name, alarm in alarms.items()]
    judged = {name.removeprefix("sera/alarm/"): value for entry in result.history
              for name, value in entry.items() if name.startswith("sera/alarm/")}  # fmt: skip
    assert {name for name, value in judged.items() if value} == alarms.keys()
    assert judged["sampled_length"] == 0.0
    assert "length_growth" not in judged  # iteration 2 samples first


def test_duplicate_pairs_train_and_ratios_that_come_to_no_pair_are_told_before(
    base_config, train, world, tmp_path
):
    base_config["datasets"][0]["path"] = str(tmp_path / "rows.jsonl")
    base_config |= {"test_datasets": None, "evals_per_epoch": None, "num_epochs": 2}
    write_rows(tmp_path / "rows.jsonl", world.rows[:1])
    words = r"iteration 2 would train on nothing: of the 1 usable pairs selection_ratio: 0\.4 keeps"
    with pytest.raises(ValueError, match=words):
        train(base_config | {"sera": {"selection_ratio": 0.4}})
    assert not (Path(base_config["output_dir"]) / "sera").exists()
    write_rows(tmp_path / "rows.jsonl", world.rows[:1] * 2)
    assert train(base_config).training_pairs[1].num_rows == 2


@of_lora
def test_a_continued_adapter_starts_where_it_ended(whole, base_config, train):
    second = train(base_config | adapter(lora_model_dir=str(whole.output), num_epochs=2))
    kept = weights(second.run / "iteration-01/policy")
    assert_close(kept, weights(whole.output), rtol=0, atol=0)
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
    assert any("modules_to_save" in name for name in trained)
    assert_close(loaded, trained, rtol=0, atol=0)


def test_old_weights_are_removed_and_trackers_get_sera_metrics(base_config, train):
    base_config |= {"num_epochs": 5, "save_total_limit": 1}
    result = train(base_config)
    kept = sorted(path.parent.name for path in result.run.glob("*/policy"))
    # Iteration 1 is a pointer to the base model. A run cut off in iteration 5 would compare
    # theta_4, theta_3 and theta_2; nothing needs theta_1.
    assert kept == [f"iteration-0{number}" for number in (1, 3, 4, 5)]
    expected = """
        rewards/margins eval_rewards/accuracies sera/pairs/kept sera/pairs/dropped
        sera/pairs/bootstrapped_found sera/pairs/bootstrapped_kept sera/lengths/sampled
        sera/margins/offline/0.5 sera/samples/duplicates sera/samples/ties sera/samples/unfinished
        sera/drift/chosen sera/seconds/sample sera/seconds/train
    """
    assert set(expected.split()) <= {name for entry in result.history for name in entry}
