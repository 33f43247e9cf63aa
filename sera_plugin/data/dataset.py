"""From the host's preference rows to exact token ids.

What is scored, sampled and trained must be the same tokens, so every row becomes token ids once,
here: the prompt with exactly one BOS where the tokenizer uses one, the completion with exactly one
end-of-turn token. What cannot be used is dropped, counted and named; docs/data.md has the table.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.config.quoting import plain
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.rows import ASIDE, PROBLEM, ROW, SOURCE
from sera_plugin.data.text import EMPTY, TEXTS, RowError

IntArray = npt.NDArray[np.int32]

#: Below the host's own logger: it shows its own messages and, of others, only warnings.
LOG = logging.getLogger("axolotl.sera")

_NAMED_ROWS, _NAMED_REASONS = 5, 20
#: Where the rows of each name come from.
_KEYS = {"train": "`datasets:`", "prompt": "`sera.prompts`"}
_KEYS["eval"] = "`test_datasets:` or `val_set_size`"
TOO_LONG = "longer than sequence_len: {}"

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

#: Characters that text may contain but seldom means to: controls, zero-width space and byte order
#: mark, direction overrides, the replacement character of a wrong decoding, piles of accents.
ODD_CHARACTERS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ufffd]"
    "|[\u0300-\u036f\u1ab0-\u1aff\u20d0-\u20ff]{9,}"
)


def model_end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a turn: the tokenizer's eos, then the generation config's."""
    generation = getattr(model, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return [token for token in (tokenizer.eos_token_id, *listed) if token is not None]


class RowTokenizer:
    """Turns a row's texts into token ids; a turn of the model ends with one of `end_ids`."""

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.end_ids = list(dict.fromkeys(end_ids))
        if not self.end_ids:
            raise ValueError(
                "the tokenizer has no eos_token, so nothing can end a completion. Set "
                "`special_tokens: {eos_token: ...}` in the YAML."
            )
        self._bos = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and tokenizer("a")["input_ids"][:1] == [self._bos]
        self._special = {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special and index not in (self._bos, tokenizer.unk_token_id)
        } | set(self.end_ids)

    def _encode(self, text: str, spelled_out: bool = False) -> list[int]:
        options = {"split_special_tokens": True} if spelled_out else {}
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids

    def prompt(self, text: str) -> list[int]:
        """The prompt's ids with one BOS where the tokenizer adds one, never two."""
        ids = self._encode(text)
        while self._bos is not None and ids[:2] == [self._bos, self._bos]:
            ids = ids[1:]
        return [self._bos, *ids] if self._adds_bos and ids[:1] != [self._bos] else ids

    def completion(self, prompt: str, text: str, spelled_out: bool = False) -> list[int]:
        """The completion's ids as they follow the prompt, without an end token added yet.

        Tokenised after the prompt (a SentencePiece tokenizer would otherwise put a space in front);
        on its own where the two would merge, because sampling continues from the prompt's tokens.
        Special tokens that are `spelled_out` become the tokens of their spelling.
        """
        alone = self._encode(prompt, spelled_out)
        joint = self._encode(prompt + text, spelled_out)
        if joint[: len(alone)] == alone:
            return joint[len(alone) :]
        return self._encode(text, spelled_out)

    def pair(self, example: Mapping[str, Any]) -> tuple[list[str], list[IntArray]]:
        """Remarks on a row, and the ids of its texts, without an end added yet."""
        if example.get(PROBLEM):
            raise RowError(example[PROBLEM])
        prompt, *answers = texts = [example[key] for key in TEXTS]
        ids = [self.prompt(prompt), *(self.completion(prompt, text) for text in answers)]
        if not all(ids):
            raise RowError("prompt, chosen or rejected without tokens")
        remarks = [] if all(map(self._decodes_to, ids[1:], answers)) else [INEXACT]
        remarks += [ODD] if any(map(ODD_CHARACTERS.search, texts)) else []
        # Arrays from here on: a Python int per token would cost gigabytes on a large dataset.
        return remarks, [np.asarray(one, dtype=np.int32) for one in ids]

    def _decodes_to(self, ids: Sequence[int], text: str) -> bool:
        """Whether the ids spell the text, white space aside."""
        decoded: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return "".join(decoded.split()) == "".join(text.split())

    def _tail(self, ids: Sequence[int]) -> list[int]:
        """Positions of the special tokens a completion ends with, white space between ignored."""
        positions: list[int] = []
        for position in range(len(ids) - 1, -1, -1):
            if ids[position] in self._special:
                positions.insert(0, position)
            elif self.tokenizer.decode([ids[position]]).strip():
                break
        return positions

    def turn_ends(self, answers: Sequence[IntArray]) -> list[int]:
        """The tokens that end a turn, the one to append to a completion without any first.

        The model's own, and the special token that at least half of all completions end with
        instead (`<|im_end|>` in data made for another model). A special token that closes something
        else, such as a tool call, is part of the answer.
        """
        ends: Counter[int] = Counter()
        foreign: Counter[int] = Counter()
        for tokens in answers:
            ids = tokens.tolist()
            tail = [ids[position] for position in self._tail(ids)]
            own = [token for token in tail if token in self.end_ids]
            ends.update(own[:1])
            foreign.update([] if own else tail[-1:])
        ends.update({token: n for token, n in foreign.items() if 2 * n >= len(answers)})
        return list(dict.fromkeys([*(token for token, _ in ends.most_common()), *self.end_ids]))

    def finish(self, ids: list[int], turn_ends: Sequence[int]) -> tuple[IntArray, bool]:
        """A completion whose last token, and no other, ends it; whether another had stood within.

        An answer may talk about `<|im_end|>`. As the token itself it would end the turn for
        everything that reads these ids later; as the tokens of its spelling it is text. Special
        tokens that do neither, such as those around a tool call, stay.
        """
        # What is behind the first end goes: the `</s>` of `<|im_end|></s>`, a newline.
        ends = [position for position in self._tail(ids) if ids[position] in turn_ends]
        answer, last = (ids[: ends[0]], ids[ends[0]]) if ends else (ids, turn_ends[0])
        if not answer:
            raise RowError(EMPTY)
        spelled: list[int] = []
        for token in answer:
            if token in turn_ends or token == self._bos:
                # Behind a full stop: a SentencePiece tokenizer puts a space before a first word.
                text = self.tokenizer.convert_ids_to_tokens(token)
                spelled += self.completion(".", text, spelled_out=True)
            else:
                spelled.append(token)
        if not set(turn_ends).isdisjoint(spelled):
            raise RowError("an answer spells an end-of-turn token that has no other spelling")
        return np.asarray([*spelled, last], dtype=np.int32), spelled != answer


@dataclass
class TokenizedRows:
    """Rows that can be trained on, and what happened to the others."""

    rows: list[int] = field(default_factory=list)  # of the host's dataset, in its order
    prompt_ids: list[IntArray] = field(default_factory=list)  # of the kept rows
    chosen_ids: list[IntArray] = field(default_factory=list)
    rejected_ids: list[IntArray] = field(default_factory=list)
    end_ids: list[int] = field(default_factory=list)  # what ends a completion, for the sampler
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by reason
    kept: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by remark
    #: Of every row: the user's dataset it comes from, and its place there.
    sources: list[str] = field(default_factory=list)
    #: Of the user's datasets: the columns that are no part of the text.
    aside: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    places: array[int] = field(default_factory=lambda: array("q"))

    def add(self, example: Mapping[str, Any], row: int) -> None:
        """Note where a row comes from, and what it has beside its texts."""
        self.sources.append(sys.intern(example.get(SOURCE, "")))
        self.places.append(example.get(ROW, row))
        if example.get(ASIDE):
            self.aside[self.sources[-1]].update(example[ASIDE].split(", "))

    def drop(self, row: int, error: Exception) -> None:
        """Leave out a row that cannot be used; a tokenizer may raise anything."""
        if not isinstance(error, RowError):
            error = RowError(f"{type(error).__name__}: {plain(str(error), 120)}")
        self.dropped[str(error)].append(row)

    @property
    def total(self) -> int:
        """How many rows there were."""
        return len(self.sources)

    def named(self, rows: Sequence[int]) -> str:
        """The first rows by their place in the user's own files."""
        first: dict[str, list[str]] = {}
        for row in nsmallest(_NAMED_ROWS, rows, lambda row: (self.sources[row], self.places[row])):
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
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    end_ids: Sequence[int],
    cfg: Mapping[str, Any],
    config: SeraConfig,
    name: str,
) -> TokenizedRows:
    """Tokenise preference rows, as `GuardedTransform` made them, exactly; log what becomes of them.

    A completion that does not end in a special token gets the data's most frequent one, the
    tokenizer's eos where there is none: sampled and offline completions then end the same way and
    their rewards are comparable. Prompt and completion longer than `sequence_len` tokens are
    dropped, or the completion is cut.

    Raises:
        ValueError: if no usable row is left, or some are dropped that must not be, with the counts
            and the first rows of each reason.
    """
    length, truncate = cfg.get("sequence_len"), _long_rows(cfg) == "truncate"
    result = _tokenized(examples, RowTokenizer(tokenizer, end_ids), length, truncate)
    require_usable(result, cfg, config, name)
    say_rows(result, name)
    return result


