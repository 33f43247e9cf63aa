"""Bad rows and files: what the guard around the host's transforms keeps, mends, and says."""

import json
import os
from functools import partial
from typing import Any

import pyarrow as pa
import pytest
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from requests.exceptions import ReadTimeout

from sera_plugin.data.files import (
    DataError,
    check_loaded,
    edited_since,
    load_failure,
    source_name,
    while_loading,
)
from sera_plugin.data.rows import GuardedTransform, as_it_is
from sera_plugin.host import reading as host
from sera_plugin.host.config import restore_entries
from tests.test_dataset import build

ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
CHANGED = "the chat template does not render the answer as it is"


def strategy(kind: Any, template: str | None = None, **entry: Any) -> Any:
    """A dataset's type; it may name a template of its own, not the tokenizer's."""
    entry |= {"type": kind} | ({"chat_template": template} if template else {})
    cfg = DictDefault({"datasets": [entry]})
    transform, _ = host.strategy(cfg, "datasets", 0)
    template = host.chat_template(cfg, cfg.datasets[0], None)
    return partial(GuardedTransform, transform, source="datasets[0] (x)", template=template)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build()


def guarded(loaded: Any, **options: Any) -> GuardedTransform:
    """A dataset's type, or a transform of one's own, as `host/datasets.py` maps it."""
    if isinstance(loaded, partial):
        return loaded(**options)
    return GuardedTransform(loaded, **{"source": "datasets[0] (x)", **options})


def answering(chosen: Any, asked: Any = "How are you?") -> Any:
    return {"messages": asked, "chosen": chosen, "rejected": "Fine, thanks."}


@pytest.mark.parametrize("template", ENDS)
def test_answers_that_the_host_cuts_wrongly_are_cut_rightly(tokenizer: Any, template: str) -> None:
    loaded, end = strategy("chat_template.default", template), ENDS[template]
    for said in ("user", "assistant", "[[dummy_message]]", "m", ">", "|", " hi ", "hi\n", "\nhi"):
        result = guarded(loaded)(answering(said), 0, tokenizer=tokenizer)
        assert result["sera_problem"] == ""
        assert result["chosen"] == (said if template == "chatml" else said.strip()) + end
    nothing = guarded(loaded)(answering("\n\u200b "), 0, tokenizer=tokenizer)
    assert nothing["sera_problem"] == "empty prompt, chosen or rejected"


REASONING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}"
    "{% if '</think>' in m['content'] %}{{ m['content'] }}"
    "{% else %}<think></think>{{ m['content'] | upper if 'shout' in m['content'] "
    "else m['content'] }}{% endif %}<|im_end|>"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FIRST_PART = (
    "{% for m in messages %}{{ m['content'] if m['content'] is string else "
    "m['content'][0]['text'] }}{% endfor %}"
)
PART = {"type": "text", "text": "one"}


@pytest.mark.parametrize(
    ("template", "asked", "said", "chosen", "problem"),
    [
        (REASONING, "q", "think", "<think></think>think<|im_end|>", ""),
        (REASONING, "q", "<think>why</think>yes", "<think>why</think>yes<|im_end|>", ""),
        (REASONING, "q", "shout", "-", CHANGED),
        (FIRST_PART, [PART], "yes", "yes", ""),
        (FIRST_PART, [PART, PART | {"text": "two"}], "yes", "-", "a message that has parts"),
        (FIRST_PART, [PART, {"type": "image"}], "yes", "-", "content is null or not text"),
    ],
)
def test_a_template_must_render_all_that_is_said(tokenizer, template, asked, said, chosen, problem):
    loaded = strategy("chat_template.default", "jinja", chat_template_jinja=template)
    row = answering(said, [{"role": "user", "content": asked}])
    result = guarded(loaded)(row, 0, tokenizer=tokenizer)
    assert result["chosen"] == chosen
    assert problem in result["sera_problem"]
    assert bool(problem) == bool(result["sera_problem"])


def raises(row: Any) -> Any:
    raise StopIteration


