"""What a judge is asked, and how its replies are read.

The wording is ours; the formats of verdicts are published ones: `[[A]]`, `[[B]]`, `[[C]]` and
`Rating: [[7]]` of MT-Bench (Zheng et al. 2023), `Score: 4` of the additive prompt of self-rewarding
language models (Yuan et al. 2024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SHIPPED = Path(__file__).parent / "templates"
#: The places of each kind of template.
PLACES = {
    "pairwise": ("question", "answer_a", "answer_b"),
    "single": ("question", "answer"),
    "additive": ("question", "answer"),
}
#: A reasoning model's thoughts; what it says of verdicts in there is none.
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_POINTS = re.compile(r"score\W{0,8}(\d+(?:\.\d+)?)", re.IGNORECASE)
_OUTCOMES = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass(frozen=True)
class Template:
    """A judge's prompt with places such as `{question}`.

    Attributes:
        text: the prompt. Braces that hold anything else are text.
        places: names, each of which occurs.
    """

    text: str
    places: tuple[str, ...]

    def fill(self, values: Mapping[str, str]) -> str:
        """The prompt. Braces inside the values stay as they are, whatever they hold."""
        pattern = r"\{(" + "|".join(self.places) + r")\}"
        return re.sub(pattern, lambda match: values[match[1]], self.text)


def read_template(kind: str, path: Path | None = None) -> Template:
    """A template of the user's, or the shipped one.

    Args:
        kind: `pairwise`, `single` or `additive`.
        path: a text file, or None.

    Raises:
        ValueError: if it is not text or lacks a place, naming the file and the place.
        OSError: if it cannot be read.
    """
    places = PLACES[kind]
    path = path or _SHIPPED / f"{kind}.txt"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"template: {path} is not UTF-8 text ({error.reason})") from None
    missing = [place for place in places if f"{{{place}}}" not in text]
    if missing:
        wanted = ", ".join(f"{{{place}}}" for place in missing)
        raise ValueError(
            f"template: {path} has no {wanted}. A {kind} template holds "
            f"{', '.join(f'{{{place}}}' for place in places)} where these texts go."
        )
    return Template(text, places)


def parse_verdict(reply: str) -> float | None:
    """Of a pairwise reply: 1 where A is better, 0 where B is, 0.5 a tie, None without a verdict.

    The last verdict counts: a judge may quote others on its way.
    """
    found = _VERDICT.findall(_said(reply))
    return _OUTCOMES[found[-1]] if found else None


def parse_rating(reply: str) -> float | None:
    """The last `[[7]]` of a reply, 1 to 10, or None."""
    return _last(_RATING, reply, 1, 10)


def parse_points(reply: str) -> float | None:
    """The last `Score: 4` of a reply to the `additive` prompt, 0 to 5, or None."""
    return _last(_POINTS, reply, 0, 5)


def _last(pattern: re.Pattern[str], reply: str, low: float, high: float) -> float | None:
    found = pattern.findall(_said(reply))
    value = float(found[-1]) if found else None
    return value if value is not None and low <= value <= high else None


def _said(reply: str) -> str:
    return _THOUGHTS.sub("", reply)


#: What a judge is told after a reply without a verdict.
REMINDERS = {
    "pairwise": "Your reply has no verdict that can be read. Reply with [[A]], [[B]] or [[C]].",
    "single": "Your reply has no rating that can be read. Reply like this: Rating: [[7]]",
}
