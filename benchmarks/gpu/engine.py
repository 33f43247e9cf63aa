"""vLLM in the room that a run makes for it: does it start, and answer as transformers does?

`SERA_VLLM_PYTHON` names the interpreter of its environment. These steps run only if asked for.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.gpu.room import NF4, free_bytes, gib, made
from benchmarks.harness import Setup
from sera_plugin.algorithm.method import CandidateSampler, SamplingSettings
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.sampling.vllm import Memory, ServedPolicy, VllmSampler

#: The likeliest token each time.
_GREEDY = SamplingSettings(
    candidates=1,
    temperature=1.0,
    top_p=1e-9,
    max_new_tokens=12,
    max_length=48,
    end_ids=(2,),
    seed=3,
)


def vllm_base(setup: Setup) -> dict[str, Any]:
    return served(setup, adapter=False, four_bit=False)


def vllm_lora(setup: Setup) -> dict[str, Any]:
    return served(setup, adapter=True, four_bit=False)


def vllm_nf4(setup: Setup) -> dict[str, Any]:
    return served(setup, adapter=True, four_bit=True)


def served(setup: Setup, adapter: bool, four_bit: bool) -> dict[str, Any]:
    """Greedy answers of both, seconds to start and to stop, and free memory, of the demo's model.

    ValueError if fewer than half of the answers are the same: rounding turns a few round, another
    policy turns all.
    """
    base, policy = setup.directory / "base", setup.directory / "vllm-policy"
    dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
    how: dict[str, Any] = {}
    if four_bit:
        how["quantization_config"] = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    place = {"": 0 if setup.device == "cuda" else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map=place, **how)
    if adapter:
        torch.manual_seed(0)
        modules = ["q_proj", "v_proj", "down_proj"]
        lora = LoraConfig(r=8, target_modules=modules, init_lora_weights=False)
        model = get_peft_model(model, lora)
        model.save_pretrained(policy)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with (setup.directory / "world.jsonl").open(encoding="utf-8") as file:
        texts = [f"<s> <|user|> {json.loads(line)['prompt']} <|assistant|>" for line in file][:24]
    rows = [
        np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in texts
    ]
    mine = collect(TransformersSampler(model, 0, 4096, device=model.device), rows)
    free = [free_bytes(setup)]

    @contextmanager
    def room(length: int) -> Iterator[Memory]:
        with made(model, None, {}, length) as memory:
            free.append(free_bytes(setup))
            yield memory

    engine = VllmSampler(
        os.environ["SERA_VLLM_PYTHON"],
        ServedPolicy(
            str(base),
            str(policy) if adapter else None,
            8,
            str(dtype).removeprefix("torch."),
            "nf4" if four_bit else None,
            {},
            model.config.vocab_size,
        ),
        {},
        setup.directory / "vllm.log",
        room,
    )
    try:
        theirs = collect(engine, rows)
    except Exception:
        print((setup.directory / "vllm.log").read_text(errors="replace")[-20_000:], flush=True)
        raise
    free.append(free_bytes(setup))
    same = sum(theirs[row] == ids for row, ids in mine.items())
    found = {
        **engine.report,
        "answers": len(rows),
        "same": same,
        "engine_seconds": engine.seconds,
        "free_gib": [gib(each) for each in free],
    }
    if 2 * same < len(rows):
        raise ValueError(f"vLLM answers as another policy would: {found}")
    return found


def collect(sampler: CandidateSampler, rows: list[Any]) -> dict[int, list[int]]:
    chunks = list(sampler.sample(rows, _GREEDY))
    return {row: list(found[0].token_ids) for chunk in chunks for row, found in chunk}
