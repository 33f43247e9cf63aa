"""What went wrong when a dataset could not be loaded, in words that name the key and the line.

The host and the libraries below it answer a damaged file with a chain of exceptions whose last one
often says nothing ("An error occurred while generating the dataset", an empty StopIteration).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sera_plugin.texts import encodable, shown


class DataError(ValueError):
    """Data that cannot be used; the message names the key, the cause and the remedy."""


def load_failure(key: str, path: str, error: BaseException) -> DataError:
    """Why the dataset at this path cannot be loaded.

    Args:
        key: where the YAML names it, such as `datasets[0]`.
        path: the `path` given there.
        error: what the host raised.
    """
    cause = _file_problem(Path(path)) or one_line(error)
    if not Path(path).exists() and isinstance(error, ValueError):
        cause = (
            "there is no such file or directory here, and no such dataset could be found on the "
            "Hugging Face hub. Correct the path; relative ones start where the command is run"
        )
    return DataError(f"{key}.path: {shown(path, 200)} cannot be loaded: {cause}.")


def check_loaded(key: str, path: str, dataset: Any) -> None:
    """Refuse a dataset without rows, or one of several splits where none was named.

    Raises:
        DataError: naming the key.
    """
    if isinstance(dataset, Mapping):
        if "train" not in dataset:
            raise DataError(
                f"{key}.split is not set, and {shown(path, 200)} has no split named train. Set it "
                f"to one of {', '.join(map(shown, dataset))}."
            )
        dataset = dataset["train"]
    if len(dataset) == 0:
        raise DataError(f"{key}.path: {shown(path, 200)} has no rows. Give a file that has some.")


def one_line(error: BaseException) -> str:
    """The first exception of a chain that says something, in one line."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    said = [found for found in chain if str(found).strip()]
    # The last one is where it began.
    first = said[-1] if said else error
    text = " ".join(str(first).split())
    return f"{type(first).__name__}: {shown(text, 300)[1:-1]}" if text else type(first).__name__


def _file_problem(path: Path) -> str | None:
    """What is wrong with a local file of JSON, if it is one and something is."""
    if not path.is_file():
        return None
    try:
        if not path.read_bytes().strip():
            return "the file is empty"
        if path.suffix not in (".json", ".jsonl", ".ndjson"):
            return None
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            if path.suffix != ".json" or not _is_json(path):
                for number, line in enumerate(lines, start=1):
                    problem = _line_problem(line) if line.strip() else None
                    if problem:
                        return (
                            f"line {number} {problem}: {shown(line.strip())}. Mend or remove that "
                            "line"
                        )
    except OSError as error:
        return one_line(error)
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _line_problem(line: str) -> str | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if not isinstance(row, dict):
        return "is not an object with fields"
    if not encodable(json.dumps(row, ensure_ascii=False)):
        return "is not valid Unicode (half of a surrogate pair)"
    return None
