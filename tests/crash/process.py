"""Runs in processes of their own that start at once.

Importing the host takes longer than a whole run here. One process imports it, computes nothing, and
forks for each run: a run is still a fresh process, and dies alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

#: A run takes seconds; one that takes this long hangs.
TIME_LIMIT = 600.0
_CONTEXT = get_context("forkserver")
#: Everything that a run imports, so that none of them has to.
_CONTEXT.set_forkserver_preload(
    [
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
    ]
)


class Ended(NamedTuple):
    """How a run ended (`finished`, `killed`, `failed` or `hung`), and its wall-clock seconds."""

    how: str
    seconds: float


def run(directory: Path, kill: tuple[str, int] | None = None, after: float | None = None) -> Ended:
    """Run in a directory that holds config.yaml and gets log.txt and trace.jsonl, to whatever end.

    With `kill`, (phase, n), the run kills itself when it is there for the n-th time; with `after`
    it is killed from outside so many seconds after its set-up.
    """
    start = time.monotonic()
    ready, set_up = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(directory, kill, set_up))
    process.start()
    set_up.close()
    if after is not None:
        # The child closes its end once it is set up, or by dying before.
        ready.poll(TIME_LIMIT)
        process.join(after)
        process.kill()
    process.join(TIME_LIMIT)
    ends = {None: "hung", 0: "finished", -signal.SIGKILL: "killed"}
    how = ends.get(process.exitcode, "failed")
    process.kill()
    process.join()
    return Ended(how, round(time.monotonic() - start, 2))


def _run(directory: Path, kill: tuple[str, int] | None, set_up: Connection) -> None:
    os.chdir(directory)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)
    import torch

    from tests.crash.child import train

    torch.set_num_threads(1)
    train(directory, kill, set_up.close)
