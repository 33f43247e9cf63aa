"""A strategy's transform of raw rows, guarded: a bad row becomes a note about itself.

What is wrong with a row shows in a transform as an exception without a row number, or not at all.
The guard turns such a row into a harmless placeholder that says what was wrong and where the row
came from. It stays in its place through shuffling, merging and the host's files, up to
`dataset.tokenize_rows`, which drops and names it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from sera_plugin.config.quoting import plain, quoted, without_credentials
from sera_plugin.data.templates import AnswerRecorder, row_texts
from sera_plugin.data.texts import SYSTEM, TEXTS, RowError, check_fields, check_texts

#: What is wrong with a row ("" if nothing), the dataset it comes from, its place there from 0.
PROBLEM, SOURCE, ROW = "sera_problem", "sera_source", "sera_row"

#: Raise it with what the guard makes of a row: prepared data of another version is prepared anew.
GUARD_VERSION = 3


def source_name(key: str, index: int, path: str) -> str:
    """A dataset as messages name it: `datasets[0] (pairs.jsonl)`."""
    if "://" in path:
        path = re.split("[?#]", without_credentials(path))[0]
    return f"{key}[{index}] ({plain(PurePath(path).name or path)})"


def as_it_is(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transform of rows that a strategy has mapped in a way of its own."""
    return row


@dataclass
class GuardedTransform:
    """A strategy's transform that never raises; sent to worker processes by the host.

    Attributes:
        transform: the host's function from a raw row to prompt, chosen and rejected.
        source: the dataset's name in messages.
        kept: columns of the raw rows to keep; all others have done their work.
        optional: fields that may be empty.
        version: of the guard; the host names cached results by the attributes.
    """

    transform: Callable[..., Any]
    source: str
    kept: tuple[str, ...] = ()
    optional: tuple[str, ...] = SYSTEM
    version: int = GUARD_VERSION

    def __post_init__(self) -> None:
        self._renders = "tokenizer" in inspect.signature(self.transform).parameters

    def __call__(self, row: Mapping[str, Any], index: int, tokenizer: Any = None) -> dict[str, Any]:
        """The row as text, or a placeholder that says what is wrong with it."""
        problem = ""
        try:
            texts = self._texts(dict(row), tokenizer)
        except RowError as error:
            problem = str(error)
        except Exception as error:  # a strategy may raise anything on a row it did not expect
            problem = _cause(error, row)
        if problem:
            texts = dict.fromkeys(TEXTS, "-")
        kept = {key: row[key] for key in self.kept}
        return {**kept, **texts, PROBLEM: problem, SOURCE: self.source, ROW: index}

    def _texts(self, row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
        recorder = AnswerRecorder(tokenizer)
        options = {"tokenizer": recorder.recording()} if self._renders else {}

        def transform(row: dict[str, Any]) -> tuple[Any, dict[str, str]]:
            result = self.transform(row, **options)
            if not isinstance(result, Mapping):
                raise RowError(f"the strategy returned {type(result).__name__} for it")
            return result, dict(zip(TEXTS, row_texts(result, tokenizer), strict=True))

        result, texts = transform(copy.deepcopy(row))
        answers = recorder.completions()
        if len(answers) == 2:
            texts["chosen"], texts["rejected"] = answers
        templated = recorder.used or not isinstance(result["prompt"], str)
        check_fields(row, texts, lambda row: transform(row)[1], templated, self.optional)
        check_texts(**texts)
        return texts


def _cause(error: Exception, row: Mapping[str, Any]) -> str:
    """Why a strategy could not transform a row, in one line."""
    names = [quoted(key) for key in row]
    if isinstance(error, KeyError) and error.args and error.args[0] not in row:
        fields = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return f"no field or role {quoted(error.args[0])}; its fields are {fields}"
    null = [quoted(key) for key, value in row.items() if value is None]
    aside = f" (null: {', '.join(null[:5])})" if null else ""
    said = f"{type(error).__name__}: {plain(str(error), 120)}"
    return f"the host's strategy cannot read it: {said}{aside}"
