"""Malformed configurations and rows by the thousand: each ends in words of ours.

Every input here is wrong in a known way, so that a pass in silence is seen too: what is accepted
must be what an oracle allows, and a damaged row must be among those dropped, for a reason that
docs/data.md has. Nothing may escape as another exception than our `ValueError`.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_plugin import SeraPlugin
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import ODD, SPELLED_OUT, TokenizedRows, tokenize_rows
from sera_plugin.data.files import DataError, while_loading
from sera_plugin.data.texts import visible
from tests.test_dataset import build
from tests.test_plugin_config import config
from tests.test_rows import guarded

DOCS = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")

#: Malformed inputs that were refused or dropped, by kind; the last test looks at it.
TRIED: Counter[str] = Counter()


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


# ------------------------------------------------------------------ configurations

NUMBERS = [math.nan, math.inf, -math.inf, -1, -0.5, 0, 10**400, 1e300, True, False]
TEXTS = ["", " ", "three", "nan", "\ud800", "a\0b", "\u202eabc\ufeff", "x" * 5000, b"\xff\xfe"]
DATES = [datetime.date(2025, 1, 1), datetime.datetime(2025, 1, 1, 12)]
LISTS: list[Any] = [[], [None], [[]], ["x", 1], {"x", "y"}, (1, 2), nested(150), object()]
BLOCKS: list[Any] = [{}, {"a": {"b": []}}, {1: 2}, {None: None}, {b"k": 1}]
JUNK: list[Any] = [*NUMBERS, *TEXTS, *DATES, *LISTS, *BLOCKS]


def _between(low: float, high: float, above: bool = False) -> Callable[[Any], bool]:
    def inside(value: Any) -> bool:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            return False
        return (low < number if above else low <= number) and number <= high

    return inside


def _unset(value: Any) -> bool:
    return not value


def _switch(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))


def _path(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


#: Strings among the junk that can name a directory.
DIRECTORIES = ("", " ", "three", "nan", "\u202eabc\ufeff")
#: Where junk goes -> which of it is no junk there.
PLACES: dict[str, Callable[[Any], bool]] = {
    "sera": lambda v: v == {},
    "sera.selection_ratio": _between(0, 1),
    "sera.bootstrap_ratio": _between(0, 32),
    "sera.gamma": _between(0, 1),
    "sera.temperature": _between(0, 10, above=True),
    "sera.top_p": _between(0, 1, above=True),
    "sera.restart_optimizer": _switch,
    "sera.keep_policies": _switch,
    "sera.score_columns": lambda v: v == [] or isinstance(v, set),
    "output_dir": lambda v: v is None or (isinstance(v, str) and v in DIRECTORIES),
    "rl_beta": lambda v: v == 1e300,
    "trl": lambda v: isinstance(v, dict),
    "trl.beta": lambda v: v == 1e300,
    "dpo_label_smoothing": lambda v: not v,
    "context_parallel_size": lambda v: not v,
    "max_steps": _unset,
    "streaming": _unset,
    "relora": _unset,
    "vllm": lambda v: v == {},
    "datasets.0.path": _path,
    "datasets.0.type": lambda v: (isinstance(v, str) and bool(v.strip())) or v == {},
    "datasets.0.type.field_prompt": lambda v: isinstance(v, str),
    "datasets.0.name": lambda v: not isinstance(v, (list, tuple)),
    "test_datasets.0.path": _path,
}
#: Where none of it is.
NEVER = """
    sera.loss sera.ipo_reduction sera.candidates sera.max_new_tokens sera.sampler
    sera.vllm_python sera.bad_rows sera.unknown rl num_epochs dpo_loss_type simpo_gamma
    cpo_alpha trainer_cls vllm.unknown datasets test_datasets datasets.0
