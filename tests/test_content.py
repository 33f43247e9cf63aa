"""What a row says reaches the text that is trained, or the row is named."""

import copy
import json
from typing import Any

import pytest
from axolotl.utils.chat_templates import get_chat_template

from sera_plugin.data.conversations import ChatTemplate
from sera_plugin.data.marks import Marks
from tests.test_dataset import build
from tests.test_rows import guarded, strategy

TOOL = {
    "type": "function",
    "function": {
        "name": "find_train",
        "description": "Trains between two towns",
        "parameters": {
            "type": "object",
            "properties": {"to": {"type": "string", "description": "where to"}},
            "required": ["to"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "find_train", "arguments": {"to": "Porto"}}}


def says(role: str, text: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **keys}


ASKED = [says("user", "Which train goes to Porto?")]
CALLED = [*ASKED, says("assistant", "", tool_calls=[CALL]), says("tool", "The 9:40.")]
GOOD, BAD = says("assistant", "Take the 9:40."), says("assistant", "None does.")
TALK = [says("user", "Hi"), says("assistant", "Hello"), says("user", "Where to?")]


def made(kind: Any, row: dict[str, Any], template: str = "qwen_25", **entry: Any) -> dict[str, Any]:
    tokenizer = build()
    tokenizer.chat_template = get_chat_template(template)
    return guarded(strategy(kind, template, **entry))(row, 0, tokenizer=tokenizer)


#: Type -> a row of it with these messages before the answers.
SHAPES = {
    "passthrough.default": lambda asked, good, bad: {
        "prompt": asked, "chosen": [good], "rejected": [bad],
    },
    "chat_template.default": lambda asked, good, bad: {
        "messages": asked, "chosen": good, "rejected": bad,
    },
    "chat_template.argilla_chat": lambda asked, good, bad: {
        "chosen": [*asked, good], "rejected": [*asked, bad],
    },
}  # fmt: skip
SHAPES["passthrough.default without a prompt"] = SHAPES["chat_template.argilla_chat"]


@pytest.mark.parametrize("written", [lambda x: x, json.dumps], ids=["objects", "JSON"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tools_calls_and_settings_are_rendered_whatever_the_type(shape, written):
    kind = shape.split()[0]
    call = copy.deepcopy(CALL)
    call["function"]["arguments"] = written(call["function"]["arguments"])
    asked = [*ASKED, says("assistant", "", tool_calls=[call]), says("tool", "The 9:40.")]
    answer = says("assistant", "I look again.", tool_calls=[call])
    row = SHAPES[shape](asked, answer, BAD) | {"tools": written([TOOL]), "id": 7, "score": 0.5}
    result = made(kind, row)
    assert result["sera_problem"] == ""
    assert '"description": "Trains between two towns"' in result["prompt"]
    said = '<tool_call>\n{"name": "find_train", "arguments": {"to": "Porto"}}\n</tool_call>'
    assert said in result["prompt"]
    assert said in result["chosen"]
    assert result["chosen"].startswith("I look again.")
    # Notes about a row are named, and it is trained.
    assert result["sera_aside"] == ""

    row = SHAPES[shape](ASKED, GOOD, BAD) | {
        "chat_template_kwargs": written({"enable_thinking": False})
    }
    result = made(kind, row, "qwen3")
    assert result["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert result["chosen"] == "Take the 9:40.<|im_end|>"


LOST: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "a template without tools": (
        "passthrough.default", SHAPES["passthrough.default"](ASKED, GOOD, BAD) | {"tools": [TOOL]},
        "chatml", "column 'tools' reaches no text",
    ),
    "a template without tool calls": (
        "chat_template.default", SHAPES["chat_template.default"](CALLED, GOOD, BAD),
        "chatml", "'tool_calls' in column 'messages' reaches no text",
    ),
    "a call in the answer": (
        "chat_template.default",
        SHAPES["chat_template.default"](ASKED, GOOD | {"tool_calls": [CALL]}, BAD),
        "chatml", "the chat template does not render the answer as it is",
    ),
    "a setting that the template does not know": (
        "passthrough.default",
        SHAPES["passthrough.default"](ASKED, GOOD, BAD) | {"chat_template_kwargs": {"think": True}},
        "qwen3", "the chat template reads no 'think' of chat_template_kwargs",
    ),
    "settings of a type that renders none": (
        {}, {"prompt": "a", "chosen": "b", "rejected": "c", "chat_template_kwargs": {"x": 1}},
        "chatml", "column 'chat_template_kwargs' reaches no text",
    ),
    "tools of a type that renders none": (
        "chatml.intel", {"question": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]},
        "chatml", "column 'tools' reaches no text",
    ),
    "a system prompt that the type does not read": (
        "chat_template.default",
        SHAPES["chat_template.default"](ASKED, GOOD, BAD) | {"system": "Be brief."},
        "chatml", "column 'system' reaches no text",
    ),
    "an image": (
        "passthrough.default",
        SHAPES["passthrough.default"](ASKED, GOOD, BAD) | {"images": [{"bytes": b"\x89PNG"}]},
        "chatml", "'bytes' in column 'images' reaches no text",
    ),
    "all but the first turn": (
        "llama3.argilla_chat", {"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
        "chatml", "'content' in column 'chosen' reaches no text",
    ),
    "all but the answer's last turn": (
        "chat_template.default",
        {"messages": ASKED, "chosen": [GOOD, *ASKED, BAD], "rejected": [BAD, *ASKED, GOOD]},
        "chatml", "chosen and rejected answer different histories",
    ),
    "another history": (
        "chat_template.argilla_chat",
        {"chosen": [*TALK, GOOD], "rejected": [*TALK[:-1], says("user", "And?"), BAD]},
        "chatml", "chosen and rejected answer different histories",
    ),
    "another history of a type that formats": (
        "chatml.argilla_chat", {"chosen": [*ASKED, GOOD], "rejected": [says("user", "And?"), BAD]},
        "chatml", "'content' in column 'rejected' reaches no text",
    ),
    "thinking in the answer that the template leaves out": (
        "passthrough.default",
        SHAPES["passthrough.default"](ASKED, GOOD | {"reasoning_content": "9:40?"}, BAD),
        "chatml", "'reasoning_content' in column 'chosen' reaches no text",
    ),
    "words before a thought of an earlier turn": (
        "passthrough.default",
        SHAPES["passthrough.default"](
            [ASKED[0], says("assistant", "Well: <think>9:40?</think>Soon."), *TALK[2:]], GOOD, BAD
        ),
        "qwen3", "changes or leaves out a message of 'assistant'",
    ),
    "an answer in the prompt": (
        "chat_template.default",
        SHAPES["chat_template.default"]([*ASKED, GOOD], [*ASKED, GOOD], [*ASKED, BAD]),
        "chatml", "the prompt holds the answer already",
    ),
    "two questions": (
        "passthrough.default",
        SHAPES["chat_template.argilla_chat"](TALK[2:], GOOD, BAD) | {"prompt": ASKED},
        "chatml", "the prompt ends with one question, and the answers begin with another",
    ),
    "a history that no text has": (
        "chat_template.default",
        SHAPES["chat_template.default"](ASKED, GOOD, BAD) | {"earlier": TALK[:2]},
        "chatml", "'content' in column 'earlier' reaches no text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_a_row_that_would_lose_something_is_named(name):
    kind, row, template, said = LOST[name]
    assert said in made(kind, row, template)["sera_problem"]


def test_an_argument_that_is_said_elsewhere_too_is_missed_all_the_same():
    """The town is in the question as well, so the text has the word and not the call."""
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    template += "{{ c.function.name }}{% endfor %}|{% endfor %}"
    row = SHAPES["passthrough.default"](CALLED, GOOD, BAD)
    transform = guarded(strategy("passthrough.default", "jinja", chat_template_jinja=template))
    problem = transform(row, 0, tokenizer=build())["sera_problem"]
    assert problem.startswith("'tool_calls' in column 'prompt' reaches no text")


#: What a template does to the content of a message, or to calls.
CHANGES = """
m.content[4:]
m.content[:-4]
m.content | upper
m.content.split() | join(' ')
m.content.replace('<', '')
"""


@pytest.mark.parametrize("change", CHANGES.split("\n")[1:-1])
@pytest.mark.parametrize("place", ["user", "assistant", "answer"])
def test_a_message_that_a_template_changes_is_named(change, place):
    text = "  def f(x):\n    return x < 1  "
    asked, good = [dict(one) for one in TALK], dict(GOOD)
    where = {"user": asked[0], "assistant": asked[1], "answer": good}[place]
    where["content"] = text
    here = "loop.index0 == " + str({"user": 0, "assistant": 1, "answer": 3}[place])
    template = "{% for m in messages %}<{{ m.role }}>{% if " + here + " %}{{ " + change
    template += " }}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    row = SHAPES["passthrough.default"](asked, good, BAD)

    def problem(template: str) -> Any:
        loaded = guarded(strategy("passthrough.default"), template=ChatTemplate(template))
        return loaded(row, 0, tokenizer=build())["sera_problem"]

    said = "does not render the answer as it is"
    if place != "answer":
        said = f"the chat template changes or leaves out a message of '{place}'"
    assert said in problem(template)
    assert problem(template.replace(change, "m.content")) == ""
    assert problem(template.replace(change, "m.content | trim")) == ""


def test_a_second_call_like_the_first_is_missed():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    template += "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}</s>"
    template += "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    roll = {"type": "function", "function": {"name": "roll", "arguments": {}}}
    loaded = guarded(strategy("passthrough.default"), template=ChatTemplate(template))
    row = SHAPES["passthrough.default"](ASKED, GOOD | {"tool_calls": [roll, roll]}, BAD)
    assert "does not render the answer" in loaded(row, 0, tokenizer=build())["sera_problem"]
    row["chosen"][0]["tool_calls"].pop()
    assert loaded(row, 0, tokenizer=build())["sera_problem"] == ""


SIGNATURES = """{% if tools %}{% for t in tools %}{{ t.function.name }}({% for name, about in
t.function.parameters.properties.items() %}{{ name }}: {{ about.type }} # {{ about.description }}{%
endfor %}) {{ t.function.description }}{% endfor %}{% endif %}{% for m in messages %}<{{ m.role
}}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments }}{%
endfor %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_tools_may_be_written_as_signatures_without_what_is_looked_at():
    loaded = guarded(strategy("passthrough.default"), template=ChatTemplate(SIGNATURES))
    tool = copy.deepcopy(TOOL)
    properties = tool["function"]["parameters"]["properties"]
    properties["to"]["enum"] = ["Porto", "Braga"]
    row = SHAPES["passthrough.default"](ASKED, GOOD, BAD) | {"tools": [tool]}
    result = loaded(row, 0, tokenizer=build())
    assert result["sera_problem"] == ""
    assert "find_train(to: string # where to) Trains between" in result["prompt"]
    properties["time"] = {"type": "object", "properties": {"hour": {"type": "integer"}}}
    assert loaded(row, 0, tokenizer=build())["sera_problem"].startswith("column 'tools' reaches no")


def test_parts_are_not_trained_as_python():
    row = SHAPES["passthrough.default"](ASKED[:], GOOD, BAD)
    for side in row.values():
        side[0] = side[0] | {"content": [{"type": "text", "text": side[0]["content"]}]}
    for written in ("m.content", "m.content | tojson", "m.content[0].text"):
        template = ChatTemplate(SIGNATURES.replace("m.content", written))
        loaded = guarded(strategy("passthrough.default"), template=template)
        said = loaded(row, 0, tokenizer=build())["sera_problem"]
        expected = "the chat template does not render a message that has parts"
        assert said == ("" if "[0]" in written else expected)


def test_arguments_stay_text_for_a_template_that_joins_them():
    call = copy.deepcopy(CALL)
    call["function"]["arguments"] = '{"to": "Porto"}'
    template = SIGNATURES.replace(" ~ c.function", " + c.function")
    loaded = guarded(strategy("passthrough.default"), template=ChatTemplate(template))
    row = SHAPES["passthrough.default"](ASKED, GOOD | {"tool_calls": [call]}, BAD)
    result = loaded(row, 0, tokenizer=build())
    assert (result["sera_problem"], result["chosen"]) == (
        "", 'Take the 9:40.find_train{"to": "Porto"}</s>'
    )  # fmt: skip


SPARSE = {"name": "f", "arguments": {"a": "b", "c": None}}
ANNOTATED = {"raw_input_text_generation_0": [says("user", "Which is better?")]}
#: Rows that lose nothing, as datasets have them, beside `ASKED`, `GOOD` and `BAD`.
KEPT: dict[str, tuple[str, dict[str, Any], str]] = {
    "no tools, as JSON": ("qwen3", {"tools": "null"}, ""),
    "what a judge was asked": (
        "chatml",
        {"labelling_prompt": [says("user", "Rate them.")]},
        "labelling_prompt",
    ),
    "how it was made": ("chatml", {"distilabel_metadata": ANNOTATED}, "distilabel_metadata"),
    "the same in another form": (
        "chatml",
        {"conversation": [{"input": ASKED[0]["content"], "output": GOOD["content"]}]},
        "",
    ),
    "arguments of another tool, in a table": (
        "qwen_25",
        {
            "chosen": [
                GOOD
                | {"tool_calls": [{"function": {"name": "f", "arguments": {"a": "b", "c": None}}}]}
            ]
        },
        "",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_row_that_loses_nothing_is_trained(name):
    template, more, aside = KEPT[name]
    result = made(
        "passthrough.default", SHAPES["passthrough.default"](ASKED, GOOD, BAD) | more, template
    )
    assert (result["sera_problem"], result["sera_aside"]) == ("", aside)


@pytest.mark.parametrize("kind", ["passthrough.default", "chat_template.default"])
def test_answers_may_repeat_the_end_of_the_prompt(kind):
    column = "prompt" if kind.startswith("passthrough") else "messages"
    asked = [says("system", "Be brief."), *ASKED]
    row = {column: asked, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}
    once = {column: asked, "chosen": [GOOD], "rejected": [BAD]}
    result = made(kind, row, "chatml")
    assert result["sera_problem"] == ""
    assert result == made(kind, once, "chatml")


def test_a_mapped_key_goes_before_one_of_the_same_name():
    """Tables that were merged have both, and null in those of the other."""

    def turn(role: str, text: str) -> dict[str, Any]:
        return {"from": role, "value": text, "role": None, "content": None}

    row = {"messages": [turn("user", "Hi")], "chosen": turn("assistant", "a")}
    row["rejected"] = turn("assistant", "b")
    names = {"role": "from", "content": "value"}
    result = made("chat_template.default", row, "chatml", message_property_mappings=names)
    assert (result["sera_problem"], result["chosen"]) == ("", "a<|im_end|>")


def test_notes_about_a_row_are_no_content():
    row = SHAPES["chat_template.default"](TALK, GOOD | {"weight": 1}, BAD) | {"source": "forum"}
    row |= {"prompt": " Where  to?", "meta": {"by": ["me"]}, "images": [], "system": None}
    result = made("chat_template.default", row)
    assert (result["sera_problem"], result["sera_aside"]) == ("", "meta, source")


def test_what_an_answer_goes_on_with_belongs_to_the_prompt():
    """The host takes the last message and forgets the others."""
    more = [says("assistant", "Hello"), says("user", "Where to?")]
    row = SHAPES["chat_template.default"](TALK[:1], [*more, GOOD], [*more, BAD])
    assert made("chat_template.default", row) == made(
        "chat_template.default", SHAPES["chat_template.default"](TALK, GOOD, BAD)
    )


def test_marks_are_shared_by_the_same_words_at_the_same_place_alone():
    marks = Marks()
    marked = marks.marked(
        {"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD], "n": {"a": [1, True]}}
    )
    assert marked["chosen"][:3] == marked["rejected"][:3]
    assert marked["chosen"][3] != marked["rejected"][3]
    assert marked["n"] == {"a": [1, True]}
    assert len({one["content"] for one in marked["chosen"]}) == 4
    assert [leaf.value for leaf in marks.lost([str(marked["chosen"])])] == [BAD["content"]]


# ------------------------------------------------------------------ prompt + completion


THINK_ALWAYS = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>
{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content }}
</think>

{% endif %}{{ m.content.split('</think>')[-1].strip() }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
#: The prompt opens a thought that the rendering of an answer does not have, as R1's does.
OPENED = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if thinking is not defined or thinking %}<think>
{% endif %}{% endif %}"""
NO_CHOICE = OPENED.replace("thinking is not defined or thinking", "true")
SPACED = "{% for m in messages %}[{{ m.role }}]:{{ ' ' ~ m.content }}<|im_end|>{% endfor %}"
SPACED += "{% if add_generation_prompt %}[assistant]:\n{% endif %}"


def whole(tokenizer: Any, template: str, answer: dict[str, Any], **kwargs: Any) -> str:
    """The definition: what the template renders of the conversation."""
    how = {"chat_template": template, "tokenize": False, **kwargs}
    return str(tokenizer.apply_chat_template([*TALK, answer], **how)).rstrip()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("template", ["qwen3", THINK_ALWAYS, SPACED, "llama3", "deepseek_v3"])
@pytest.mark.parametrize("thought", ["", "<think>\nA long one.\n</think>\n\n"])
def test_prompt_and_completion_are_what_the_template_renders(shape, template, thought):
    jinja = template if "{" in template else get_chat_template(template)
    tokenizer, good = build(), GOOD | {"content": thought + GOOD["content"]}
    row = SHAPES[shape](TALK, good, BAD)
    loaded = strategy(shape.split()[0], "jinja", chat_template_jinja=jinja)
    result = guarded(loaded)(row, 0, tokenizer=tokenizer)
    if thought and template == "deepseek_v3":  # it leaves thinking out of every answer
        assert result["sera_problem"] == "the chat template does not render the answer as it is"
        return
    assert result["sera_problem"] == ""
    for key, answer in (("chosen", good), ("rejected", BAD)):
        assert result["prompt"] + result[key] == whole(tokenizer, jinja, answer)
        assert answer["content"].split("\n\n")[-1] in result[key]


@pytest.mark.parametrize("shape", SHAPES)
def test_where_the_prompt_cannot_be_had_a_setting_that_works_is_named(shape):
    row = SHAPES[shape](TALK, GOOD, BAD)

    def with_template(text: str, **kwargs: Any) -> dict[str, Any]:
        loaded = strategy(shape.split()[0])
        return guarded(loaded, template=ChatTemplate(text, kwargs))(row, 0, tokenizer=build())

    problem = with_template(OPENED)["sera_problem"]
    assert "differently once the answer follows" in problem
    assert problem.endswith("set chat_template_kwargs: {thinking: false}")
    result = with_template(OPENED, thinking=False)
    assert result["prompt"] + result["chosen"] == whole(build(), OPENED, GOOD)
    assert with_template(NO_CHOICE)["sera_problem"].endswith("such as chatml")
