"""Damaged rows by the hundred: each is dropped for a reason that docs/data.md has.

Every row here is wrong in a known way, so that a pass in silence is seen too. Nothing may escape as
an exception.
"""

import copy
import datetime
import math
import re
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.chat_templates import get_chat_template

from sera_plugin.data.dataset import TokenizedRows
from sera_plugin.data.text import visible
from tests.test_dataset import build
from tests.test_dataset import tokenize as tokenize_texts
from tests.test_rows import guarded, strategy


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else "x"


def at(row: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        row = row[key]
    return row


def put(row: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of the row with this value there, or without the key."""
    changed = copy.deepcopy(row)
    target = at(changed, path[:-1])
    if value is MISSING:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return changed


#: What the reasons for dropping a row have, and docs/data.md.
REASONS = re.compile(
    "not text|is empty|empty prompt, chosen or rejected|no field or role|"
    "the host's strategy cannot read it|must all be text|a message's content is null or not text|"
    "a user message is empty|unknown role|has the role|has several messages|without tokens|"
    "the chat template does not render|renders the prompt differently|not valid Unicode|"
    "chosen equals rejected|longer than sequence_len|no other spelling|"
    "answer different histories|reaches no text|differently once the answer follows|reads no|"
    "not an object|not a list of tools"
)
MISSING = object()
LENGTH = 200
BAD_TEXTS: list[Any] = [
    *(MISSING, None, "", " \n\t", "\u200b\ufeff", "\x00\x01", "a\ud800b", "\udfff"),
    *("hello world " * LENGTH, 0, 5, -1.5, math.nan, True, b"hello", datetime.date(2025, 1, 1)),
    *([], ["hello"], [["hello"]], {}, {"text": "hello"}, nested(20)),
]


def turns(*contents: Any, roles: Any = ("user", "assistant")) -> list[dict[str, Any]]:
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


ANSWERS = [{"answer": "hello", "rank": 1}, {"answer": "world", "rank": 2}]
TEXT_ROW = {"prompt": "hi", "chosen": "hello", "rejected": "world", "system": None, "id": 7}
ASKED = {"question": "hi", "input": "hi", **TEXT_ROW}
TALK = {"prompt": "hi", "chosen": turns("hi", "hello"), "rejected": turns("hi", "world")}
THREE = [("prompt",), ("chosen",), ("rejected",)]
TURNS = [("chosen",), ("chosen", 0, "content"), ("chosen", 1, "content"), ("rejected",)]
NECTAR = [("prompt",), ("answers",), ("answers", 0, "answer"), ("answers", 1, "answer")]
#: Strategy -> a good row, and the places in it that must hold text.
STRATEGIES: dict[str, tuple[dict[str, Any], list[tuple[Any, ...]]]] = {
    "user_defined.default": (TEXT_ROW, THREE),
    "passthrough.default": (TEXT_ROW, THREE),
    "zephyr.nectar": ({"prompt": "hi", "answers": ANSWERS}, NECTAR),
    "chat_template.default": (TEXT_ROW | {"messages": "hi"}, [("messages",), *THREE[1:]]),
    "chat_template.argilla_chat": ({key: TALK[key] for key in ("chosen", "rejected")}, TURNS),
}
for _family in ("chatml", "llama3"):
    STRATEGIES |= {
        f"{_family}.default": (TEXT_ROW, THREE),
        f"{_family}.icr": (ASKED, [("input",), *THREE[1:]]),
        f"{_family}.intel": (ASKED, [("question",), *THREE[1:]]),
        f"{_family}.prompt_pairs": (ASKED, THREE),
        f"{_family}.ultra": (TALK, [("prompt",), ("chosen", 1, "content"), ("rejected",)]),
        f"{_family}.argilla_chat": (TALK, TURNS),
    }


def tokenize(
    kind: str, good: dict[str, Any], bad: list[dict[str, Any]], template: str = "plain"
) -> TokenizedRows:
    """What becomes of bad rows, a good one before each, behind a guarded strategy of the host."""
    tokenizer = build(add_bos=True)
    if template != "plain":
        tokenizer.chat_template = get_chat_template(template)
    block = {"prompt_format": "<|user|>{system}{prompt}<|assistant|>"}
    transform = guarded(strategy(block if kind == "user_defined.default" else kind))
    rows = [copy.deepcopy(row) for damaged in bad for row in (good, damaged)]
    prepared = [transform(row, index, tokenizer=tokenizer) for index, row in enumerate(rows)]
    return tokenize_texts(tokenizer, *prepared, length=LENGTH)


def test_the_documentation_has_every_reason() -> None:
    docs = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
    assert [phrase for phrase in REASONS.pattern.split("|") if phrase not in docs] == []


def all_dropped(result: TokenizedRows, bad: list[dict[str, Any]], wanted: list[str]) -> None:
    """All rows but the good ones between them are dropped, for a reason that is documented."""
    reasons = {row: reason for reason, rows in result.dropped.items() for row in rows}
    assert [bad[row // 2] for row in result.rows if row % 2] == []
    assert result.rows == list(range(0, 2 * len(bad), 2))
    for row, damaged, said in zip(sorted(reasons), bad, wanted, strict=True):
        reason = reasons[row]
        assert reason.isascii()
        assert len(reason) < 400
        assert REASONS.search(reason), reason
        assert re.search(said, reason), (damaged, said, reason)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_damaged_fields_are_dropped_by_every_strategy(kind: str) -> None:
    good, places = STRATEGIES[kind]
    damaged = [(place, value) for place in places for value in BAD_TEXTS]
    bad = [put(good, place, value) for place, value in damaged]
    wanted = [expected(value, isinstance(at(good, place), str)) for place, value in damaged]
    all_dropped(tokenize(kind, good, bad), bad, wanted)


def expected(value: Any, read_as_text: bool) -> str:
    """What the reason for dropping a row must say that has this value where text belongs."""
    # Another column says the same until this one is changed.
    unreadable = "|reaches no text|different histories"
    unreadable += "" if read_as_text else "|cannot read it|must all be text"
    if value is MISSING:
        return "no field or role|must all be text"
    if value is None:
        return "is null|must all be text|null or not text|NoneType"
    if not isinstance(value, str):
        return "not text|must all be text|cannot read it|no field|is empty|histories|empty prompt"
    if not visible(value):
        return f"is empty|empty prompt{unreadable}"
    return ("longer than" if len(value) > LENGTH else "not valid Unicode") + unreadable


BAD_TURNS: list[Any] = [
    *(MISSING, None, 5, [], [None], ["hello"], [[]], [{}]),
    *([{"role": "user"}], [{"content": "hi"}]),
    *([{"role": role, "content": "hi"}] for role in (None, 5, "", "narrator", "User", [])),
    *([{"role": "user", "content": text}] for text in BAD_TEXTS[1:6]),
    *([{"role": "user", "content": text}] for text in BAD_TEXTS[8:]),
    [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}],
]
TALKS = {
    "passthrough.default": {
        "prompt": turns("hi"),
        "chosen": turns("hello", roles=["assistant"]),
        "rejected": turns("world", roles=["assistant"]),
    },
    "chat_template.default": {
        "messages": turns("hi"),
        "chosen": turns("hello", roles=["assistant"]),
        "rejected": {"role": "assistant", "content": "world"},
    },
}


@pytest.mark.parametrize("template", ["plain", "llama3", "chatml"])
@pytest.mark.parametrize("kind", TALKS)
def test_damaged_messages_are_dropped(kind: str, template: str) -> None:
    good = TALKS[kind]
    bad = [put(good, (field,), value) for field in good for value in BAD_TURNS]
    all_dropped(tokenize(kind, good, bad, template), bad, [""] * len(bad))
