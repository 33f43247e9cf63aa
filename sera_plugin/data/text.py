"""What a pair's text has to be, and the error for one that is not."""

import unicodedata

TEXTS = ("prompt", "chosen", "rejected")
EMPTY = "empty prompt, chosen or rejected"


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


def visible(text: str) -> bool:
    """Whether there is anything to read: not only white space and zero-width characters."""
    return any(not one.isspace() and unicodedata.category(one) not in ("Cc", "Cf") for one in text)


def encodable(text: str) -> bool:
    """Whether the text is valid Unicode. A JSON escape such as \\ud800 alone is not."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
