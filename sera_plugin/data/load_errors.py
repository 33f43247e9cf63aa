"""What went wrong when a dataset could not be loaded, in words that name the key and the line.

The host and the libraries below it answer a damaged file with a chain of exceptions whose last one
often says nothing ("An error occurred while generating the dataset", an empty StopIteration).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub.errors import HfHubHTTPError
from requests.exceptions import RequestException

from sera_plugin.config.quoting import plain, quoted
from sera_plugin.data.texts import encodable

_DOCUMENT_BYTES = 2**28

#: What the host says when it has looked everywhere.
_NOT_FOUND = "The dataset could not be loaded."
#: What the libraries below it raise about the content of a file.
_UNREADABLE = (json.JSONDecodeError, UnicodeError, pa.ArrowException)
_GENERATION = "DatasetGenerationError"  # of `datasets`, around any other

#: The host tries these again, because the hub may answer the next time.
UNREACHABLE = (RequestException, HfHubHTTPError)


class DataError(ValueError):
    """Data that cannot be used; the message names the key, the cause and the remedy."""


def load_failure(key: str, path: str, error: BaseException) -> DataError:
    """Why the dataset at this path cannot be loaded.

    Args:
        key: where the YAML names it, such as `datasets[0]`.
        path: the `path` given there.
        error: what the host raised.
    """
    nothing = "it has no rows" if "corresponds to no data" in str(error) else None
    unreadable = any(
        isinstance(one, _UNREADABLE) or type(one).__name__ == _GENERATION for one in _chain(error)
    )
    damage = _file_problem(Path(path)) if unreadable else None
    cause = _empty(path) or damage or nothing or one_line(error)
    if not os.path.exists(path) and str(error).startswith(_NOT_FOUND):
        cause = (
            "there is no such file or directory here, and no such dataset could be found on the "
            "Hugging Face hub. Correct the path; relative ones start where the command is run"
        )
    return DataError(f"{key}.path: {quoted(path, 200)} cannot be loaded: {cause}.")


@contextlib.contextmanager
def while_loading(key: str, path: str) -> Iterator[None]:
    """Name the dataset that cannot be loaded, unless the hub may answer the next time."""
    try:
        yield
    except UNREACHABLE:
        raise
    except Exception as error:
        raise load_failure(key, path, error) from error


@contextlib.contextmanager
def while_preparing(key: str) -> Iterator[None]:
    """Name the datasets that cannot be prepared, unless the hub may answer the next time."""
    try:
        yield
    except (DataError, *UNREACHABLE):
        raise
    except Exception as error:
        raise DataError(
            f"{key} cannot be prepared: {one_line(error)}. Look for the dataset and the column it "
            "names, and mend or remove them."
        ) from error


def check_loaded(key: str, path: str, dataset: Any) -> Any:
    """The split that the host will take; refuse one without rows, or several without a name.

    Raises:
        DataError: naming the key.
    """
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


def _chain(error: BaseException) -> list[BaseException]:
    """The exception and those that led to it, the last first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def one_line(error: BaseException) -> str:
    """The first exception of a chain that says something, in one line."""
    chain = _chain(error)
    # A worker process sends its whole traceback along as an exception of its own.
    said = [x for x in chain if str(x).strip() and type(x).__name__ != "RemoteTraceback"]
    # The last one is where it began.
    first = said[-1] if said else error
    text = " ".join(str(first).split())
    return f"{type(first).__name__}: {plain(text, 300)}" if text else type(first).__name__


def _empty(path: str) -> str | None:
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, "rb") as lines:
            if not any(line.strip() for line in lines):
                return "the file is empty"
    return None


def _file_problem(path: Path) -> str | None:
    """What is wrong with a local file, as far as it is JSON; read up to the first damaged line."""
    if not os.path.isfile(path):
        return None
    try:
        if path.suffix not in (".json", ".jsonl", ".ndjson") or _is_json(path):
            return None
        with path.open(encoding="utf-8-sig", errors="replace") as text:
            for number, line in enumerate(text, start=1):
                problem = _line_problem(line) if line.strip() else None
                if problem:
                    shape = f"line {number} {problem}: {quoted(line.strip())}"
                    return f"{shape}. Mend or remove that line"
    except OSError as error:
        return one_line(error)
    return None


def _is_json(path: Path) -> bool:
    """Whether a file is one JSON document of rows; not asked of files too big to hold."""
    if path.stat().st_size > _DOCUMENT_BYTES:
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return False
    rows = found if isinstance(found, list) else [found]
    return all(isinstance(row, dict) and _encodable(row) for row in rows)


def _encodable(row: Any) -> bool:
    return encodable(json.dumps(row, ensure_ascii=False))


def _line_problem(line: str) -> str | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if not isinstance(row, dict):
        return "is not an object with fields"
    if not _encodable(row):
        return "is not valid Unicode (half of a surrogate pair)"
    return None
