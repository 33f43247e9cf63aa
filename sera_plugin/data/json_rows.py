"""Rows of a file of JSON lines, or of one JSON list, and where each of them stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, row): `line 3`, counted from 1, or of a list `row 2`, counted from 0.

    A row is whatever stands there; empty lines are none.

    Args:
        path: UTF-8 text, with a byte order mark or without.

    Raises:
        ValueError: if it is not text or not JSON, naming the line. The caller names the path.
        OSError: if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason})") from None
    if text.lstrip().startswith("["):
        for row, content in enumerate(_parsed(text, "it")):
            yield f"row {row}", content
        return
    # Only line feeds end a line: texts may hold the other characters that end lines for Python.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"line {number}")


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error})") from None
