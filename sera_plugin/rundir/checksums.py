"""Checksums: whether a file is what was written, and which checkpoints a run may continue from.

A directory's checksums are in its `SHA256SUMS`, in the format of `sha256sum`, so that anybody can
check a run with `sha256sum -c`. A file is listed before it gets its name, and a directory that is
written as a whole (a policy, a checkpoint) is listed last of all: what is not listed was cut off.
"""

import hashlib
import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path

from sera_plugin.rundir.format import Invalid, Record, read_json
from sera_plugin.rundir.progress import progress
from sera_plugin.rundir.writing import beside, flush, make_directory, remove

LOG = logging.getLogger("axolotl.sera")

SUMS = "SHA256SUMS"
#: What a checkpoint says of the run, in a file of its own: |D_t| so far as known, else as planned.
RECORD = "sera.json"
#: Bytes of a list of checksums; a checkpoint has some dozen lines.
_LARGEST = 16 * 2**20
#: Bytes that take some seconds, and those read at a time.
_MUCH, _CHUNK = 10**9, 2**22
#: Digits of a checksum in a file's name.
_SHORT = 16


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; says how far it is where there are many."""
    size, sha = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size < _MUCH or not LOG.isEnabledFor(logging.INFO):
            return hashlib.file_digest(file, "sha256").hexdigest()
        with progress(f"checksum of {path.name}", size, "byte") as advance:
            while block := file.read(_CHUNK):
                sha.update(block)
                advance(len(block))
    return sha.hexdigest()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place by `write(path)`, list its checksum, and rename it into place.

    Whenever the process ends, and where it cannot be written, the place holds the whole old file or
    the whole new one, and the list knows it.
    """
    make_directory(path.parent)
    with beside(path) as partial:
        write(partial)
        flush(partial)
        sums = _read(path.parent)
        earlier = sums.get(path.name, ())
        written = digest(partial)
        _write(path.parent, {**sums, path.name: (*earlier, written)})
        partial.replace(path)
        flush(path.parent)
        if earlier:
            _write(path.parent, {**sums, path.name: (written,)})


def is_whole(path: Path) -> bool:
    """Whether a file is there and is one that `replace_file` has written."""
    return path.is_file() and digest(path) in _read(path.parent).get(path.name, ())


def add_file(directory: Path, name: str, write: Callable[[Path], object]) -> None:
    """Like `replace_file`, with the checksum in the name: many may add to one directory."""
    path = directory / name
    make_directory(directory)
    with beside(path) as partial:
        write(partial)
        flush(partial)
        partial.replace(path.with_stem(f"{path.stem}-{digest(partial)[:_SHORT]}"))
        flush(directory)


def is_named_right(path: Path) -> bool:
    """Whether a file of `add_file` is what its name says."""
    return path.is_file() and digest(path)[:_SHORT] == path.stem[-_SHORT:]


def replace_directory(path: Path, write: Callable[[Path], object]) -> None:
    """Write a directory beside its place, seal it, and rename it into place of what is there."""
    make_directory(path.parent)
    with beside(path) as partial:
        partial.mkdir()
        write(partial)
        seal(partial)
        remove(path)
        partial.rename(path)
        flush(path.parent)


