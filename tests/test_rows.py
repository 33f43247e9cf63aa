"""The guard around the host's transforms: what it keeps, mends, and says."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from requests.exceptions import ReadTimeout

from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import DUPLICATE, SPELLED_OUT, prepare_rows, tokenize_rows
from sera_plugin.data.files import (
    DataError,
    check_loaded,
    edited_since,
    load_failure,
    one_line,
    while_loading,
    while_preparing,
)
from sera_plugin.data.rows import GuardedTransform, as_it_is, source_name
from sera_plugin.host.config import restore_entries
from tests.test_dataset import build, ordinary_texts, spelled

ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}


def strategy(kind: Any, template: str | None = None, **entry: Any) -> Any:
    """A host strategy; its dataset may name a template of its own, not the tokenizer's."""
    from axolotl.prompt_strategies.dpo import load
    from axolotl.utils.dict import DictDefault

    entry |= {"type": kind} | ({"chat_template": template} if template else {})
    cfg = DictDefault({"chat_template": "tokenizer_default", "datasets": [entry]})
    return load("user_defined.default" if isinstance(kind, dict) else kind, cfg, dataset_idx=0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build()


def guarded(loaded: Any, **options: Any) -> GuardedTransform:
    """A host strategy as `host/datasets.py` maps it."""
    transform = loaded[0] if isinstance(loaded, tuple) else loaded
    return GuardedTransform(transform, **{"source": "datasets[0] (x)", **options})


def transformed(tokenizer: Any, loaded: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    transform = guarded(loaded)
    result: dict[str, Any] = transform(copy.deepcopy(dict(row)), 3, tokenizer=tokenizer)
    return result


def answered(tokenizer: Any, template: str, content: str) -> dict[str, Any]:
    row = {"messages": "How are you?", "chosen": content, "rejected": "Fine, thanks."}
    return transformed(tokenizer, strategy("chat_template.default", template), row)


# ------------------------------------------------------------------ chat templates


@pytest.mark.parametrize("template", ENDS)
@pytest.mark.parametrize(
    "content",
    ["user", "assistant", "[[dummy_message]]", "m", "a", ">", "|", " hi ", "hi\n", "\nhi"],
)
def test_answers_that_the_host_cuts_wrongly_are_cut_rightly(
    tokenizer: Any, template: str, content: str
) -> None:
    result = answered(tokenizer, template, content)
    assert result["sera_problem"] == ""
    assert result["chosen"].endswith(ENDS[template])
    answer = result["chosen"].removesuffix(ENDS[template])
    assert answer == (content if template == "chatml" else content.strip())
    nothing = answered(tokenizer, template, f"\n\u200b{' ' * len(content)}")
    assert nothing["sera_problem"] == "empty prompt, chosen or rejected"


@pytest.mark.parametrize("template", ENDS)
def test_the_host_alone_still_cuts_them_wrongly(tokenizer: Any, template: str) -> None:
    """Where this fails the host was mended, and templates.AnswerRecorder may go."""
    row = {"messages": "How are you?", "chosen": "user", "rejected": "Fine, thanks."}
    transform, _ = strategy("chat_template.default", template)
    assert transform(row, tokenizer=tokenizer)["chosen"] != f"user{ENDS[template]}"


def test_ordinary_answers_are_what_the_host_makes_of_them(tokenizer: Any) -> None:
    for template in ENDS:
        loaded = strategy("chat_template.default", template)
        for text in ordinary_texts(60):
            row = {"messages": "Hello?", "chosen": text, "rejected": text[::-1] + "."}
            result = transformed(tokenizer, loaded, row)
            host = loaded[0](dict(row), tokenizer=tokenizer)
            assert {key: result[key] for key in host} == host


REASONING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}"
    "{% if '</think>' in m['content'] %}{{ m['content'] }}"
    "{% else %}<think></think>{{ m['content'] | upper if 'shout' in m['content'] "
    "else m['content'] }}{% endif %}<|im_end|>"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_templates_that_write_reasoning_keep_what_the_answer_has(tokenizer: Any) -> None:
    loaded = strategy("chat_template.default", "jinja", chat_template_jinja=REASONING)

    def of(content: str) -> dict[str, Any]:
        row = {"messages": "q", "chosen": content, "rejected": "no"}
        return transformed(tokenizer, loaded, row)

    assert of("think")["chosen"] == "think<|im_end|>"
    assert of("<think>why</think>yes")["chosen"] == "<think>why</think>yes<|im_end|>"
    assert of("shout")["sera_problem"] == "the chat template does not render the answer as it is"


def test_parts_of_a_message_must_all_be_rendered(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] if m['content'] is string else "
        "m['content'][0]['text'] }}{% endfor %}"
    )
    loaded = strategy("chat_template.default", "jinja", chat_template_jinja=template)

    def of(*parts: Any) -> Any:
        user = {"role": "user", "content": list(parts)}
        row = {"messages": [user], "chosen": "yes", "rejected": "no"}
        return transformed(tokenizer, loaded, row)["sera_problem"]

    text = {"type": "text", "text": "one"}
    assert of(text) == ""
    assert "a message that has parts" in of(text, {"type": "text", "text": "two"})
    assert "null or not text" in of(text, {"type": "image", "image": "x.png"})


