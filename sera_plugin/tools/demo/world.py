"""The world: sort six letters.

A prompt is six distinct letters, the best response is the same letters sorted. How good any
response is can be computed, and filler words make it longer without making it better. Pure
functions; every random choice comes from the generator that is passed in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

LETTERS = tuple(ascii_lowercase)
FILLERS = ("well", "so", "like", "um")
PROMPT_LENGTH = 6


@dataclass(frozen=True)
class Labelling:
    """How the preference labels of the demo are made, and what is wrong with them."""

    temperature: float = 0.15  # of the Bradley-Terry model on the true reward (0 to 1)
    length_bonus: float = 0.1  # log-odds per word of the longer response, better or not
    noise: float = 0.2  # share of labels swapped afterwards


def make_prompt(random: Random) -> str:
    """Six distinct letters in random order, separated by spaces."""
    return " ".join(random.sample(LETTERS, PROMPT_LENGTH))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for left in one:
        diagonal = 0
        for index, right in enumerate(other, start=1):
            above = row[index]
            row[index] = diagonal + 1 if left == right else max(above, row[index - 1])
            diagonal = above
    return row[-1]


def true_reward(prompt: str, response: str) -> float:
    """How good a response is, 0 to 1: 2 LCS / (both lengths), filler words ignored."""
    best = sorted(prompt.split())
    words = [word for word in response.split() if word not in FILLERS]
    return 2 * common_subsequence(words, best) / (len(words) + len(best))


def demonstrate(prompt: str, random: Random) -> str:
    """The best response, corrupted at a rate that is itself random.

    A model trained on such demonstrations answers sometimes well and sometimes badly, which is
    what preference tuning needs.
    """
    rate = random.uniform(0.0, 0.9)
    words: list[str] = []
    for letter in sorted(prompt.split()):
        # A letter is dropped, replaced, said after a filler word, or out of order.
        fate = random.randrange(4) if random.random() < rate else None
        if fate == 1:
            words.append(random.choice(LETTERS))
        elif fate == 2:
            words += [random.choice(FILLERS), letter]
        elif fate == 3 and words:
            words.insert(random.randrange(len(words)), letter)
        elif fate != 0:
            words.append(letter)
    return " ".join(words or [random.choice(LETTERS)])


def label(
    prompt: str, one: str, other: str, labelling: Labelling, random: Random
) -> tuple[str, str, bool]:
    """Prefer one of two responses: (chosen, rejected, whether noise has swapped them).

    Two draws are taken from `random`, whatever the outcome.
    """
    log_odds = (true_reward(prompt, one) - true_reward(prompt, other)) / labelling.temperature
    log_odds += labelling.length_bonus * (len(one.split()) - len(other.split()))
    chosen, rejected = one, other
    # The logistic function, as a tanh because that does not overflow at low temperatures.
    if random.random() >= 0.5 * (1 + math.tanh(log_odds / 2)):
        chosen, rejected = rejected, chosen
    swapped = random.random() < labelling.noise
    return (rejected, chosen, True) if swapped else (chosen, rejected, False)
