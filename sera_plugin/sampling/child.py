"""A child process that cannot outlive the training process, and that says what went wrong.

The child speaks JSON, one object per line, on its standard output; everything it prints goes to a
log file. Its standard input is its lifeline: it holds the job, and when it closes, because we are
done or because we were killed, the child's whole process group ends (see `vllm_worker.guard`).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil

#: A child that neither answers nor, while it starts, logs anything for this many seconds is hung.
PATIENCE = 900.0
#: Seconds that processes get to end by themselves before they are killed.
GRACE = 15.0


class ChildFailed(RuntimeError):
    """The child ended without finishing its job.

    Attributes:
        reason: what happened, in one sentence.
        printed: the end of what it printed.
        log: the file with the rest.
    """

    def __init__(self, reason: str, printed: str, log: Path) -> None:
        super().__init__(reason)
        self.reason = reason
        self.printed = printed
        self.log = log


class Child:
    """A running child; a context manager that leaves no process behind.

    Args:
        command: what to run.
        job: sent to it as one line of JSON.
        environment: all of its environment.
        log: receives what it prints; appended to.
    """

    def __init__(
        self,
        command: Sequence[str],
        job: Mapping[str, Any],
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        self.log = log
        self._job = job
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._log_start = file.tell()
            # No shell; the worker's file and the interpreter that the YAML names.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=dict(environment),
                cwd=log.parent,
                start_new_session=True,  # a group of its own; Ctrl-C is for us to pass on
            )
        self._done = False
        self._family: dict[int, psutil.Process] = {}
        self._remember_family()
        self._lines: queue.Queue[bytes | None] = queue.Queue(maxsize=16)
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the child says until it says `{"done": true}`.

        Raises:
            ChildFailed: if it reports an error, ends, or shows no sign of life.
        """
        self._send_job()
        started = False
        last_sign, log_size = monotonic(), -1
        while True:
            try:
                line = self._lines.get(timeout=1.0)
            except queue.Empty:
                self._remember_family()
                size = self.log.stat().st_size
                if not started and size != log_size:
                    # Loading and compiling answer nothing for minutes, but they log.
                    last_sign, log_size = monotonic(), size
                if monotonic() - last_sign > PATIENCE:
                    raise self._failed(f"it hung: no progress for {PATIENCE:.0f} seconds") from None
                continue
            if line is None or not line.endswith(b"\n"):  # it died, perhaps in the middle of one
                raise self._failed(self._how_it_ended())
            last_sign = monotonic()
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise self._failed(message["error"])
            if "done" in message:
                self._done = True
                return
            started = started or "ready" in message
            yield message

    def _send_job(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already; messages() says so
            self._process.stdin.write(json.dumps(self._job).encode() + b"\n")
            self._process.stdin.flush()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "it closed its output and went on without an answer"
        if code >= 0:
            return f"it ended with exit code {code}"
        name = signal.Signals(-code).name
        killer = " (often the operating system, out of memory)" if -code == signal.SIGKILL else ""
        return f"it was killed by {name}{killer}"

    def _failed(self, reason: str) -> ChildFailed:
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - 65_536))
            return ChildFailed(reason, file.read().decode("utf-8", "replace"), self.log)

    def _remember_family(self) -> None:
        """Descendants are only known while their parents live."""
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self._family.update({process.pid: process for process in family})

    def close(self) -> None:
        """End the child and every process it has started; returns when they are gone."""
        self._remember_family()
        if self._done:  # it closes its engine by itself
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if not self._finished():
            self._kill()
            self._finished()
        self._process.wait()

    def _finished(self) -> bool:
        """Wait for all of the family to end by itself, for a while."""
        until = monotonic() + GRACE
        while monotonic() < until:
            self._process.poll()  # collects it
            if not any(map(_alive, [*self._family.values(), *_group(self._process.pid)])):
                return True
            sleep(0.1)
        return False

    def _kill(self) -> None:
        for process in [*_group(self._process.pid), *self._family.values()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _group(leader: int) -> list[psutil.Process]:
    """Every process of the leader's process group."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader:
                members.append(process)
        except (ProcessLookupError, PermissionError):
            continue
    return members
