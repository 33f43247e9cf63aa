"""What bf16 does to log-probabilities, margins and the kept set, and an output layer in float32.

theta_1 is theta_0 after some steps of DPO in float32. These weights then score the pairs in float32
and under bf16's autocast, in two layouts: as a run does (answers share their prompt), and one
sequence at a time. Nothing is timed, so there are no rounds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.precision import float32_head
from benchmarks.harness import Setup, markdown
from benchmarks.workload import (
    load_model,
    longest_of,
    make_model,
    read_rows,
    vocabulary_of,
)
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.selection import select_largest
from sera_plugin.model.budget import scoring_budget
from sera_plugin.model.forward import collate, evaluating, forward_logps
from sera_plugin.model.scoring import score_sequences

TITLE = "Noise of bf16"
#: DPO until the margins' standard deviation is that of a real run, in nats, or for as many passes.
MARGIN, PASSES, BETA, LEARNING_RATE = 2.0, 8, 0.1, 2e-6
RATIO = 0.7
SIDES = ("chosen", "rejected")
LAYOUTS = ("as in a run", "one at a time")


class Scores:
    """One model's weights as they are, in every way."""

    def __init__(self, setup: Setup) -> None:
        directory = make_model(setup)
        self.model, tokenizer = load_model(setup, directory)
        self.model.float()
        self.device, self.longest = torch.device(setup.device), longest_of(setup, directory)
        rows = read_rows(setup, 24, vocabulary_of(directory), self.longest)
        self.pad_id = int(tokenizer.pad_token_id)

        def ids(text: str, end: list[int]) -> np.ndarray:
            return np.array([*tokenizer(text, add_special_tokens=False).input_ids, *end], np.int32)

        answers = [ids(row[side], [tokenizer.eos_token_id]) for side in SIDES for row in rows]
        self.prompts = [ids(f"{row['prompt']}\n", []) for row in rows] * 2
        self.completions = [
            answer[: self.longest - len(prompt)]
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        self.lengths = np.array(list(map(len, self.completions)))

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16)

    def __call__(
        self, layout: str, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> FloatArray:
        """(2n,) log-probabilities in nats, chosen before rejected."""
        how: dict[str, Any] = {
            "pad_id": self.pad_id,
            "budget": scoring_budget(self.model, self.device, self.longest),
            "autocast": autocast,
        }
        if layout == LAYOUTS[0]:
            return score_sequences(self.model, self.prompts, self.completions, **how)
        alone = zip(self.prompts, self.completions, strict=True)
        return np.concatenate([score_sequences(self.model, [p], [c], **how) for p, c in alone])

    def train(self, reference: FloatArray) -> int:
        """DPO until the margins are `MARGIN` nats apart; how many passes that took."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0)
        count = len(reference) // 2
        ratios = torch.from_numpy(reference).float()
        for number in range(1, PASSES + 1):
            margins = []
            for at in range(0, count, 4):
                pairs = range(at, min(at + 4, count))
                lines = [(index,) for start in (0, count) for index in (start + i for i in pairs)]
                inputs, targets = collate(
                    self.prompts, self.completions, lines, self.pad_id, self.device
                )
                with evaluating(self.model):  # no dropout
                    logps, _ = forward_logps(self.model, inputs, targets)
                moved = logps - ratios[[index for (index,) in lines]].to(self.device)
                chosen, rejected = moved.chunk(2)
                torch.nn.functional.softplus(BETA * (rejected - chosen)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                margins += (chosen - rejected).tolist()
            print(f"pass {number}: margins {np.std(margins):.2f} nats apart", flush=True)
            if np.std(margins) >= MARGIN:
                break
        return number


def measure(setup: Setup) -> dict[str, Any]:
    score = Scores(setup)
    ways: dict[str, dict[str, list[FloatArray]]] = {}

    def in_all_ways() -> FloatArray:
        exact = score(LAYOUTS[0])
        ways.setdefault("float32", {}).setdefault(LAYOUTS[0], []).append(exact)
        for layout in LAYOUTS:
            ways.setdefault("bf16", {}).setdefault(layout, []).append(score(layout, score.autocast))
            with float32_head(score.model):
                name = "bf16, output layer in float32"
                found = score(layout, score.autocast)
            ways.setdefault(name, {}).setdefault(layout, []).append(found)
        return exact

    passes = score.train(in_all_ways())
    in_all_ways()
    exact = ways.pop("float32")[LAYOUTS[0]]
    result: dict[str, Any] = {
        "pairs": len(exact[0]) // 2,
        "tokens": float(score.lengths.mean()),
        "passes": passes,
        "deviation": float(_margins(exact).std()),
        "ways": {},
    }
    root = np.sqrt(score.lengths)
    for name, by_layout in ways.items():
        one, other = by_layout.values()
        result["ways"][name] = {
            "of_float32": _rms((one[0] - exact[0]) / root),
            "of_layouts": _rms((one[0] - other[0]) / root),
            "margin_of_float32": _rms(_margins(one) - _margins(exact)),
            "margin_of_layouts": _rms(_margins(one) - _margins(other)),
            "kept_of_float32": _replaced(one, exact),
            "kept_of_layouts": _replaced(one, other),
        }
    return result


def _margins(scores: list[FloatArray]) -> FloatArray:
    """(n,) of theta_0's and theta_1's scores."""
    before, after = scores
    chosen, rejected = np.split(after - before, 2)
    return chosen - rejected


def _rms(values: FloatArray) -> float:
    return float(np.sqrt((values**2).mean()))


def _replaced(one: list[FloatArray], other: list[FloatArray]) -> float:
    """The share of one's kept set that the other does not keep."""
    count = round(RATIO * len(_margins(one)))
    kept, there = (select_largest(_margins(scores), count) for scores in (one, other))
    return float((kept & ~there).sum() / count)


def table(result: dict[str, Any]) -> str:
    names = {
        "": "nats per root token",
        "margin_": "a margin, nats",
        "kept_": f"of the {RATIO:.0%} kept, other pairs",
    }
    rows = []
    for start, what in names.items():
        for of, meant in (("of_layouts", "between the layouts"), ("of_float32", "from float32")):
            values = [way[start + of] for way in result["ways"].values()]
            shown = [f"{v:.1%}" if start == "kept_" else f"{v:.3f}" for v in values]
            rows.append([f"{what}, {meant}", *shown])
    return (
        f"{result['pairs']} pairs, answers of {result['tokens']:.0f} tokens, margins "
        f"{result['deviation']:.2f} nats apart after {result['passes']} passes of DPO.\n\n"
        + markdown(("root of the mean square", *result["ways"]), rows)
    )
