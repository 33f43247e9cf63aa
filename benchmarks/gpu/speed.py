"""How quick: sampling by batch size and kind of cache, and parts of `python -m benchmarks`."""

import importlib
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from benchmarks.gpu.precision import PeakMemory
from benchmarks.harness import Setup
from benchmarks.workload import load_model, make_model
from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.sampling.transformers import TransformersSampler

Prompts = list[list[int]]


def sampling(setup: Setup) -> dict[str, Any]:
    """Tokens a second inside the training process, of one batch; prompts of 64 tokens.

    By the run's sampler, and with transformers' static cache on the same model, prompts and number
    of tokens (`benchmarks.generate` has continuous batching). What that fails with is its figure.
    """
    model, _ = load_model(setup, make_model(setup))
    random, new = np.random.default_rng(0), 8 if setup.pairs else 64
    found: dict[str, Any] = {"new_tokens": new}
    for way, sample in {"ours": ours, "static": static}.items():
        for batch in (2, 8, 32, 128)[: setup.pairs and 2]:  # the first to warm up
            prompts = random.integers(4, model.config.vocab_size, (batch, 64)).tolist()
            peak, start = PeakMemory(setup), time.perf_counter()
            try:
                tokens = sample(model, prompts, new)
            except Exception as error:  # whatever transformers has, beside the run's own sampler
                if way == "ours":
                    raise
                found[f"{way}_{batch}"] = f"{type(error).__name__}: {error}"[:300]
                continue
            seconds = time.perf_counter() - start
            found[f"{way}_{batch}"] = {
                "tokens_per_second": round(tokens / seconds, 1),
                "seconds": round(seconds, 2),
                "peak_gib": peak.gib(),
            }
            print(f"round 1/1: {way}_{batch}: {found[f'{way}_{batch}']}", flush=True)
    return found


def ours(model: Any, prompts: Prompts, new: int) -> int:
    sampler = TransformersSampler(
        model, 0, len(prompts) * (len(prompts[0]) + new), device=model.device
    )
    settings = SamplingSettings(
        candidates=1,
        temperature=1.0,
        top_p=0.95,
        max_new_tokens=new,
        max_length=None,
        end_ids=(2,),
        seed=0,
    )
    chunks = list(sampler.sample([np.array(one, np.int32) for one in prompts], settings))
    if len(chunks) != 1:
        raise ValueError(f"{len(prompts)} prompts were sampled in {len(chunks)} batches, not in 1")
    return sum(len(one.token_ids) for chunk in chunks for _, group in chunk for one in group)


def _config(new: int, **how: Any) -> GenerationConfig:
    sampled = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    return GenerationConfig(**sampled, max_new_tokens=new, eos_token_id=[2], pad_token_id=0, **how)


def _generated(model: Any, prompts: Prompts, config: GenerationConfig) -> int:
    ids = torch.tensor(prompts, device=model.device)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return int((output[:, ids.shape[1] :] != 0).sum())


def static(model: Any, prompts: Prompts, new: int) -> int:
    config = _config(new, cache_implementation="static", disable_compile=True)
    return _generated(model, prompts, config)


def part(setup: Setup, name: str, rounds: int, pairs: int) -> dict[str, Any]:
    """A part of `python -m benchmarks`; what it prints is this step's log."""
    module = importlib.import_module(f"benchmarks.{name}")
    # The model that is there already, so that this process leaves the device to those it starts.
    mine = replace(
        setup,
        rounds=min(rounds, setup.rounds),
        pairs=setup.pairs or pairs,
        model=make_model(setup),
    )
    measured: dict[str, Any] = module.measure(mine)
    print(f"\n{module.table(measured)}\n", flush=True)
    return measured


def scoring(setup: Setup) -> dict[str, Any]:
    return part(setup, "scoring", 5, 96)


def step(setup: Setup) -> dict[str, Any]:
    return part(setup, "step", 5, 64)


def whole_run(setup: Setup) -> dict[str, Any]:
    """One round: thirteen commands of the host, which begin with the imports already made."""
    return part(setup, "whole_run", 1, 48)
