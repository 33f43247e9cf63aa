"""The user's files of rows: the JSON in them, what is damaged in them, whether they were edited.

The host and the libraries below it answer a damaged file with a chain of exceptions whose last one
often says nothing ("An error occurred while generating the dataset", an empty StopIteration).
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub.errors import HfHubHTTPError
from requests.exceptions import RequestException

from sera_plugin.config.credentials import without_credentials
from sera_plugin.config.quoting import plain, quoted
from sera_plugin.data.text import encodable

#: What the libraries below it raise about the content of a file.
_UNREADABLE = (json.JSONDecodeError, UnicodeError, pa.ArrowException)
_GENERATION = "DatasetGenerationError"  # of `datasets`, around any other


class DataError(ValueError):
    """Data that cannot be used; the message names the key, the cause and the remedy."""


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of JSON lines, counted from 1, or of one JSON list, counted from 0.

    ValueError names and shows the line that is not JSON, or says that the file is not UTF-8 text.
    The caller names the path.
    """
    where, line = "it", ""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if where == "it" and line.lstrip().startswith("["):
                    for row, content in enumerate(json.loads(line + lines.read())):
                        yield f"row {row}", content
                elif line.strip():
                    where = f"line {number}"
                    yield where, json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): {quoted(line.strip())}") from None


def source_name(key: str, index: int, path: str) -> str:
    """A dataset as messages name it: `datasets[0] (pairs.jsonl)`."""
    if "://" in path:
        path = re.split("[?#]", without_credentials(path))[0]
    return f"{key}[{index}] ({plain(Path(path).name or path)})"


def load_failure(key: str, path: str, error: BaseException) -> DataError:
    """Why the dataset at this path, which the YAML names under this key, cannot be loaded."""
    # What the host says when it has looked everywhere.
    missing = str(error).startswith("The dataset could not be loaded.")
    if missing and not os.path.exists(path):
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
    """Name the dataset that cannot be loaded, or without a path those that cannot be prepared."""
    try:
        yield
    except (DataError, RequestException, HfHubHTTPError):
        raise  # the host tries again where the hub has not answered
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
    text = plain(" ".join(str(first).split()), 300).rstrip(".")
    return type(first).__name__ + (f": {text}" if text else "")


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
        is_json = path.endswith((".json", ".jsonl", ".ndjson"))
        if is_json and any(
            isinstance(one, _UNREADABLE) or type(one).__name__ == _GENERATION
            for one in _chain(error)
        ):
            return _damaged_row(Path(path))
    return None


def _damaged_row(path: Path) -> str | None:
    try:
        for where, row in json_rows(path):
            text = json.dumps(row, ensure_ascii=False)
            problem = "" if isinstance(row, dict) else "is not an object with fields"
            if not encodable(text):
                problem = "is not valid Unicode (half of a surrogate pair)"
            if problem:
                return f"{where} {problem}: {quoted(text)}. Mend or remove it"
    except ValueError as error:
        return f"{error}. Mend or remove it"
    return None


def edited_since(entries: Sequence[Any], prepared: Path, *aside: Path) -> str:
    """The local files that are newer than what was prepared from them, with their times.

    The host keeps prepared data by configuration, not by content, and would go on training rows
    that have been mended since. What a run writes, to the directories `aside`, is no edit.
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
