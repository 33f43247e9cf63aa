"""The host's checkpoints: which one a run continues from, and which ones are whole.

A checkpoint counts once it is sealed (`checksums.seal`): the trainer does that after the host has
written all of it and before an older one is removed, so there is always a whole one.
"""

from __future__ import annotations

import logging
import re
import shutil
from itertools import count
from pathlib import Path

from sera_plugin.rundir.checksums import SUMS, damage

LOG = logging.getLogger("axolotl.sera")


def checkpoint(output_dir: Path, step: int) -> Path:
    """Where the host saves after an optimizer step."""
    return output_dir / f"checkpoint-{step}"


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def steps(output_dir: Path) -> list[int]:
    """The optimizer steps of all finished checkpoints, ascending; damaged ones included."""
    finished = [path.parent for path in output_dir.glob(f"checkpoint-*/{SUMS}")]
    return sorted(step for step in map(_step, finished) if step is not None)


def newest(output_dir: Path) -> int | None:
    """The newest whole checkpoint's step, or None if there is none. Says which are damaged."""
    for step in reversed(steps(output_dir)):
        path = checkpoint(output_dir, step)
        problem = damage(path)
        if problem is None:
            return step
        LOG.warning("SeRA: %s is damaged (%s) and is not used", path, problem)
    return None


def named(output_dir: Path, asked: str) -> int:
    """The step of a checkpoint that the YAML asks for (`resume_from_checkpoint`).

    A ValueError if it is none of this run's checkpoints, or not whole.
    """
    path = Path(asked)
    step = _step(path)
    if step is None or path.resolve().parent != output_dir.resolve():
        raise ValueError(
            f"resume_from_checkpoint: {asked} is not a checkpoint in output_dir: {output_dir}. A "
            "run continues in its own directory: set output_dir to the one that holds the "
            "checkpoint, or use `auto_resume_from_checkpoints: true`."
        )
    if problem := damage(path):
        usable = [n for n in steps(output_dir) if damage(checkpoint(output_dir, n)) is None]
        raise ValueError(
            f"resume_from_checkpoint: {asked} cannot be used: {problem}. Whole checkpoints: "
            f"{', '.join(map(str, usable)) or 'none'}. Name another one, or use "
            "`auto_resume_from_checkpoints: true`, which takes the newest whole one."
        )
    return step


def set_aside(output_dir: Path, last: int) -> None:
    """Put what is newer than the step a run continues from where neither run nor host looks.

    A checkpoint whose saving was cut off is removed; a finished one gets another name: it is
    damaged, or belongs to a continuation that is being trained anew.
    """
    for path in output_dir.glob("checkpoint-*"):
        step = _step(path)
        if step is None or step <= last or not path.is_dir() or path.is_symlink():
            continue
        if not (path / SUMS).exists():
            shutil.rmtree(path)
            continue
        target, numbers = output_dir / f"set-aside-{path.name}", count(1)
        while target.exists():
            target = output_dir / f"set-aside-{path.name}.{next(numbers)}"
        path.rename(target)
        LOG.warning("SeRA: continuing from step %d; %s is now %s", last, path, target.name)
