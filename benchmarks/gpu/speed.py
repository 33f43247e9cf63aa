"""How quick: sampling by batch size, and parts of `python -m benchmarks`."""

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.gpu.precision import PeakMemory
from benchmarks.harness import ROOT, Setup
from benchmarks.workload import load_model, make_model
from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.sampling.transformers import TransformersSampler


def sampling(setup: Setup) -> dict[str, Any]:
    """Tokens a second inside the training process, of one batch; prompts of 64 tokens."""
    model, _ = load_model(setup, make_model(setup))
    random, new = np.random.default_rng(0), 8 if setup.pairs else 64
    found: dict[str, Any] = {"new_tokens": new}
    for batch in (2, 8, 32, 128)[: setup.pairs and 2]:  # the first to warm up
        prompts = random.integers(4, model.config.vocab_size, (batch, 64)).tolist()
        sampler = TransformersSampler(model, 0, batch * (64 + new), device=model.device)
        settings = SamplingSettings(
            candidates=1,
            temperature=1.0,
            top_p=0.95,
            max_new_tokens=new,
            max_length=None,
            end_ids=(2,),
            seed=0,
        )
        peak, start = PeakMemory(setup), time.perf_counter()
        chunks = list(sampler.sample(prompts, settings))
        seconds = time.perf_counter() - start
        tokens = sum(len(one.token_ids) for chunk in chunks for _, group in chunk for one in group)
        found[f"batch_{batch}"] = {
            "tokens_per_second": round(tokens / seconds, 1),
            "seconds": round(seconds, 2),
            "batches": len(chunks),
            "peak_gib": peak.gib(),
        }
    return found


def part(setup: Setup, name: str, rounds: int) -> dict[str, Any]:
    """A part of `python -m benchmarks`, in full; what it prints is this step's log."""
    command = [sys.executable, "-m", "benchmarks", "--device", setup.device, "--only", name]
    command += ["--shape", setup.shape, "--rounds", str(min(rounds, setup.rounds))]
    command += ["--pairs", str(setup.pairs)] if setup.pairs else []
    command += ["--save", str(setup.directory / "figures")]
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise RuntimeError(f"it ended with exit status {code}; its own message is above")
    path = setup.directory / "figures" / f"{name}-{setup.device}-{setup.shape}.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept


def scoring(setup: Setup) -> dict[str, Any]:
    return part(setup, "scoring", 5)


def step(setup: Setup) -> dict[str, Any]:
    return part(setup, "step", 5)


def whole_run(setup: Setup) -> dict[str, Any]:
    """One round takes minutes: nine commands of the host."""
    return part(setup, "whole_run", 1)
