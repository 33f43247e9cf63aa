"""FSDP2 on two gloo ranks: what its runs give, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import adapter, summary, table
from tests.two_ranks import (
    assert_alike,
    assert_fitted_alike,
    assert_theta_1_is_kept,
    assert_weights_are_close,
    launch,
    of_kind,
)


def fsdp(**keys) -> dict:
    """The keys that share the weights out."""
    wrap = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    }
    return {"fsdp_version": 2, "fsdp_config": wrap | keys}


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["lora", "full", "fitted"])
def test_sharded_weights_give_what_one_process_gives(base_config, train, tmp_path, kind):
    config = of_kind(base_config, kind)
    # With Adam's 1e-8 a gradient of that size takes a whole step in the direction of its rounding.
    config["adam_epsilon"] = 1e-6
    two = config | fsdp() | {"output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 1}
    two |= {"saves_per_epoch": 3, "auto_resume_from_checkpoints": True}
    result = launch(two, tmp_path, module="tests.host_on_cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    one, other = train(config).run, tmp_path / "two/sera"
    assert_alike(one, other, 3)
    # Whole weights, written once: the policies, the checkpoints, what is left at the end.
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    policy, final = other / f"iteration-03/policy/{weights}", other.parent / weights
    assert_weights_are_close(one / f"iteration-03/policy/{weights}", policy)
    assert_weights_are_close(one.parent / weights, final)
    fitted = summary(other, 3)["reward"]
    if kind == "fitted":
        assert_fitted_alike(summary(one, 3), summary(other, 3))
    else:
        assert_theta_1_is_kept(other, weights)
    assert_weights_are_close(policy, other.parent / f"checkpoint-6/{weights}", atol=0)

    # Cut off after one step of iteration 3, with theta_2 scored anew and theta_1 read back.
    whole = shutil.copy(final, tmp_path / "whole.safetensors")
    tables = {name: table(other, 3, name) for name in ("offline", "candidates")}
    for step in (8, 9):
        shutil.rmtree(other.parent / f"checkpoint-{step}")
    for name in tables:
        (other / f"iteration-03/{name}.parquet").unlink()
    result = launch(two, tmp_path, module="tests.host_on_cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    for name, before in tables.items():
        np.testing.assert_equal(table(other, 3, name), before)  # nan is equal to nan
    assert_weights_are_close(Path(whole), final, atol=0)
    assert summary(other, 3)["reward"] == fitted
    if kind != "fitted":
        assert_theta_1_is_kept(other, weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "on_cpu", "said"),
    [
        (fsdp(), "true", "fsdp_config is set, but the host cannot shard the model here"),
        pytest.param(
            *(adapter(), "false", "2 processes were started, but the host trains in each of them"),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["sharding", "apart"],
)
def test_what_the_host_cannot_do_together_is_refused(base_config, tmp_path, keys, on_cpu, said):
    result = launch(base_config | keys, tmp_path, ACCELERATE_USE_CPU=on_cpu)
    assert result.returncode != 0
    assert said in result.stderr