# ------------------------------------------------------------------ the guard


def test_a_strategy_may_return_anything_and_raise_anything() -> None:
    def of(transform: Any, **row: Any) -> Any:
        return GuardedTransform(transform, "s")(row, 0)["sera_problem"]

    def raises(row: Any) -> Any:
        raise StopIteration

    assert of(lambda row: None) == "the strategy returned NoneType for it"
    assert of(raises, a=None) == "the host's strategy cannot read it: StopIteration:  (null: 'a')"
    assert of(lambda row: row["x\u202e"], **{"y\n": 1}) == (
        "no field or role 'x\\u202e'; its fields are 'y\\n'"
    )
    assert "must all be text" in of(lambda row: {})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"chosen": ""}, "field 'chosen' is empty"),
        ({"rejected": " \n"}, "field 'rejected' is empty"),
        ({"prompt": ""}, "field 'prompt' is empty"),
        ({"chosen": None}, "all be text or all messages, not str, NoneType, str"),
        ({"chosen": [{"role": "assistant", "content": "hi"}]}, "not str, list, str"),
        ({"prompt": [], "chosen": [], "rejected": []}, "all be text or all messages"),
        # No Arrow table can hold it, so a placeholder must stand for the row from here on.
        ({"chosen": "a\ud800"}, "not valid Unicode: half of a surrogate pair"),
    ],
)
def test_rows_that_a_strategy_has_mapped_in_a_way_of_its_own(bad: Any, reason: str) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    transform = guarded(as_it_is)
    assert transform(row, 0)["sera_problem"] == ""
    result = transform(row | bad, 1)
    assert reason in result["sera_problem"]
    assert result["chosen"] == "-"


def test_several_splits_need_a_name() -> None:
    with pytest.raises(DataError, match=r"datasets\[0\].split is not set.*one of 'a', 'b'"):
        check_loaded("datasets[0]", "org/set", {"a": [1], "b": [2]})
    assert check_loaded("datasets[0]", "org/set", {"train": [1], "b": [2]}) == [1]
    with pytest.raises(DataError, match=r"datasets\[0\].path: 'org/set' has no rows"):
        check_loaded("datasets[0]", "org/set", {"train": []})


def test_a_hub_that_does_not_answer_is_left_to_the_host() -> None:
    """The host tries again; only what it gives up on for another reason is ours to explain."""
    for context in (while_loading("datasets[0]", "org/set"), while_preparing("datasets")):
        with pytest.raises(ReadTimeout), context:
            raise ReadTimeout("no answer")
    said = pytest.raises(DataError, match=r"^datasets cannot be prepared: ZeroDivisionError: no")
    with said, while_preparing("datasets"):
        raise ZeroDivisionError("no")


