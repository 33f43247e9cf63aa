"""A model loaded to answer prompts: in this process, or by a vLLM in a process of its own."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sera_plugin.algorithm.method import CandidateSampler, SamplingSettings
from sera_plugin.config.quoting import quoted
from sera_plugin.data.dataset import RowTokenizer, model_end_ids
from sera_plugin.model.budget import GIB
from sera_plugin.model.memory import element_size, sampled_batches
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.sampling.vllm import Memory, ServedPolicy, VllmSampler, adapter_problem
from sera_plugin.tools.evaluation.answers import NO_ROOM, Conversation, Decoding, Turn
from sera_plugin.tools.evaluation.models import Model

#: Top-p that leaves one token: both engines take the likeliest one then.
_GREEDY = 1e-9
_SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


class Engine:
    """A model, ready to answer as it is asked by its own tokenizer and template.

    With `vllm_python`, the interpreter of an environment with vLLM, it is served by that, which
    prints into `log`. A ValueError if it cannot be loaded, asked this way, or served by vLLM.
    """

    def __init__(
        self, model: Model, decoding: Decoding, vllm_python: str | None, log: Path
    ) -> None:
        self._model, self._decoding = model, decoding
        python = None if vllm_python is None else _program(vllm_python)
        with _named(model):
            self._tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, **_SAFE)
            config = AutoConfig.from_pretrained(model.weights, **_SAFE).get_text_config()
        if decoding.prompt_format is None and not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {model.name} ({model.tokenizer}) has no chat template, so how "
                "it is asked is not known. Give --prompt-format, such as 'Q: {prompt} A:'."
            )
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        with suppress(OSError):  # a model may have no generation_config.json
            generation = GenerationConfig.from_pretrained(model.weights, local_files_only=True)
            config.generation_config = generation
        ends = [*model_end_ids(config, self._tokenizer), *model.end_ids, *self._turn_end()]
        self._end_ids = tuple(dict.fromkeys(ends))
        self._rows = RowTokenizer(self._tokenizer, self._end_ids)
        self._sampler: CandidateSampler
        if python is not None:
            policy = _served(model, int(config.vocab_size))
            self._sampler = VllmSampler(python, policy, {}, log, _room)
            return
        weights, pad = _load(model), self._tokenizer.pad_token_id
        width = element_size(weights, weights.device)
        batches = sampled_batches(weights, weights.device, width, longest=0)
        pad = self._end_ids[0] if pad is None else pad
        self._sampler = TransformersSampler(
            weights, pad, batches.tokens, device=weights.device, size=batches.size
        )

    def __call__(
        self, conversations: Sequence[Conversation], done: Collection[int], seed: int
    ) -> Iterator[tuple[int, Turn]]:
        """Yield (index, answer) of every conversation that is not `done`, in any order."""
        decoding, context = self._decoding, self._context
        prompts = [np.array(self._prompt(one), dtype=np.int32) for one in conversations]
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
            end_ids=self._end_ids,
            seed=seed,
        )
        finished = set(done)
        skip = {place for place, row in enumerate(rows) if row in finished}
        for chunk in self._sampler.sample([prompts[row] for row in rows], settings, skip):
            for place, (candidate,) in chunk:
                ids, reason = list(candidate.token_ids), candidate.finish_reason
                # An end token may be no special one for the tokenizer.
                shown = ids[:-1] if reason == "stop" else ids
                text: str = self._tokenizer.decode(shown, skip_special_tokens=True)
                yield rows[place], Turn(text.strip(), len(ids), reason)

    def _turn_end(self) -> list[int]:
        """The special token that the chat template puts after an answer, if it puts one there."""
        if self._decoding.prompt_format is not None:
            return []
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "answer"}]
        how = {"tokenize": False, **self._model.template_kwargs}
        text: str = self._tokenizer.apply_chat_template(turns, **how)
        after = text.rpartition("answer")[2].strip()
        first = self._tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        return [token for token in first if token in self._tokenizer.all_special_ids]

    def _prompt(self, conversation: Conversation) -> list[int]:
        """The token ids after which the model answers."""
        if self._decoding.prompt_format is None:
            roles = ("user", "assistant")
            turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(conversation)]
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
            how |= self._model.template_kwargs
            ids: list[int] = self._tokenizer.apply_chat_template(turns, **how)
            return ids
        if len(conversation) > 1:
            raise ValueError(
                "--prompt-format: prompts of several turns need the chat template of "
                f"{self._model.name}. Leave --prompt-format out."
            )
        return self._rows.prompt(self._decoding.prompt_format.replace("{prompt}", conversation[0]))


def _program(name: str) -> str:
    found = shutil.which(Path(name).expanduser())
    if found is None:
        raise ValueError(
            f"--vllm-python: {quoted(name, 200)} is not a program that can be run here."
        )
    # The child starts elsewhere; a link to an interpreter is not the interpreter.
    return os.path.abspath(found)


def _load(model: Model) -> Any:
    """The model on the GPU if there is one, read from safetensors, in place of the one before."""
    clear_device_cache(garbage_collection=True)
    safe = {**_SAFE, "use_safetensors": True}
    with _named(model):
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


@contextmanager
def _named(model: Model) -> Iterator[None]:
    """Say which model it is that cannot be loaded: libraries raise whatever they like."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{model.name} ({model.source}) cannot be loaded: {error}") from error


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
