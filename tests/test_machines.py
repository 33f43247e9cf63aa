"""Several machines: two network namespaces of this one, with a cable that can be pulled."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from safetensors.numpy import load_file

from sera_plugin.rundir import machines
from sera_plugin.rundir.machines import Watch
from sera_plugin.rundir.ranks import Ranks
from tests.conftest import adapter, table
from tests.two_ranks import free_port, join, launch, of_two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
#: Name of the namespace and of the host, address, and the interface of each machine.
MACHINES = (("machine-a", "10.83.7.1", "sera-a"), ("machine-b", "10.83.7.2", "sera-b"))
#: Seconds: long for processes that share two cores with others, short beside the host's own limits.
LIMIT = 20


def ip(*words: str, check: bool = True) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and result.returncode:
        pytest.skip(f"no network namespaces can be made here: {result.stderr.strip()}")


@pytest.fixture
def cable() -> Iterator[None]:
    """Two machines with a cable between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2's `ip`")
    try:
        (_, _, one), (_, _, other) = MACHINES
        ip("link", "add", one, "type", "veth", "peer", "name", other)
        for machine, address, interface in MACHINES:
            ip("netns", "add", machine)
            ip("link", "set", interface, "netns", machine)
            ip("-n", machine, "address", "add", f"{address}/24", "dev", interface)
            for each in ("lo", interface):
                ip("-n", machine, "link", "set", each, "up")
        yield
    finally:
        for machine, _, _ in MACHINES:
            ip("netns", "del", machine, check=False)


class Pair:
    """`axolotl train` on both machines, each with a log."""

    def __init__(self, config: dict, directory: Path, own: Path | None = None) -> None:
        """The second machine may have something of its `own` in place of a directory."""
        path = directory / "machines.yaml"
        config = config | {"max_memory": {"cpu": "8GiB"}}
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.logs, self.processes = [], []
        for rank, (machine, _, interface) in enumerate(MACHINES):
            setup = f"hostname {machine}"
            if rank and own:
                (directory / "elsewhere").mkdir()
                setup += f"; mount --bind {directory / 'elsewhere'} {own}"
            command = ["ip", "netns", "exec", machine, "unshare", "--mount", "--uts", "sh", "-c"]
            command += [f'{setup}; exec "$@"', "sh", sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}"]
            command += [f"--master_addr={MACHINES[0][1]}", "--master_port=29517"]
            variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            # torch loads an optimizer to `cpu`, and accelerate calls that `cpu:0`.
            variables["ACCELERATE_TORCH_DEVICE"] = "cpu"
            variables |= {"GLOO_SOCKET_IFNAME": interface, "WATCH_LIMIT": str(LIMIT)}
            self.logs.append(directory / f"{machine}.log")
            with self.logs[-1].open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*command, "-m", "tests.host_watched", str(path)],
                        env=os.environ | variables,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self, seconds: float = 600) -> list[int]:
        """How both have ended."""
        ends = time.monotonic() + seconds
        return [process.wait(max(1, ends - time.monotonic())) for process in self.processes]

    def said(self) -> list[str]:
        return [" ".join(log.read_text().split()) for log in self.logs]


def await_file(path: Path, pair: Pair) -> None:
    ends = time.monotonic() + 600
    while not path.exists():
        assert all(process.poll() is None for process in pair.processes), pair.said()[0][-3000:]
        assert time.monotonic() < ends
        time.sleep(0.1)


def assert_equal_weights(one: Path, other: Path) -> None:
    mine, theirs = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        np.testing.assert_array_equal(weight, theirs[name])


def test_two_machines_give_what_one_gives_and_outlast_a_cable_that_is_pulled(
    base_config, tmp_path, cable
):
    config = of_two_ranks(base_config)
    one, pulled = tmp_path / "one", tmp_path / "pulled"
    result = launch(config | {"output_dir": str(one)}, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]

    with Pair(config | {"output_dir": str(pulled)}, tmp_path) as pair:
        await_file(pulled / "sera/iteration-02/offline.parquet", pair)
        ip("-n", "machine-b", "link", "set", "sera-b", "down")
        assert all(pair.wait(LIMIT + 90))
        others = ("rank 1 on machine-b", "rank 0 on machine-a")
        for said, lost in zip(pair.said(), others, strict=True):
            assert f"SeRA: {lost} has not been heard of for {LIMIT} seconds" in said, said[-3000:]
            assert "the same command with `auto_resume_from_checkpoints: true` goes on" in said
    assert not (pulled / "adapter_model.safetensors").exists()

    ip("-n", "machine-b", "link", "set", "sera-b", "up")
    prepared = Path(config["dataset_prepared_path"])  # which need not be shared
    with Pair(config | {"output_dir": str(pulled)}, tmp_path, own=prepared) as pair:
        assert pair.wait() == [0, 0], pair.said()[0][-3000:]
        assert not any("has not been heard of" in said for said in pair.said())
    assert list((tmp_path / "elsewhere").iterdir())
    for name in ("offline", "candidates", "bootstrapped"):
        mine, theirs = (table(run / "sera", 2, name) for run in (one, pulled))
        np.testing.assert_equal(mine, theirs)  # nan is equal to nan
    assert_equal_weights(one, pulled)


def test_machines_that_do_not_share_output_dir_are_told(base_config, tmp_path, cable):
    shared = tmp_path / "shared"
    shared.mkdir()
    config = base_config | adapter() | {"output_dir": str(shared / "out")}
    with Pair(config, tmp_path, own=shared) as pair:
        assert all(pair.wait(300))
        for said in pair.said():
            assert (
                f"output_dir: {shared / 'out'} is not the same directory on all machines: what "
                "rank 0 writes there on machine-a is not seen on machine-b. Set output_dir to"
            ) in said, said[-3000:]
    seen = [*shared.rglob("*"), *(tmp_path / "elsewhere").rglob("*")]
    left = [path for path in seen if path.is_file()]
    assert {path.name for path in left} <= {"debug.log"}  # the host's


def _watch(rank: int, port: int) -> None:
    machines.BEAT, machines.LIMIT = 0.2, 3.0
    watch = Watch(join(rank, port))
    dist.barrier()
    if rank == 1:
        watch.close(done=True)  # and then it takes its time
        time.sleep(6)
    else:
        time.sleep(6)  # it is slow, and its threads go on
        watch.close(done=True)
    dist.barrier()
    watch = Watch(Ranks(rank, (2,), dist.group.WORLD))
    if rank == 0:
        time.sleep(30)
        os._exit(5)  # too late
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_is_slow_or_done_is_not_lost_and_one_that_is_stopped_is(capfd):
    context = mp.spawn(_watch, (free_port(),), nprocs=2, join=False, daemon=True)
    first, second = context.processes
    first.join(120)
    second.kill()
    assert first.exitcode == 1
    assert "rank 1 on " in capfd.readouterr().err
