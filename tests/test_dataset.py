"""From texts to exact token ids, with real tokenizers built here."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import INEXACT, LOG, prepare_rows, tokenize_rows

_NAMES = "user assistant im_start im_end start_header_id end_header_id eot_id tool_end"
SPECIAL = ["<pad>", "<s>", "</s>", *(f"<|{name}|>" for name in _NAMES.split())]
CORPUS = ["ab"] * 9 + ["hello world", "a user and an assistant say hi", "user assistant"] * 3
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build(add_bos: bool = False, metaspace: bool = False, lower: bool = False) -> Any:
    """A byte-level BPE (or SentencePiece-like) tokenizer as transformers wraps it."""
    from transformers import PreTrainedTokenizerFast

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


def row(prompt: Any = "<|user|>hi<|assistant|>", chosen: Any = "hello", rejected: Any = "world"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokenize(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> Any:
    options = {"end_ids": [tokenizer.eos_token_id], "max_length": None, **options}
    return tokenize_rows(list(rows), tokenizer, **options)


def spelled(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(
        [int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


# ------------------------------------------------------------------ beginnings


@pytest.mark.parametrize("text", ["hi", "<s>hi", "<s><s>hi", "<s><s><s>hi"])
@pytest.mark.parametrize("adds", [True, False])
def test_one_bos_where_the_tokenizer_adds_one_and_never_two(adds: bool, text: str) -> None:
    tokenizer = build(add_bos=adds)
    result = tokenize(tokenizer, row(prompt=text))
    assert spelled(tokenizer, result.prompt_ids[0]) == ("<s>hi" if adds or text != "hi" else "hi")
    for ids in (result.chosen_ids[0], result.rejected_ids[0]):
        assert tokenizer.bos_token_id not in ids


def test_tokens_do_not_merge_across_the_boundary(plain: Any) -> None:
    result = tokenize(plain, row(prompt="xa", chosen="bx", rejected="x"))
    assert spelled(plain, result.prompt_ids[0]) == "xa"
    assert spelled(plain, result.chosen_ids[0]) == "bx</s>"
    assert result.prompt_ids[0].tolist() == plain("xa")["input_ids"]
    assert INEXACT not in result.kept


@pytest.mark.parametrize("chosen", ["hello", " hello", "hello  world", "hello user"])
@pytest.mark.parametrize("metaspace", [False, True])
def test_prompt_and_completion_spell_the_text(metaspace: bool, chosen: str) -> None:
    tokenizer = build(metaspace=metaspace)
    prompt = "<|user|>hi<|assistant|>"
    result = tokenize(tokenizer, row(prompt=prompt, chosen=chosen))
    both = np.concatenate([result.prompt_ids[0], result.chosen_ids[0]])
    expected = tokenizer(prompt + chosen + "</s>", add_special_tokens=False)["input_ids"]
    assert both.tolist() == expected


# ------------------------------------------------------------------ ends


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("hello<|im_end|>", "hello<|im_end|>"),
        ("hello</s>", "hello</s>"),
        ("hello<|im_end|></s>", "hello<|im_end|>"),
        ("hello<|im_end|><|im_end|>", "hello<|im_end|>"),
        ("hello<|im_end|>\n", "hello<|im_end|>"),
        ("hello<|im_end|> \n\n", "hello<|im_end|>"),
        ("hello<|im_end|></s>\n", "hello<|im_end|>"),
        ("hello<|im_end|>\n</s>", "hello<|im_end|>"),
        # Nothing that stands before an end, or without one behind it, is lost.
        ("hello\n", "hello\n<|im_end|>"),
        ("hello<|im_end|>world", "hello<|im_end|>world<|im_end|>"),
    ],
)
def test_exactly_one_end_token_and_nothing_behind_it(plain: Any, text: str, kept: str) -> None:
    result = tokenize(plain, row(chosen=text, rejected="world<|im_end|>"))
    assert spelled(plain, result.chosen_ids[0]) == kept


def test_a_special_token_that_ends_no_turn_is_part_of_the_answer(plain: Any) -> None:
    """A tool call closes with a special token of its own, and the turn ends behind it."""
    ends = [plain.eos_token_id, plain.convert_tokens_to_ids("<|im_end|>")]
    called = row(chosen="ab<|tool_end|><|im_end|>", rejected="ab<|tool_end|></s>")
    result = tokenize(plain, called, row(chosen="ab<|tool_end|>"), end_ids=ends)
    assert spelled(plain, result.chosen_ids[0]) == "ab<|tool_end|><|im_end|>"
    assert spelled(plain, result.rejected_ids[0]) == "ab<|tool_end|></s>"
    assert spelled(plain, result.chosen_ids[1]).startswith("ab<|tool_end|><")


def test_one_unfinished_tool_call_does_not_make_its_close_an_end(plain: Any) -> None:
    """Every other answer says how turns end; the odd one out must not cut theirs short."""
    usual = row(chosen="ab<|tool_end|></s>", rejected="hi</s>")
    odd = row(chosen="ab<|tool_end|>", rejected="hi</s>")
    result = tokenize(plain, *[usual] * 5, odd)
    assert result.end_ids == [plain.eos_token_id]
    assert {spelled(plain, ids) for ids in result.chosen_ids} == {"ab<|tool_end|></s>"}


def test_a_missing_end_becomes_the_datas_most_frequent_one(plain: Any) -> None:
    rows = [
        row(chosen="hello", rejected="world<|im_end|>"),
        row(chosen="ab<|im_end|>", rejected="hi</s>"),
    ]
    result = tokenize(plain, *rows)
    im_end = plain.convert_tokens_to_ids("<|im_end|>")
    assert spelled(plain, result.chosen_ids[0]) == "hello<|im_end|>"
    assert spelled(plain, result.rejected_ids[1]) == "hi</s>"
    # The sampler stops at what ends completions in the data, and at the model's own end.
    assert result.end_ids == [im_end, plain.eos_token_id]


def test_without_any_end_in_the_data_it_is_the_eos(plain: Any) -> None:
    im_end = plain.convert_tokens_to_ids("<|im_end|>")
    result = tokenize(plain, row(), end_ids=[plain.eos_token_id, im_end, im_end])
    assert spelled(plain, result.chosen_ids[0]) == "hello</s>"
    assert spelled(plain, result.rejected_ids[0]) == "world</s>"
    assert result.end_ids == [plain.eos_token_id, im_end]


def test_a_tokenizer_without_eos_says_what_to_set(plain: Any) -> None:
    with pytest.raises(ValueError, match=r"special_tokens: \{eos_token"):
        tokenize(plain, row(), end_ids=[])


# ------------------------------------------------------------------ rows


def test_ids_are_int32_arrays_and_rows_are_named_by_their_place(plain: Any) -> None:
    result = tokenize(plain, row(), row(chosen=""), row())
    assert result.rows == [0, 2]
    for column in (result.prompt_ids, result.chosen_ids, result.rejected_ids):
        assert [ids.dtype for ids in column] == [np.int32, np.int32]


def test_sequence_len_counts_prompt_longer_completion_and_end_token(plain: Any) -> None:
    """prompt: <|user|> x <|assistant|> is 3; chosen x x </s> is 3; rejected y </s> is 2."""
    example = row(prompt="<|user|>x<|assistant|>", chosen="xz", rejected="y")
    assert tokenize(plain, example, max_length=6).rows == [0]
    result = tokenize(plain, row(prompt="x", chosen="x", rejected="y"), example, max_length=5)
    assert result.rows == [0]
    assert result.dropped == {"longer than sequence_len: 5": [1]}


def test_truncation_cuts_completions_to_the_room_the_prompt_leaves_if_any(plain: Any) -> None:
    long = row(prompt="<|user|>x<|assistant|>", chosen="xzx", rejected="y")
    result = tokenize(plain, long, max_length=5, truncate=True)
    assert spelled(plain, result.prompt_ids[0]) == "<|user|>x<|assistant|>"
    assert spelled(plain, result.chosen_ids[0]) == "xz"
    assert spelled(plain, result.rejected_ids[0]) == "y</s>"
    assert result.dropped == {}
    short = row(prompt="x", chosen="x", rejected="y")
    result = tokenize(plain, long, short, max_length=3, truncate=True)
    assert (result.rows, list(result.dropped.values())) == ([1], [[0]])


def test_no_usable_row_is_an_error_with_the_counts(plain: Any) -> None:
    rows = [row(chosen=""), row(rejected=""), row(chosen="hello world " * 9)]
    with pytest.raises(
        ValueError,
        match=r"none of the 3 .*2 row\(s\): .* without tokens.*1 row\(s\): longer.*sequence_len",
    ):
        tokenize(plain, *rows, max_length=12)
    with pytest.raises(ValueError, match="the dataset is empty"):
        tokenize(plain)


def test_tokens_that_do_not_spell_their_text_are_noted_and_trained() -> None:
    result = tokenize(build(lower=True), row(chosen="hello"), row(chosen="HELLO"))
    assert (result.rows, result.kept[INEXACT]) == ([0, 1], [1])


def test_ordinary_text_of_any_script_is_exact(plain: Any) -> None:
    rows = [row(chosen=text, rejected=text[::-1]) for text in ordinary_texts(60)]
    result = tokenize(plain, *rows)
    assert INEXACT not in result.kept
    assert result.dropped == {}


def test_the_log_names_the_first_rows_of_each_reason(
    plain: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LOG, "handlers", [caplog.handler])
    monkeypatch.setattr(LOG, "propagate", False)  # as where the host has set up its loggers
    rows = [row(), *[row(chosen="")] * 7]
    prepare_rows(rows, plain, [plain.eos_token_id], {}, SeraConfig(), "train")
    [line] = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    assert line.startswith("WARNING train: dropped 7 row(s): prompt, chosen or rejected without")
    assert "(rows 1, 2, 3, 4, 5, ...)" in line


# ------------------------------------------------------------------ the host's chat_template


WORDS = """
The answer is probably forty two because user interfaces need an assistant to header
größer naïve 東京 تم العثور שלום мир 🙂 👩‍👩‍👧 🇯🇵 é
def f(x): return x>y && a|b <b>bold</b> {'role': 'user'} \\n `code` * - 1. <|x|> > >> | [[ ]]
end eot im message
"""


def ordinary_texts(count: int) -> list[str]:
    """Answers of several words: prose, scripts, emoji, code, markup."""
    random = Random(7)
    words = WORDS.split()
    texts = ["> quoted answer", ">>> print(1)", "| a | b |\n|---|---|", "user: who am I?"]
    while len(texts) < count:
        joined = random.choice([" ", " ", "\n"]).join(
            random.choices(words, k=random.randint(4, 30))
        )
        texts.append(f"No. {len(texts)} {joined} done.")
    return texts[:count]
