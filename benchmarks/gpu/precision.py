"""What bf16 costs in nats: products, log-probabilities and margins against float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import Setup
from benchmarks.workload import make_model
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.model import forward
from sera_plugin.model.budget import TokenBudget, scoring_budget
from sera_plugin.model.scoring import score_sequences

Texts = list[npt.NDArray[np.int32]]


def large(setup: Setup) -> dict[str, Any]:
    """The model of the other steps: random weights in a directory, bf16 on a GPU."""
    return {"model": make_model(setup).name}


def quantised(setup: Setup) -> dict[str, Any]:
    """Layers of bitsandbytes against the same weights in bf16: relative error of a product.

    ValueError if it is more than rounding. Imports all that a run imports, and says which it is.
    """
    import axolotl.core.builders
    import bitsandbytes as bnb
    import trl

    import sera_plugin.host.trainer

    torch.manual_seed(0)
    size = 2048
    dense = torch.nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device=setup.device)
    four_bit = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    layers = {
        "nf4": bnb.nn.Linear4bit(size, size, bias=False, **four_bit),  # type: ignore[attr-defined]
        "int8": bnb.nn.Linear8bitLt(size, size, bias=False, has_fp16_weights=False),  # type: ignore[attr-defined]
    }
    inputs = torch.randn(64, size, dtype=torch.bfloat16, device=setup.device)
    expected = dense(inputs).float()
    found: dict[str, Any] = {}
    for name, layer in layers.items():
        layer.load_state_dict({"weight": dense.weight.detach().cpu()})
        error = layer.to(setup.device)(inputs).float() - expected
        found[name] = round(float(error.norm() / expected.norm()), 4)
    if not all(error < 0.2 for error in found.values()):
        raise ValueError(f"quantised products are wrong: {found}")
    packages = (torch, axolotl, trl, bnb, sera_plugin)
    found["versions"] = {package.__name__: package.__version__ for package in packages}
    return found | ({"gpu": torch.cuda.get_device_name()} if setup.device == "cuda" else {})


def load(setup: Setup, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(make_model(setup), dtype=dtype)
    return model.to(setup.device).eval()


def texts(setup: Setup, model: Any, count: int) -> tuple[Texts, Texts]:
    """Random ids: `count` completions, of which every two have their prompt in common."""
    random, longest = np.random.default_rng(0), 24 if setup.pairs else 400

    def draw(length: int) -> npt.NDArray[np.int32]:
        return random.integers(4, model.config.vocab_size, length, dtype=np.int32)

    prompts = [draw(length) for length in random.integers(4, longest // 2, count // 2)]
    completions = [draw(length) for length in random.integers(4, longest, count)]
    return [prompt for prompt in prompts for _ in range(2)], completions


def scored(
    setup: Setup,
    model: Any,
    prompts: Texts,
    completions: Texts,
    budget: TokenBudget | None = None,
    **how: Any,
) -> FloatArray:
    budget = budget or scoring_budget(model, torch.device(setup.device), longest=1024)
    return score_sequences(model, prompts, completions, pad_id=0, budget=budget, **how)


def difference(found: FloatArray, expected: FloatArray) -> dict[str, float]:
    apart = np.abs(found - expected)
    return {"max": round(float(apart.max()), 4), "mean": round(float(apart.mean()), 4)}


class PeakMemory:
    """Of tensors on the GPU from here on, beyond those that are there; None without a GPU."""

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


class InFloat32(torch.nn.Module):
    """An output layer that computes in float32, whatever is around it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(layer.weight.detach().float())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), self.weight)


@contextmanager
def float32_head(model: Any) -> Iterator[None]:
    layer = model.get_output_embeddings()
    model.set_output_embeddings(InFloat32(layer))
    try:
        yield
    finally:
        model.set_output_embeddings(layer)


def margins(setup: Setup) -> dict[str, Any]:
    """log pi_1/pi_0 of the chosen minus of the rejected, of policies a few nats from each other.

    theta_1 is theta_0 trained a little, and then moved along the same line until the margins'
    deviation is between 1 and 5 nats. The same weights score in float32, under autocast, and
    rounded to bf16 (a full fine-tune that the host has loaded in bf16 has no other ones); the
    latter two also with an output layer in float32.
    """
    model, rounded = load(setup, torch.float32), load(setup, torch.bfloat16)
    prompts, completions = texts(setup, model, 16 if setup.pairs else 128)

    def low() -> Any:
        return torch.autocast(setup.device, torch.bfloat16)

    def exact() -> FloatArray:
        return scored(setup, model, prompts, completions)

    def in_all_ways() -> dict[str, FloatArray]:
        rounded.load_state_dict(model.state_dict())
        found = {"float32": exact()}
        for head, block in (("", nullcontext), ("_float32_head", float32_head)):
            with block(model):
                found[f"autocast{head}"] = scored(setup, model, prompts, completions, autocast=low)
            with block(rounded):
                found[f"rounded{head}"] = scored(setup, rounded, prompts, completions)
        return found

    before = in_all_ways()
    start = [weight.detach().clone() for weight in model.parameters()]
    train(model, prompts, completions, low)
    way = [weight.detach() - old for weight, old in zip(model.parameters(), start, strict=True)]
    step, tried = 1.0, []
    for _ in range(8):
        with torch.no_grad():
            for weight, old, new in zip(model.parameters(), start, way, strict=True):
                weight.copy_(old + step * new)
        apart = exact() - before["float32"]
        tried.append(round(float((apart[::2] - apart[1::2]).std()), 4))
        if 1.0 <= tried[-1] <= 5.0:
            break
        step *= min(100.0, 2.5 / max(tried[-1], 1e-6))
    else:
        raise ValueError(f"margins have these deviations instead of 1 to 5 nats: {tried}")
    moved = {name: after - before[name] for name, after in in_all_ways().items()}
    margin = {name: ratio[::2] - ratio[1::2] for name, ratio in moved.items()}
    right = margin.pop("float32")
    found: dict[str, Any] = {"pairs": len(right), "deviation": tried[-1], "tried": tried}
    for name, values in margin.items():
        found[name] = difference(values, right)
        found[name] |= {"deviation_of_error": round(float((values - right).std()), 4)}
        found[name] |= {"other_sign": int((np.sign(values) != np.sign(right)).sum())}
    return found


def train(model: Any, prompts: Texts, completions: Texts, low: Callable[[], Any]) -> None:
    """One pass over all pairs, two at a time: a direction in which training moves the weights."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for at in range(0, len(prompts), 4):
        lines = [(index,) for index in range(at, at + 4)]
        inputs, targets = forward.collate(prompts, completions, lines, 0, device)
        with low():
            logps, _ = forward.forward_logps(model, inputs, targets)
        chosen, rejected = logps[::2], logps[1::2]
        torch.nn.functional.softplus(0.2 * (rejected - chosen)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
