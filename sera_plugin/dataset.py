"""From the host's preference rows to exact token ids.

What is scored, sampled and trained must be the same tokens, so every row becomes token ids once,
here: the prompt with exactly one BOS where the tokenizer uses one, the completion with exactly one
end-of-turn token. Rows that the host's chat template strategy corrupted are found and named.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

#: Below the host's own logger: it shows its own messages and, of others, only warnings.
LOG = logging.getLogger("axolotl.sera")

#: The host's `chat_template.*` strategies render a completion after this user message and cut it
#: out again by string search (axolotl 0.19, prompt_strategies/dpo/chat_template.py).
_HOST_DUMMY = "[[dummy_message]]"
_NAMED_ROWS = 5


def model_end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a turn: the tokenizer's eos, then the generation config's."""
    generation = getattr(model, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    found = [token for token in (tokenizer.eos_token_id, *listed) if token is not None]
    return list(dict.fromkeys(found))


class RowError(ValueError):
    """A row that cannot be used; the message says which and why."""


@dataclass
class TokenizedRows:
    """Rows that can be trained on, and what happened to the others.

    Attributes:
        rows: indices into the host's dataset, in its order.
        prompt_ids, chosen_ids, rejected_ids: token ids per kept row.
        end_ids: token ids that end a completion (for the sampler).
        dropped: reason -> rows dropped for it.
        inexact: kept rows whose tokens do not decode back to their text.
    """

    rows: list[int] = field(default_factory=list)
    prompt_ids: list[IntArray] = field(default_factory=list)
    chosen_ids: list[IntArray] = field(default_factory=list)
    rejected_ids: list[IntArray] = field(default_factory=list)
    end_ids: list[int] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    inexact: list[int] = field(default_factory=list)

    def drop(self, row: int, reason: str) -> None:
        self.dropped.setdefault(reason, []).append(row)


class ChatTemplateCheck:
    """Tells completions that the host cut out of its rendered chat template wrongly.

    The host looks for the answer's text in the whole rendering. An answer such as "user" is found
    in the turn's header first, and one that the template trims is not found at all, which leaves
    only the last character of the end-of-turn text. Both leave traces that a probe reveals.
    """

    def __init__(self, tokenizer: Any) -> None:
        probe = "sera-probe-7f3a"
        rendered: str = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": _HOST_DUMMY},
                {"role": "assistant", "content": probe},
            ],
            add_generation_prompt=False,
            tokenize=False,
        )
        self._before, _, after = rendered.partition(probe)
        self._end = after.rstrip()

    def corrupted(self, completion: str) -> bool:
        """Whether this completion, as the host returned it, is not answer + end of turn."""
        if _HOST_DUMMY in completion:
            return True
        if not completion.endswith(self._end):
            return self._end.endswith(completion)
        answer = completion[: len(completion) - len(self._end)]
        # Found too early: the completion is X + answer' + end with X the tail of what precedes
        # the answer, and the search matched because X + answer' starts with answer'.
        return any(
            answer.startswith(self._before[-length:])
            and len(rest := answer[length:]) > 0
            and answer.startswith(rest)
            for length in range(1, min(len(self._before), len(answer)) + 1)
        )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _texts(example: Mapping[str, Any], tokenizer: Any) -> tuple[str, str, str]:
    """The row's prompt, chosen and rejected as text; conversations go through the template."""
    values = [example.get(key) for key in ("prompt", "chosen", "rejected")]
    if all(isinstance(value, str) for value in values):
        return values[0], values[1], values[2]  # type: ignore[return-value]
    if not all(_is_conversation(value) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise RowError(f"prompt, chosen, rejected must all be text or all messages, not {kinds}")
    prompt: Any
    prompt, chosen, rejected = values
    text: str = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    completions = []
    for answer in (chosen, rejected):
        whole: str = tokenizer.apply_chat_template(prompt + answer, tokenize=False)
        if not whole.startswith(text):
            raise RowError(
                "the chat template renders the prompt differently once the answer follows"
            )
        completions.append(whole[len(text) :].rstrip())
    return text, completions[0], completions[1]


class RowTokenizer:
    """Turns a row's texts into token ids.

    Args:
        tokenizer: a transformers tokenizer.
        end_ids: token ids that end a turn for the model (tokenizer and generation config).
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.end_ids = list(dict.fromkeys(end_ids))
        if not self.end_ids:
            raise ValueError(
                "the tokenizer has no eos_token, so nothing can end a completion. Set "
                "`special_tokens: {eos_token: ...}` in the YAML."
            )
        bos = tokenizer.bos_token_id
        with_special = tokenizer("a")["input_ids"]
        self._bos = bos if bos is not None and with_special[:1] == [bos] else None
        self._special = {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special and index not in (bos, tokenizer.unk_token_id)
        } | set(self.end_ids)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def prompt(self, text: str) -> list[int]:
        """The prompt's ids with one BOS where the tokenizer adds one, never two."""
        ids = self._encode(text)
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        return ids

    def completion(self, prompt: str, text: str) -> list[int]:
        """The completion's ids as they follow the prompt, without an end token added yet.

        Tokenised behind the prompt where that leaves the prompt's own tokens alone (a
        SentencePiece tokenizer would otherwise put a space in front); on its own where the two
        would merge across the boundary, because sampling continues from the prompt's tokens.
        """
        alone = self._encode(prompt)
        joint = self._encode(prompt + text)
        return joint[len(alone) :] if joint[: len(alone)] == alone else self._encode(text)

    def tail(self, ids: Sequence[int]) -> list[int]:
        """Positions of the special tokens a completion ends with, white space between ignored."""
        positions: list[int] = []
        for position in range(len(ids) - 1, -1, -1):
            if ids[position] in self._special:
                positions.insert(0, position)
            elif self.tokenizer.decode([ids[position]]).strip():
                break
        return positions

    def end_once(self, ids: list[int], turn_ends: Collection[int]) -> tuple[list[int], bool]:
        """Cut behind the first token that ends the turn (`<|im_end|></s>`, a newline after it).

        Returns:
            The ids, and whether they end in such a token.
        """
        for position in self.tail(ids):
            if ids[position] in turn_ends:
                return ids[: position + 1], True
        return ids, False

    def decodes_to(self, ids: Sequence[int], text: str) -> bool:
        """Whether the ids spell the text, white space aside."""
        decoded: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return "".join(decoded.split()) == "".join(text.split())


def tokenize_rows(
    examples: Sequence[Mapping[str, Any]] | Any,
    tokenizer: Any,
    end_ids: Sequence[int],
    max_length: int | None,
    truncate: bool = False,
    template_check: ChatTemplateCheck | None = None,
) -> TokenizedRows:
    """Tokenise preference rows exactly.

    Args:
        examples: rows with `prompt`, `chosen`, `rejected`, as text or as messages.
        tokenizer: a transformers tokenizer.
        end_ids: token ids that end a turn for the model.
        max_length: longest prompt + completion in tokens (`sequence_len`), or None.
        truncate: cut longer completions (`excess_length_strategy: truncate`) instead of dropping
            the row.
        template_check: finds completions that the host's chat template strategy corrupted.

    Returns:
        The rows that can be used. A completion that does not end in a special token gets the
        data's most frequent one, the tokenizer's eos where there is none: sampled and offline
        completions then end the same way and their rewards are comparable.

    Raises:
        ValueError: if no usable row is left, with the counts of what was wrong.
    """
    encoder = RowTokenizer(tokenizer, end_ids)
    result = TokenizedRows()
    parsed: list[tuple[int, IntArray, IntArray, IntArray]] = []
    total = 0
    for row, example in enumerate(examples):
        total += 1
        try:
            prompt, chosen, rejected = _texts(example, tokenizer)
        except RowError as error:
            result.drop(row, str(error))
            continue
        if not prompt or not chosen.strip() or not rejected.strip():
            result.drop(row, "empty prompt, chosen or rejected")
            continue
        if template_check and any(map(template_check.corrupted, (chosen, rejected))):
            result.drop(row, "completion corrupted by the host's chat_template strategy")
            continue
        prompt_ids = encoder.prompt(prompt)
        answers = [encoder.completion(prompt, text) for text in (chosen, rejected)]
        if not all(answers) or not prompt_ids:
            result.drop(row, "prompt, chosen or rejected without tokens")
            continue
        if not (
            encoder.decodes_to(answers[0], chosen) and encoder.decodes_to(answers[1], rejected)
        ):
            result.inexact.append(row)
        # Arrays from here on: a Python int per token would cost gigabytes on a large dataset.
        arrays = [np.asarray(ids, dtype=np.int32) for ids in (prompt_ids, *answers)]
        parsed.append((row, arrays[0], arrays[1], arrays[2]))

    end, *others = _turn_ends(encoder, parsed)
    result.end_ids = [end, *others]
    for row, prompt_array, *completions in parsed:
        completed = []
        for ids in completions:
            kept, ended = encoder.end_once(ids.tolist(), result.end_ids)
            completed.append(np.asarray(kept if ended else [*kept, end], dtype=np.int32))
        if min(map(len, completed)) < 2:
            result.drop(row, "empty prompt, chosen or rejected")
            continue
        if max_length is not None and len(prompt_array) + max(map(len, completed)) > max_length:
            if not truncate or len(prompt_array) >= max_length:
                result.drop(row, f"longer than sequence_len: {max_length}")
                continue
            completed = [ids[: max_length - len(prompt_array)] for ids in completed]
        result.rows.append(row)
        result.prompt_ids.append(prompt_array)
        result.chosen_ids.append(completed[0])
        result.rejected_ids.append(completed[1])
    if not result.rows:
        reasons = "; ".join(f"{len(rows)} {why}" for why, rows in result.dropped.items())
        raise ValueError(
            f"none of the {total} preference rows can be used "
            f"({reasons or 'the dataset is empty'}). Check `datasets:` and `sequence_len`."
        )
    return result


def _turn_ends(
    encoder: RowTokenizer, parsed: Sequence[tuple[int, IntArray, IntArray, IntArray]]
) -> list[int]:
    """The tokens that end a turn, the one to append to a completion without any first.

    The model's own, and the special token that at least half of all completions end with instead
    (`<|im_end|>` in data made for another model). A special token that closes something else,
    such as a tool call, is part of the answer.
    """
    ends: Counter[int] = Counter()
    foreign: Counter[int] = Counter()
    for _, _, *completions in parsed:
        for array in completions:
            ids = array.tolist()
            tail = [ids[position] for position in encoder.tail(ids)]
            own = [token for token in tail if token in encoder.end_ids]
            ends.update(own[:1])
            foreign.update([] if own else tail[-1:])
    half = len(parsed)  # two completions a row
    ends.update({token: count for token, count in foreign.items() if count >= half})
    most_common = [token for token, _ in ends.most_common()]
    return list(dict.fromkeys([*most_common, *encoder.end_ids]))


def report_rows(result: TokenizedRows, name: str) -> None:
    """Say in the log what was dropped and what is inexact, naming the first rows."""

    def named(rows: list[int]) -> str:
        shown = ", ".join(map(str, rows[:_NAMED_ROWS]))
        return shown + (", ..." if len(rows) > _NAMED_ROWS else "")

    for reason, rows in result.dropped.items():
        LOG.warning("%s: dropped %d row(s): %s (rows %s)", name, len(rows), reason, named(rows))
    if result.inexact:
        LOG.warning(
            "%s: the tokens of %d row(s) do not decode back to their text (rows %s); they are "
            "trained as tokenised",
            name,
            len(result.inexact),
            named(result.inexact),
        )