def say_rows(result: TokenizedRows, name: str) -> None:
    """Log which columns are in no text, which rows have something odd, and which are dropped."""
    for source, columns in result.aside.items():
        named = plain(", ".join(sorted(columns)), 200)
        LOG.info("%s: of %s, no text has the column(s) %s", name, source, named)
    for remark, rows in result.kept.items():
        LOG.warning("%s: %d row(s) %s (%s)", name, len(rows), remark, result.named(rows))
    for reason in result.reasons():
        LOG.warning("%s: dropped %s", name, reason)


def check_rows(dataset: Any, cfg: Mapping[str, Any], config: SeraConfig, name: str) -> None:
    """Raise what `prepare_rows` would of rows that could not even be made into text.

    It reads three columns of `dataset` and needs no model: before one is loaded.
    """
    result = TokenizedRows(sources=dataset[SOURCE][:], places=array("q", dataset[ROW]))
    for row, problem in enumerate(dataset[PROBLEM]):
        if problem:
            result.dropped[problem].append(row)
        else:
            result.rows.append(row)
    require_usable(result, cfg, config, name)


def _long_rows(cfg: Mapping[str, Any]) -> str:
    return str(cfg.get("excess_length_strategy") or "").lower()


def require_usable(
    result: TokenizedRows, cfg: Mapping[str, Any], config: SeraConfig, name: str
) -> None:
    """ValueError if no usable row is left, or some are dropped that must not be."""
    reasons = result.reasons()
    if not result.rows:
        raise ValueError(
            f"none of the {result.total} {name} rows can be used "
            f"({'; '.join(reasons) or 'the dataset is empty'}). Check {_KEYS[name]}, and "
            "`sequence_len`."
        )
    dropped = sum(map(len, result.dropped.values()))
    long = len(result.dropped.get(TOO_LONG.format(cfg.get("sequence_len")), ()))
    for wanted, count, key in (
        (_long_rows(cfg) == "raise", long, "excess_length_strategy"),
        (config.bad_rows == "raise", dropped - long, "sera.bad_rows"),
    ):
        if wanted and count:
            raise ValueError(
                f"{key}: raise, and {dropped} of the {result.total} {name} rows cannot be used: "
                f"{'; '.join(reasons)}. Mend or remove them, or set {key}: drop."
            )


