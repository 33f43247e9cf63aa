"""The host's checkpoints: which one a run continues from, and which ones are whole.

A checkpoint counts once it is sealed (`checksums.seal`): the trainer does that after the host has
written all of it and before an older one is removed, so there is always a whole one.
"""

from __future__ import annotations

import logging
import re
import shutil
from itertools import chain, count
from pathlib import Path

from sera_plugin.rundir.checksums import SUMS, damage

LOG = logging.getLogger("axolotl.sera")


def steps(output_dir: Path) -> list[int]:
    """The optimizer steps of all finished checkpoints, ascending; damaged ones included."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("*"))
    numbers = sorted(int(match[1]) for match in found if match)
    return [step for step in numbers if (checkpoint(output_dir, step) / SUMS).exists()]


def checkpoint(output_dir: Path, step: int) -> Path:
    """Where the host saves after an optimizer step."""
    return output_dir / f"checkpoint-{step}"


def newest(output_dir: Path) -> int | None:
    """The newest whole checkpoint's step, or None if there is none. Says which are damaged."""
    for step in reversed(steps(output_dir)):
        problem = damage(checkpoint(output_dir, step))
        if problem is None:
            return step
        LOG.warning(
            "SeRA: %s is damaged (%s) and is not used", checkpoint(output_dir, step), problem
        )
    return None


def named(output_dir: Path, asked: str) -> int:
    """The step of a checkpoint that the YAML asks for.

    Args:
        output_dir: the host's.
        asked: `resume_from_checkpoint`.

    Raises:
        ValueError: if it is none of this run's checkpoints, or not whole.
    """
    path = Path(asked)
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    if match is None or path.resolve().parent != output_dir.resolve():
        raise ValueError(
            f"resume_from_checkpoint: {asked} is not a checkpoint in output_dir: {output_dir}. A "
            "run continues in its own directory: set output_dir to the one that holds the "
            "checkpoint, or use `auto_resume_from_checkpoints: true`."
        )
    problem = damage(path)
    if problem is not None:
        usable = [n for n in steps(output_dir) if damage(checkpoint(output_dir, n)) is None]
        whole = ", ".join(map(str, usable)) or "none"
        raise ValueError(
            f"resume_from_checkpoint: {asked} cannot be used: {problem}. Whole checkpoints: "
            f"{whole}. Name another one, or use `auto_resume_from_checkpoints: true`, which takes "
            "the newest whole one."
        )
    return int(match[1])


def set_aside(output_dir: Path, step: int) -> None:
    """Put what is newer than the step a run continues from where neither run nor host looks.

    A checkpoint whose saving was cut off is removed; a finished one gets another name: it is
    damaged, or belongs to a continuation that is being trained anew.
    """
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match is None or int(match[1]) <= step or not path.is_dir() or path.is_symlink():
            continue
        if not (path / SUMS).exists():
            shutil.rmtree(path)
            continue
        suffixes = chain([""], (f".{number}" for number in count(1)))
        free = (output_dir / f"set-aside-{path.name}{suffix}" for suffix in suffixes)
        target = next(name for name in free if not name.exists())
        path.rename(target)
        LOG.warning("SeRA: continuing from step %d; %s is now %s", step, path, target.name)
