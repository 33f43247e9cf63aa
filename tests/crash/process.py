"""Runs in processes of their own that start at once.

Importing the host takes longer than a whole run here. One process imports it, computes nothing, and
forks for each run: a run is still a fresh process, and dies alone.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: A run takes seconds; one that takes this long hangs.
TIME_LIMIT = 600.0


@dataclass(frozen=True)
class Job:
    """One run, in a directory that holds config.yaml and gets log.txt and trace.jsonl."""

    directory: str
    #: `train`, or `world` to make the data and the model instead.
    call: str = "train"
    #: (phase, n): the run kills itself when it is there for the n-th time.
    kill: tuple[str, int] | None = None
    #: Seconds after its set-up at which it is killed from outside.
    after: float | None = None


@dataclass(frozen=True)
class Ended:
    """How a run ended (`finished`, `killed`, `failed` or `hung`), and its wall-clock seconds."""

    how: str
    seconds: float


class ForkServer:
    """The process that forks, seen from outside; it and its libraries print to `log`."""

    def __init__(self, log: Path) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        # What keeps the host quiet and offline is set in tests.conftest.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.process"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        if not self._answer().get("ready"):
            raise RuntimeError(f"the host could not be imported; see {log}")

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=TIME_LIMIT)

    def run(self, job: Job) -> Ended:
        """Run a job to its end, whatever end that is."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        return Ended(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or "{}")
        return answer


# ------------------------------------------------------------------ inside


#: Everything that a run imports, so that none of them has to.
_HOST = (
    "axolotl.cli.config",
    "axolotl.cli.train",
    "axolotl.common.datasets",
    "axolotl.core.builders",
    "axolotl.train",
    "peft.peft_model",
    "transformers.modeling_utils",
    "trl",
    "sera_plugin.host.plugin",
    "sera_plugin.host.trainer",
    "tests.conftest",
    "tests.crash.child",
)


def _fork(job: Job) -> Ended:
    """Fork, run the job in the child, and wait for it or kill it."""
    start = time.monotonic()
    ready, set_up = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        _child(job, lambda: os.close(set_up))
    os.close(set_up)
    try:
        if job.after is not None:
            # The child closes its end once it is set up, or by dying before.
            select.select([ready], [], [], TIME_LIMIT)
            _wait(pid, time.monotonic() + job.after, reap=False)
            os.kill(pid, signal.SIGKILL)  # still ours: it has not been waited for
        status = _wait(pid, start + TIME_LIMIT)
    finally:
        os.close(ready)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        how = "hung"
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        how = "killed"
    else:
        how = "finished" if status == 0 else "failed"
    return Ended(how, round(time.monotonic() - start, 2))


def _wait(pid: int, deadline: float, reap: bool = True) -> int | None:
    """The status of a process that has ended, None if it has not by the deadline.

    With `reap` false it stays a zombie, so that its number cannot become another process's.
    """
    while time.monotonic() < deadline:
        if not reap:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return None
        elif (ended := os.waitpid(pid, os.WNOHANG))[0]:
            return ended[1]
        time.sleep(0.005)
    return None


def _child(job: Job, set_up: Callable[[], None]) -> None:
    """Never returns."""
    code = 1
    try:
        os.chdir(job.directory)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        if job.call == "world":
            from tests.conftest import make_world

            make_world(Path(job.directory))
        else:
            from tests.crash.child import train

            train(Path(job.directory), job.kill, set_up)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for module in _HOST:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        fields = json.loads(line)
        fields["kill"] = fields["kill"] and tuple(fields["kill"])
        answers.write(json.dumps(asdict(_fork(Job(**fields)))) + "\n")


if __name__ == "__main__":
    _serve()
