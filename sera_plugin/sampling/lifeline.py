"""Runs a command that cannot outlive whoever started it: `python lifeline.py SECONDS COMMAND...`.

Standard input is the lifeline: when it closes, because its owner is done or because it was killed,
the command ends, and so does everything that it has started. Each step of that gets some seconds.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

#: prctl's PR_SET_CHILD_SUBREAPER: whoever loses its parent is then a child of this process.
_ADOPT = 36
#: Unlinks shared memory when all who have used it are gone: it is the last to be killed.
_TRACKER = "multiprocessing.resource_tracker"


def end_all(seconds: float, ask: bool) -> None:
    """Kill all descendants; `ask` them to end first."""
    steps = [(signal.SIGTERM, "")] if ask else []
    for number, spared in (*steps, (signal.SIGKILL, _TRACKER), (signal.SIGKILL, "")):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                last = spared and spared in " ".join(process.cmdline())
                process.send_signal(signal.SIGCONT if last else number)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:  # nobody is left
                return
            time.sleep(0.05)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_ADOPT, 1, 0, 0, 0)
    # No shell; the command of the process that started this one. A group of its own, so that a
    # signal to it does not end this process.
    command = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, process_group=0)
    while command.poll() is None and not select.select([0], [], [], 0.1)[0]:
        pass
    code = command.returncode
    end_all(float(sys.argv[1]), ask=code is None)
    if code is not None and code < 0:  # ends as the command did
        os.kill(os.getpid(), -code)
    sys.exit(code)
