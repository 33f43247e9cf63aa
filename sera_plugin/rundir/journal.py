"""A file of JSON lines that only grows: what a killed process had finished is not done again.

A line that a process died in is passed over, and the next one starts on a line of its own. Each
line ends with a checksum of the rest of it: one that was changed is not used, and named.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from sera_plugin.rundir.writing import COMMAND, Advice, explained, open_own

LOG = logging.getLogger("axolotl.sera")


def key_of(*parts: Any) -> str:
    """SHA-256 of values as JSON has them: the key of what they determine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _signed(line: bytes) -> bytes:
    """An object's JSON with a checksum of all of it as the last key."""
    return b'%s, "sha256": "%s"}' % (line[:-1], _sum(line))


def _unsigned(line: bytes) -> tuple[bytes, bool]:
    """A line without its checksum, and whether it has one that is right."""
    head, _, tail = line.rpartition(b', "sha256": "')
    whole = head + b"}"
    return (whole, True) if tail == _sum(whole) + b'"}' else (line, False)


def _sum(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:16].encode()


class Journal:
    """Records under keys, each written at once and never changed. Threads may share one.

    The file is made with the first record; `advice` is for whose work it is kept. A ValueError if
    it is a link or no regular file.
    """

    def __init__(self, path: Path, advice: Advice = COMMAND) -> None:
        self.path = path
        self._advice = advice
        self._lock = Lock()
        self._file: int | None = None
        self._records: dict[str, dict[str, Any]] = {}
        self._torn = False
        if os.path.lexists(path):
            with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
                content = file.read()
            self._torn = bool(content) and not content.endswith(b"\n")
            self._read(content.splitlines())

    def _read(self, lines: Sequence[bytes]) -> None:
        """Take in what is whole. The lines of an earlier version, which come first, have no sum."""
        damaged: list[int] = []
        has_sums = False
        for number, line in enumerate(lines, start=1):
            whole, found = _unsigned(line)
            has_sums |= found
            try:
                has_none = not has_sums and b'"sha256"' not in line
                record: Any = json.loads(whole) if found or has_none else None
                self._records[record.pop("key")] = record
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                damaged += [number] if line.strip() else []
        if damaged and not (self._torn and damaged == [len(lines)]):
            places = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            LOG.warning(
                "SeRA: %s: %d line(s) are damaged and not used (%s); what they held is asked for "
                "again", self.path, len(damaged), places,
            )  # fmt: skip

    def get(self, key: str, **kinds: type) -> dict[str, Any] | None:
        """A record, if each field that is named has a value of that kind."""
        found = self._records.get(key)
        usable = found is not None and all(type(found.get(k)) is kind for k, kind in kinds.items())
        return found if usable else None

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Write a record. A ValueError if another process writes to the file."""
        line = _signed(json.dumps({"key": key, **record}, ensure_ascii=True).encode()) + b"\n"
        with self._lock, explained(self.path.parent, self._advice):
            if self._file is None:
                self._file = self._open()
            data = b"\n" + line if self._torn else line
            self._torn = True
            while data:
                data = data[os.write(self._file, data) :]
            self._torn = False
            self._records[key] = dict(record)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open_own(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(
                f"{self.path} is being written by another process. Wait for it or end it, then "
                "start the same command again."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                raise
        return file

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
