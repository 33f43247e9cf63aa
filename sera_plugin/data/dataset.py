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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.config.quoting import plain
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.encoding import RowTokenizer
from sera_plugin.data.rows import PROBLEM, ROW, SOURCE
from sera_plugin.data.texts import EMPTY, TEXTS, RowError, odd

IntArray = npt.NDArray[np.int32]

#: Below the host's own logger: it shows its own messages and, of others, only warnings.
LOG = logging.getLogger("axolotl.sera")

_NAMED_ROWS = 5
_NAMED_REASONS = 20
_TOO_LONG = "longer than sequence_len: {}"

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
        first: dict[str, list[str]] = {}
        for row in rows[:_NAMED_ROWS]:
            first.setdefault(self.sources[row], []).append(str(self.places[row]))
        places = [f"{source} rows {', '.join(found)}".strip() for source, found in first.items()]
        return "; ".join(places) + (", ..." if len(rows) > _NAMED_ROWS else "")

    def reasons(self) -> list[str]:
        """How many rows were dropped and why, the commonest reason first, with its first rows."""
        ranked = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        lines = [f"{len(rows)} row(s): {why} ({self.named(rows)})" for why, rows in ranked]
        more = len(lines) - _NAMED_REASONS
        return lines[:_NAMED_REASONS] + ([f"{more} more reasons"] if more > 0 else [])


def prepare_rows(
    examples: Any,
    tokenizer: Any,
    end_ids: Sequence[int],
    cfg: Mapping[str, Any],
    config: SeraConfig,
    name: str,
) -> TokenizedRows:
    """`tokenize_rows`, and say in the log what was dropped and what deserves a look.

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
    long = len(result.dropped.get(_TOO_LONG.format(length), ()))
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
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    end_ids: Sequence[int],
    max_length: int | None,
    truncate: bool = False,
    name: str = "train",
) -> TokenizedRows:
    """Tokenise preference rows exactly.

    Args:
        examples: rows as `GuardedTransform` made them: `prompt`, `chosen` and `rejected` as text,
            what is wrong with them and where they come from.
        end_ids: token ids that end a turn for the model.
        max_length: longest prompt + completion in tokens (`sequence_len`), or None.
        truncate: cut longer completions instead of dropping the row.
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
    encoded: list[tuple[int, list[str], list[IntArray]]] = []
    for row, example in enumerate(examples):
        result.total += 1
        result.sources.append(sys.intern(example.get(SOURCE, "")))
        result.places.append(example.get(ROW, row))
        try:
            encoded.append((row, *_encode(encoder, example)))
        except RowError as error:
            result.drop(row, str(error))
        except Exception as error:  # a tokenizer may raise anything
            result.drop(row, f"{type(error).__name__}: {plain(str(error), 120)}")

    # Which token ends a completion without any is known once all have been seen.
    result.end_ids = _turn_ends(encoder, [answer for *_, ids in encoded for answer in ids[1:]])
    seen: set[bytes] = set()
    for row, remarks, (prompt, *answers) in encoded:
        try:
            finished = [_end_once(encoder, answer.tolist(), result.end_ids) for answer in answers]
            pair = [ids for ids, _ in finished]
            if max_length is not None:
                too_long = len(prompt) + max(map(len, pair)) > max_length
                if too_long and not (truncate and len(prompt) < max_length):
                    raise RowError(_TOO_LONG.format(max_length))
                pair = [ids[: max_length - len(prompt)] for ids in pair]
            if np.array_equal(pair[0], pair[1]):
                raise RowError("chosen equals rejected, which prefers nothing")
        except RowError as error:
            result.drop(row, str(error))
            continue
        digest = b"".join(hashlib.sha256(ids.tobytes()).digest() for ids in (prompt, *pair))
        remarks += [DUPLICATE] if digest in seen else []
        remarks += [SPELLED_OUT] if any(spelled_out for _, spelled_out in finished) else []
        seen.add(digest)
        for remark in remarks:
            result.kept.setdefault(remark, []).append(row)
        result.rows.append(row)
        result.prompt_ids.append(prompt)
        result.chosen_ids.append(pair[0])
        result.rejected_ids.append(pair[1])
    if not result.rows:
        reasons = "; ".join(result.reasons()) or "the dataset is empty"
        keys = "`datasets:`" if name == "train" else "`test_datasets:` or `val_set_size`"
        raise ValueError(
            f"none of the {result.total} {name} rows can be used ({reasons}). Check {keys}, and "
            "`sequence_len`."
        )
    return result


def _encode(encoder: RowTokenizer, example: Mapping[str, Any]) -> tuple[list[str], list[IntArray]]:
    """Remarks on a row, and the ids of its texts, without an end added yet."""
    if example.get(PROBLEM):
        raise RowError(example[PROBLEM])
    prompt, *answers = texts = [example[key] for key in TEXTS]
    ids = [encoder.prompt(prompt), *(encoder.completion(prompt, text) for text in answers)]
    if not all(ids):
        raise RowError("prompt, chosen or rejected without tokens")
    remarks = [] if all(map(encoder.decodes_to, ids[1:], answers)) else [INEXACT]
    remarks += [ODD] if any(map(odd, texts)) else []
    # Arrays from here on: a Python int per token would cost gigabytes on a large dataset.
    return remarks, [np.asarray(one, dtype=np.int32) for one in ids]


def _end_once(
    encoder: RowTokenizer, ids: list[int], end_ids: Sequence[int]
) -> tuple[IntArray, bool]:
    """A completion whose last token, and no other, ends it; whether another had stood within."""
    answer, end = encoder.before_end(ids, end_ids)
    if not answer:
        raise RowError(EMPTY)
    spelled = encoder.spell_out(answer, end_ids)
    if not set(end_ids).isdisjoint(spelled):
        raise RowError("an answer spells an end-of-turn token that has no other spelling")
    last = end_ids[0] if end is None else end
    return np.asarray([*spelled, last], dtype=np.int32), spelled != answer


def _turn_ends(encoder: RowTokenizer, answers: Sequence[IntArray]) -> list[int]:
    """The tokens that end a turn, the one to append to a completion without any first.

    The model's own, and the special token that at least half of all completions end with instead
    (`<|im_end|>` in data made for another model). A special token that closes something else,
    such as a tool call, is part of the answer.
    """
    ends: Counter[int] = Counter()
    foreign: Counter[int] = Counter()
    for tokens in answers:
        ids = tokens.tolist()
        tail = [ids[position] for position in encoder.tail(ids)]
        own = [token for token in tail if token in encoder.end_ids]
        ends.update(own[:1])
        foreign.update([] if own else tail[-1:])
    ends.update({token: count for token, count in foreign.items() if 2 * count >= len(answers)})
    most_common = [token for token, _ in ends.most_common()]
    return list(dict.fromkeys([*most_common, *encoder.end_ids]))
