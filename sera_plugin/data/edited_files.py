"""Whether data was edited since the host prepared it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def edited_since(entries: Sequence[Any], prepared: Path, *aside: Path) -> str:
    """The local files that are newer than what was prepared from them, with their times.

    The host keeps prepared data by configuration, not by content. Where rows have been mended it
    would go on training the old ones. Data prepared elsewhere, without its files, stays good.

    Args:
        entries: the datasets of the configuration.
        prepared: where the host has put what it prepared from them.
        aside: directories that a run writes to, which may lie in one that holds data.
    """
    if not prepared.exists():
        return ""
    since = prepared.stat().st_mtime_ns
    skipped = {os.path.realpath(path) for path in (prepared.parent, *aside)}
    named: list[str] = []
    for entry in entries:
        files = entry.get("data_files") or [entry["path"]]
        named += [files] if isinstance(files, str) else list(files)
    for path in list(named):
        for folder, below, names in os.walk(path):
            below[:] = [
                x for x in below if os.path.realpath(os.path.join(folder, x)) not in skipped
            ]
            # What libraries keep beside the data begins like this.
            named += [os.path.join(folder, x) for x in names if not x.startswith((".", "cache-"))]
    found = {path: os.stat(path).st_mtime_ns for path in named if os.path.isfile(path)}
    return " ".join(f"{path} {time}" for path, time in sorted(found.items()) if time > since)
