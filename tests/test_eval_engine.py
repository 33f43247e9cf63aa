"""The engine of an evaluation: what a real model is asked, and what it answers."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from sera_plugin.tools.demo.base_model import build_tokenizer, load_model
from sera_plugin.tools.evaluation.answers import NO_ROOM, Decoding, Turn
from sera_plugin.tools.evaluation.engine import Engine
from sera_plugin.tools.evaluation.models import Model

GREEDY = Decoding(temperature=0.0, top_p=1.0, max_new_tokens=12, seed=0)
PROMPT, FORMAT = "f b d a e c", "<s> <|user|> {prompt} <|assistant|>"


@pytest.fixture
def sample(world, tmp_path):
    """Answers of a model to conversations, by index."""

    def run(conversations, decoding=GREEDY, done=(), path=None, **keys):
        model = Model("m", "m", str(path or world.base), **keys)
        engine = Engine(model, decoding, None, tmp_path / "vllm.log")
        return dict(engine([(c,) if isinstance(c, str) else c for c in conversations], done, 0))

    return run


def test_temperature_0_takes_the_likeliest_token(sample, world):
    answer = sample([PROMPT])[0]
    model, tokenizer = load_model(world.base)
    ids = tokenizer(FORMAT.format(prompt=PROMPT), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert answer.text == tokenizer.decode(out, skip_special_tokens=True)
    assert answer.tokens == len(out)


def test_a_resumed_sample_is_the_one_it_would_have_been(sample):
    decoding = Decoding(1.0, 1.0, 12, 3)
    conversations = [" ".join(Random(n).sample("abcdefghij", 2 + n % 5)) for n in range(30)]
    whole = sample(conversations, decoding)
    for done in (range(11), range(0, 30, 2), [29]):
        rest = sample(conversations, decoding, done)
        assert rest == {index: one for index, one in whole.items() if index not in set(done)}


def test_a_format_in_place_of_the_template(sample):
    decoding = replace(GREEDY, prompt_format=FORMAT)
    assert sample([PROMPT], decoding) == sample([PROMPT])
    assert sample([PROMPT], replace(GREEDY, prompt_format="{prompt}")) != sample([PROMPT])
    with pytest.raises(ValueError, match="need the chat template of m"):
        sample([("a", "b", "c")], decoding)


def test_a_prompt_that_fills_the_context_is_told_and_one_that_nearly_does_is_answered(sample):
    # The context has 64 tokens; three more stand around a prompt.
    found = sample([" ".join("a" * 61), " ".join("a" * 60), PROMPT, " ".join("b" * 9000)])
    assert [found[n].finish_reason == NO_ROOM for n in range(4)] == [True, False, False, True]
    assert found[1].tokens == 1
    assert found[2] == sample([PROMPT])[0]


def test_an_answer_of_nothing_is_an_empty_one(sample, world, tmp_path):
    """A model whose first token is an end token."""
    model, tokenizer = load_model(world.base)[0], build_tokenizer()
    model.model.norm.weight.data[:] = 0  # all tokens are equally likely, and each is an end
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "silent")
    found = sample([PROMPT], path=tmp_path / "silent", end_ids=tuple(range(len(tokenizer))))
    assert found[0] == Turn("", 1, "stop")


def test_a_missing_template_and_damaged_weights_are_named(sample, world, tmp_path):
    bare = shutil.copytree(world.base, tmp_path / "bare")
    for path in bare.glob("chat_template*"):
        path.unlink()
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"m \(.*bare\) has no chat template.*--prompt-format"):
        sample([PROMPT], path=bare)
    decoding = replace(GREEDY, prompt_format=FORMAT)
    assert sample([PROMPT], decoding, path=bare) == sample([PROMPT])
    (bare / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"m \(m\) cannot be loaded"):
        sample([PROMPT], decoding, path=bare)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif("SERA_VLLM_PYTHON" not in os.environ, reason="SERA_VLLM_PYTHON is unset")
def test_vllm_gives_the_same_answers_of_a_model_and_an_adapter(world, model, tmp_path, monkeypatch):
    """At relative paths: the engine is another process, which starts elsewhere."""
    from peft import LoraConfig, get_peft_model

    from sera_plugin.tools.evaluation.engine import Engine

    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    base, python = map(os.path.relpath, (world.base, os.environ["SERA_VLLM_PYTHON"]))
    asked = [(PROMPT,), ("c a b", "z y", "x"), ("q r s t",)]
    found = []
    for its in ({}, {"adapter": Path("adapter")}):
        tuned = Model("m", "m", base, **its)
        here, there = (
            dict(Engine(tuned, GREEDY, vllm_python, tmp_path / "vllm.log")(asked, [], 0))
            for vllm_python in (None, python)
        )
        assert here == there
        found.append(here)
    assert found[0] != found[1]
    assert (tmp_path / "vllm.log").stat().st_size > 0