def test_answers_are_checked_also_where_a_template_renders_the_prompt(tokenizer: Any) -> None:
    def own(row: Any, tokenizer: Any = None) -> Any:
        asked = [{"role": "user", "content": row["q"]}]
        texts = {key: f"{row[key][0]['content']}<|im_end|>" for key in ("chosen", "rejected")}
        return {"prompt": tokenizer.apply_chat_template(asked, tokenize=False), **texts}

    row = {"q": "q", "chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}
    templated = copy.copy(tokenizer)
    templated.chat_template = REASONING
    assert transformed(templated, (own, {}), row)["sera_problem"] == ""
    for value, said in ((None, "null, not text"), (5, "a number, not text"), ("", "empty")):
        problem = transformed(templated, (own, {}), row | {"chosen": [{"content": value}]})
        assert problem["sera_problem"] == f"field \"chosen[0]['content']\" is {said}"


def test_the_file_is_blamed_only_where_its_content_could_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": 1}\nhello\n', encoding="utf-8")
    key = "datasets[2]"
    for error in (json.JSONDecodeError("no", "x", 0), pa.ArrowInvalid("no")):
        wrapped = RuntimeError("outer")
        wrapped.__cause__ = error
        assert "line 2 is not JSON" in str(load_failure(key, str(path), wrapped))
    said = str(load_failure(key, str(path), PermissionError("not yours")))
    assert said.endswith("cannot be loaded: PermissionError: not yours.")
    # One array of rows is what the host reads too: something else is wrong.
    path.write_text('[{"a": 1},\n {"a": 2}]\n', encoding="utf-8")
    said = str(load_failure(key, str(path), pa.ArrowInvalid("too big")))
    assert said.endswith("cannot be loaded: ArrowInvalid: too big.")


def test_a_dataset_is_missing_only_where_the_host_says_so() -> None:
    said = str(load_failure("datasets[0]", "org/set", ValueError("BuilderConfig 'x' not found")))
    assert "cannot be loaded: ValueError: BuilderConfig 'x' not found." in said
    assert "x" * 5000 not in str(load_failure("datasets[0]", "x" * 5000, OSError("too long")))


def test_an_edit_is_noticed_wherever_the_file_lies(tmp_path: Path) -> None:
    prepared, folder = tmp_path / "prepared", tmp_path / "data"
    (folder / "part").mkdir(parents=True)
    path = folder / "part" / "a.jsonl"
    path.touch()
    os.utime(path, (1, 1))
    entries = [{"path": str(folder)}, {"path": "https://example.org/" + "x" * 5000}]
    assert edited_since(entries, prepared) == ""
    prepared.mkdir()
    assert edited_since(entries, prepared) == ""
    os.utime(path, (2**32, 2**32))
    assert "a.jsonl" in edited_since(entries, prepared)
    # What a run writes is no edit, wherever it puts it.
    assert edited_since(entries, prepared, folder / "part") == ""
    assert edited_since(entries, prepared.parent / "data" / "part" / "x") == ""
    assert edited_since([entries[0] | {"data_files": "other.jsonl"}], prepared) == ""
    path.rename(folder / "cache-1.arrow")
    assert edited_since(entries, prepared) == ""


def test_nothing_usable_names_the_set(tokenizer: Any) -> None:
    for name, keys in (("train", "`datasets:`"), ("eval", "`test_datasets:` or `val_set_size`")):
        with pytest.raises(ValueError, match=f"none of the 1 {name} rows .* Check {keys}, and"):
            tokenize_rows([{"sera_problem": "why"}], tokenizer, [2], None, name=name)


# ------------------------------------------------------------------ tokens


def rows_of(tokenizer: Any, *pairs: tuple[str, str], **options: Any) -> Any:
    rows = [{"prompt": "x", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    options = {"max_length": None, **options}
    return tokenize_rows(rows, tokenizer, [tokenizer.eos_token_id], **options)


def test_an_answer_may_spell_the_token_that_ends_a_turn(tokenizer: Any) -> None:
    result = rows_of(tokenizer, ("ab</s>hello</s>", "world</s>"), ("ab<s>", "hello"))
    assert result.kept == {SPELLED_OUT: [0, 1]}
    for ids in result.chosen_ids:
        assert ids.tolist().count(tokenizer.eos_token_id) == 1
        assert tokenizer.bos_token_id not in ids
    assert spelled(tokenizer, result.chosen_ids[0]) == "ab</s>hello</s>"
    assert spelled(tokenizer, result.chosen_ids[1]) == "ab<s></s>"


def test_equal_answers_prefer_nothing(tokenizer: Any) -> None:
    result = rows_of(tokenizer, ("ab", "hello"), ("ab", "ab"), ("ab</s>", "ab"), ("ab</s>\n", "ab"))
    assert result.rows == [0]
    assert result.dropped == {"chosen equals rejected, which prefers nothing": [1, 2, 3]}
    cut = rows_of(tokenizer, ("yzx", "xzy"), ("xzx", "xzy"), max_length=3, truncate=True)
    assert (cut.rows, list(cut.dropped.values())) == ([0], [[1]])


def test_duplicates_are_kept_and_named(tokenizer: Any) -> None:
    result = rows_of(tokenizer, *[("ab", "hello")] * 2, ("ab", "world"), ("ab</s>", "hello"))
    assert len(result.rows) == 4
    assert result.kept == {DUPLICATE: [1, 3]}


def test_only_rows_that_are_trained_are_remarked_on(tokenizer: Any) -> None:
    result = rows_of(tokenizer, ("a\0b", "y"), ("\0" * 30, "y"), max_length=12)
    assert result.rows == [0]
    assert list(result.kept.values()) == [[0]]


@pytest.mark.parametrize(
    ("config", "cfg", "said"),
    [
        ({}, {}, None),
        ({"bad_rows": "raise"}, {}, r"^sera.bad_rows: raise, and 2 of the 3 train rows .*bad_rows"),
        (
            {},
            {"excess_length_strategy": "raise"},
            r"^excess_length_strategy: raise, and 2 of the 3 .*1 row\(s\): longer .*\(rows 2\)",
        ),
    ],
)
def test_bad_and_long_rows_stop_the_run_when_asked_to(
    tokenizer: Any, config: Any, cfg: Any, said: str | None
) -> None:
    rows = [{"prompt": "hi", "chosen": text, "rejected": "ab"} for text in ("x", "", "hello " * 9)]
    options = ([tokenizer.eos_token_id], {"sequence_len": 9, **cfg}, SeraConfig(**config), "train")
    if said is None:
        assert prepare_rows(rows, tokenizer, *options).rows == [0]
        return
    with pytest.raises(ValueError, match=said) as error:
        prepare_rows(rows, tokenizer, *options)
    assert "1 row(s): prompt, chosen or rejected without tokens (rows 1)" in str(error.value)
    assert str(error.value).split(". ")[-1].startswith("Mend or remove them, or set ")
    if config:  # rows that are only too long are no bad rows
        assert prepare_rows(rows[::2], tokenizer, *options).rows == [0]


def test_only_the_commonest_reasons_are_named(tokenizer: Any) -> None:
    good = {"prompt": "hi", "chosen": "ab", "rejected": "hello"}
    bad = [
        {"sera_problem": f"problem {i}", "sera_source": "datasets[0] (f)", "sera_row": i}
        for i in range(30)
    ]
    lines = tokenize_rows([good, *bad, bad[7]], tokenizer, [2], None).reasons()
    assert lines[0] == "2 row(s): problem 7 (datasets[0] (f) rows 7, 7)"
    assert lines[-1] == "10 more reasons"
    assert len(lines) == 21


# ------------------------------------------------------------------ words


@settings(deadline=None, max_examples=200)
@given(value=st.text() | st.binary() | st.lists(st.text()) | st.floats() | st.integers())
def test_a_shown_value_is_short_and_plain(value: Any) -> None:
    text = quoted(value)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 63


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/p.jsonl", "p.jsonl"), ("org/set", "set"), ("/", "/"), ("a\u202eb'c", "a\\u202eb'c")],
)
def test_a_source_is_named_by_its_file(path: str, name: str) -> None:
    assert source_name("datasets", 1, path) == f"datasets[1] ({name})"


def test_one_line_finds_where_it_began() -> None:
    first, last = KeyError("it began\nhere"), RuntimeError()
    last.__cause__ = first
    assert one_line(last) == r"KeyError: 'it began\nhere'"
    assert one_line(StopIteration()) == "StopIteration"


def test_what_the_hosts_validation_lost_is_put_back() -> None:
    second = {"path": "b", "type": "x", "split": "train"}
    cfg = {"datasets": [{"path": "a", "type": {}}, second.copy()]}
    first = {"path": "a", "type": {"field_prompt": "q"}, "name": "main"}
    raw = [first | {"split": None}, {"path": "b", "type": "x"}]
    restore_entries(cfg, {"datasets": raw, "test_datasets": None})
    assert cfg["datasets"] == [first, second]
