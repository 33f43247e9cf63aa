"""Prompts without answers (`sera.prompts`): read as those of pairs are, and each sampled once.

A row gets two stand-ins for answers and goes the way of a pair, through the same strategy, chat
template and checks; of what comes out only the prompt is used. So it has the tokens that it would
have in a pair.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.conversations import ANSWER_ROLES, MessageReader, is_conversation
from sera_plugin.data.dataset import (
    ODD,
    ODD_CHARACTERS,
    TOO_LONG,
    RowTokenizer,
    TokenizedRows,
    require_usable,
    say_rows,
)
from sera_plugin.data.rows import PROBLEM, GuardedTransform
from sera_plugin.data.text import RowError
from sera_plugin.rundir.store import make_table
from sera_plugin.rundir.tokens import IntArray, TokenColumn

LOG = logging.getLogger("axolotl.sera")

#: Two different answers, which everything that reads an answer takes.
_STAND_INS = {"chosen": "yes", "rejected": "no"}
#: As messages name them that nothing maps; ShareGPT's among them.
_ANSWERS = (*ANSWER_ROLES, "gpt")


@dataclass
class GuardedPrompt(GuardedTransform):
    """See `GuardedTransform`. `column` has the prompt and `answers` are where a pair has them."""

    column: str = "prompt"
    answers: tuple[str, str] = ("chosen", "rejected")

    def __call__(self, row: Mapping[str, Any], index: int, tokenizer: Any = None) -> dict[str, Any]:
        """See `GuardedTransform`; the answers in it mean nothing."""
        # A column with a whole talk, answers included, is not the prompt's to say.
        ours = (self.column, *self.kept)
        kept = {k: v for k, v in row.items() if k in ours or not _is_talk(v)}
        reads_text = isinstance(self.transform, MessageReader)
        messages = is_conversation(row.get(self.column)) and not reads_text
        for name, text in zip(self.answers, _STAND_INS.values(), strict=True):
            kept[name] = [{"role": "assistant", "content": text}] if messages else text
        return super().__call__(kept, index, tokenizer)

    def _texts(self, row: dict[str, Any], tokenizer: Any) -> tuple[dict[str, str], str]:
        prompt: Any = row.get(self.column)
        if is_conversation(prompt):
            reader = self.transform if isinstance(self.transform, MessageReader) else None
            said = prompt[-1].get(reader.names["role"] if reader else "role")
            if (reader.roles.get(said, said) if reader else said) in _ANSWERS:
                raise RowError("the prompt ends with an answer; leave the last message out")
        return super()._texts(row, tokenizer)


def _is_talk(value: Any) -> bool:
    return is_conversation(value) and not {"role", "from"}.isdisjoint(value[0])


def prepare_prompts(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    end_ids: Sequence[int],
    cfg: Mapping[str, Any],
    config: SeraConfig,
    pairs: TokenColumn,
    held_out: TokenColumn | None,
) -> pa.Table:
    """prompts.parquet: the prompts that are in no pair, each once; says what becomes of the rows.

    (M,) `row`, which goes on from those of `pairs`, `prompt_ids`, and columns of `score_columns`.

    `examples` are as `GuardedPrompt` made them. Samples of a held-out pair's prompt would be
    trained, and the pair then judge what it has taught.

    Raises:
        ValueError: if none is left, or some are dropped that must not be, with the counts and the
            first rows of each reason.
    """
    encoder, length = RowTokenizer(tokenizer, end_ids), cfg.get("sequence_len")
    result, kept = TokenizedRows(), config.score_columns
    known: list[dict[str, Any]] = []
    for row, example in enumerate(examples):
        result.add(example, row)
        known.append({name: example[name] for name in kept if name in example})
        try:
            if example[PROBLEM]:
                raise RowError(example[PROBLEM])
            prompt = np.asarray(encoder.prompt(example["prompt"]), dtype=np.int32)
            if length is not None and len(prompt) >= length:
                raise RowError(TOO_LONG.format(length))
        except Exception as error:
            result.drop(row, error)
        else:
            result.rows.append(row)
            result.prompt_ids.append(prompt)
            if ODD_CHARACTERS.search(example["prompt"]):
                result.kept[ODD].append(row)
    require_usable(result, cfg, config, "prompt")
    say_rows(result, "prompt")
    named = {"are those of pairs": pairs, "are those of held-out pairs": held_out}
    taken = {one.tobytes(): why for why, column in named.items() for one in column or ()}
    left_out: Counter[str] = Counter()
    found: list[IntArray] = []
    rows: list[int] = []
    for row, prompt in zip(result.rows, result.prompt_ids, strict=True):
        if why := taken.get(key := prompt.tobytes()):
            left_out[why] += 1
        else:
            found.append(prompt)
            rows.append(row)
            taken[key] = "repeat another one"
    said = f"{len(found)} of {result.total} prompts are sampled beside those of the pairs"
    said += "".join(f"; {count} {why}" for why, count in left_out.items())
    if not found:
        raise ValueError(f"sera.prompts: {said}. Remove it, or name other prompts.")
    LOG.info("SeRA: sera.prompts: %s", said)
    columns: dict[str, Any] = {"row": np.arange(len(pairs), len(pairs) + len(found))}
    columns["prompt_ids"] = found
    for name in known[0]:
        columns[name] = pa.array([known[row][name] for row in rows])
    return make_table(columns)
