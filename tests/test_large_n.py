"""20,000 pairs against Algorithm 1 written out row by row: what is vectorised changes nothing."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest

from sera_plugin.algorithm.method import Candidate
from sera_plugin.algorithm.summary import summarize
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir import tokens
from tests.three_pairs import FakeSampler, Run

N, R, KEPT, SAMPLED = 20_000, 4, 14_000, 12_000
CONFIG = SeraConfig(selection_ratio=0.7, bootstrap_ratio=0.6, candidates=R)
END = 9


def chance(key: str) -> int:
    return crc32(key.encode()) * 2_654_435_761 >> 12


def answer(key: str) -> list[int]:
    """So short, of so few tokens, that many candidates repeat another one."""
    number = chance(key)
    return [number >> i & 1 for i in range(number >> 9 & 1)] + [END]


def logp(policy: int, prompt: list[int], completion: list[int]) -> float:
    """Quarters of a nat, few of them: many rewards are equal, and all sums are exact."""
    return -(chance(f"{policy} {list(prompt)} {list(completion)}") % 3) / 4


PROMPTS = [[row % 7, row] for row in range(N)]
CHOSEN = [answer(f"chosen {row}") for row in range(N)]
REJECTED = [answer(f"rejected {row}") for row in range(N)]
CANDIDATES = [[answer(f"{index} of {row}") for index in range(R)] for row in range(N)]


def scorer(policy, prompts, completions, phase):
    pairs = zip(prompts, completions, strict=True)
    return np.array([logp(policy, p.tolist(), c.tolist()) for p, c in pairs])


class Sampler(FakeSampler):
    def sample(self, prompts, settings, skip=()):
        order = [row for row in np.random.default_rng(0).permutation(N).tolist() if row not in skip]
        for first in range(0, N, 512):
            yield [
                (row, [Candidate(ids, "stop") for ids in CANDIDATES[row]])
                for row in order[first : first + 512]
            ]


def reward(row: int, completion: list[int]) -> float:
    return logp(1, PROMPTS[row], completion) - logp(0, PROMPTS[row], completion)


def largest(margins: list[float], count: int) -> list[int]:
    """Where the largest are, the first of equal ones, in order."""
    return sorted(sorted(range(len(margins)), key=lambda i: (-margins[i], i))[:count])


def test_training_pairs_are_those_of_the_plain_algorithm(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_CHUNK", 1000)
    columns = {"prompt_ids": PROMPTS, "chosen_ids": CHOSEN, "rejected_ids": REJECTED}
    run = Run(tmp_path, CONFIG, scorer=scorer, sampler=Sampler(), pairs=columns)
    trained = run.upto(2)

    margins = [reward(row, CHOSEN[row]) - reward(row, REJECTED[row]) for row in range(N)]
    expected = [(PROMPTS[row], CHOSEN[row], REJECTED[row]) for row in largest(margins, KEPT)]
    found: list[tuple[float, int, list[int], list[int]]] = []
    spreads, ties = [], 0
    for row, group in enumerate(CANDIDATES):
        distinct = [ids for index, ids in enumerate(group) if ids not in group[:index]]
        ranked = sorted(distinct, key=lambda ids: -reward(row, ids))
        margin = reward(row, ranked[0]) - reward(row, ranked[-1])
        if len(distinct) > 1:
            spreads.append(margin / (sum(map(len, group)) / R))
            ties += margin == 0
        if margin > 0:
            found.append((margin, row, ranked[0], ranked[-1]))
    assert min(len(found) - SAMPLED, ties, N - len(spreads)) > 100  # all of it occurs
    for place in largest([margin for margin, *_ in found], SAMPLED):
        _, row, best, worst = found[place]
        expected.append((PROMPTS[row], best, worst))
    got = (trained["prompt_ids"], trained["chosen_ids"], trained["rejected_ids"])
    assert list(zip(*got, strict=True)) == expected
    for side, place in (("chosen", 1), ("rejected", 2)):
        reference = [logp(1, pair[0], pair[place]) for pair in expected]
        assert trained[f"ref_{side}_logps"] == reference

    summary = summarize(run.iteration(2))
    assert summary["pairs"]["trained"] == KEPT + SAMPLED
    assert summary["pairs"]["bootstrapped_found"] == len(found)
    counts = {"prompts": N, "ties": ties, "too_few": N - len(spreads)}
    counts["duplicates"] = sum(R - len(set(map(tuple, group))) for group in CANDIDATES)
    assert summary["samples"].items() >= counts.items()
    assert summary["spread"]["sampled"] == pytest.approx(float(np.median(spreads)))