"""
PLACES |= dict.fromkeys(NEVER.split(), lambda v: False)


def misplaced(place: str, value: Any) -> dict[str, Any]:
    """A configuration with this value there, everything else in order."""
    cfg = config(sera={}, trl={}, vllm={})
    cfg["test_datasets"] = copy.deepcopy(cfg["datasets"])
    *path, last = place.split(".")
    if place.startswith("datasets.0.type."):
        cfg["datasets"][0]["type"] = {}
    target: Any = cfg
    for key in path:
        target = target[int(key) if key.isdigit() else key]
    target[int(last) if last.isdigit() else last] = value
    return cfg


def refused(cfg: dict[str, Any]) -> str | None:
    """What `register` says, or None where it accepts; anything but a ValueError escapes."""
    try:
        SeraPlugin().register(cfg)
    except ValueError as error:
        if type(error) is not ValueError:
            raise  # one of somebody else's
        return str(error)
    if cfg.get("inference"):
        return None  # nothing is trained, and the block is not looked at
    resolved = SeraConfig(**cfg["sera"])
    json.dumps(resolved.model_dump(mode="json"), allow_nan=False)
    return None


def readable(message: str, *parts: str) -> None:
    """A message is one short line of plain characters that names what it is about."""
    assert message.isascii()
    assert message.isprintable()
    assert 20 < len(message) < 1000, message
    for part in parts:
        assert part in message, (part, message)


@pytest.mark.parametrize("place", PLACES)
def test_junk_anywhere_in_a_configuration_is_refused_in_words(place: str) -> None:
    for value in JUNK:
        message = refused(misplaced(place, value))
        if PLACES[place](value):
            assert message is None, (place, value, message)
            continue
        assert message is not None, (place, value)
        TRIED["configuration"] += 1
        named = place if place.startswith(("sera.", "vllm.")) else place.split(".")[-1]
        readable(message, "datasets" if named == "0" else named)


plain_values = st.none() | st.booleans() | st.integers() | st.floats() | st.dates()
names = st.text(max_size=6) | st.integers() | st.none()
yaml_values = st.recursive(
    plain_values | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
sera_keys = st.sampled_from(sorted(SeraConfig.model_fields)) | st.text(max_size=12) | st.integers()


@settings(deadline=None, max_examples=250, derandomize=True, database=None)
@given(block=st.dictionaries(sera_keys, yaml_values, min_size=1, max_size=4), beside=yaml_values)
def test_any_block_is_understood_or_refused_in_words(block: Any, beside: Any) -> None:
    message = refused(config(sera=block, dpo_loss_type=beside, num_epochs=beside))
    if message is not None:
        TRIED["configuration"] += 1
        readable(message)


top_keys = (
    st.sampled_from(["sera", "serra", "sera_gamma", "gamma", "vllm", "trl", "datasets", "rl_beta"])
    | st.text(max_size=10)
    | st.integers()
)


@settings(deadline=None, max_examples=250, derandomize=True, database=None)
@given(keys=st.dictionaries(top_keys, yaml_values, min_size=1, max_size=3))
def test_any_keys_beside_the_block_are_understood_or_refused(keys: Any) -> None:
    message = refused({**config(), **keys})
    if message is not None:
        TRIED["configuration"] += 1
        readable(message)


# ------------------------------------------------------------------ rows

#: Reasons for dropping a row: what the message has, and docs/data.md.
REASONS = {
    r"^field .* is (null|a number|true or false|a list|an object|a \w+), not text$": "is null",
    r"^field .* is empty$": "is empty",
    r"^empty prompt, chosen or rejected$": "empty prompt, chosen or rejected",
    r"^no field or role .*; its fields are ": "no field or role",
    r"^the host's strategy cannot read it: \w+: ": "the host's strategy cannot read it",
    r"^prompt, chosen, rejected must all be text or all messages, not ": "must all be text",
    r"^a message's content is null or not text$": "a message's content is null or not text",
    r"^a user message is empty$": "a user message is empty",
    r"^unknown role .* in the prompt$": "unknown role",
    r"^chosen or rejected has the role .*, not assistant$": "has the role",
    r"^chosen or rejected has several messages": "has several messages",
    r"^the chat template does not render": "the chat template does not render",
    r"^the chat template renders the prompt differently": "renders the prompt differently",
    r"^not valid Unicode: half of a surrogate pair$": "not valid Unicode",
    r"^prompt, chosen or rejected without tokens$": "without tokens",
    r"^chosen equals rejected, which prefers nothing$": "chosen equals rejected",
    r"^longer than sequence_len: \d+$": "longer than sequence_len",
    r"^an answer spells an end-of-turn token that has no other spelling$": "no other spelling",
}
LENGTH = 200
MISSING = object()
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
TALK = {
    "prompt": "hi",
    "chosen": turns("hi", "hello"),
    "rejected": turns("hi", "world"),
    "score": 0.5,
}
THREE = [("prompt",), ("chosen",), ("rejected",)]
TURNS = [("chosen",), ("chosen", 0, "content"), ("chosen", 1, "content"), ("rejected",)]
#: Strategy -> a good row, and the places in it that must hold text.
STRATEGIES: dict[str, tuple[dict[str, Any], list[tuple[Any, ...]]]] = {
    "user_defined.default": (TEXT_ROW, THREE),
    "passthrough.default": (TEXT_ROW, THREE),
    "zephyr.nectar": (
        {"prompt": "hi", "answers": ANSWERS},
        [("prompt",), ("answers",), ("answers", 0, "answer"), ("answers", 1, "answer")],
    ),
    "chat_template.default": (
        {"messages": "hi", "chosen": "hello", "rejected": "world"},
        [("messages",), *THREE[1:]],
    ),
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


def put(row: Mapping[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of the row with this value there, or without the key."""
    changed = copy.deepcopy(dict(row))
    target: Any = changed
    for key in path[:-1]:
        target = target[key]
    if value is MISSING:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return changed