def seal(directory: Path) -> None:
    """List every file of a finished directory, and make sure that all of it is on the disk."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS)
    for path in files:
        flush(path)
    _write(directory, {str(path.relative_to(directory)): (digest(path),) for path in files})
    flush(directory)
    flush(directory.parent)


def damage(directory: Path) -> str | None:
    """What is wrong with a sealed directory in half a sentence, or None if nothing is."""
    if not directory.is_dir():
        return "it does not exist"
    if not (sums := _read(directory)):
        return "it was not written to its end"
    if _header(sums) not in (directory / SUMS).read_text(encoding="utf-8", errors="replace"):
        return f"{SUMS} is not whole"
    for name, expected in sums.items():
        if not (directory / name).is_file():
            return f"{name} is missing"
        if digest(directory / name) not in expected:
            return f"the checksum of {name} differs"
    return None


def _read(directory: Path) -> dict[str, tuple[str, ...]]:
    """Name -> checksums. A file that is being replaced has two for a moment."""
    path = directory / SUMS
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    sums: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for line in text.splitlines():
        checksum, _, name = line.partition("  ")
        if len(checksum) == 64 and name:
            sums[name] += (checksum,)
    return sums


def _write(directory: Path, sums: Mapping[str, Sequence[str]]) -> None:
    lines = [f"{one}  {name}\n" for name, found in sorted(sums.items()) for one in found]
    with beside(directory / SUMS) as partial:
        partial.write_text("".join([_header(sums), *lines]), encoding="utf-8")
        flush(partial)
        partial.replace(directory / SUMS)


def _header(sums: Mapping[str, object]) -> str:
    """Shows when a list has lost lines."""
    return f"# {len(sums)} files\n"


# ------------------------------------------------------------------ the host's checkpoints

# One counts once it is sealed, after the host has written all of it and before it removes an older
# one: there is always a whole one.


def checkpoint(output_dir: Path, step: int) -> Path:
    """Where the host saves after an optimizer step."""
    return output_dir / f"checkpoint-{step}"


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def checkpoint_steps(output_dir: Path) -> list[int]:
    """The optimizer steps of all finished checkpoints, ascending; damaged ones included."""
    finished = [path.parent for path in output_dir.glob(f"checkpoint-*/{SUMS}")]
    return sorted(step for step in map(_step, finished) if step is not None)


def newest_checkpoint(output_dir: Path) -> int | None:
    """The newest whole checkpoint's step, or None if there is none. Says which are damaged."""
    for step in reversed(checkpoint_steps(output_dir)):
        path = checkpoint(output_dir, step)
        problem = damage(path)
        if problem is None:
            return step
        LOG.warning("SeRA: %s is damaged (%s) and is not used", path, problem)
    return None


def named_checkpoint(output_dir: Path, asked: str) -> int:
    """The step of `resume_from_checkpoint`; ValueError if that is not this run's or not whole."""
    path = Path(asked)
    step = _step(path)
    if step is None or path.resolve().parent != output_dir.resolve():
        raise ValueError(
            f"resume_from_checkpoint: {asked} is not a checkpoint in output_dir: {output_dir}. A "
            "run continues in its own directory: set output_dir to the one that holds the "
            "checkpoint, or use `auto_resume_from_checkpoints: true`."
        )
    if problem := damage(path):
        usable = [
            n for n in checkpoint_steps(output_dir) if damage(checkpoint(output_dir, n)) is None
        ]
        raise ValueError(
            f"resume_from_checkpoint: {asked} cannot be used: {problem}. Whole checkpoints: "
            f"{', '.join(map(str, usable)) or 'none'}. Name another one, or use "
            "`auto_resume_from_checkpoints: true`, which takes the newest whole one."
        )
    return step


def set_aside(output_dir: Path, last: int) -> None:
    """Put what is newer than the step a run continues from where neither run nor host looks.

    Remains of one that was cut off are removed; a finished one (damaged, or of a continuation that
    is being trained anew) gets another name.
    """
    for path in output_dir.glob("checkpoint-*"):
        step = _step(path)
        if step is None or step <= last or not path.is_dir() or path.is_symlink():
            continue
        if not (path / SUMS).exists():
            shutil.rmtree(path)
            continue
        target, numbers = output_dir / f"set-aside-{path.name}", count(1)
        while os.path.lexists(target):
            target = output_dir / f"set-aside-{path.name}.{next(numbers)}"
        path.rename(target)
        LOG.warning("SeRA: continuing from step %d; %s is now %s", last, path, target.name)


def recorded_pairs(checkpoint: Path) -> tuple[int, ...]:
    """|D_t| of each iteration as a checkpoint has them; ValueError if it cannot be continued."""
    try:
        return tuple(read_json(checkpoint / RECORD, Record)["pairs"])
    except Invalid as error:
        raise ValueError(
            f"{checkpoint / RECORD} cannot be used: {error}. Restore it from a copy, or continue "
            "from another checkpoint: name it with resume_from_checkpoint."
        ) from None
