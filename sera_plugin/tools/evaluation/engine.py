"""A model loaded to answer prompts: in this process, or by a vLLM in a process of its own."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from sera_plugin.algorithm.method import CandidateSampler, SamplingSettings
from sera_plugin.config.quoting import quoted
from sera_plugin.model.budget import GIB
from sera_plugin.model.memory import element_size, sampled_batches
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.sampling.vllm import Memory, ServedPolicy, VllmSampler, adapter_problem
from sera_plugin.tools.evaluation.answers import NO_ROOM, Conversation, Decoding, Turn
from sera_plugin.tools.evaluation.chat import SAFE, Chat, named
from sera_plugin.tools.evaluation.models import Model

#: Top-p that leaves one token: both engines take the likeliest one then.
_GREEDY = 1e-9


class Engine:
    """A model, ready to answer as it is asked by its own tokenizer and template.

    With `vllm_python`, the interpreter of an environment with vLLM, it is served by that, which
    prints into `log`. A ValueError if it cannot be loaded, asked this way, or served by vLLM.
    """

    def __init__(
        self, model: Model, decoding: Decoding, vllm_python: str | None, log: Path
    ) -> None:
        self._decoding = decoding
        python = None if vllm_python is None else _program(vllm_python)
        self._chat = chat = Chat(model, decoding.prompt_format)
        self._sampler: CandidateSampler
        if python is not None:
            self._sampler = VllmSampler(python, _served(model, chat.vocabulary), {}, log, _room)
            return
        weights = load(model)
        width = element_size(weights, weights.device)
        batches = sampled_batches(weights, weights.device, width, longest=0)
        self._sampler = TransformersSampler(
            weights, chat.pad_id, batches.tokens, device=weights.device, size=batches.size
        )

    def __call__(
        self, conversations: Sequence[Conversation], done: Collection[int], seed: int
    ) -> Iterator[tuple[int, Turn]]:
        """Yield (index, answer) of every conversation that is not `done`, in any order."""
        decoding, chat, context = self._decoding, self._chat, self._chat.context
        prompts = [np.array(chat.prompt(one), dtype=np.int32) for one in conversations]
        # All that have room are given, finished ones too: what the others draw depends on it.
        rows = [row for row, one in enumerate(prompts) if context is None or len(one) < context]
        for row in set(range(len(prompts))).difference(rows, done):
            yield row, Turn("", 0, NO_ROOM)
        settings = SamplingSettings(
            candidates=1,
            temperature=decoding.temperature or 1.0,
            top_p=decoding.top_p if decoding.temperature else _GREEDY,
            max_new_tokens=decoding.max_new_tokens,
            max_length=context,
            end_ids=chat.end_ids,
            seed=seed,
        )
        finished = set(done)
        skip = {place for place, row in enumerate(rows) if row in finished}
        for chunk in self._sampler.sample([prompts[row] for row in rows], settings, skip):
            for place, (candidate,) in chunk:
                ids, reason = list(candidate.token_ids), candidate.finish_reason
                # An end token may be no special one for the tokenizer.
                shown = ids[:-1] if reason == "stop" else ids
                text: str = chat.tokenizer.decode(shown, skip_special_tokens=True)
                yield rows[place], Turn(text.strip(), len(ids), reason)


def _program(name: str) -> str:
    found = shutil.which(Path(name).expanduser())
    if found is None:
        raise ValueError(
            f"--vllm-python: {quoted(name, 200)} is not a program that can be run here."
        )
    # The child starts elsewhere; a link to an interpreter is not the interpreter.
    return os.path.abspath(found)


def load(model: Model) -> Any:
    """The model on the GPU if there is one, read from safetensors, in place of the one before."""
    clear_device_cache(garbage_collection=True)
    safe = {**SAFE, "use_safetensors": True}
    with named(model):
        weights = AutoModelForCausalLM.from_pretrained(model.weights, dtype="auto", **safe)
        if model.adapter is not None:
            # `find_models` has seen adapter_model.safetensors, which PEFT takes first.
            _grow(weights, model.adapter)
            weights = PeftModel.from_pretrained(weights, str(model.adapter))
    return weights.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _grow(base: Any, adapter: Path) -> None:
    """Give the base the rows of an adapter that was trained with new tokens and saved them."""
    embeddings = {base.get_input_embeddings(), base.get_output_embeddings()}
    named = [name for name, module in base.named_modules() if module in embeddings]
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        saved = {f"base_model.model.{name}.weight" for name in named}.intersection(file.keys())
        rows = {file.get_slice(name).get_shape()[0] for name in saved}
    if rows:
        base.resize_token_embeddings(max(rows), mean_resizing=False)


def _served(model: Model, vocabulary: int) -> ServedPolicy:
    adapter, rank = None, 0
    if model.adapter is not None:
        config = json.loads((model.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        problem = adapter_problem(config)
        if problem is not None:
            raise ValueError(f"--vllm-python: {problem}. Leave it out to sample in this process.")
        adapter, rank = str(model.adapter.resolve()), config["r"]
    weights = str(Path(model.weights).resolve())
    return ServedPolicy(weights, adapter, rank, "auto", None, {}, vocabulary)


@contextmanager
def _room(length: int) -> Iterator[Memory]:
    """What an engine may take: nothing else of ours is on the device."""
    clear_device_cache(garbage_collection=True)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield Memory(min(0.95, (free - GIB) / total), whole_fits=True)
    else:
        available = psutil.virtual_memory().available
        yield Memory(None, whole_fits=True, cache_gib=max(1, available // 4 // GIB))
