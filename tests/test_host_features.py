"""The host's training features under `rl: sera`: each does here what it does elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.conftest import adapter, summary


@pytest.fixture
def run(base_config, train, tmp_path):
    """A run of two iterations with some keys changed; returns its weights and what happened."""
    base_config |= {"num_epochs": 2, "test_datasets": None, "evals_per_epoch": None}
    base_config["sera"] = {"selection_ratio": 0.7, "bootstrap_ratio": 0.0}

    def start(name: str, **keys):
        config = base_config | keys | {"output_dir": str(tmp_path / name)}
        result = train(config)
        weights = "adapter_model" if "adapter" in keys else "model"
        return load_file(tmp_path / name / f"{weights}.safetensors"), result

    return start


def assert_same(mine, theirs, tolerance):
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        np.testing.assert_allclose(weight, theirs[name], atol=tolerance, err_msg=name)


def selections(result):
    return {t: pairs["chosen_ids"].to_pylist() for t, pairs in result.training_pairs.items()}


@pytest.mark.slow
def test_accumulated_micro_batches_train_like_whole_batches(run):
    # Plain SGD: a gradient of the wrong size moves the weights by the wrong amount. The last step
    # of iteration 2 has one pair, in a micro-batch of its own.
    keys = {"optimizer": "sgd", "learning_rate": 0.01}
    whole, first = run("whole", micro_batch_size=8, gradient_accumulation_steps=1, **keys)
    parts, second = run("parts", micro_batch_size=4, gradient_accumulation_steps=2, **keys)
    assert first.trainer.state.global_step == second.trainer.state.global_step == 6
    assert selections(first) == selections(second)
    mine, theirs = (
        [log["grad_norm"] for log in result.history if "grad_norm" in log]
        for result in (first, second)
    )
    assert len(mine) == 6
    np.testing.assert_allclose(mine, theirs, rtol=1e-3)
    assert_same(whole, parts, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reentrant"), [({}, True), (adapter(), False)], ids=["full-reentrant", "lora"]
)
def test_gradient_checkpointing_changes_memory_and_nothing_else(run, kind, reentrant):
    plain, _ = run("plain", **kind)
    keys = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    again, result = run("checkpointed", gradient_checkpointing=True, **keys, **kind)
    assert result.trainer.model.is_gradient_checkpointing
    assert_same(plain, again, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers_train_and_restart(run, optimizer):
    _, result = run(optimizer, optimizer=optimizer, **adapter())
    inner = result.trainer.optimizer.optimizer
    assert type(inner).__module__.startswith("bitsandbytes"), type(inner)
    # What the second iteration has done: its optimizer is a new one.
    assert max(int(state["step"]) for state in inner.state.values()) == 3


@pytest.mark.slow
def test_full_fine_tuning_in_bf16_is_continued(base_config, train, monkeypatch):
    """The host keeps norms, embeddings and output layer in float32: only autocast joins the two."""
    # The host takes bf16 for a GPU's alone; torch's autocast knows it on a CPU too.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    base_config |= {"bf16": True, "num_epochs": 1, "auto_resume_from_checkpoints": True}
    model = train(base_config).trainer.model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16, torch.float32}
    # Nothing is left to train, but the model is first compared with the one that began.
    assert train(base_config).trainer.state.global_step == 3


@pytest.mark.slow
def test_activation_offloading_wraps_the_step(run, monkeypatch):
    import trl.trainer.dpo_trainer as trl_dpo

    entered = []

    class OnCpu(torch.autograd.graph.save_on_cpu):
        """TRL's own needs an accelerator; this one keeps what it is given in host memory too."""

        def __enter__(self):
            entered.append(1)
            return super().__enter__()

    plain, _ = run("plain", **adapter())
    monkeypatch.setattr(trl_dpo, "get_act_offloading_ctx_manager", lambda model: OnCpu())
    keys = {"gradient_checkpointing": True, "activation_offloading": True}
    again, result = run("offloaded", **keys, **adapter())
    assert len(entered) == 6 + 5  # micro-batches
    assert_same(plain, again, tolerance=1e-6)
    assert summary(result.run, 2)["step_zero"]["loss"] == pytest.approx(np.log(2), abs=1e-4)
