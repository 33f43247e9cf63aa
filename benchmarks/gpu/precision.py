"""What bf16 costs in nats: products, log-probabilities and margins against float32."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import Setup
from benchmarks.workload import make_model
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.model import forward
from sera_plugin.model.budget import scoring_budget
from sera_plugin.model.forward import Abilities, Sharing, plan_lines
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


def scored(setup: Setup, model: Any, prompts: Texts, completions: Texts, **how: Any) -> FloatArray:
    budget = scoring_budget(model, torch.device(setup.device), longest=1024)
    return score_sequences(model, prompts, completions, pad_id=0, budget=budget, **how)


@torch.no_grad()
def naive(model: Any, prompts: Texts, completions: Texts) -> FloatArray:
    """One sequence at a time by the model's own logits; sums in float64."""
    device, found = next(model.parameters()).device, []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(device)
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])
        found.append(chosen.double().sum().item())
    return np.array(found)


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


def scorer(setup: Setup) -> dict[str, Any]:
    """The scorer in every layout against `naive`, in nats a sequence: in its own type, in float32.

    ValueError if they differ in float32, where a kernel's order of sums is all that may.
    """
    found: dict[str, Any] = {}
    exact: FloatArray | None = None
    for dtype in (torch.float32, torch.bfloat16):
        model = load(setup, dtype)
        prompts, completions = texts(setup, model, 8 if setup.pairs else 64)
        plain = naive(model, prompts, completions)
        exact = plain if exact is None else exact
        can = forward.abilities(model, setup.device)
        lines = plan_lines(prompts, completions, Sharing.of(model, 1024))
        figures: dict[str, Any] = {
            "abilities": vars(can),
            "shared_lines": sum(len(line) > 1 for line in lines),
            "naive_against_float32": difference(plain, exact),
        }
        layouts = {
            "one_a_line": Abilities(can.in_head, packed=False, shared=False),
            "all_logits": Abilities(in_head=False, packed=False, shared=False),
            "shared": Abilities(can.in_head, packed=False, shared=can.shared),
            "packed": Abilities(can.in_head, packed=can.packed, shared=False),
        }
        for name, able in layouts.items():
            if name in ("shared", "packed") and not getattr(can, name):
                continue
            forward._KNOWN[model] = able
            peak = PeakMemory(setup)
            scores = scored(setup, model, prompts, completions)
            figures[name] = {"peak_gib": peak.gib()}
            figures[name] |= {"against_naive": difference(scores, plain)}
            figures[name] |= {"against_naive_float32": difference(scores, exact)}
            if dtype == torch.float32 and np.abs(scores - plain).max() > 0.05:
                raise ValueError(f"{name} is wrong in float32: {figures[name]}")
        found[str(dtype).removeprefix("torch.")] = figures
        del model
    return {"sequences": len(prompts), "tokens": sum(map(len, completions)), **found}


def margins(setup: Setup) -> dict[str, Any]:
    """log pi_1/pi_0 of the chosen minus of the rejected, where theta_1 is theta_0 trained a little.

    The same weights score in float32, under autocast, and rounded to bf16 (a full fine-tune that
    the host has loaded in bf16 has no other ones).
    """
    model, rounded = load(setup, torch.float32), load(setup, torch.bfloat16)
    prompts, completions = texts(setup, model, 16 if setup.pairs else 128)
    device = torch.device(setup.device)

    def low() -> Any:
        return torch.autocast(setup.device, torch.bfloat16)

    def in_all_ways() -> dict[str, FloatArray]:
        rounded.load_state_dict(model.state_dict())
        return {
            "float32": scored(setup, model, prompts, completions),
            "autocast": scored(setup, model, prompts, completions, autocast=low),
            "rounded": scored(setup, rounded, prompts, completions),
        }

    before = in_all_ways()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6)
    for at in range(0, len(prompts), 4):
        lines = [(index,) for index in range(at, at + 4)]
        inputs, targets = forward.collate(prompts, completions, lines, 0, device)
        with low():
            logps, _ = forward.forward_logps(model, inputs, targets)
        chosen, rejected = logps[::2], logps[1::2]
        torch.nn.functional.softplus(0.2 * (rejected - chosen)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: after - before[name] for name, after in in_all_ways().items()}
    margin = {name: ratio[::2] - ratio[1::2] for name, ratio in moved.items()}
    exact = margin.pop("float32")
    found: dict[str, Any] = {"pairs": len(exact), "deviation": round(float(exact.std()), 4)}
    for name, values in margin.items():
        found[name] = difference(values, exact)
        found[name] |= {"deviation_of_error": round(float((values - exact).std()), 4)}
        found[name] |= {"other_sign": int((np.sign(values) != np.sign(exact)).sum())}
    return found
