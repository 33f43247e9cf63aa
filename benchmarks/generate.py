"""Ways of transformers to sample in process, on the same prompts: `python -m benchmarks.generate`.

`generate` with its growing cache, which `sampling.transformers` uses, against its static cache and
continuous batching. Prompts are random tokens of unequal lengths; all samples have the same length,
so that sides do the same work. Sides take turns.
"""

import argparse
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.harness import figure, interleave, markdown, times

PROMPTS, CANDIDATES, LENGTH = 8, 4, 24
#: Blocks of 256 tokens; unset, continuous batching takes nearly all memory there is.
BLOCKS = ContinuousBatchingConfig(
    num_blocks=64, block_size=256, max_batch_tokens=1024, use_cuda_graph=False, seed=1
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(device).eval()
    random, vocabulary = np.random.default_rng(0), model.config.vocab_size
    prompts = [
        random.integers(5, vocabulary, size).tolist() for size in random.integers(20, 60, PROMPTS)
    ]
    sides: dict[str, Callable[[], float]] = {
        "growing cache": partial(generated, model, prompts),
        "static cache": partial(generated, model, prompts, cache_implementation="static"),
        "continuous batching": partial(batched, model, prompts),
    }
    seconds = interleave(sides, arguments.rounds, warm_up=True)
    tokens, first = PROMPTS * CANDIDATES * LENGTH, seconds["growing cache"]
    rows = [
        (name, figure([tokens / one for one in found]), times(first, found))
        for name, found in seconds.items()
    ]
    print(markdown(("", "tokens/s", "faster than a growing cache by"), rows))


def generated(model: Any, prompts: list[list[int]], **how: Any) -> float:
    """Seconds of one call of `generate`."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    config = settings(num_return_sequences=CANDIDATES, min_new_tokens=LENGTH, eos_token_id=2, **how)
    torch.manual_seed(1)
    began = perf_counter()
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=mask.to(model.device), generation_config=config
        )
    found.cpu()
    return perf_counter() - began


def batched(model: Any, prompts: list[list[int]]) -> float:
    """Seconds of one call of `generate_batch`."""
    torch.manual_seed(1)
    began = perf_counter()
    found = model.generate_batch(
        [one for one in prompts for _ in range(CANDIDATES)],
        generation_config=settings(eos_token_id=-1),
        continuous_batching_config=BLOCKS,
        progress_bar=False,
        warmup=False,
    )
    lengths = {len(one.generated_tokens) for one in found.values()}
    assert (len(found), lengths) == (PROMPTS * CANDIDATES, {LENGTH})
    return perf_counter() - began


def settings(**more: Any) -> GenerationConfig:
    common = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "pad_token_id": 0}
    return GenerationConfig(max_new_tokens=LENGTH, **common, **more)


if __name__ == "__main__":
    main()