@pytest.mark.parametrize(
    ("transform", "row", "problem"),
    [
        (lambda row: None, {}, "the strategy returned NoneType for it"),
        (raises, {"a": None}, "the host's strategy cannot read it: StopIteration:  (null: 'a')"),
        (
            lambda row: row["x\u202e"],
            {"y\n": 1},
            "no field or role 'x\\u202e'; its fields are 'y\\n'",
        ),
        (lambda row: {}, {}, "must all be text or all messages, not NoneType, NoneType, NoneType"),
        (as_it_is, {}, ""),
        (as_it_is, {"chosen": ""}, "field 'chosen' is empty"),
        (as_it_is, {"chosen": None}, "all be text or all messages, not str, NoneType, str"),
        (as_it_is, {"chosen": [{"role": "assistant", "content": "hi"}]}, "not str, list, str"),
        # No Arrow table can hold it, so a placeholder must stand for the row from here on.
        (as_it_is, {"chosen": "a\ud800"}, "not valid Unicode: half of a surrogate pair"),
    ],
)
def test_whatever_a_strategy_returns_or_raises_is_text_or_a_reason(transform, row, problem):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"} if transform is as_it_is else {}
    result = guarded(transform)(good | row, 1)
    assert result["sera_problem"].endswith(problem)
    assert bool(problem) == bool(result["sera_problem"])
    assert result["chosen"] == ("-" if problem else "a")
    assert (result["sera_source"], result["sera_row"]) == ("datasets[0] (x)", 1)


def test_answers_are_checked_also_where_a_template_renders_the_prompt(tokenizer: Any) -> None:
    def own(row: Any, tokenizer: Any = None) -> Any:
        asked = [{"role": "user", "content": row["q"]}]
        texts = {key: f"{row[key][0]['content']}<|im_end|>" for key in ("chosen", "rejected")}
        return {"prompt": tokenizer.apply_chat_template(asked, tokenize=False), **texts}

    cases = {"a": None, None: "null, not text", 5: "a number, not text", "": "empty"}
    for value, said in cases.items():
        row = {"q": "q", "chosen": [{"content": value}], "rejected": [{"content": "b"}]}
        problem = guarded(own)(row, 0, tokenizer=tokenizer)["sera_problem"]
        assert problem == (f"field \"chosen[0]['content']\" is {said}" if said else "")


LINE = json.dumps({"question": "hi", "good": "hello", "bad": "world"})
FILES = {
    "empty": (b"", "the file is empty"),
    "blank": (b"\n \n\n", "the file is empty"),
    "cut off": (f'{LINE}\n{{"question": "p", "good": \n{LINE}\n'.encode(), "line 2 is not JSON"),
    "no json": (f"{LINE}\n\nhello\n".encode(), r"line 3 is not JSON .*: 'hello'. Mend"),
    "half a surrogate pair": (
        f'{LINE}\n{{"question": "a\\ud800", "good": "b", "bad": "c"}}\n'.encode(),
        "line 2 is not valid Unicode",
    ),
    "missing": (None, "there is no such file or directory here"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_line(name, tmp_path):
    content, said = FILES[name]
    path = tmp_path / "pairs.jsonl"
    entry = DictDefault({"path": str(path), "ds_type": "json", "split": "train"})
    if content is not None:
        path.write_bytes(content)
    said = rf"^datasets\[1\]\.path: '.*' cannot be loaded: .*{said}"
    with pytest.raises(ValueError, match=said), while_loading("datasets[1]", entry.path):
        load_dataset_with_config(entry, False)


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ("hello", PermissionError("not\nyours"), "PermissionError: not yours"),
        # One array of rows is what the host reads too: something else is wrong.
        ('[{"a": 1},\n {"a": 2}]\n', pa.ArrowInvalid("too big"), "ArrowInvalid: too big"),
        # A dataset is missing only where the host says so.
        (None, ValueError("Config 'x' not found"), "ValueError: Config 'x' not found"),
    ],
)
def test_a_file_is_blamed_only_where_its_content_could_not_be_read(content, error, said, tmp_path):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    last = RuntimeError()
    last.__cause__ = error
    said = rf"^datasets\[2\]\.path: '.*' cannot be loaded: {said}\.$"
    with pytest.raises(DataError, match=said), while_loading("datasets[2]", str(path)):
        raise last
    assert "x" * 5000 not in str(load_failure("datasets[0]", "x" * 5000, OSError("too long")))


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


def test_a_source_is_named_by_its_file() -> None:
    names = {"/a/p.jsonl": "p.jsonl", "org/set": "set", "/": "/", "a\u202eb'c": "a\\u202eb'c"}
    for path, name in names.items():
        assert source_name("datasets", 1, path) == f"datasets[1] ({name})"


def test_what_the_hosts_validation_lost_is_put_back() -> None:
    second = {"path": "b", "type": "x", "split": "train"}
    cfg = {"datasets": [{"path": "a", "type": {}}, second.copy()]}
    first = {"path": "a", "type": {"field_prompt": "q"}, "name": "main"}
    raw = [first | {"split": None}, {"path": "b", "type": "x"}]
    restore_entries(cfg, {"datasets": raw, "test_datasets": None})
    assert cfg["datasets"] == [first, second]
