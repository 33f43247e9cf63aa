"""From the host's preference rows to exact token ids.

What is scored, sampled and trained must be the same tokens, so every row becomes token ids once,
here: the prompt with exactly one BOS where the tokenizer uses one, the completion with exactly one
end-of-turn token. What cannot be used is dropped, counted and named; docs/data.md has the table.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.config.quoting import plain
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.encoding import RowTokenizer
from sera_plugin.data.fields import TEXTS
from sera_plugin.data.rows import PROBLEM, ROW, SOURCE
from sera_plugin.data.texts import RowError, odd

IntArray = npt.NDArray[np.int32]

#: Below the host's own logger: it shows its own messages and, of others, only warnings.
LOG = logging.getLogger("axolotl.sera")

_NAMED_ROWS = 5
_NAMED_REASONS = 20


def too_long(sequence_len: int | None) -> str:
    """The reason for dropping a row that the context has no room for."""
    return f"longer than sequence_len: {sequence_len}"


@dataclass
class TokenizedRows:
    """Rows that can be trained on, and what happened to the others.

    Attributes:
        rows: indices into the host's dataset, in its order.
        prompt_ids, chosen_ids, rejected_ids: token ids per kept row.
        end_ids: token ids that end a completion (for the sampler).
        total: how many rows there were.
        dropped: reason -> rows dropped for it.
        kept: remark -> kept rows that deserve a look.
        sources, places: for every row, the user's dataset it comes from and its place there.
    """

    rows: list[int] = field(default_factory=list)
    prompt_ids: list[IntArray] = field(default_factory=list)
    chosen_ids: list[IntArray] = field(default_factory=list)
    rejected_ids: list[IntArray] = field(default_factory=list)
    end_ids: list[int] = field(default_factory=list)
    total: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    places: array[int] = field(default_factory=lambda: array("q"))

    def drop(self, row: int, reason: str) -> None:
        """Note why a row is not used."""
        self.dropped.setdefault(reason, []).append(row)

    def named(self, rows: Sequence[int]) -> str:
        """The first rows by their place in the user's own files."""
        first: dict[str, list[int]] = {}
        for row in rows[:_NAMED_ROWS]:
            first.setdefault(self.sources[row], []).append(self.places[row])
        more = ", ..." if len(rows) > _NAMED_ROWS else ""
        return (
            "; ".join(
                f"{source} rows {', '.join(map(str, places))}".strip()
                for source, places in first.items()
            )
            + more
        )

    def reasons(self) -> list[str]:
        """How many rows were dropped and why, the commonest reason first, with its first rows."""
        ranked = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        lines = [f"{len(rows)} row(s): {why} ({self.named(rows)})" for why, rows in ranked]
        more = len(lines) - _NAMED_REASONS
        return lines[:_NAMED_REASONS] + ([f"{more} more reasons"] if more > 0 else [])


#: Remarks on rows that are kept.
INEXACT = "have tokens that do not decode back to their text; they are trained as tokenised"
SPELLED_OUT = (
    "have an answer that spells a token which ends a turn or begins a text; it is tokenised as "
    "plain text there"
)
ODD = (
    "have control characters, zero-width spaces, byte order marks, direction overrides, wrongly "
    "decoded characters or piled-up accents; they are trained as they are"
)
DUPLICATE = (
    "repeat an earlier row, token for token; they are trained as often as they are there. Set "
    "`dataset_exact_deduplication: true` to keep one of each"
)


def prepare_rows(
    examples: Any,
    tokenizer: Any,
    end_ids: Sequence[int],
    cfg: Mapping[str, Any],
    config: SeraConfig,
    name: str,
) -> TokenizedRows:
    """Tokenise rows and say in the log what was dropped and what deserves a look.

    Args:
        examples, tokenizer, end_ids: see `tokenize_rows`.
        cfg: the host's resolved configuration (`sequence_len`, `excess_length_strategy`).
        config: the `sera:` block in it (`bad_rows`).
        name: what the rows are for, "train" or "eval".

    Raises:
        ValueError: if no usable row is left, or some are dropped that must not be, with the counts
            and the first rows of each reason.
    """
    long_rows = str(cfg.get("excess_length_strategy") or "").lower()
    length = cfg.get("sequence_len")
    result = tokenize_rows(
        examples, tokenizer, end_ids, length, truncate=long_rows == "truncate", name=name
    )
    for remark, rows in result.kept.items():
        LOG.warning("%s: %d row(s) %s (%s)", name, len(rows), remark, result.named(rows))
    dropped = sum(map(len, result.dropped.values()))
    long = len(result.dropped.get(too_long(length), ()))
    for wanted, count, key in (
        (long_rows == "raise", long, "excess_length_strategy"),
        (config.bad_rows == "raise", dropped - long, "sera.bad_rows"),
    ):
        if wanted and count:
            raise ValueError(
                f"{key}: raise, and {dropped} of the {result.total} {name} rows cannot be used: "
                f"{'; '.join(result.reasons())}. Mend or remove them, or set {key}: drop."
            )
    for reason in result.reasons():
        LOG.warning("%s: dropped %s", name, reason)
    return result


