"""What bf16 costs in nats: products, log-probabilities and margins against float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import Setup
from benchmarks.workload import make_model
from sera_plugin.model import forward
from sera_plugin.model.budget import scoring_budget
from sera_plugin.model.forward import Abilities, abilities, collate, forward_logps, innermost
from sera_plugin.model.scoring import score_sequences

Ids = list[np.ndarray[Any, Any]]


def large(setup: Setup) -> dict[str, Any]:
    return {"model": make_model(setup).name}


def quantised(setup: Setup) -> dict[str, Any]:
    """Layers of bitsandbytes against the same weights in bf16: relative error of a product."""
    import axolotl
    import bitsandbytes as bnb
    import trl

    import sera_plugin

    torch.manual_seed(0)
    size = 256 if setup.device == "cpu" else 2048
    dense = torch.nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device=setup.device)
    layers = {
        "nf4": bnb.nn.Linear4bit(
            size, size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        ),
        "int8": bnb.nn.Linear8bitLt(size, size, bias=False, has_fp16_weights=False),
    }
    inputs = torch.randn(64, size, dtype=torch.bfloat16, device=setup.device)
    expected = dense(inputs).float()
    found = {}
    for name, layer in layers.items():
        layer.load_state_dict({"weight": dense.weight.detach().cpu()})
        error = layer.to(setup.device)(inputs).float() - expected
        found[name] = round(float(error.norm() / expected.norm()), 4)
    cuda = setup.device == "cuda"
    versions = {each.__name__: each.__version__ for each in (torch, axolotl, trl, bnb, sera_plugin)}
    device = torch.cuda.get_device_name() if cuda else "cpu"
    if max(found.values()) > 0.2:
        raise ValueError(f"quantised products are wrong: {found}")
    return {"relative_error": found, "device": device, "versions": versions}


def texts(setup: Setup, vocabulary: int, count: int) -> tuple[Ids, Ids]:
    """Random ids: every two completions have a prompt in common."""
    random = np.random.default_rng(0)
    longest = 24 if setup.shape == "toy" else 400
    prompts, completions = [], []
    for _ in range(count // 2):
        prompt = random.integers(4, vocabulary, random.integers(4, longest // 2), dtype=np.int32)
        for length in random.integers(4, longest, 2):
            prompts.append(prompt)
            completions.append(random.integers(4, vocabulary, length, dtype=np.int32))
    return prompts, completions


@torch.no_grad()
def naive(model: Any, prompts: Ids, completions: Ids) -> np.ndarray[Any, Any]:
    """One sequence at a time by the model's own logits; sums in float64."""
    device, found = next(model.parameters()).device, []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(device)
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])
        found.append(chosen.double().sum().item())
    return np.array(found)


def difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> dict[str, float]:
    apart = np.abs(found - expected)
    return {"max": round(float(apart.max()), 4), "mean": round(float(apart.mean()), 4)}


@contextmanager
def as_able(model: Any, able: Abilities) -> Iterator[None]:
    """The scorer takes the model for one that can do this and no more."""
    base = innermost(model)
    before, forward._KNOWN[base] = abilities(model), able
    try:
        yield
    finally:
        forward._KNOWN[base] = before


def scorer(setup: Setup) -> dict[str, Any]:
    """The scorer in every layout against `naive`, both in one type, in nats a sequence."""
    directory, found = make_model(setup), {}
    expected: np.ndarray[Any, Any] | None = None
    for dtype in (torch.float32, torch.bfloat16):
        model = load(setup, directory, dtype)
        prompts, completions = texts(setup, model.config.vocab_size, 8 if setup.pairs else 64)
        plain = naive(model, prompts, completions)
        can = abilities(model)
        figures: dict[str, Any] = {"abilities": vars(can)}
        if expected is None:
            expected = plain
        else:
            figures["naive_against_float32"] = difference(plain, expected)
        layouts = {
            "one_a_line": Abilities(can.in_head, False, False),
            "one_a_line_all_logits": Abilities(False, False, False),
            **({"shared": Abilities(can.in_head, False, True)} if can.shared else {}),
            **({"packed": Abilities(can.in_head, True, False)} if can.packed else {}),
        }
        for name, able in layouts.items():
            peak = PeakMemory(setup)
            with as_able(model, able):
                scores = scored(setup, model, prompts, completions)
            figures[name] = {
                "against_naive": difference(scores, plain),
                "against_naive_float32": difference(scores, expected),
                "peak_gib": peak.gib(),
            }
            if dtype == torch.float32 and np.abs(scores - plain).max() > 0.05:
                raise ValueError(f"{name} is wrong in float32: {figures[name]}")
        found[str(dtype).removeprefix("torch.")] = figures
        del model
    return {"sequences": len(prompts), "tokens": sum(map(len, completions)), **found}


def load(setup: Setup, directory: Any, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
    return model.to(setup.device).eval()


def scored(
    setup: Setup,
    model: Any,
    prompts: Ids,
    completions: Ids,
    autocast: Callable[[], Any] = nullcontext,
) -> np.ndarray[Any, Any]:
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    budget = scoring_budget(model, torch.device(setup.device), longest)
    return score_sequences(model, prompts, completions, pad_id=0, budget=budget, autocast=autocast)


class PeakMemory:
    """Of tensors on the GPU from here on, beyond those that are there."""

    def __init__(self, setup: Setup) -> None:
        self.cuda = setup.device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def gib(self) -> float | None:
        if not self.cuda:
            return None
        return round((torch.cuda.max_memory_allocated() - self.before) / 2**30, 3)


def margins(setup: Setup) -> dict[str, Any]:
    """log pi_1/pi_0 of the chosen minus of the rejected, where theta_1 is theta_0 trained a little.

    The same weights score in float32, under autocast, and rounded to bf16 (a full fine-tune that
    the host has loaded in bf16 has no other ones).
    """
    model = load(setup, make_model(setup), torch.float32)
    prompts, completions = texts(setup, model.config.vocab_size, 16 if setup.pairs else 128)

    def low() -> Any:
        return torch.autocast(setup.device, torch.bfloat16)

    def all_ways() -> dict[str, np.ndarray[Any, Any]]:
        rounded = load(setup, make_model(setup), torch.bfloat16)
        rounded.load_state_dict(model.state_dict())
        return {
            "float32": scored(setup, model, prompts, completions),
            "autocast": scored(setup, model, prompts, completions, low),
            "rounded": scored(setup, rounded, prompts, completions),
        }

    before = all_ways()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6)
    for at in range(0, len(prompts), 4):
        lines = [(index,) for index in range(at, at + 4)]
        inputs, targets = collate(prompts, completions, lines, 0, torch.device(setup.device))
        with low():
            logps, _ = forward_logps(model, inputs, targets)
        chosen, rejected = logps[::2], logps[1::2]
        (-torch.nn.functional.logsigmoid(0.2 * (chosen - rejected))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = all_ways()
    margin = {name: (after[name] - before[name]) for name in after}
    margin = {name: values[::2] - values[1::2] for name, values in margin.items()}
    exact = margin["float32"]
    found: dict[str, Any] = {
        "pairs": len(exact),
        "deviation_of_margins": round(float(exact.std()), 4),
    }
    for name in ("autocast", "rounded"):
        found[name] = {
            "deviation_of_error": round(float((margin[name] - exact).std()), 4),
            **difference(margin[name], exact),
            "other_sign": int((np.sign(margin[name]) != np.sign(exact)).sum()),
        }
    return found
