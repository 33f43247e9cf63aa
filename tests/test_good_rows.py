"""Good rows of every shape: none is dropped, and none of their texts is changed."""

from __future__ import annotations

import copy
from functools import partial

import pytest

from sera_plugin.data.rows import SYSTEM
from tests.test_dataset import TEXTS, build, tokenize
from tests.test_rows import guarded, strategy

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


def user(text, **keys):
    return {"role": "user", "content": text, **keys}


def answer(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def template(name):
    from axolotl.utils.chat_templates import get_chat_template

    tokenizer = build()
    tokenizer.chat_template = get_chat_template(name)
    return tokenizer


def check(loaded, rows, tokenizer, expect, **options):
    """Every row is kept and has the expected texts."""
    transform = guarded(loaded, **options)
    found = [
        transform(copy.deepcopy(row), number, tokenizer=tokenizer)
        for number, row in enumerate(rows)
    ]
    for row, result in zip(rows, found, strict=True):
        assert result["sera_problem"] == "", row
        assert {key: result[key] for key in ("prompt", "chosen", "rejected")} == expect(row), row
    assert tokenize(tokenizer, *found).dropped == {}


def host_texts(loaded, tokenizer, row):
    """What the host makes of it alone."""
    transform, keys = (loaded, {})
    if isinstance(loaded, tuple):
        transform, keys = loaded[0], {"tokenizer": tokenizer}
    result = transform(copy.deepcopy(dict(row)), **keys)
    return {key: result[key] for key in ("prompt", "chosen", "rejected")}


def in_fields():
    """Every text as prompt, chosen and rejected, alone and beside all that may be empty."""
    for text in TEXTS:
        for prompt, chosen, rejected in ((text, text, "no"), ("q", "yes", text)):
            row = pair(prompt, chosen, rejected) | {"input": prompt, "question": prompt}
            row |= {"persona": ""}
            yield from (row, row | ASIDE, row | ASIDE | {"system": text}, row | {"system": ""})


def in_messages():
    blank = {"name": "", "tool_calls": [], "reasoning_content": "", "arguments": {}}
    for text in TEXTS:
        for more in ({}, blank, {"name": None, "tool_calls": None}):
            yield pair("q", *([user("q", **more), answer(said, **more)] for said in (text, "no")))


def in_ranked_answers():
    first, last = {"answer": "", "rank": 0, "model": None}, {"answer": "no", "rank": 1}
    for text in TEXTS:
        answers = [first, {"answer": text, "rank": 2, "model": ""}, last]
        yield {"prompt": text, "answers": answers}


FORMATTED = {
    f"{family}.{name}": in_fields
    for family in ("chatml", "llama3")
    for name in ("default", "icr", "intel", "prompt_pairs")
}
FORMATTED |= dict.fromkeys(("chatml.ultra", "chatml.argilla_chat"), in_messages)
FORMATTED |= {"llama3.argilla_chat": in_messages, "zephyr.nectar": in_ranked_answers}
BLOCKS = [
    {"prompt_format": "{system}|{prompt}|", "chosen_format": "{chosen}!"},
    {"field_system": "persona", "prompt_format": "{system}|{prompt}|"},
    {},
]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [*FORMATTED.items(), *((block, in_fields) for block in BLOCKS)],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_text_that_is_formatted(kind, rows):
    loaded = strategy(kind)
    options = {"optional": (*SYSTEM, "persona")}
    check(loaded, list(rows()), build(), partial(host_texts, loaded, None), **options)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen_25", "phi_35", "gemma3", "qwen3"])
def test_messages_through_the_hosts_chat_template(name):
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


def rendered(tokenizer, row):
    """The definition: what the template writes behind the prompt."""
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    texts = {"prompt": render(row["prompt"], add_generation_prompt=True)}
    for key in ("chosen", "rejected"):
        texts[key] = render(row["prompt"] + row[key])[len(texts["prompt"]) :].rstrip()
    return texts


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen_25", "jamba", "phi_35", "deepseek_v3"])
@pytest.mark.parametrize("blank", [{}, {"reasoning_content": "", "name": ""}])
def test_messages_that_are_pairs_already(name, blank):
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
    for message in (message for row in filled for messages in row.values() for message in messages):
        message |= {"tool_calls": [], "weight": None}
    check(loaded, filled, tokenizer, lambda row: rendered(tokenizer, rows[filled.index(row)]))


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("arguments", [{}, {"places": []}, {"text": ""}])
@pytest.mark.parametrize("name", ["qwen_25", "qwen3", "mistral_v2v3", "jamba", "exaone4"])
def test_tool_calls_say_something(name, arguments, content):
    tokenizer = template(name)
    call = CALL | {"function": FUNCTION | {"arguments": arguments}}
    asked, done = [user("Where?")], [answer(content, tool_calls=[CALL])]
    done += [{"role": "tool", "content": "there", "tool_call_id": CALL["id"], "name": "lookup"}]
    rows = [
        pair(prompt, [answer(content, tool_calls=[call])], [answer("I do not know.")])
        for prompt in (asked, asked + done)
    ]
    loaded = strategy("passthrough.default")
    check(loaded, rows, tokenizer, partial(rendered, tokenizer))
    # A call that the template leaves out is no answer.
    silent = pair(asked, [answer("", tool_calls=[call])], [answer("no")])
    result = guarded(loaded)(silent, 0, tokenizer=template("chatml"))
    assert result["sera_problem"] == "the chat template does not render the answer as it is"


def test_a_strategy_may_use_the_tokenizer_as_it_likes():
    import pickle

    def own(row, tokenizer=None):
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
    for field in ("chosen", "rejected"):
        result = guarded(own)(rows[0] | {field: None}, 0, tokenizer=original)
        assert result["sera_problem"] == f"field '{field}' is null, not text"


@pytest.mark.parametrize(
    ("changed", "optional", "problem"),
    [
        ({}, SYSTEM, "field 'persona' is empty"),
        ({"operating_system": "Linux"}, SYSTEM, ""),
        ({"persona": "me"}, ("persona",), "field 'operating_system' is empty"),
        ({"persona": "me", "system": ""}, SYSTEM, "field 'system' is empty"),
    ],
)
def test_a_system_prompt_is_optional_by_its_own_name_alone(changed, optional, problem):
    def own(row):
        prompt = f"{row['persona']}|{row['operating_system']}"
        return {"prompt": prompt, "chosen": row["system"] + ".", "rejected": "no"}

    row = {"persona": "", "operating_system": "", "system": "yes"} | changed
    assert guarded(own, optional=optional)(row, 0)["sera_problem"] == problem
