"""What a judge is asked, and how its replies are read.

The wording is ours; the formats of verdicts are published ones: `[[A]]`, `[[B]]`, `[[C]]` and
`Rating: [[7]]` of MT-Bench (Zheng et al. 2023), `Score: 4` of the additive prompt of self-rewarding
language models (Yuan et al. 2024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_SHIPPED = Path(__file__).parent / "templates"
#: The places of each kind of template.
PLACES = {
    "pairwise": ("question", "answer_a", "answer_b"),
    "single": ("question", "answer"),
    "additive": ("question", "answer"),
}
#: What a reply to each kind holds: a verdict and the values that it may have.
_VERDICTS = {
    "pairwise": (re.compile(r"\[\[\s*([ABC])\s*\]\]"), 0, 1),
    "single": (re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]"), 1, 10),
    "additive": (re.compile(r"score\W{0,8}(\d+(?:\.\d+)?)", re.IGNORECASE), 0, 5),
}
_OUTCOMES = {"A": 1.0, "B": 0.0, "C": 0.5}
#: What a judge is told after a reply without a verdict.
REMINDERS = {
    "pairwise": "Your reply has no verdict that can be read. Reply with [[A]], [[B]] or [[C]].",
    "single": "Your reply has no rating that can be read. Reply like this: Rating: [[7]]",
}
#: A reasoning model's thoughts; what it says of verdicts in there is none.
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with texts in its places. Braces inside these stay as they are."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], template)


def read_template(kind: str, path: Path | None = None) -> str:
    """A judge's prompt, the user's or the shipped one, with places such as `{question}`.

    Braces that hold anything else are text. The kind is `pairwise`, `single` or `additive`.

    Raises:
        ValueError: if it is not text or lacks a place, naming the file and the place.
        OSError: if it cannot be read.
    """
    path = path or _SHIPPED / f"{kind}.txt"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"template: {path} is not UTF-8 text ({error.reason})") from None
    places = [f"{{{place}}}" for place in PLACES[kind]]
    missing = [place for place in places if place not in text]
    if missing:
        raise ValueError(
            f"template: {path} has no {', '.join(missing)}. A {kind} template holds "
            f"{', '.join(places)} where these texts go."
        )
    return text


def parse(kind: str, reply: str) -> float | None:
    """The verdict of a reply to that kind of template, None without one.

    `pairwise`: 1 where A is better, 0 where B is, 0.5 a tie; `single`: 1 to 10; `additive`: 0 to 5.
    The last verdict counts: a judge may quote others on its way.
    """
    pattern, low, high = _VERDICTS[kind]
    found = pattern.findall(_THOUGHTS.sub("", reply))
    if not found:
        return None
    value = _OUTCOMES[found[-1]] if kind == "pairwise" else float(found[-1])
    return value if low <= value <= high else None
