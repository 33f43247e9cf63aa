"""Runs of the host on two gloo ranks, and whether two of them are alike."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from safetensors.numpy import load_file

from sera_plugin.rundir.format import read_json
from sera_plugin.rundir.ranks import Ranks, current_ranks
from tests.conftest import adapter, table, with_an_early_best


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(rank: int, port: int, **options: Any) -> Ranks:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    place = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", **place, **options)
    return current_ranks()


def launch(
    config: dict,
    directory: Path,
    module: str = "axolotl.cli.train",
    python: str = sys.executable,
    **environment: str,
) -> subprocess.CompletedProcess:
    """`axolotl train` in two processes under torchrun on the CPU."""
    # Without an accelerator the host asks for device 0 unless it is told how much memory there is.
    config = config | {"max_memory": {"cpu": "8GiB"}}
    path = directory / "ranks.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [python, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port()}", "-m", module, str(path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def of_two_ranks(config: dict) -> dict:
    """A LoRA of two iterations for a rank each of two, which the same command goes on with."""
    config = config | adapter() | {"num_epochs": 2, "gradient_accumulation_steps": 1}
    config["sera"]["sampler"] = "transformers"
    return config | {"auto_resume_from_checkpoints": True}


def assert_alike(one: Path, other: Path, iterations: int) -> None:
    """Two runs: to the last bit before training, up to rounding after it.

    The other one, of the host's command, has a report.
    """
    assert (other / "report.html").exists()
    for name in ("offline", "evaluation"):
        assert table(one, 1, name) == table(other, 1, name)
    for iteration in range(2, iterations + 1):
        for name, same, close in (
            ("offline", ["selected"], ["chosen_logp"]),
            ("candidates", ["row", "token_ids"], ["reward"]),
            ("bootstrapped", ["row", "chosen_candidate", "rejected_candidate", "selected"], []),
        ):
            mine, theirs = (table(run, iteration, name) for run in (one, other))
            assert [mine[column] for column in same] == [theirs[column] for column in same]
            for column in close:
                np.testing.assert_allclose(mine[column], theirs[column], atol=1e-3)


def assert_weights_are_close(one: Path, other: Path, atol: float = 1e-4) -> None:
    mine, theirs = load_file(one), load_file(other)
    # The host saves tied weights twice under FSDP.
    assert mine.keys() <= theirs.keys()
    for name, weight in mine.items():
        np.testing.assert_allclose(weight, theirs[name], atol=atol)


def of_kind(config: dict, kind: str) -> dict:
    """An adapter or a whole model whose first policy is kept, or one with a fitted reward."""
    if kind == "fitted":
        config["sera"]["reward"] = "fitted"
    else:
        four_bits = {"adapter": "qlora", "load_in_4bit": True}
        keys = {"full": {}, "lora": adapter(), "qlora": adapter(**four_bits)}
        config = with_an_early_best(config | keys[kind])
    config["sera"]["sampler"] = "transformers"
    return config


def assert_fitted_alike(one: dict, other: dict) -> None:
    mine, theirs = (summary["reward"] for summary in (one, other))
    assert mine["errors"].keys() == mine["weights"].keys() > {"theta_0", "length"}
    assert mine["accuracy"] == theirs["accuracy"]
    for name in ("weights", "errors"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-2)


def assert_theta_1_is_kept(run: Path, weights: str) -> None:
    assert read_json(run / "last/summary.json")["kept"] == 1
    assert_weights_are_close(run / f"iteration-02/policy/{weights}", run.parent / weights, atol=0)
