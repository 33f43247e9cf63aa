"""Candidates of one prompt: the prompt computed once against once for each of them."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import Setup, figure, interleave, markdown, times
from benchmarks.workload import load_model, make_model, vocabulary_of
from sera_plugin.model.budget import scoring_budget
from sera_plugin.model.forward import _KNOWN, abilities
from sera_plugin.model.lines import Sharing, plan_lines
from sera_plugin.model.scoring import score_sequences

TITLE = "Shared prompts"
PROMPTS, CANDIDATES, COMPLETION = (32, 128, 512, 768), 4, 96


def measure(setup: Setup) -> dict[str, Any]:
    """Useful tokens per second by length of the prompts, shared and apart, by round."""
    directory = make_model(setup)
    model, tokenizer = load_model(setup, directory)
    can = abilities(model, model.device)
    budget = scoring_budget(model, model.device, max(PROMPTS) + COMPLETION)
    count = setup.pairs or (4 if setup.device == "cpu" else 64)
    random = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return random.integers(4, vocabulary_of(directory), length).astype(np.int32)

    def timed(prompts: list[Any], completions: list[Any], shared: bool) -> float:
        _KNOWN[model] = replace(can, shared=shared and can.shared)
        start = time.perf_counter()
        score_sequences(
            model, prompts, completions, pad_id=int(tokenizer.pad_token_id), budget=budget
        )
        seconds = time.perf_counter() - start
        return sum(map(len, [*prompts, *completions])) / seconds

    rates, most = {}, {}
    for length in PROMPTS:
        prompts = [prompt for _ in range(count) for prompt in [ids(length)] * CANDIDATES]
        completions = [ids(COMPLETION + 8 * (n % CANDIDATES)) for n in range(len(prompts))]
        lines = plan_lines(prompts, completions, Sharing.of(model, budget.planned))
        most[str(length)] = max(map(len, lines))
        score = partial(timed, prompts, completions)
        sides = {"planned": partial(score, True), "apart": partial(score, False)}
        rates[str(length)] = interleave(sides, setup.rounds, warm_up=False)
    _KNOWN[model] = can
    return {"prompts": count, "shared": most, "tokens_per_second": rates}


def table(result: dict[str, Any]) -> str:
    rows = [
        [
            length,
            str(result["shared"][length]),
            figure(rates["planned"]),
            figure(rates["apart"]),
            times(rates["planned"], rates["apart"]),
        ]
        for length, rates in result["tokens_per_second"].items()
    ]
    head = ("tokens of a prompt", "share it", "useful tokens/s", "each with its own", "faster by")
    return (
        f"{result['prompts']} prompts with {CANDIDATES} candidates of about {COMPLETION} tokens."
        f"\n\n{markdown(head, rows)}"
    )
