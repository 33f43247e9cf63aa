"""Exact token ids of one row's texts: where a prompt begins and where a completion ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def model_end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a turn: the tokenizer's eos, then the generation config's."""
    generation = getattr(model, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    found = [token for token in (tokenizer.eos_token_id, *listed) if token is not None]
    return list(dict.fromkeys(found))


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

        Tokenised after the prompt where that leaves the prompt's own tokens alone (a
        SentencePiece tokenizer would otherwise put a space in front); on its own where the two
        would merge across the boundary, because sampling continues from the prompt's tokens.
        Special tokens that are `spelled_out` become the tokens of their spelling.
        """
        alone = self._encode(prompt, spelled_out)
        joint = self._encode(prompt + text, spelled_out)
        if joint[: len(alone)] == alone:
            return joint[len(alone) :]
        return self._encode(text, spelled_out)

    def tail(self, ids: Sequence[int]) -> list[int]:
        """Positions of the special tokens a completion ends with, white space between ignored."""
        positions: list[int] = []
        for position in range(len(ids) - 1, -1, -1):
            if ids[position] in self._special:
                positions.insert(0, position)
            elif self.tokenizer.decode([ids[position]]).strip():
                break
        return positions

    def before_end(
        self, ids: list[int], turn_ends: Collection[int]
    ) -> tuple[list[int], int | None]:
        """The ids up to the first of these tokens in the tail, and that token or None.

        What is behind it goes: the `</s>` of `<|im_end|></s>`, a newline.
        """
        for position in self.tail(ids):
            if ids[position] in turn_ends:
                return ids[:position], ids[position]
        return ids, None

    def spell_out(self, ids: Sequence[int], turn_ends: Collection[int]) -> list[int]:
        """An answer's ids, without its end, with turn ends and BOS as plain text.

        An answer may talk about `<|im_end|>`. As the token itself it would end the turn for
        everything that reads these ids later; as the tokens of its spelling it is text. Special
        tokens that do neither, such as those around a tool call, stay.
        """
        found: list[int] = []
        for token in ids:
            if token in turn_ends or token == self._bos:
                # Behind a full stop: a SentencePiece tokenizer puts a space before a first word.
                text = self.tokenizer.convert_ids_to_tokens(token)
                found += self.completion(".", text, spelled_out=True)
            else:
                found.append(token)
        return found

    def decodes_to(self, ids: Sequence[int], text: str) -> bool:
        """Whether the ids spell the text, white space aside."""
        decoded: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return "".join(decoded.split()) == "".join(text.split())
