"""Ray's workers instead of a launcher's; SERA_RANKS_PYTHON names a Python that has ray too."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from tests.conftest import table
from tests.doc_pages import ROOT
from tests.test_machines import assert_equal_weights
from tests.two_ranks import launch, of_two_ranks

PYTHON = os.environ.get("SERA_RANKS_PYTHON")


def start(config: dict, directory: Path) -> tuple[subprocess.Popen, Path]:
    """The host with two workers on this machine's CPUs, and its log."""
    config = config | {"max_memory": {"cpu": "8GiB"}, "use_ray": True, "ray_num_workers": 2}
    config["resources_per_worker"] = {"CPU": 1}
    path, log = directory / "ray.yaml", directory / "ray.log"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables["RAY_USAGE_STATS_ENABLED"] = "0"
    with log.open("w") as file:
        command = [str(PYTHON), "-m", "tests.host_on_ray", str(path)]
        return subprocess.Popen(command, env=os.environ | variables, stdout=file, stderr=file), log


def workers(driver: subprocess.Popen) -> list[psutil.Process]:
    found = psutil.Process(driver.pid).children(recursive=True)
    return [one for one in found if "ray::RayTrainWorker" in " ".join(one.cmdline())]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not PYTHON, reason="SERA_RANKS_PYTHON names no Python that has ray")
def test_workers_of_ray_give_what_two_ranks_give_and_one_may_be_killed(base_config, tmp_path):
    config = of_two_ranks(base_config)
    one, other = tmp_path / "one", tmp_path / "other"
    result = launch(config | {"output_dir": str(one)}, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]

    driver, log = start(config | {"output_dir": str(other)}, tmp_path)
    ends = time.monotonic() + 600
    while not (other / "sera/iteration-02/offline.parquet").exists():
        assert driver.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < ends
        time.sleep(0.1)
    first, second = workers(driver)
    second.kill()
    assert driver.wait(180) != 0
    assert not first.is_running()
    assert not (other / "adapter_model.safetensors").exists()

    driver, log = start(config | {"output_dir": str(other)}, tmp_path)
    assert driver.wait(600) == 0, log.read_text()[-3000:]
    for name in ("offline", "candidates", "bootstrapped"):
        mine, theirs = (table(run / "sera", 2, name) for run in (one, other))
        np.testing.assert_equal(mine, theirs)  # nan is equal to nan
    assert_equal_weights(one, other)
