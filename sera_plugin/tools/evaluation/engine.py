"""A model loaded to answer prompts: in this process, or by a vLLM in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sera_plugin.algorithm.protocols import CandidateSampler, SamplingSettings
from sera_plugin.config.quoting import quoted
from sera_plugin.data.encoding import RowTokenizer
from sera_plugin.model.budget import plan_tokens
from sera_plugin.sampling.offload import cache_bytes_per_token
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.sampling.vllm import Memory, ServedPolicy, VllmSampler, adapter_problem
from sera_plugin.tools.evaluation.answers import NO_ROOM, Conversation, Decoding, Sample, Turn
from sera_plugin.tools.evaluation.models import Model

#: Top-p that leaves one token: both engines take the likeliest one then.
_GREEDY = 1e-9
_GIB = 2**30
_SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


class Speaker:
    """Turns conversations into token ids and token ids into answers, as one model has it.

    Args:
        model: whose tokenizer and template.
        prompt_format: a text with `{prompt}` in place of the chat template, or None.

    Raises:
        ValueError: if there is neither a template nor a format, or nothing ends an answer.
    """

    def __init__(self, model: Model, prompt_format: str | None) -> None:
        self._model = model
        self._format = prompt_format
        with _named(model):
            self.tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, **_SAFE)
            config = AutoConfig.from_pretrained(model.weights, **_SAFE)
        if prompt_format is None and not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {model.name} ({model.tokenizer}) has no chat template, so how "
                "it is asked is not known. Give --prompt-format, such as 'Q: {prompt} A:'."
            )
        self.context: int | None = getattr(
            config.get_text_config(), "max_position_embeddings", None
        )
        self.vocabulary = int(config.get_text_config().vocab_size)
        ends = [self.tokenizer.eos_token_id, *_generation_ends(Path(model.weights))]
        found = dict.fromkeys([*(one for one in ends if one is not None), *model.end_ids])
        self.end_ids = tuple({**found, **dict.fromkeys(self._turn_end())})
        self._rows = RowTokenizer(self.tokenizer, self.end_ids)

    def _turn_end(self) -> list[int]:
        """The special token that the chat template puts after an answer, if it puts one there."""
        if self._format is not None:
            return []
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "answer"}]
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False)
        after = text.rpartition("answer")[2].strip()
        first = self.tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        return [token for token in first if token in self.tokenizer.all_special_ids]

    def prompt(self, conversation: Conversation) -> list[int]:
        """The token ids after which the model answers.

        Raises:
            ValueError: for a conversation of several turns without a chat template.
        """
        if self._format is not None:
            if len(conversation) > 1:
                raise ValueError(
                    "--prompt-format: prompts of several turns need the chat template of "
                    f"{self._model.name}. Leave --prompt-format out."
                )
            return self._rows.prompt(self._format.replace("{prompt}", conversation[0]))
        turns = [
            {"role": "assistant" if index % 2 else "user", "content": text}
            for index, text in enumerate(conversation)
        ]
        ids: list[int] = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids

    def answer(self, token_ids: Sequence[int]) -> str:
        """The text of sampled tokens."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text.strip()


def _generation_ends(weights: Path) -> list[int]:
    """End tokens in generation_config.json, which chat models list there."""
    path = weights / "generation_config.json"
    if not path.is_file():
        return []
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return ends if isinstance(ends, list) else [ends]


def load_engine(model: Model, decoding: Decoding, vllm_python: str | None, log: Path) -> Sample:
    """The model, ready to answer.

    Args:
        model: what answers.
        decoding: how it answers.
        vllm_python: the interpreter of an environment with vLLM, or None to sample here.
        log: what vLLM prints goes there.

    Raises:
        ValueError: if it cannot be asked this way, or not be served by vLLM.
    """
    python = None if vllm_python is None else _program(vllm_python)
    speaker = Speaker(model, decoding.prompt_format)
    sampler: CandidateSampler
    if python is not None:
        sampler = VllmSampler(python, _served(model, speaker.vocabulary), {}, log, _room)
    else:
        policy = _load(model)
        pad = speaker.tokenizer.pad_token_id
        sampler = TransformersSampler(
            policy,
            speaker.end_ids[0] if pad is None else pad,
            plan_tokens(
                policy.device,
                bytes_per_token=cache_bytes_per_token(policy, element_size=4),
                longest=0,
                on_cpu=16_384,
            ),
        )
    return partial(_answers, speaker, sampler, decoding)


