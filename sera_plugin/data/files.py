"""The user's files of rows: the JSON in them, what is damaged in them, whether they were edited.

The host and the libraries below it answer a damaged file with a chain of exceptions whose last one
often says nothing ("An error occurred while generating the dataset", an empty StopIteration).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub.errors import HfHubHTTPError
from requests.exceptions import RequestException

from sera_plugin.config.quoting import plain, quoted
from sera_plugin.data.texts import encodable

#: A JSON document larger than this is not read whole to find out whether it is one.
_DOCUMENT_BYTES = 2**28
#: What the host says when it has looked everywhere.
_NOT_FOUND = "The dataset could not be loaded."
#: What the libraries below it raise about the content of a file.
_UNREADABLE = (json.JSONDecodeError, UnicodeError, pa.ArrowException)
_GENERATION = "DatasetGenerationError"  # of `datasets`, around any other
#: The host tries these again, because the hub may answer the next time.
_UNREACHABLE = (RequestException, HfHubHTTPError)


class DataError(ValueError):
    """Data that cannot be used; the message names the key, the cause and the remedy."""


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of JSON lines, counted from 1, or of one JSON list, counted from 0.

    ValueError names the line that is not JSON or not UTF-8 text. The caller names the path.
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


def load_failure(key: str, path: str, error: BaseException) -> DataError:
    """Why the dataset at this path, which the YAML names under this key, cannot be loaded."""
    if not os.path.exists(path) and str(error).startswith(_NOT_FOUND):
        cause = (
            "there is no such file or directory here, and no such dataset could be found on the "
            "Hugging Face hub. Correct the path; relative ones start where the command is run"
        )
    else:
        empty = "it has no rows" if "corresponds to no data" in str(error) else None
        cause = _damage(path, error) or empty or one_line(error)
    return DataError(f"{key}.path: {quoted(path, 200)} cannot be loaded: {cause}.")


@contextlib.contextmanager
def while_loading(key: str, path: str | None = None) -> Iterator[None]:
    """Name the dataset that cannot be loaded, or without a path those that cannot be prepared.

    Not where the hub may answer the next time.
    """
    try:
        yield
    except (DataError, *_UNREACHABLE):
        raise
    except Exception as error:
        if path is not None:
            raise load_failure(key, path, error) from error
        raise DataError(
            f"{key} cannot be prepared: {one_line(error)}. Look for the dataset and the column it "
            "names, and mend or remove them."
        ) from error


def check_loaded(key: str, path: str, dataset: Any) -> Any:
    """The split that the host will take; DataError for none without rows or several unnamed."""
    if isinstance(dataset, Mapping):
        if "train" not in dataset:
            raise DataError(
                f"{key}.split is not set, and {quoted(path, 200)} has no split named train. Set it "
                f"to one of {', '.join(map(quoted, dataset))}."
            )
        dataset = dataset["train"]
    if len(dataset) == 0:
        raise DataError(f"{key}.path: {quoted(path, 200)} has no rows. Give a file that has some.")
    return dataset


def one_line(error: BaseException) -> str:
    """The exception of a chain in which it began, if that says something, in one line."""
    # A worker process sends its whole traceback along as an exception of its own.
    said = [x for x in _chain(error) if str(x).strip() and type(x).__name__ != "RemoteTraceback"]
    first = said[-1] if said else error
    text = " ".join(str(first).split())
    return f"{type(first).__name__}: {plain(text, 300)}" if text else type(first).__name__


def _chain(error: BaseException | None) -> list[BaseException]:
    """The exception and those that led to it, the last first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _damage(path: str, error: BaseException) -> str | None:
    """What is wrong with a local file: it is empty, or the first line of JSON that is damaged."""
    if not os.path.isfile(path):
        return None
    with contextlib.suppress(OSError):  # the host's own error says it
        with open(path, "rb") as content:
            if not any(map(bytes.strip, content)):
                return "the file is empty"
        if not path.endswith((".json", ".jsonl", ".ndjson")) or not any(
            isinstance(one, _UNREADABLE) or type(one).__name__ == _GENERATION
            for one in _chain(error)
        ):
            return None
        with open(path, encoding="utf-8-sig", errors="replace") as lines:
            small = os.path.getsize(path) <= _DOCUMENT_BYTES
            if small and not _problem(lines.read(), whole=True):
                return None
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.strip() and (problem := _problem(line)):
                    shown = quoted(line.strip())
                    return f"line {number} {problem}: {shown}. Mend or remove that line"
    return None


def _problem(text: str, whole: bool = False) -> str:
    """Why a text is not a row in JSON, or a whole file not a list of rows."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    rows = found if whole and isinstance(found, list) else [found]
    if not all(isinstance(row, dict) for row in rows):
        return "is not an object with fields"
    valid = all(encodable(json.dumps(row, ensure_ascii=False)) for row in rows)
    return "" if valid else "is not valid Unicode (half of a surrogate pair)"


def edited_since(entries: Sequence[Any], prepared: Path, *aside: Path) -> str:
    """The local files that are newer than what was prepared from them, with their times.

    The host keeps prepared data by configuration, not by content. Where rows have been mended it
    would go on training the old ones. Data prepared elsewhere, without its files, stays good. What
    a run writes, to the directories `aside`, may lie in one that holds data and is no edit.
    """
    if not prepared.exists():
        return ""
    since = prepared.stat().st_mtime_ns
    skipped = {os.path.realpath(path) for path in (prepared.parent, *aside)}
    named: list[str] = []
    for entry in entries:
        files = entry.get("data_files") or [entry["path"]]
        named += [files] if isinstance(files, str) else files
    for path in list(named):
        for folder, below, names in os.walk(path):
            below[:] = [x for x in below if os.path.realpath(f"{folder}/{x}") not in skipped]
            # What libraries keep beside the data begins like this.
            named += [f"{folder}/{x}" for x in names if not x.startswith((".", "cache-"))]
    found = {path: os.stat(path).st_mtime_ns for path in named if os.path.isfile(path)}
    return " ".join(f"{path} {time}" for path, time in sorted(found.items()) if time > since)
