"""The scorer in every layout against single sequences and against the training forward pass."""

import re
from typing import Any

import numpy as np
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from benchmarks.gpu.precision import (
    PeakMemory,
    Texts,
    difference,
    load,
    scored,
    texts,
)
from benchmarks.harness import Setup
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.model import forward
from sera_plugin.model.budget import TokenBudget, scoring_bytes_per_token
from sera_plugin.model.forward import Abilities
from sera_plugin.model.lines import Sharing, plan_lines
from sera_plugin.model.losses import Objective, PreferenceLoss, check_step_zero, rounding_limit

#: Operators and kernels of attention, as the profiler calls them.
_ATTENTION = re.compile(r"scaled_dot_product|flash|fmha|mem_eff|cudnn.*sdpa", re.I)
#: Pairs of a micro-batch.
_PAIRS = 2


def scorer(setup: Setup) -> dict[str, Any]:
    """Nats a sequence, memory by the plan, and which kernels attention gets, by type.

    ValueError if layouts differ in float32, where a kernel's order of sums is all that may; or if
    a training forward is further from them than the step-0 gate of a run allows.
    """
    types = [torch.float32, torch.bfloat16]
    types += [torch.float16] if setup.device == "cuda" else []
    found: dict[str, Any] = {}
    exact: FloatArray | None = None
    for dtype in types:
        kind = str(dtype).removeprefix("torch.")
        model = load(setup, dtype)
        prompts, completions = texts(setup, model, 8 if setup.pairs else 64)
        plain = naive(model, prompts, completions)
        exact = plain if exact is None else exact
        can = forward.abilities(model, setup.device)
        budget = TokenBudget(256 if setup.pairs else 8192, device=setup.device)
        lines = plan_lines(prompts, completions, Sharing.of(model, budget.planned))
        per_token = scoring_bytes_per_token(model.config.hidden_size, whole=0)
        figures: dict[str, Any] = {
            "abilities": vars(can),
            "shared_lines": sum(len(line) > 1 for line in lines),
            "naive_against_float32": difference(plain, exact),
            "planned_gib": round(per_token * budget.planned / 2**30, 3),
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
            scores = scored(setup, model, prompts, completions, budget=budget)
            figures[name] = {"peak_gib": peak.gib()}
            figures[name] |= {"against_naive": difference(scores, plain)}
            figures[name] |= {"against_naive_float32": difference(scores, exact)}
            print(f"round 1/1: {kind}_{name}: {figures[name]}", flush=True)
            if dtype == torch.float32 and np.abs(scores - plain).max() > 0.05:
                raise ValueError(f"{name} is wrong in float32: {figures[name]}")
            figures[name]["against_training"] = against_training(
                model, prompts, completions, scores
            )
        forward._KNOWN[model] = can
        figures["attention"] = attention(model, prompts, completions, can.shared)
        found[kind] = figures
        del model
    return {"sequences": len(prompts), "tokens": sum(map(len, completions)), **found}


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


def against_training(
    model: Any, prompts: Texts, completions: Texts, scores: FloatArray
) -> dict[str, float]:
    """The step-0 gate on all pairs: what a run's own forward pass gives, with a gradient.

    Two sequences that follow each other are a pair. Nats a sequence, and per square root of its
    tokens at most; ValueError over the gate's limit.
    """
    collate, device = DataCollatorForPreference(0), next(model.parameters()).device
    objective = Objective(PreferenceLoss("dpo", 0.2))
    found, worst = [], 0.0
    for at in range(0, len(prompts), 2 * _PAIRS):
        firsts = range(at, at + 2 * _PAIRS, 2)
        examples = [
            {
                "prompt_ids": prompts[one].tolist(),
                "chosen_ids": completions[one].tolist(),
                "rejected_ids": completions[one + 1].tolist(),
                "ref_chosen_logps": scores[one],
                "ref_rejected_logps": scores[one + 1],
            }
            for one in firsts
        ]
        inputs = {name: value.to(device) for name, value in collate(examples).items()}
        step = objective(model, inputs)
        gate = check_step_zero(
            inputs, step.chosen_logps, step.rejected_logps, rounding_limit(model, False)
        )
        worst = max(worst, gate["nats_per_root_token"])
        both = torch.stack([step.chosen_logps, step.rejected_logps], dim=1)
        found.append(both.detach().double().cpu().numpy().ravel())
        del step, both
    return difference(np.concatenate(found), scores) | {"nats_per_root_token": worst}


@torch.no_grad()
def attention(model: Any, prompts: Texts, completions: Texts, shared: bool) -> dict[str, list[str]]:
    """Operators and kernels that attention takes: of a plain batch, and with a mask of our own."""
    device = next(model.parameters()).device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    batches = {"plain": [(0,), (1,)]} | ({"shared": [(0, 1), (2, 3)]} if shared else {})
    found = {}
    for name, lines in batches.items():
        inputs, targets = forward.collate(prompts, completions, lines, 0, device)
        with torch.profiler.profile(activities=activities) as profile:
            forward.forward_logps(model, inputs, targets)
        names = {event.key for event in profile.key_averages()}
        found[name] = sorted(each[:120] for each in names if _ATTENTION.search(each))
    return found