class Guarded:
    """A host strategy behind the guard."""

    def __init__(self, strategy: str, template: str = "plain", **entry: Any) -> None:
        from axolotl.prompt_strategies.dpo import load
        from axolotl.utils.chat_templates import get_chat_template
        from axolotl.utils.dict import DictDefault

        self.tokenizer = build(add_bos=True)
        if template != "plain":
            self.tokenizer.chat_template = get_chat_template(template)
        if strategy == "user_defined.default":
            entry["type"] = {"prompt_format": "<|user|>{system}{prompt}<|assistant|>"}
        cfg = {"chat_template": "tokenizer_default", "datasets": [{"type": strategy, **entry}]}
        self.transform = guarded(load(strategy, DictDefault(cfg), dataset_idx=0))

    def tokenize(self, rows: list[dict[str, Any]]) -> TokenizedRows:
        prepared = [
            self.transform(copy.deepcopy(row), index, tokenizer=self.tokenizer)
            for index, row in enumerate(rows)
        ]
        return tokenize_rows(prepared, self.tokenizer, [self.tokenizer.eos_token_id], LENGTH)


def all_dropped(result: TokenizedRows, rows: list[dict[str, Any]], good: dict[str, Any]) -> None:
    """All rows but the good ones are dropped, each for a reason that the documentation has."""
    kept = [number for number, row in enumerate(rows) if row is good]
    assert [rows[row] for row in result.rows if row not in kept] == []
    assert result.rows == kept
    TRIED["row"] += len(rows) - len(kept)
    for reason in result.dropped:
        assert reason.isascii()
        assert len(reason) < 400
        [phrase] = [phrase for pattern, phrase in REASONS.items() if re.search(pattern, reason)]
        assert phrase in DOCS, phrase
    assert sum(map(len, result.dropped.values())) == len(rows) - len(kept)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_damaged_fields_are_dropped_by_every_strategy(strategy: str) -> None:
    good, places = STRATEGIES[strategy]
    rows: list[dict[str, Any]] = []
    wanted: list[str] = []
    for place in places:
        for value in BAD_TEXTS:
            as_text = isinstance(at(good, place), str)
            rows += [good, put(good, place, value)]
            wanted += ["", expected(value, as_text)]
    result = Guarded(strategy).tokenize(rows)
    all_dropped(result, rows, good)
    for reason, dropped in result.dropped.items():
        for row in dropped:
            assert re.search(wanted[row], reason), (rows[row], wanted[row], reason)