def kept_columns(dataset: Any, rows: Sequence[int], names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of the host's rows that can be used, (N,) each."""
    kept = dataset.select(rows)
    return {name: kept[name][:] for name in names}


def tokenize_rows(
    examples: Sequence[Mapping[str, Any]] | Any,
    tokenizer: Any,
    end_ids: Sequence[int],
    max_length: int | None,
    truncate: bool = False,
    name: str = "train",
) -> TokenizedRows:
    """Tokenise preference rows exactly.

    Args:
        examples: rows with `prompt`, `chosen` and `rejected` as text, as the guarded transform
            made them; it also says what is wrong with them and where they come from.
        tokenizer: a transformers tokenizer.
        end_ids: token ids that end a turn for the model.
        max_length: longest prompt + completion in tokens (`sequence_len`), or None.
        truncate: cut longer completions (`excess_length_strategy: truncate`) instead of dropping
            the row.
        name: what the rows are for, "train" or "eval".

    Returns:
        The rows that can be used. A completion that does not end in a special token gets the
        data's most frequent one, the tokenizer's eos where there is none: sampled and offline
        completions then end the same way and their rewards are comparable.

    Raises:
        ValueError: if no usable row is left, with the counts of what was wrong.
    """
    encoder = RowTokenizer(tokenizer, end_ids)
    result = TokenizedRows()
    parsed: list[tuple[int, list[str], IntArray, list[IntArray]]] = []
    for row, example in enumerate(examples):
        result.total += 1
        result.sources.append(sys.intern(example.get(SOURCE, "")))
        result.places.append(example.get(ROW, row))
        try:
            if example.get(PROBLEM):
                raise RowError(example[PROBLEM])
            texts = [example[key] for key in TEXTS]
            prompt_ids, *answers = _encode(encoder, *texts)
        except RowError as error:
            result.drop(row, str(error))
            continue
        except Exception as error:  # a tokenizer may raise anything
            result.drop(row, f"{type(error).__name__}: {plain(str(error), 120)}")
            continue
        remarks = [] if all(map(encoder.decodes_to, answers, texts[1:])) else [INEXACT]
        remarks += [ODD] if any(map(odd, texts)) else []
        # Arrays from here on: a Python int per token would cost gigabytes on a large dataset.
        prompt_array, *raw = (np.asarray(ids, dtype=np.int32) for ids in (prompt_ids, *answers))
        parsed.append((row, remarks, prompt_array, raw))

    result.end_ids = _turn_ends(encoder, [raw for *_, raw in parsed])
    seen: set[bytes] = set()
    for row, remarks, prompt_array, raw in parsed:
        try:
            completions, spelled_out = _finish(encoder, raw, result.end_ids)
            if max_length is not None:
                completions = _fit(len(prompt_array), completions, max_length, truncate)
            if np.array_equal(completions[0], completions[1]):
                raise RowError("chosen equals rejected, which prefers nothing")
        except RowError as error:
            result.drop(row, str(error))
            continue
        digest = hashlib.sha256()
        for ids in (prompt_array, *completions):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        remarks += [DUPLICATE] if digest.digest() in seen else []
        remarks += [SPELLED_OUT] if spelled_out else []
        seen.add(digest.digest())
        for remark in remarks:
            result.kept.setdefault(remark, []).append(row)
        result.rows.append(row)
        result.prompt_ids.append(prompt_array)
        result.chosen_ids.append(completions[0])
        result.rejected_ids.append(completions[1])
    if not result.rows:
        reasons = "; ".join(result.reasons())
        keys = "`datasets:`" if name == "train" else "`test_datasets:` or `val_set_size`"
        raise ValueError(
            f"none of the {result.total} {name} rows can be used "
            f"({reasons or 'the dataset is empty'}). Check {keys}, and `sequence_len`."
        )
    return result


def _encode(encoder: RowTokenizer, prompt: str, chosen: str, rejected: str) -> list[list[int]]:
    found = [encoder.prompt(prompt)]
    found += [encoder.completion(prompt, text) for text in (chosen, rejected)]
    if not all(found):
        raise RowError("prompt, chosen or rejected without tokens")
    return found


def _finish(
    encoder: RowTokenizer, raw: Sequence[IntArray], end_ids: Sequence[int]
) -> tuple[list[IntArray], bool]:
    """Both completions with one end token, their last; and whether one had another within."""
    completions = []
    spelled_out = False
    for tokens in raw:
        ids, ended = encoder.end_once(tokens.tolist(), end_ids)
        answer, end = (ids[:-1], ids[-1]) if ended else (ids, end_ids[0])
        if not answer:
            raise RowError("empty prompt, chosen or rejected")
        plain = encoder.spell_out(answer, end_ids)
        if plain != answer:
            spelled_out = True
            if not set(end_ids).isdisjoint(plain):
                raise RowError("an answer spells an end-of-turn token that has no other spelling")
        completions.append(np.asarray([*plain, end], dtype=np.int32))
    return completions, spelled_out


def _fit(
    prompt: int, completions: Sequence[IntArray], max_length: int, truncate: bool
) -> list[IntArray]:
    """The completions as far as they fit after a prompt of that many tokens."""
    if prompt + max(map(len, completions)) > max_length and (not truncate or prompt >= max_length):
        raise RowError(too_long(max_length))
    return [ids[: max_length - prompt] for ids in completions]


def _turn_ends(encoder: RowTokenizer, answers: Sequence[Sequence[IntArray]]) -> list[int]:
    """The tokens that end a turn, the one to append to a completion without any first.

    The model's own, and the special token that at least half of all completions end with instead
    (`<|im_end|>` in data made for another model). A special token that closes something else,
    such as a tool call, is part of the answer.
    """
    ends: Counter[int] = Counter()
    foreign: Counter[int] = Counter()
    for tokens in chain.from_iterable(answers):
        ids = tokens.tolist()
        tail = [ids[position] for position in encoder.tail(ids)]
        own = [token for token in tail if token in encoder.end_ids]
        ends.update(own[:1])
        foreign.update([] if own else tail[-1:])
    half = len(answers)  # two completions a row
    ends.update({token: count for token, count in foreign.items() if count >= half})
    most_common = [token for token, _ in ends.most_common()]
    return list(dict.fromkeys([*most_common, *encoder.end_ids]))
