"""The host's training features under `rl: sera`: each does here what it does elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import adapter, summary
from tests.test_runs import KINDS, assert_same

pytestmark = pytest.mark.slow


def short(base_config, tmp_path, name: str, **keys) -> dict:
    """Two iterations without samples, as what the host changes there is looked at alone."""
    block = {"selection_ratio": 0.7, "bootstrap_ratio": 0.0}
    unset = {"test_datasets": None, "evals_per_epoch": None, "sera": block, "num_epochs": 2}
    return base_config | unset | {"output_dir": str(tmp_path / name), **keys}


def test_accumulated_micro_batches_train_like_whole_batches(base_config, train, tmp_path):
    # Plain SGD: a gradient of the wrong size moves the weights by the wrong amount. The last step
    # of iteration 2 has one pair, in a micro-batch of its own.
    results, norms = [], []
    for size, micro_batches in ((8, 1), (4, 2)):
        keys = {"micro_batch_size": size, "gradient_accumulation_steps": micro_batches}
        keys |= {"optimizer": "sgd", "learning_rate": 0.01}
        results.append(train(short(base_config, tmp_path, f"{size}", **keys)))
        norms.append([log["grad_norm"] for log in results[-1].history if "grad_norm" in log])
    first, second = results
    assert first.trainer.state.global_step == second.trainer.state.global_step == len(norms[0]) == 6
    for iteration, pairs in first.training_pairs.items():
        assert pairs["chosen_ids"] == second.training_pairs[iteration]["chosen_ids"]
    np.testing.assert_allclose(*norms, rtol=1e-3)
    assert_same(first.output, second.output, tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_and_offloading_change_memory_and_nothing_else(
    base_config, train, tmp_path, monkeypatch, kind
):
    import trl.trainer.dpo_trainer as trl_dpo

    entered = []

    class OnCpu(torch.autograd.graph.save_on_cpu):
        """TRL's own needs an accelerator; this one keeps what it is given in host memory too."""

        def __enter__(self):
            entered.append(1)
            return super().__enter__()

    monkeypatch.setattr(trl_dpo, "get_act_offloading_ctx_manager", lambda model: OnCpu())
    plain = train(short(base_config, tmp_path, "plain", **KINDS[kind]))
    assert entered == []
    keys = {"gradient_checkpointing_kwargs": {"use_reentrant": kind == "full"}}
    keys |= {"gradient_checkpointing": True, "activation_offloading": kind == "lora"}
    again = train(short(base_config, tmp_path, "again", **keys, **KINDS[kind]))
    assert again.trainer.model.is_gradient_checkpointing
    assert len(entered) == (6 + 5 if kind == "lora" else 0)  # micro-batches
    assert_same(plain.output, again.output, tolerance=1e-6)
    assert summary(again.run, 2)["step_zero"]["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_paged_eight_bit_optimizers_train_and_restart(base_config, train, tmp_path):
    keys = adapter(optimizer="paged_adamw_8bit")
    inner = train(short(base_config, tmp_path, "bits", **keys)).trainer.optimizer.optimizer
    assert type(inner).__module__.startswith("bitsandbytes"), type(inner)
    # What the second iteration has done: its optimizer is a new one.
    assert max(int(state["step"]) for state in inner.state.values()) == 3


def test_full_fine_tuning_in_bf16_is_continued(base_config, train, monkeypatch):
    """The host keeps norms, embeddings and output layer in float32: only autocast joins the two."""
    # The host takes bf16 for a GPU's alone; torch's autocast knows it on a CPU too.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    base_config |= {"bf16": True, "num_epochs": 1, "auto_resume_from_checkpoints": True}
    model = train(base_config).trainer.model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16, torch.float32}
    # Nothing is left to train, but the model is first compared with the one that began.
    assert train(base_config).trainer.state.global_step == 3
