"""How files are written: beside their place, by a name that nobody can guess, and renamed into it.

No link that stands at such a place is ever followed, and nothing waits for a pipe: whatever is
there is replaced, or, where a file grows in place (a journal, a log, a lock) or a directory is,
refused.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from time import time
from typing import NamedTuple

#: Bytes of free space at which a disk counts as full: less than a file system keeps for itself.
_NEXT_TO_NOTHING = 2**16
_REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space, or have the quota raised",
    errno.EROFS: "Make it writable, or {elsewhere}",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Change the permissions, or {elsewhere}"),
}
#: Something else stands where a file or directory of ours belongs.
_IN_THE_WAY = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)


class Advice(NamedTuple):
    """Where a disk takes no file: how to write elsewhere, and what to do once it takes files."""

    elsewhere: str
    then: str


#: For a training run, and for a command that writes files of its own.
RUN = Advice("set another output_dir", "continue the run with `auto_resume_from_checkpoints: true`")
COMMAND = Advice("name another place", "start the same command again")


#: What `beside` makes; a name that is cut short leaves room for the rest.
_ROOM = re.compile(r"\..{0,40}\.sera-[a-z0-9_]{8}\.partial")
#: Seconds after which an empty one is no longer somebody's who has only begun.
_BEGUN = 60.0
#: Directories in which this process has looked for remains.
_TIDIED: set[Path] = set()


@contextmanager
def beside(path: Path, advice: Advice = RUN) -> Iterator[Path]:
    """Where to write a file or directory until it is whole, for a rename; nothing is left there.

    That is in a directory of its own, made for this: its name is drawn, and it opens to this user
    alone. A lock on it says that somebody is at work, to whoever clears remains away.
    """
    with explained(path.parent, advice):
        if path.parent not in _TIDIED:
            tidy(path.parent)
            _TIDIED.add(path.parent)
        room = mkdtemp(prefix=f".{path.name[:40]}.sera-", suffix=".partial", dir=path.parent)
        handle = os.open(room, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(room, path.name)
        finally:
            try:
                os.rmdir(room)
            except OSError:  # what could not be written to its end
                shutil.rmtree(room, ignore_errors=True)
            os.close(handle)


def tidy(directory: Path) -> None:
    """Remove what killed processes of this user have left of `beside` in a directory.

    Nothing that is a link, that has another name, or that a process is still writing in.
    """
    with suppress(OSError), os.scandir(directory) as found:
        for entry in found:
            if not _ROOM.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
                continue
            with suppress(OSError):  # at work, or nobody can tell
                handle = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    about = os.fstat(handle)
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    old = about.st_mtime < time() - _BEGUN or os.listdir(handle)
                    if about.st_uid == os.geteuid() and old:
                        shutil.rmtree(entry.path)
                finally:
                    os.close(handle)


def make_directory(path: Path, advice: Advice = RUN) -> None:
    """Have a directory there, and those above it; an OSError that names what else there is.

    That may be a link too: what is written into such a directory would be behind it.
    """
    with explained(path, advice):
        if path.is_symlink():
            raise FileExistsError(errno.EEXIST, "Is a link", str(path))
        path.mkdir(parents=True, exist_ok=True)


def look(path: Path) -> bool:
    """Whether something is there that another machine may just have written.

    NFS answers for up to a minute from what it last knew of a directory, until that is opened.
    """
    with suppress(OSError):
        os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))
    return path.exists()


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; of a link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_own(path: Path, flags: int) -> int:
    """Open a file that is changed in its place: a handle, to be closed.

    Args:
        flags: as of `os.open`, without O_TRUNC: what is opened could be somebody's.

    Raises:
        ValueError: if it is a link (a hard one too) or anything but a regular file.
        OSError: if it cannot be opened.
    """
    handle, problem = -1, "it is no regular file"
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        about = os.fstat(handle)
        if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
            return handle
        if stat.S_ISREG(about.st_mode):
            problem = "it is a second name (a hard link) of another file"
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        if path.is_symlink():
            problem = "it is a link"
    if handle >= 0:
        os.close(handle)
    raise ValueError(
        f"{path} is not opened: {problem}, and what it leads to could be somebody's. Move it "
        "away, then start the same command again."
    )


def write_file(path: Path, write: Callable[[Path], object], advice: Advice = COMMAND) -> None:
    """Write a file in a directory that is there, whole or not at all. No checksum is listed."""
    with beside(path, advice) as partial:
        write(partial)
        partial.replace(path)


def write_text(path: Path, text: str, advice: Advice = COMMAND) -> None:
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"), advice)


def flush(path: Path) -> None:
    """Have a file or a directory on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explained(directory: Path, advice: Advice = RUN) -> Iterator[None]:
    """Say in an OSError what to do about a full or closed disk that `directory` is on, or about
    what stands in a file's way."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if isinstance(error, OSError) and number in _IN_THE_WAY:
            if error.filename is None:  # it is said already
                raise
            raise OSError(
                number,
                f"{error.filename2 or error.filename} is not what belongs there: {error.strerror}. "
                f"Move it away, then {advice.then}",
            ) from error
        if number not in _REMEDIES:
            # Libraries written in other languages report a full disk in words of their own.
            there = next(path for path in (directory / "x").absolute().parents if path.exists())
            if shutil.disk_usage(there).free >= _NEXT_TO_NOTHING:
                raise
            number = errno.ENOSPC
        remedy = _REMEDIES[number].format(elsewhere=advice.elsewhere)
        raise OSError(
            number,
            f"{directory} takes no more files: {os.strerror(number)}. {remedy}, then "
            f"{advice.then}. Nothing that was finished is lost",
        ) from error