def _program(name: str) -> str:
    found = shutil.which(Path(name).expanduser())
    if found is None:
        raise ValueError(
            f"--vllm-python: {quoted(name, 200)} is not a program that can be run here."
        )
    # The child starts elsewhere; a link to an interpreter is not the interpreter.
    return os.path.abspath(found)


def _answers(
    speaker: Speaker,
    sampler: CandidateSampler,
    decoding: Decoding,
    conversations: Sequence[Conversation],
    done: Collection[int],
    seed: int,
) -> Iterator[tuple[int, Turn]]:
    prompts = [np.array(speaker.prompt(one), dtype=np.int32) for one in conversations]
    full = [
        index
        for index, prompt in enumerate(prompts)
        if speaker.context is not None and len(prompt) >= speaker.context
    ]
    for index in set(full).difference(done):
        yield index, Turn("", 0, NO_ROOM)
    # All that have room are given, finished ones too: what the others draw depends on it.
    rows = sorted(set(range(len(prompts))).difference(full))
    settings = SamplingSettings(
        candidates=1,
        temperature=decoding.temperature or 1.0,
        top_p=decoding.top_p if decoding.temperature else _GREEDY,
        max_new_tokens=decoding.max_new_tokens,
        max_length=speaker.context,
        end_ids=speaker.end_ids,
        seed=seed,
    )
    finished = set(done)
    skip = {place for place, index in enumerate(rows) if index in finished}
    for chunk in sampler.sample([prompts[index] for index in rows], settings, skip):
        for place, (candidate,) in chunk:
            ids, reason = candidate.token_ids, candidate.finish_reason
            # An end token may be no special one for the tokenizer.
            text = speaker.answer(ids[:-1] if reason == "stop" else ids)
            yield rows[place], Turn(text, len(ids), reason)


def _load(model: Model) -> Any:
    """The model on the GPU if there is one, read from safetensors."""
    _free()
    with _named(model):
        # As above: files that are here already.
        weights = AutoModelForCausalLM.from_pretrained(
            model.weights, dtype="auto", use_safetensors=True, **_SAFE
        )
        if model.adapter is not None:
            # `find_models` has seen adapter_model.safetensors, which PEFT takes first.
            weights = PeftModel.from_pretrained(weights, str(model.adapter))
    return weights.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@contextmanager
def _named(model: Model) -> Iterator[None]:
    """Say which model it is that cannot be loaded: libraries raise whatever they like."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{model.name} ({model.source}) cannot be loaded: {error}") from error


def _served(model: Model, vocabulary: int) -> ServedPolicy:
    weights = str(Path(model.weights).resolve())
    if model.adapter is None:
        return ServedPolicy(weights, None, 0, "auto", None, {}, vocabulary)
    config = json.loads((model.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    problem = adapter_problem(config)
    if problem is not None:
        raise ValueError(f"--vllm-python: {problem}. Leave it out to sample in this process.")
    adapter = str(model.adapter.resolve())
    return ServedPolicy(weights, adapter, config["r"], "auto", None, {}, vocabulary)


@contextmanager
def _room(length: int) -> Iterator[Memory]:
    """What an engine may take: nothing else of ours is on the device."""
    _free()
    if not torch.cuda.is_available():
        available = psutil.virtual_memory().available
        yield Memory(None, whole_fits=True, cache_gib=max(1, available // 4 // _GIB))
        return
    free, total = torch.cuda.mem_get_info()
    yield Memory(min(0.95, (free - _GIB) / total), whole_fits=True)


def _free() -> None:
    """Give back what the model before took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
