"""DeepSpeed's ZeRO on two gloo ranks; SERA_RANKS_PYTHON names a Python that has deepspeed too."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.given import deepspeed_config
from sera_plugin.host.refused import refuse
from sera_plugin.rundir.format import read_json
from tests.conftest import summary, table
from tests.two_ranks import (
    assert_alike,
    assert_fitted_alike,
    assert_theta_1_is_kept,
    assert_weights_are_close,
    launch,
    of_kind,
)

PYTHON = os.environ.get("SERA_RANKS_PYTHON")
with_deepspeed = pytest.mark.skipif(
    not PYTHON, reason="SERA_RANKS_PYTHON names no Python that has deepspeed"
)


def zero(stage: int, **keys) -> dict:
    """The keys that a YAML has for it."""
    inner = {"stage": stage, "overlap_comm": False, **keys}
    if stage == 3:
        # Some weights stay whole between passes, others do not.
        inner |= {"stage3_gather_16bit_weights_on_model_save": True}
        inner |= {"stage3_param_persistence_threshold": 200}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    block = dict.fromkeys((*auto, "gradient_clipping"), "auto")
    block |= {name: {"enabled": "auto"} for name in ("bf16", "fp16")}
    return {"deepspeed": block | {"zero_optimization": inner}}


def train_zero(config: dict, directory: Path) -> None:
    result = launch(config, directory, module="tests.host_on_cpu", python=str(PYTHON))
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.nightly
@with_deepspeed
@pytest.mark.parametrize(
    ("stage", "kind", "offload"),
    [
        (1, "full", ()),
        (2, "fitted", ("offload_optimizer",)),
        (2, "lora", ()),
        (3, "full", ()),
        (3, "lora", ("offload_optimizer", "offload_param")),
    ],
)
def test_zero_gives_what_one_process_gives(base_config, train, tmp_path, stage, kind, offload):
    config = of_kind(base_config, kind)
    config["adam_epsilon"] = 1e-6  # see test_sharded_weights_give_what_one_process_gives
    two = config | zero(stage, **{name: {"device": "cpu"} for name in offload})
    two |= {"output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 1}
    two |= {"saves_per_epoch": 3, "auto_resume_from_checkpoints": True}
    train_zero(two, tmp_path)
    one, other = train(config).run, tmp_path / "two/sera"
    assert_alike(one, other, 3)
    assert read_json(other / "run.json")["config"]["deepspeed"] == two["deepspeed"]
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    policy, final = other / f"iteration-03/policy/{weights}", other.parent / weights
    # Where a gradient is hardly more than epsilon, the order of a sum shows in Adam's step of 1e-2.
    # Offloaded weights are stepped by DeepSpeed's own Adam. Moments that are kept make 5e-3.
    atol = 1e-3 if offload else 5e-4
    assert_weights_are_close(one / f"iteration-03/policy/{weights}", policy, atol)
    assert_weights_are_close(one.parent / weights, final, atol)
    if kind == "fitted":
        assert_fitted_alike(summary(one, 3), summary(other, 3))
    else:
        assert_theta_1_is_kept(other, weights)

    # Cut off after one step of iteration 3, with theta_2 scored anew and theta_1 read back.
    whole = shutil.copy(final, tmp_path / "whole.safetensors")
    before = table(other, 3, "candidates")
    for step in (8, 9):
        shutil.rmtree(other.parent / f"checkpoint-{step}")
    for name in ("offline", "candidates"):
        (other / f"iteration-03/{name}.parquet").unlink()
    train_zero(two, tmp_path)
    assert table(other, 3, "candidates")["token_ids"] == before["token_ids"]
    assert_weights_are_close(Path(whole), final, atol=0)


@pytest.mark.slow
@pytest.mark.nightly
@with_deepspeed
@pytest.mark.parametrize(("stage", "kind"), [(2, "full"), (3, "full"), (1, "qlora"), (3, "qlora")])
def test_zero_in_bf16_passes_its_gates_and_continues(base_config, tmp_path, stage, kind):
    config = of_kind(base_config, "full" if kind == "full" else "lora") | zero(stage)
    config |= {"bf16": True, "gradient_accumulation_steps": 1, "auto_resume_from_checkpoints": True}
    if kind == "qlora":
        config |= {"adapter": "qlora", "load_in_4bit": True}
    weights = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    train_zero(config, tmp_path)
    run = Path(config["output_dir"]) / "sera"
    gates = [summary(run, t)["step_zero"] for t in (1, 2, 3)]
    assert all(gate["nats_per_root_token"] < 0.05 for gate in gates), gates
    whole = load_file(run.parent / weights)
    shutil.rmtree(run.parent / "checkpoint-9")
    train_zero(config, tmp_path)
    again = load_file(run.parent / weights)
    assert whole.keys() == again.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


def test_a_configuration_of_deepspeed_is_a_block_or_a_file(tmp_path):
    block = zero(2, offload_optimizer={"device": "cpu"})["deepspeed"]
    (tmp_path / "zero.json").write_text(json.dumps(block), encoding="utf-8")
    for given in (block, str(tmp_path / "zero.json")):
        refuse({"deepspeed": given, "datasets": [{"path": "pairs.jsonl"}]}, SeraConfig())
        assert deepspeed_config(given) == block
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    assert deepspeed_config(str(tmp_path / "list.json")) is deepspeed_config(None) is None
