"""Good rows of every shape: none is dropped, and none of their texts is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from sera_plugin.data.dataset import tokenize_rows
from sera_plugin.data.texts import SYSTEM
from tests.test_dataset import build
from tests.test_rows import guarded, strategy

TEXTS = [
    *("None", "5", "[]", "{}", "null", "true"),
    "x = [] or {}\nprint(x[0], {'a': None})",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5",
    "مرحبا بالعالم",
    "שלום עולם",
    "e\u0301 naïve 東京",
    "One.\n\nTwo.\n\t- three",
]
#: What else may stand in a row: nothing, and every kind of it.
ASIDE = {
    "tool_calls": [],
    "tools": {},
    "name": "",
    "note": None,
    "score": 5,
    "good": True,
    "meta": {"text": "", "value": None, "content": [], "tags": [[]]},
    "history": [{"content": "", "answer": None}],
}

BRIEF = {"role": "system", "content": "Be brief."}
FUNCTION = {"name": "lookup", "arguments": {"place": "x"}}
CALL = {"id": "abc123def", "type": "function", "function": FUNCTION}


def user(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **keys}


def answer(text: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def pair(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def template(name: str) -> Any:
    from axolotl.utils.chat_templates import get_chat_template

    tokenizer = build()
    tokenizer.chat_template = get_chat_template(name)
    return tokenizer


def check(
    loaded: Any, rows: list[dict[str, Any]], tokenizer: Any, expect: Any, **options: Any
) -> None:
    """Every row is kept and has the expected texts."""
    transform = guarded(loaded, **options)
    found = [
        transform(copy.deepcopy(row), number, tokenizer=tokenizer)
        for number, row in enumerate(rows)
    ]
    for row, result in zip(rows, found, strict=True):
        assert result["sera_problem"] == "", row
        assert {key: result[key] for key in ("prompt", "chosen", "rejected")} == expect(row), row
    tokenized = tokenize_rows(found, tokenizer, [tokenizer.eos_token_id], None)
    assert tokenized.dropped == {}


def host_texts(loaded: Any, tokenizer: Any, row: Mapping[str, Any]) -> dict[str, str]:
    """What the host makes of it alone."""
    transform = loaded[0] if isinstance(loaded, tuple) else loaded
    keys = {"tokenizer": tokenizer} if isinstance(loaded, tuple) else {}
    result = transform(copy.deepcopy(dict(row)), **keys)
    return {key: result[key] for key in ("prompt", "chosen", "rejected")}


def pairs(**more: Any) -> list[dict[str, Any]]:
    """Every text as prompt, chosen and rejected, alone and beside all that may be empty."""
    rows = []
    for text in TEXTS:
        for prompt, chosen, rejected in ((text, text, "no"), ("q", "yes", text)):
            row = pair(prompt, chosen, rejected) | more
            rows += [row, row | ASIDE, row | ASIDE | {"system": text}, row | {"system": ""}]
    return rows


FORMATTED = ["default", "icr", "intel", "prompt_pairs"]


@pytest.mark.parametrize(
    "kind",
    [
        *(f"{family}.{name}" for family in ("chatml", "llama3") for name in FORMATTED),
        {"prompt_format": "{system}|{prompt}|", "chosen_format": "{chosen}!"},
        {"field_system": "persona", "prompt_format": "{system}|{prompt}|"},
        {},
    ],
    ids=str,
)
def test_text_in_fields(kind: Any) -> None:
    tokenizer, loaded = build(), strategy(kind)
    rows = [row | {"input": row["prompt"], "question": row["prompt"]} for row in pairs(persona="")]
    check(loaded, rows, tokenizer, partial(host_texts, loaded, None), optional=(*SYSTEM, "persona"))


@pytest.mark.parametrize("kind", ["chatml.ultra", "chatml.argilla_chat", "llama3.argilla_chat"])
def test_text_in_messages_that_are_formatted(kind: str) -> None:
    loaded = strategy(kind)
    blank = {"name": "", "tool_calls": [], "reasoning_content": "", "arguments": {}}
    rows = [
        pair("q", *([user("q", **more), answer(said, **more)] for said in (text, "no")))
        for text in TEXTS
        for more in ({}, blank, {"name": None, "tool_calls": None})
    ]
    check(loaded, rows, build(), partial(host_texts, loaded, None))


def test_text_in_ranked_answers() -> None:
    loaded = strategy("zephyr.nectar")
    first = {"answer": "", "rank": 0, "model": None}
    last = {"answer": "no", "rank": 1}
    rows = [
        {"prompt": text, "answers": [first, {"answer": text, "rank": 2, "model": ""}, last]}
        for text in TEXTS
    ]
    check(loaded, rows, build(), partial(host_texts, loaded, None))


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen_25", "phi_35", "gemma3", "qwen3"])
def test_messages_through_the_hosts_chat_template(name: str) -> None:
    tokenizer = template(name)
    loaded = strategy("chat_template.default")
    system = [] if name == "gemma3" else [BRIEF]
    rows = [
        {
            "messages": [*system, user("q", name=""), answer(text, tool_calls=[]), user(text)],
            "chosen": answer(f"{text} it is.", reasoning_content="", name=""),
            "rejected": answer("No, not at all.", tool_calls=None),
            **ASIDE,
        }
        for text in TEXTS
    ]
    check(loaded, rows, tokenizer, partial(host_texts, loaded, tokenizer))
    loaded = strategy("chat_template.argilla_chat")
    rows = [{key: [*row["messages"], row[key]] for key in ("chosen", "rejected")} for row in rows]
    check(loaded, rows, tokenizer, partial(host_texts, loaded, tokenizer))


def rendered(tokenizer: Any, row: Mapping[str, Any]) -> dict[str, str]:
    """The definition: what the template writes behind the prompt."""
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=False
    )
    texts = {"prompt": prompt}
    for key in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(row["prompt"] + row[key], tokenize=False)
        texts[key] = whole[len(prompt) :].rstrip()
    return texts


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen_25", "jamba", "phi_35", "deepseek_v3"])
@pytest.mark.parametrize("blank", [{}, {"reasoning_content": "", "name": ""}])
def test_messages_that_are_pairs_already(name: str, blank: dict[str, Any]) -> None:
    tokenizer = template(name)
    rows = [
        pair(
            [BRIEF, user(text, **blank), answer(text, **blank), user("More?", **blank)],
            [answer(text, **blank)],
            [answer("no", **blank)],
        )
        for text in TEXTS
    ]
    loaded = strategy("passthrough.default")
    check(loaded, rows, tokenizer, partial(rendered, tokenizer))
    # What a table fills in where other rows have something.
    filled = copy.deepcopy(rows)
    for row in filled:
        for messages in row.values():
            for message in messages:
                message |= {"tool_calls": [], "weight": None}
    check(loaded, filled, tokenizer, lambda row: rendered(tokenizer, rows[filled.index(row)]))


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("arguments", [{}, {"places": []}, {"text": ""}])
@pytest.mark.parametrize("name", ["qwen_25", "qwen3", "mistral_v2v3", "jamba", "exaone4"])
def test_tool_calls_say_something(name: str, arguments: Any, content: str | None) -> None:
    tokenizer = template(name)
    call = CALL | {"function": FUNCTION | {"arguments": arguments}}
    asked = [user("Where?")]
    done = [answer(content, tool_calls=[CALL])]
    done += [{"role": "tool", "content": "there", "tool_call_id": CALL["id"], "name": "lookup"}]
    rows = [
        pair(prompt, [answer(content, tool_calls=[call])], [answer("I do not know.")])
        for prompt in (asked, asked + done)
    ]
    check(strategy("passthrough.default"), rows, tokenizer, partial(rendered, tokenizer))


def test_a_tool_call_that_the_template_leaves_out_is_no_answer() -> None:
    row = pair([user("q")], [answer("", tool_calls=[CALL])], [answer("no")])
    transform = guarded(strategy("passthrough.default"))
    result = transform(row, 0, tokenizer=template("chatml"))
    assert result["sera_problem"] == "the chat template does not render the answer as it is"


def test_a_strategy_may_use_the_tokenizer_as_it_likes() -> None:
    import pickle

    def own(row: Any, tokenizer: Any = None) -> Any:
        assert len(copy.copy(tokenizer)) == len(tokenizer) == len(original)
        assert isinstance(tokenizer, type(original))
        pickle.loads(pickle.dumps(tokenizer))
        messages = [user(row.pop("q"))]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert ids == original.apply_chat_template(messages, add_generation_prompt=True)
        assert tokenizer("hi") == original("hi")
        several = tokenizer.apply_chat_template([messages, messages], tokenize=False)
        answers = {key: f"{value}<|im_end|>" for key, value in {**row}.items() if key != "x"}
        return {"prompt": several[0], **answers}

    original = template("chatml")
    rows = [{"q": text, "chosen": text, "rejected": "no", "x": None} for text in TEXTS]
    check((own, {}), rows, original, partial(host_texts, (own, {}), original))
    transform = guarded((own, {}))
    for field in ("chosen", "rejected"):
        result = transform(rows[0] | {field: None}, 0, tokenizer=original)
        assert result["sera_problem"] == f"field '{field}' is null, not text"


def test_a_system_prompt_is_optional_by_its_own_name_alone() -> None:
    def own(row: Any) -> dict[str, str]:
        prompt = f"{row['persona']}|{row['operating_system']}"
        return {"prompt": prompt, "chosen": row["system"] + ".", "rejected": "no"}

    def of(row: dict[str, Any], **options: Any) -> Any:
        return guarded(own, **options)(row, 0)["sera_problem"]

    row = {"persona": "", "operating_system": "", "system": "yes"}
    assert of(row) == "field 'persona' is empty"
    assert of(row | {"operating_system": "Linux"}) == ""
    assert of(row | {"persona": "me"}, optional=("persona",)) == "field 'operating_system' is empty"
    assert of({"persona": "me", "operating_system": "x", "system": ""}) == "field 'system' is empty"
