"""Runs a command that cannot outlive whoever started it: `python lifeline.py COMMAND...`.

Standard input is the lifeline: when it closes, because its owner is done or because it was killed,
the command's whole process group ends. Imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
import time

#: Seconds between asking a process group to end and killing it.
GRACE = 10.0


def guard() -> None:
    """End this process group when standard input closes, however that happens.

    A process of its own, which outlives a command that is hung or was killed.
    """
    group = os.getpgid(0)
    if os.fork():
        return
    os.setpgid(0, 0)
    while os.read(0, 1):
        pass
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(group, number)
            until = time.monotonic() + GRACE
            while time.monotonic() < until:
                os.killpg(group, 0)  # raises once nobody is left
                time.sleep(0.1)
    except ProcessLookupError:
        pass
    os._exit(0)


if __name__ == "__main__":
    guard()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # No shell; the command of the process that started this one.
    os.execvp(sys.argv[1], sys.argv[1:])
