"""From texts to exact token ids, with real tokenizers built here."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import DUPLICATE, INEXACT, LOG, ODD, SPELLED_OUT, prepare_rows

_NAMES = "user assistant im_start im_end start_header_id end_header_id eot_id tool_end"
SPECIAL = ["<pad>", "<s>", "</s>", *(f"<|{name}|>" for name in _NAMES.split())]
CORPUS = ["ab"] * 9 + ["hello world", "a user and an assistant say hi", "user assistant"] * 3
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


TEXTS = [
    *("None", "5", "[]", "{}", "null", "true", "user: who am I?", "end eot im message"),
    "x = [] or {}\nprint(x[0], {'role': 'user'})",
    "def f(x): return x>y && a|b <b>bold</b> `code` <|x|> [[ ]] \\n",
    "> quoted\n>>> print(1)\n| a | b |\n|---|---|",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5",
    "مرحبا بالعالم",
    "שלום עולם",
    "e\u0301 naïve größer 東京 мир",
    "One.\n\nTwo.\n\t- three",
]


def build(add_bos: bool = False, metaspace: bool = False, lower: bool = False) -> Any:
    """A byte-level BPE (or SentencePiece-like) tokenizer as transformers wraps it."""
    backend = Tokenizer(models.BPE())
    if lower:
        backend.normalizer = normalizers.Lowercase()
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def plain() -> Any:
    return build()


def row(prompt: str, chosen: str = "hello", rejected: str = "world") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokenize(
    tokenizer: Any,
    *rows: dict[str, Any],
    ends: str = "</s>",
    length: int | None = None,
    name: str = "train",
    bad_rows: Any = "drop",
    **cfg: Any,
) -> Any:
    end_ids = tokenizer.convert_tokens_to_ids(ends.split())
    config = SeraConfig(bad_rows=bad_rows)
    return prepare_rows(rows, tokenizer, end_ids, {"sequence_len": length, **cfg}, config, name)


def spelled(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(
        [int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


@pytest.mark.parametrize("text", ["hi", "<s>hi", "<s><s>hi", "<s><s><s>hi"])
@pytest.mark.parametrize("adds", [True, False])
def test_one_bos_where_the_tokenizer_adds_one_and_never_two(adds: bool, text: str) -> None:
    tokenizer = build(add_bos=adds)
    result = tokenize(tokenizer, row(text))
    assert spelled(tokenizer, result.prompt_ids[0]) == ("<s>hi" if adds or text != "hi" else "hi")
    for ids in (result.chosen_ids[0], result.rejected_ids[0]):
        assert tokenizer.bos_token_id not in ids


@pytest.mark.parametrize("chosen", ["hello", " hello", "hello  world", "hello user"])
@pytest.mark.parametrize("metaspace", [False, True])
def test_prompt_and_completion_spell_the_text(metaspace: bool, chosen: str) -> None:
    tokenizer, prompt = build(metaspace=metaspace), "<|user|>hi<|assistant|>"
    result = tokenize(tokenizer, row(prompt, chosen))
    both = np.concatenate([result.prompt_ids[0], result.chosen_ids[0]])
    expected = tokenizer(prompt + chosen + "</s>", add_special_tokens=False)["input_ids"]
    assert both.tolist() == expected
    assert both.dtype == np.int32


EQUAL = "chosen equals rejected, which prefers nothing"
NO_TOKENS = "prompt, chosen or rejected without tokens"
TOO_LONG = "longer than sequence_len: "
LONG = "excess_length_strategy"


@dataclass
class Case:
    """Answers to "x" as (chosen, rejected), or with another prompt before them; what remains."""

    rows: list[tuple[str, ...]]
    #: Of the rows that are kept, as their tokens spell them; None is the same text and one end.
    answers: list[tuple[str, str]] | None = None
    dropped: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    end_ids: str = "</s>"
    options: dict[str, Any] = field(default_factory=dict)


XY = ("x", "y")
TALK = ("<|user|>x<|assistant|>", "xz", "y")  # 3 tokens, then 3 of the longer answer with its end
CALLED, ENDS = "ab<|tool_end|>", "</s> <|im_end|> <|im_end|>"
#: Nothing that stands before an end, or without one behind it, is lost.
ENDED = {end: end for end in ("<|im_end|>", "</s>")}
ENDED |= dict.fromkeys(("<|im_end|></s>", "<|im_end|><|im_end|>"), "<|im_end|>")
ENDED |= dict.fromkeys(("<|im_end|> \n\n", "<|im_end|></s>\n", "<|im_end|>\n</s>"), "<|im_end|>")
ENDED |= {"\n": "\n<|im_end|>", "<|im_end|>z": "<|im_end|>z<|im_end|>"}
CASES = {
    # In the text "xa" + "bx" an a and a b would merge.
    "tokens do not merge across the boundary": Case([("xa", "bx", "x")]),
    "no end in the data": Case([XY], end_ids="</s> <|im_end|>", options={"ends": ENDS}),
    # The sampler stops at what ends completions in the data, and at the model's own end.
    "a missing end becomes the most frequent one": Case(
        [("hello", "world<|im_end|>"), ("ab<|im_end|>", "hi</s>")],
        [("hello<|im_end|>", "world<|im_end|>"), ("ab<|im_end|>", "hi</s>")],
        end_ids="<|im_end|> </s>",
    ),
    # A tool call closes with a special token of its own, and the turn ends behind it.
    "a special token that ends no turn is part of the answer": Case(
        [(f"{CALLED}<|im_end|>", f"{CALLED}</s>"), (CALLED, "hi<|im_end|>")],
        [(f"{CALLED}<|im_end|>", f"{CALLED}</s>"), (f"{CALLED}<|im_end|>", "hi<|im_end|>")],
        end_ids="<|im_end|> </s>",
        options={"ends": ENDS},
    ),
    # Every other answer says how turns end; the odd one out must not cut theirs short.
    "one unfinished tool call does not make its close an end": Case(
        [(f"{CALLED}</s>", f"{i}</s>") for i in range(5)] + [(CALLED, "hi</s>")],
        [(f"{CALLED}</s>", f"{i}</s>") for i in (*range(5), "hi")],
    ),
    "nothing behind an end": Case(
        [(f"x{end}", "y<|im_end|>") for end in ENDED],
        [(f"x{end}", "y<|im_end|>") for end in ENDED.values()],
        kept={DUPLICATE: [2, 3, 4, 5, 6], SPELLED_OUT: [8]},
        end_ids="<|im_end|> </s>",
    ),
    "an answer spells the end of a turn": Case(
        [("ab</s>hello</s>", "world</s>"), ("ab<s>", "hello")],
        [("ab</s>hello</s>", "world</s>"), ("ab<s></s>", "hello</s>")],
        kept={SPELLED_OUT: [0, 1]},
    ),
    "equal answers": Case(
        [XY, ("ab", "ab"), ("ab</s>", "ab"), ("ab</s>\n", "ab")], dropped={EQUAL: [1, 2, 3]}
    ),
    "equal once they are cut": Case(
        [("yzx", "xzy"), ("xzx", "xzy")],
        [("yz", "xz")],
        dropped={EQUAL: [1]},
        options={"length": 3, LONG: "truncate"},
    ),
    "duplicates": Case(
        [XY, XY, ("x", "z"), ("x</s>", "y")],
        [*[("x</s>", "y</s>")] * 2, ("x</s>", "z</s>"), ("x</s>", "y</s>")],
        kept={DUPLICATE: [1, 3]},
    ),
    "only rows that are trained are remarked on": Case(
        [("a\0b", "y"), ("\0" * 30, "y")],
        dropped={TOO_LONG + "12": [1]},
        kept={ODD: [0]},
        options={"length": 12},
    ),
    "rows are named by their place": Case([("", "y"), XY, ("x", "")], dropped={NO_TOKENS: [0, 2]}),
    "just as long as may be": Case([TALK], options={"length": 6}),
    "one token too long": Case([XY, TALK], dropped={TOO_LONG + "5": [1]}, options={"length": 5}),
    "cut to the room that the prompt leaves": Case(
        [TALK], [("xz", "y</s>")], options={"length": 5, LONG: "truncate"}
    ),
    "no room behind the prompt": Case(
        [XY, TALK], dropped={TOO_LONG + "3": [1]}, options={"length": 3, LONG: "truncate"}
    ),
    "any text": Case([(text, f"{text}.") for text in TEXTS]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_rows(plain: Any, name: str) -> None:
    case = CASES[name]
    rows = [row(*(texts if len(texts) == 3 else ("x", *texts))) for texts in case.rows]
    result = tokenize(plain, *rows, **case.options)
    assert (result.dropped, result.kept) == (case.dropped, case.kept)
    gone = {index for dropped in case.dropped.values() for index in dropped}
    left = [index for index in range(len(rows)) if index not in gone]
    assert result.rows == left
    prompts, *answers = (
        [spelled(plain, ids) for ids in column]
        for column in (result.prompt_ids, result.chosen_ids, result.rejected_ids)
    )
    assert prompts == [rows[index]["prompt"] for index in left]
    same = [tuple(f"{text}</s>" for text in case.rows[index][-2:]) for index in left]
    assert list(zip(*answers, strict=True)) == (case.answers or same)
    assert plain.convert_ids_to_tokens(result.end_ids) == case.end_ids.split()
    for ids in (*result.chosen_ids, *result.rejected_ids):
        assert not {plain.bos_token_id, *result.end_ids} & set(ids[:-1].tolist())


def test_odd_characters_are_kept_and_counted(plain: Any) -> None:
    odd = ["\0", "\x1b", "\u200b", "\u202e", "\u2066", "\ufeff", "\ufffd", "\u0301" * 9]
    fine = ["\u200d", "\u200c", "é", "e\u0301", "👩‍👩‍👧", "\t", "\n", *TEXTS]
    result = tokenize(plain, *(row("hi", f"a{character}b") for character in (*odd, *fine)))
    assert result.dropped == {}
    assert result.kept == {ODD: list(range(len(odd)))}


def test_other_tokenizers_spell_out_an_end_too_and_what_they_change_is_noted() -> None:
    tokenizer = build(metaspace=True)
    result = tokenize(tokenizer, row("hi", "ab</s>hello", "ab"))
    assert result.kept == {SPELLED_OUT: [0]}
    assert result.chosen_ids[0].tolist().count(tokenizer.eos_token_id) == 1
    result = tokenize(build(lower=True), row("hi", "hello"), row("hi", "HELLO"))
    assert (result.rows, result.kept[INEXACT]) == ([0, 1], [1])


def test_nothing_usable_is_an_error_with_the_counts(plain: Any) -> None:
    rows = [row("hi", ""), row("hi", "hi", ""), row("hi", "hello world " * 9)]
    counts = r"\(2 row\(s\): .* without tokens \(rows 0, 1\); 1 row\(s\): longer.*\)"
    for name, keys in (("train", "`datasets:`"), ("eval", "`test_datasets:` or `val_set_size`")):
        said = f"none of the 3 {name} rows can be used {counts}. Check {keys}, and `sequence_len`"
        with pytest.raises(ValueError, match=said):
            tokenize(plain, *rows, length=12, name=name)
    with pytest.raises(ValueError, match="the dataset is empty"):
        tokenize(plain)
    with pytest.raises(ValueError, match=r"special_tokens: \{eos_token"):
        tokenize(plain, row("hi"), ends="")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bad_rows": "raise"}, r"^sera.bad_rows: raise, and 2 of the 3 train rows .*bad_rows"),
        ({LONG: "raise"}, rf"^{LONG}: raise, and 2 of .*1 row\(s\): longer .*\(rows 2\)"),
    ],
)
def test_bad_and_long_rows_stop_the_run_when_asked_to(plain, options, said) -> None:
    rows = [row("hi", text, "ab") for text in ("x", "", "hello " * 9)]
    with pytest.raises(ValueError, match=said) as error:
        tokenize(plain, *rows, length=9, **options)
    assert f"1 row(s): {NO_TOKENS} (rows 1)" in str(error.value)
    assert str(error.value).split(". ")[-1].startswith("Mend or remove them, or set ")
    if "bad_rows" in options:  # rows that are only too long are no bad rows
        assert tokenize(plain, *rows[::2], length=9, **options).rows == [0]


def test_the_log_names_the_first_rows_of_the_commonest_reasons(plain, monkeypatch, caplog):
    monkeypatch.setattr(LOG, "handlers", [caplog.handler])
    monkeypatch.setattr(LOG, "propagate", False)  # as where the host has set up its loggers
    source = {"sera_source": "datasets[0] (f)"}
    bad = [{"sera_problem": f"problem {i}", "sera_row": i} | source for i in range(30)]
    tokenize(plain, row("hi"), *[row("hi", "")] * 7, *bad, bad[7])
    lines = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    assert lines[0] == f"WARNING train: dropped 7 row(s): {NO_TOKENS} (rows 1, 2, 3, 4, 5, ...)"
    assert lines[1] == "WARNING train: dropped 2 row(s): problem 7 (datasets[0] (f) rows 7, 7)"
    assert lines[-1] == "WARNING train: dropped 11 more reasons"
    assert len(lines) == 21