def _tokenized(
    examples: Iterable[Mapping[str, Any]],
    encoder: RowTokenizer,
    max_length: int | None,
    truncate: bool,
) -> TokenizedRows:
    result = TokenizedRows()
    encoded: list[tuple[int, list[str], list[IntArray]]] = []
    for row, example in enumerate(examples):
        result.add(example, row)
        try:
            encoded.append((row, *encoder.pair(example)))
        except Exception as error:
            result.drop(row, error)

    # Which token ends a completion without any is known once all have been seen.
    result.end_ids = encoder.turn_ends([answer for *_, ids in encoded for answer in ids[1:]])
    seen: set[bytes] = set()
    for row, remarks, (prompt, *answers) in encoded:
        try:
            finished = [encoder.finish(answer.tolist(), result.end_ids) for answer in answers]
            pair = [ids for ids, _ in finished]
            if max_length is not None:
                too_long = len(prompt) + max(map(len, pair)) > max_length
                if too_long and not (truncate and len(prompt) < max_length):
                    raise RowError(TOO_LONG.format(max_length))
                pair = [ids[: max_length - len(prompt)] for ids in pair]
            if np.array_equal(pair[0], pair[1]):
                raise RowError("chosen equals rejected, which prefers nothing")
        except RowError as error:
            result.dropped[str(error)].append(row)
            continue
        digest = b"".join(hashlib.sha256(ids.tobytes()).digest() for ids in (prompt, *pair))
        remarks += [DUPLICATE] if digest in seen else []
        remarks += [SPELLED_OUT] if any(spelled_out for _, spelled_out in finished) else []
        seen.add(digest)
        for remark in remarks:
            result.kept[remark].append(row)
        result.rows.append(row)
        result.prompt_ids.append(prompt)
        result.chosen_ids.append(pair[0])
        result.rejected_ids.append(pair[1])
    return result
