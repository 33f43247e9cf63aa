"""What processes on several machines need: storage that all see, and to hear of one that is lost.

A process that dies closes its connections, and whoever waits for it hears of it. A machine that
loses its power or its network closes nothing: the others would wait for ever. So each process
counts up in the store of torch.distributed; rank 0 watches all counters, the others rank 0's.
"""

import atexit
import logging
import os
import socket
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep

from sera_plugin.rundir.ranks import AGAIN, Ranks, store_connection
from sera_plugin.rundir.writing import beside, look, make_directory

LOG = logging.getLogger("axolotl.sera")

#: Seconds between two counts.
BEAT = 5.0
#: Seconds without a count after which a rank is lost. Long: a call into C may keep Python's lock,
#: and with it all threads, for as long as it takes.
LIMIT = 120.0
#: Seconds that shared storage may take to show one machine what another one has written.
SEEN_WITHIN = 10.0
#: What a process counts to when its training is over.
_DONE = b"done"
_COUNT, _SAID = "sera/count/{}", "sera/said"


def require_shared(directory: Path, ranks: Ranks) -> None:
    """All ranks: a ValueError on each if a machine does not see what rank 0 writes to output_dir.

    Of that nothing is left.
    """
    if len(ranks.machines) == 1:
        return
    machine, made, name = socket.gethostname(), False, ""
    with ExitStack() as mark:
        if ranks.main:
            made = not directory.exists()
            make_directory(directory)
            name = mark.enter_context(beside(directory / "shared")).parent.name
        writer, path = ranks.words(machine)[0], directory / ranks.words(name)[0]
        ends = monotonic() + SEEN_WITHIN
        while not (seen := look(path)) and monotonic() < ends:
            sleep(0.2)
        blind = sorted(set(ranks.words("" if seen else machine)) - {""})
    if made:
        directory.rmdir()
    if blind:
        raise ValueError(
            f"output_dir: {directory} is not the same directory on all machines: what rank 0 "
            f"writes there on {writer} is not seen on {', '.join(blind)}. Set output_dir to a "
            "directory on storage that all machines share, mounted at the same path on each."
        )


class Watch:
    """Two threads of this process: one counts and reads, one judges while that hangs."""

    def __init__(self, ranks: Ranks) -> None:
        """A collective call; nothing is watched in one process."""
        self._over, self._counter = Event(), Thread(target=self._count, daemon=True)
        if ranks.group is None:
            return
        self._store = store_connection()
        self._mine = _COUNT.format(ranks.rank)
        others = [0] if ranks.rank else list(range(1, ranks.world))
        machines = ranks.words(socket.gethostname())
        #: Of each watched rank: who it is, its last count, and the seconds since then.
        self._names = [f"rank {rank} on {machines[rank]}" for rank in others]
        self._keys = [_COUNT.format(rank) for rank in others]
        self._counts = [b""] * len(others)
        self._silent = [0.0] * len(others)
        self._main, self._said, self._done = ranks.main, "", False
        self._store.set(self._mine, "0")
        if ranks.main:
            self._store.set(_SAID, "")
        ranks.barrier()  # reading waits for keys that are not there
        atexit.register(self.close)  # a thread must not be in the store when Python ends
        self._counter.start()
        Thread(target=self._judge, daemon=True).start()

    def close(self, done: bool = False) -> None:
        """Watch no longer, nor be watched if this process is `done`."""
        if self._counter.is_alive() and not self._over.is_set():
            self._done = done
            self._over.set()
            self._counter.join(BEAT)

    def _count(self) -> None:
        count = 0
        while not self._over.wait(BEAT):
            count += 1
            # What fails here is lost sooner or later; how late is for the other thread to say.
            with suppress(Exception):
                self._store.set(self._mine, str(count))
                if self._main:
                    self._store.set(_SAID, self._said)
                *counts, said = self._store.multi_get([*self._keys, _SAID])
                for place, found in enumerate(counts):
                    if found != self._counts[place]:
                        self._counts[place], self._silent[place] = found, 0.0
                self._said = said.decode()
        if self._done:
            with suppress(Exception):
                self._store.set(self._mine, _DONE)

    def _judge(self) -> None:
        # Seconds are counted and not read from a clock: those in which this process was held up,
        # too, are not the others'.
        while not self._over.wait(1.0):
            for place, count in enumerate(self._counts):
                self._silent[place] += count != _DONE
                if self._silent[place] > LIMIT and not self._said:
                    self._said = (
                        f"{self._names[place]} has not been heard of for {LIMIT:.0f} seconds: it "
                        "was killed or is stopped, or its machine or network is down."
                    )
                    self._over.wait(2 * BEAT * self._main)  # the others read what rank 0 says
            if self._said and not self._over.is_set():
                LOG.error(f"SeRA: {self._said} {AGAIN}")
                for stream in (sys.stdout, sys.stderr):
                    with suppress(Exception):
                        stream.flush()
                os._exit(1)  # the main thread may be in a call that nothing else ends
