"""Files that cannot be loaded: named in the user's own terms, with the line; and those edited."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pytest
from requests.exceptions import ReadTimeout

from sera_plugin.data.files import (
    DataError,
    check_loaded,
    edited_since,
    load_failure,
    one_line,
    while_loading,
)

LINE = json.dumps({"question": "hi", "good": "hello", "bad": "world"})
FILES = {
    "empty": (b"", "the file is empty"),
    "blank": (b"\n \n\n", "the file is empty"),
    "cut off": (f'{LINE}\n{{"question": "p", "good": \n{LINE}\n'.encode(), "line 2 is not JSON"),
    "no json": (f"{LINE}\n\nhello\n".encode(), r"line 3 is not JSON .*: 'hello'. Mend"),
    "a bare value": (f"{LINE}\n5\n".encode(), "line 2 is not an object with fields: '5'"),
    "half a surrogate pair": (
        f'{LINE}\n{{"question": "a\\ud800", "good": "b", "bad": "c"}}\n'.encode(),
        "line 2 is not valid Unicode",
    ),
    "missing": (None, "there is no such file or directory here"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_line(name, tmp_path):
    from axolotl.utils.data.shared import load_dataset_with_config
    from axolotl.utils.dict import DictDefault

    content, said = FILES[name]
    path = tmp_path / "pairs.jsonl"
    entry = DictDefault({"path": str(path), "ds_type": "json", "split": "train"})
    if content is not None:
        path.write_bytes(content)
    with (
        pytest.raises(ValueError, match=rf"^datasets\[1\]\.path: '.*' cannot be loaded: .*{said}"),
        while_loading("datasets[1]", entry.path),
    ):
        load_dataset_with_config(entry, False)


JSON_ERROR = json.JSONDecodeError("no", "x", 0)
#: What is in the file, what the host raised because of what, and what is said.
FAILURES = [
    ('{"a": 1}\nhello\n', RuntimeError("outer"), JSON_ERROR, "line 2 is not JSON .*"),
    ('{"a": 1}\nhello\n', RuntimeError("outer"), pa.ArrowInvalid("no"), "line 2 is not JSON .*"),
    ("hello", PermissionError("not yours"), None, "PermissionError: not yours"),
    # One array of rows is what the host reads too: something else is wrong.
    ('[{"a": 1},\n {"a": 2}]\n', pa.ArrowInvalid("too big"), None, "ArrowInvalid: too big"),
    # A dataset is missing only where the host says so.
    (None, ValueError("Config 'x' not found"), None, "ValueError: Config 'x' not found"),
]


@pytest.mark.parametrize(("content", "error", "cause", "said"), FAILURES)
def test_a_file_is_blamed_only_where_its_content_could_not_be_read(
    content, error, cause, said, tmp_path
):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    error.__cause__ = cause
    with pytest.raises(DataError, match=rf"^datasets\[2\]\.path: '.*' cannot be loaded: {said}\.$"):
        raise load_failure("datasets[2]", str(path), error)
    assert "x" * 5000 not in str(load_failure("datasets[0]", "x" * 5000, OSError("too long")))


def test_one_line_finds_where_it_began():
    first, last = KeyError("it began\nhere"), RuntimeError()
    last.__cause__ = first
    assert one_line(last) == r"KeyError: 'it began\nhere'"
    assert one_line(StopIteration()) == "StopIteration"


def test_several_splits_need_a_name():
    with pytest.raises(DataError, match=r"datasets\[0\].split is not set.*one of 'a', 'b'"):
        check_loaded("datasets[0]", "org/set", {"a": [1], "b": [2]})
    assert check_loaded("datasets[0]", "org/set", {"train": [1], "b": [2]}) == [1]
    with pytest.raises(DataError, match=r"datasets\[0\].path: 'org/set' has no rows"):
        check_loaded("datasets[0]", "org/set", {"train": []})


def test_a_hub_that_does_not_answer_is_left_to_the_host():
    """The host tries again; only what it gives up on for another reason is ours to explain."""
    for place in (("datasets[0]", "org/set"), ("datasets",)):
        with pytest.raises(ReadTimeout), while_loading(*place):
            raise ReadTimeout("no answer")
    said = pytest.raises(DataError, match=r"^datasets cannot be prepared: ZeroDivisionError: no")
    with said, while_loading("datasets"):
        raise ZeroDivisionError("no")


def test_an_edit_is_noticed_wherever_the_file_lies(tmp_path):
    prepared, folder = tmp_path / "prepared", tmp_path / "data"
    path = folder / "part" / "a.jsonl"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (1, 1))
    entries = [{"path": str(folder)}, {"path": "https://example.org/" + "x" * 5000}]
    assert edited_since(entries, prepared) == ""
    prepared.mkdir()
    assert edited_since(entries, prepared) == ""
    os.utime(path, (2**32, 2**32))
    assert "a.jsonl" in edited_since(entries, prepared)
    # What a run writes is no edit, wherever it puts it.
    assert edited_since(entries, prepared, path.parent) == ""
    assert edited_since(entries, path.parent / "x") == ""
    assert edited_since([entries[0] | {"data_files": "other.jsonl"}], prepared) == ""
    path.rename(folder / "cache-1.arrow")
    assert edited_since(entries, prepared) == ""