def at(row: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        row = row[key]
    return row


def expected(value: Any, read_as_text: bool) -> str:
    """What the reason for dropping a row must say that has this value where text belongs."""
    unreadable = "" if read_as_text else "|cannot read it"
    if value is MISSING:
        return "no field or role|must all be text"
    if value is None:
        return "is null|must all be text|null or not text|NoneType"
    if not isinstance(value, str):
        return "not text|must all be text|cannot read it|no field or role|is empty"
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
@pytest.mark.parametrize("strategy", TALKS)
def test_damaged_messages_are_dropped(strategy: str, template: str) -> None:
    good = TALKS[strategy]
    rows: list[dict[str, Any]] = []
    for field in good:
        for value in BAD_TURNS:
            rows += [put(good, (field,), value), good]
    all_dropped(Guarded(strategy, template).tokenize(rows), rows, good)


@pytest.mark.parametrize("strategy", ["user_defined.default", "chatml.default"])
def test_optional_fields_may_be_anything_that_is_left_out(strategy: str) -> None:
    rows = [TEXT_ROW | {"system": value, "note": value} for value in (None, "", "Be brief.")]
    rows += [TEXT_ROW | {"note": value} for value in BAD_TEXTS[1:]]
    result = Guarded(strategy).tokenize(rows)
    assert result.dropped == {}


def test_any_values_in_the_three_columns_are_dropped_or_text() -> None:
    random = Random(3)
    values = [*BAD_TEXTS[1:], *BAD_TURNS[1:], "hello", "world", turns("hi")]
    good = {"prompt": "hi", "chosen": "hello", "rejected": "world"}
    rows = [good] + [
        {key: random.choice(values) for key in ("prompt", "chosen", "rejected", "x")}
        for _ in range(400)
    ]
    result = Guarded("passthrough.default").tokenize(rows)
    kept = [rows[row] for row in result.rows]
    for row in kept:
        texts = [row["prompt"], row["chosen"], row["rejected"]]
        assert all(isinstance(text, str) and text.strip() for text in texts), row
        assert texts[1] != texts[2]
    TRIED["row"] += len(rows) - len(kept)
    assert len(kept) + sum(map(len, result.dropped.values())) == len(rows)


PIECES = ["hello", " world", "</s>", "<s>", "<|im_end|>", "<|tool_end|>", "<|user|>", "\n", " "]


@pytest.mark.parametrize("options", [{}, {"add_bos": True}, {"metaspace": True}])
def test_special_tokens_in_answers_end_no_turn(options: dict[str, bool]) -> None:
    random = Random(5)
    tokenizer = build(**options)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    rows = []
    for index in range(150):
        text = "ab" + "".join(random.choices(PIECES, k=random.randint(1, 6)))
        rows.append({"prompt": "hi", "chosen": f"{text} b{index}", "rejected": text})
    result = tokenize_rows(rows, tokenizer, ends, None)
    assert len(result.rows) == len(rows)
    for ids in (*result.chosen_ids, *result.rejected_ids):
        assert ids[-1] in ends
        assert not {*ends, tokenizer.bos_token_id} & set(ids[:-1].tolist())
    spelled = {
        index
        for index, row in enumerate(rows)
        if re.search(r"</s>|<s>|<\|im_end\|>", row["chosen"])
    }
    assert set(result.kept[SPELLED_OUT]) == spelled


def test_odd_characters_are_kept_and_counted() -> None:
    odd = ["\0", "\x1b", "\u200b", "\u202e", "\u2066", "\ufeff", "\ufffd", "\u0301" * 9]
    fine = ["\u200d", "\u200c", "é", "e\u0301", "مرحبا", "שלום", "👩‍👩‍👧", "\t", "\n"]
    texts = [f"a{character}b" for character in (*odd, *fine)]
    rows = [{"prompt": "hi", "chosen": text, "rejected": "world"} for text in texts]
    result = Guarded("passthrough.default").tokenize(rows)
    assert result.dropped == {}
    assert result.kept == {ODD: list(range(len(odd)))}


# ------------------------------------------------------------------ files


def damaged_files() -> Iterator[tuple[str, bytes]]:
    """Files of good rows with a piece cut out, put in or replaced so that they are not JSON."""
    random = Random(11)
    line = json.dumps({"prompt": "hi", "chosen": "hello", "rejected": "world"})
    yield "empty", b""
    yield "blank", b"\n\n"
    for index in range(60):
        lines = [line] * 4
        place = random.randrange(4)
        cut = random.randrange(1, len(line) - 1)
        lines[place] = random.choice(
            [line[:cut], line[cut:], "[1, 2]", "5", '"text"', "{", "]", "key: value"]
        )
        yield f"line {place + 1}", "\n".join(lines).encode() + b"\n" * (index % 2)


def test_damaged_files_are_named_with_the_line(tmp_path: Path) -> None:
    from axolotl.utils.data.shared import load_dataset_with_config
    from axolotl.utils.dict import DictDefault

    for number, (said, content) in enumerate(damaged_files()):
        TRIED["file"] += 1
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(content)
        entry = DictDefault({"path": str(path), "ds_type": "json", "split": "train"})
        with pytest.raises(DataError) as error, while_loading("datasets[0]", str(path)):
            load_dataset_with_config(entry, False)
        readable(str(error.value), "datasets[0].path", f"{number}.jsonl")
        assert said in str(error.value) or said == "blank"


def test_thousands_were_tried() -> None:
    """Counted, not assumed; holds when this file ran as a whole."""
    if len(TRIED) < 3:
        pytest.skip("only a part of this file ran")
    assert sum(TRIED.values()) >= 2000, TRIED
    print(dict(TRIED))
