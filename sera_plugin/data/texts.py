"""What counts as text in a preference row."""

from __future__ import annotations

import re
import unicodedata

#: Characters that text may contain but seldom means to: controls, zero-width space and byte order
#: mark, direction overrides, the replacement character of a wrong decoding, piles of accents.
_ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ufffd]"
    "|[\u0300-\u036f\u1ab0-\u1aff\u20d0-\u20ff]{9,}"
)


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


def visible(text: str) -> bool:
    """Whether there is anything to read: not only white space and zero-width characters."""
    return any(
        not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")
        for character in text
    )


def encodable(text: str) -> bool:
    """Whether the text is valid Unicode. A JSON escape such as \\ud800 alone is not."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def odd(text: str) -> bool:
    """Whether the text has characters that are worth a second look (see docs/data.md)."""
    return _ODD.search(text) is not None


def check_texts(prompt: str, chosen: str, rejected: str) -> None:
    """Refuse what no tokenizer turns into a pair.

    Raises:
        RowError: for text that is empty to a reader or not valid Unicode.
    """
    texts = (prompt, chosen, rejected)
    if not prompt or not all(map(visible, texts)):
        raise RowError("empty prompt, chosen or rejected")
    if not all(map(encodable, texts)):
        raise RowError("not valid Unicode: half of a surrogate pair")
