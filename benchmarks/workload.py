"""Models and preference pairs to measure on, built here: nothing is downloaded."""

import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

from benchmarks.harness import Setup

#: Shapes of models; the last two are those of TinyLlama-1.1B and Mistral-7B-v0.2.
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
    },
    "small": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    },
    "tinyllama-1.1b": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
}

#: Deciles (0 %, 10 %, ..., 100 %) of lengths in characters: prompts of 1,281 preference pairs made
#: from AlpacaEval's public annotations (Li et al. 2023, tatsu-lab/alpaca_eval), and both answers.
PROMPT_DECILES = (15, 37, 52, 70, 85, 105, 130, 166, 228, 355, 1917)
ANSWER_DECILES = (16, 153, 301, 457, 625, 838, 1056, 1277, 1523, 1869, 2398)
CHARACTERS_PER_TOKEN = 4  # the usual rule for English text and a vocabulary of 32,000

PROMPT_FORMAT, ANSWER_FORMAT = "{}\n", "{}"
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def lengths(deciles: tuple[int, ...], count: int, random: Random) -> list[int]:
    """Tokens of `count` texts with the given deciles, evenly over them, in random order."""
    ranks = [(index + 0.5) / count for index in range(count)]
    random.shuffle(ranks)
    characters = np.interp(ranks, np.linspace(0, 1, len(deciles)), deciles)
    return [max(1, round(number / CHARACTERS_PER_TOKEN)) for number in characters]


def make_rows(count: int, vocabulary: int, longest: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of words at random, a word a token.

    Args:
        count: pairs.
        vocabulary: of the model, with the special tokens.
        longest: most tokens of prompt and answer together, end token included.
        seed: of lengths and words.
    """
    random = Random(seed)

    def text(tokens: int) -> str:
        return " ".join(f"w{random.randrange(len(_SPECIAL), vocabulary)}" for _ in range(tokens))

    prompts = lengths(PROMPT_DECILES, count, random)
    chosen, rejected = (lengths(ANSWER_DECILES, count, random) for _ in range(2))
    rows = []
    for prompt, first, second in zip(prompts, chosen, rejected, strict=True):
        prompt = min(prompt, longest // 2)
        first, second = (min(answer, longest - prompt - 1) for answer in (first, second))
        rows.append({"prompt": text(prompt), "chosen": text(first), "rejected": text(second)})
    return rows


def read_rows(setup: Setup, count: int, vocabulary: int, longest: int) -> list[dict[str, str]]:
    """`--data`'s first pairs, else `make_rows`."""
    count = setup.pairs or count
    if setup.data is None:
        return make_rows(count, vocabulary, longest)
    with setup.data.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def make_tokenizer(vocabulary: int, longest: int) -> FastTokenizer:
    words = (*_SPECIAL, *(f"w{index}" for index in range(len(_SPECIAL), vocabulary)))
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FastTokenizer(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=longest,
    )


def make_model(setup: Setup, vocabulary: int | None = None) -> Path:
    """A directory with the model and its tokenizer, made once a setup and vocabulary."""
    if setup.model is not None:
        return setup.model
    shape = SHAPES[setup.shape] | ({"vocab_size": vocabulary} if vocabulary else {})
    directory = setup.directory / f"model-{shape['vocab_size']}"
    if directory.exists():
        return directory
    config = AutoConfig.for_model(
        **shape, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    with torch.device(setup.device):
        model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    model.save_pretrained(directory)
    longest = shape["max_position_embeddings"]
    make_tokenizer(shape["vocab_size"], longest).save_pretrained(directory)
    return directory


def load_model(setup: Setup, directory: Path) -> tuple[Any, Any]:
    """The model on the device, in eval mode, and the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=setup.dtype).to(setup.device)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def longest_of(setup: Setup, directory: Path) -> int:
    """Most tokens of a sequence."""
    config = AutoConfig.from_pretrained(directory).get_text_config()
    return min(int(config.max_position_embeddings), 2048 if setup.device == "cuda" else 1024)


def vocabulary_of(directory: Path) -> int:
    return int(AutoConfig.from_pretrained(directory).get_text_config().vocab_size)
