"""docs/claims.md: every figure in its prose is what the kept results say."""

from __future__ import annotations

import re

import pytest

from benchmarks.claims import page, tables
from benchmarks.claims.estimates import Comparison, Estimate, Side, after, during, final
from benchmarks.claims.world import WORLDS

#: A sentence's words, and where its figures come from: learning rate, system, figure, swapped.
LAST, ORDER = final("true_reward"), "order_found"
SAID = {
    "it ends {} below it": ("1e-4", "SeRA", "iterative DPO", 0.2),
    "at 3e-5 it is {} below": ("3e-5", "SeRA", "iterative DPO", 0.2),
    "ahead, by {}.": ("1e-5", "SeRA", "iterative DPO", 0.2),
    "{} of the pairs at 1e-4": ("1e-4", "SeRA", during(2, ORDER), 0.2),
    "{} at 1e-5 (20 % swapped)": ("1e-5", "SeRA", during(2, ORDER), 0.2),
    "are so at 1e-5 ({})": ("1e-5", "SeRA", during(3, ORDER), 0.2),
    "than by a coin ({})": ("3e-5", "SeRA", during(3, ORDER), 0.2),
    "mostly in reverse ({})": ("1e-4", "SeRA", during(3, ORDER), 0.2),
    "iterations ({}": ("3e-5", "SeRA", after(2, "true_reward"), 0.2),
    "and {}) and falls": ("3e-5", "iterative DPO", after(2, "true_reward"), 0.2),
    "falls to {} in the third": ("3e-5", "SeRA", LAST, 0.2),
    "from 0 ({})": ("1e-4", "SeRA, gamma 0", LAST, 0.2),
    "to 0.9 ({})": ("1e-4", "SeRA, gamma 0.9", LAST, 0.2),
    "samples as badly ({})": ("1e-4", "SeRA", during(3, "order_since_initial"), 0.2),
    "nearly always ({})": ("1e-4", "SeRA", during(3, "order_likelihood"), 0.2),
    "collapses at 1e-4 ({})": ("1e-4", "iterative SimPO", LAST, 0.2),
    "with SeRA it ends at {},": ("1e-4", "SeRA, SimPO", LAST, 0.2),
    "a tenth of N ends at {}": ("1e-4", "SeRA, 10% sampled", LAST, 0.2),
    "three N at {};": ("1e-4", "SeRA, k~ = 3 N", LAST, 0.2),
    "alone ends at {}.": ("1e-4", "SeRA, bootstrap only", LAST, 0.2),
    "it drops {} of them": ("1e-4", "SeRA, selection only", during(2, "recall"), 0.2),
    "with 40 % swapped, {}.": ("1e-4", "SeRA, selection only", during(2, "recall"), 0.4),
    "log-probabilities ({})": ("1e-4", "selection by reference", LAST, 0.2),
    "judge's score ({})": ("1e-4", "selection by score", LAST, 0.2),
    "than by margin ({})": ("1e-4", "SeRA, selection only", LAST, 0.2),
    "reaches {} at 1e-4": ("1e-4", "iterative DPO", LAST, 0.2),
    "shorter ({} words": ("1e-4", "SeRA, length control", final("words"), 0.2),
    "instead of {} at 1e-4": ("1e-4", "SeRA", final("words"), 0.2),
}


@pytest.fixture(scope="module")
def results():
    worlds = [WORLDS[name] for name in page.TESTED]
    records = page.read()
    return {tables.step_size(world): tables.compared(records, world) for world in worlds}


@pytest.fixture(scope="module")
def prose() -> str:
    text = re.sub(r"<!-- .*?<!-- end.*?-->", "", page.PAGES[0].read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize("words", SAID)
def test_a_figure_in_the_prose_is_that_of_the_results(words, results, prose):
    rate, system, other, noise = SAID[words]
    if isinstance(other, str):
        one = Comparison("", noise, Side(system), Side(other)).estimate(results[rate])
    else:
        one = Estimate.over(list(results[rate].of(system, noise, other).values()))
    mean = -one.mean if "below" in words else one.mean
    assert words.format(f"{mean:.{2 if mean > 2 else 3}f}") in prose


def test_every_figure_in_the_prose_is_tested(prose):
    tested: set[int] = set()
    for words in SAID:
        said = re.escape(words).replace(r"\{\}", r"\d\.\d{2,}")
        tested.update(at for match in re.finditer(said, prose) for at in range(*match.span()))
    figures = re.finditer(r"\d\.\d{2,}", prose)
    assert not [match[0] for match in figures if match.start() not in tested]
