"""Good rows of every shape: none is dropped, and none of their texts is changed."""

import copy
from functools import partial
from itertools import product

import pytest
from axolotl.utils.chat_templates import get_chat_template

from sera_plugin.data.rows import SYSTEM
from tests.test_dataset import TEXTS, build, tokenize
from tests.test_fuzz import STRATEGIES, at
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


def message(role, text, **keys):
    return {"role": role, "content": text, **keys}


user, answer = partial(message, "user"), partial(message, "assistant")


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def template(name):
    tokenizer = build()
    tokenizer.chat_template = get_chat_template(name)
    return tokenizer


def check(loaded, rows, tokenizer, expect=None, **options):
    """Every row is kept and has the expected texts, or those that the host makes of it alone."""
    transform = guarded(loaded, **options)
    found = []
    for number, row in enumerate(rows):
        found.append(transform(copy.deepcopy(row), number, tokenizer=tokenizer))
        assert found[-1].pop("sera_problem") == "", row
        expected = expect(row) if expect else transform.transform(copy.deepcopy(row))
        assert all(found[-1][key] == expected[key] for key in ("prompt", "chosen", "rejected")), row
    assert tokenize(tokenizer, *found).dropped == {}


def beside_what_may_be_empty(row, text):
    """The row alone, and with all that else may stand in it and in its messages."""
    blank = {"name": "", "tool_calls": [], "model": None, "reasoning_content": "", "arguments": {}}
    filled = {
        key: [one | blank for one in value] if isinstance(value, list) else value
        for key, value in row.items()
    }
    return row, row | {"system": ""}, filled | ASIDE, filled | ASIDE | {"system": text}


def put_everywhere(value, old, new):
    """Columns repeat one another, and what only one of them says would be lost."""
    if isinstance(value, dict):
        return {key: put_everywhere(one, old, new) for key, one in value.items()}
    if isinstance(value, list):
        return [put_everywhere(one, old, new) for one in value]
    return new if value == old else value


BLOCKS = [
    {"prompt_format": "{system}|{prompt}|", "chosen_format": "{chosen}!"},
    {"field_system": "persona", "prompt_format": "{system}|{prompt}|"},
    {},
]
FORMATTED = [kind for kind in STRATEGIES if kind.startswith(("chatml.", "llama3.", "zephyr."))]


@pytest.mark.parametrize("kind", [*FORMATTED, *BLOCKS], ids=str)
def test_text_that_is_formatted(kind):
    good, places = STRATEGIES[kind if isinstance(kind, str) else "user_defined.default"]
    rows = [
        row | {"persona": ""}
        for place, text in product(places, TEXTS)
        if isinstance(at(good, place), str)
        for row in beside_what_may_be_empty(put_everywhere(good, at(good, place), text), text)
    ]
    check(strategy(kind), rows, build(), optional=(*SYSTEM, "persona"))


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen_25", "phi_35", "gemma3", "qwen3"])
def test_messages_through_the_hosts_chat_template(name):
    tokenizer = template(name)
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

    def expect(row):
        """What the definition makes of the same messages without what a table fills in."""
        *asked, chosen = (
            row["chosen"] if row.get("messages") is None else [*row["messages"], row["chosen"]]
        )
        rejected = row["rejected"] if row.get("messages") is not None else row["rejected"][-1]
        asked, chosen, rejected = (
            [{k: v for k, v in one.items() if v not in (None, [])} for one in messages]
            for messages in (asked, [chosen], [rejected])
        )
        return rendered(tokenizer, pair(asked, chosen, rejected))

    check(strategy("chat_template.default"), rows, tokenizer, expect)
    rows = [{key: [*row["messages"], row[key]] for key in ("chosen", "rejected")} for row in rows]
    check(strategy("chat_template.argilla_chat"), rows, tokenizer, expect)


def rendered(tokenizer, row):
    """The definition: what the template writes behind the prompt."""
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    texts = {"prompt": render(row["prompt"], add_generation_prompt=True)}
    for key in ("chosen", "rejected"):
        texts[key] = render(row["prompt"] + row[key])[len(texts["prompt"]) :].rstrip()
    return texts


def talks(blank):
    for text in TEXTS:
        asked = [BRIEF, user(text, **blank), answer(text, **blank), user("More?", **blank)]
        yield pair(asked, *([answer(said, **blank)] for said in (text, "no")))


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen_25", "jamba", "phi_35", "deepseek_v3"])
@pytest.mark.parametrize(
    ("blank", "rendered_blank"),
    [
        *(({}, {}), ({"reasoning_content": "", "name": ""},) * 2),
        # What a table fills in where other rows have something.
        ({"tool_calls": [], "weight": None}, {}),
    ],
)
def test_messages_that_are_pairs_already(name, blank, rendered_blank):
    tokenizer, defined = template(name), talks(rendered_blank)
    loaded = strategy("passthrough.default")
    check(loaded, talks(blank), tokenizer, lambda _: rendered(tokenizer, next(defined)))


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
    def own(row, tokenizer=None):
        assert len(copy.deepcopy(tokenizer)) == len(original)
        messages = [user(row.pop("q"))]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert ids == original.apply_chat_template(messages, add_generation_prompt=True)
        several = tokenizer.apply_chat_template([messages, messages], tokenize=False)
        return row | {"prompt": several[0]}

    original = template("chatml")
    rows = [{"q": text, "chosen": text, "rejected": "no"} for text in TEXTS]
    check(own, rows, original, lambda row: own(dict(row), original))


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
