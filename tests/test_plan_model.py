"""A plan's sizes against what torch, PEFT, bitsandbytes and the host's own loader really hold."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from axolotl.loaders import ModelLoader, load_tokenizer
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.optim import AdamW8bit
from peft import get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaModel

from sera_plugin.algorithm.method import Method, SamplingSettings
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model.budget import GIB, scoring_budget
from sera_plugin.model.forward import Targets, forward_logps
from sera_plugin.model.memory import (
    SAMPLED_ON_CPU,
    resident_bytes,
    sampled_batches,
    state_bytes,
)
from sera_plugin.model.policies import take_snapshot, tidy_adapters
from sera_plugin.model.scoring import score_sequences
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.tools.planning.counts import lengths
from sera_plugin.tools.planning.model import describe
from sera_plugin.tools.planning.run import Run
from tests.conftest import adapter

SMALL = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = adapter(lora_target_modules=None, lora_target_linear=True)
QLORA = adapter(adapter="qlora", load_in_4bit=True)
SINGLE = {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}


@pytest.fixture
def model_directory(world, tmp_path):
    """A small random model of a kind, with the world's tokenizer."""

    def make(kind: str, **changes):
        tokenizer = AutoTokenizer.from_pretrained(world.base)
        config = AutoConfig.for_model(kind, **SMALL | {"vocab_size": len(tokenizer)} | changes)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.fixture
def described(base_config, model_directory, load):
    """The host's model for a configuration, and the run that a plan makes of it: 4 pairs of 96."""

    def planned(kind: str, changes: dict, **model) -> SimpleNamespace:
        places = {"base_model": str(model_directory(kind, **model)), "sequence_len": 96}
        cfg = load(base_config | places | changes)
        tokenizer = load_tokenizer(cfg)
        method = Method(SeraConfig(**{**cfg.sera, "bootstrap_ratio": 0}), False, False, 4)
        prompt, completion = np.array([16] * 4), np.array([80] * 4)
        found, pairs = describe(cfg, tokenizer, False), lengths(prompt, completion, completion)
        run = Run(cfg, found, method, pairs, pairs[:0], "transformers", None, lambda _: found)
        host, lora = ModelLoader(cfg, tokenizer).load()
        if lora is not None:
            host = get_peft_model(host, lora)
        ids = torch.randint(3, 30, (4, 96), generator=torch.Generator().manual_seed(0))
        return SimpleNamespace(cfg=cfg, run=run, model=host.train(), ids=ids)

    return planned


def test_a_model_that_needs_values_to_be_passed_is_refused_by_name(described, monkeypatch):
    def look(self, *args, **kwargs):
        return self.embed_tokens.weight.sum().item()

    monkeypatch.setattr(LlamaModel, "forward", look)
    with pytest.raises(ValueError, match=r"model_type llama\) cannot be measured .* Train a few"):
        described("llama", {})


def stored(weights) -> int:
    """Bytes of weights with their quantisation state, counted tensor by tensor."""
    total = 0
    for weight in weights:
        total += weight.nbytes
        state = getattr(weight, "quant_state", None)
        while state is not None:
            total += sum(one.nbytes for one in vars(state).values() if torch.is_tensor(one))
            state = getattr(state, "state2", None)
    return total


def kept(found, length: int) -> int:
    """Bytes that a forward pass keeps for its backward pass, storage by storage."""
    own = {weight.untyped_storage().data_ptr() for weight in found.model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    model = found.model.get_base_model() if found.cfg.adapter else found.model
    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bool(found.cfg.bf16)),
    ):
        model.base_model(input_ids=found.ids[:, :length], use_cache=False)
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"bf16": False}),
        ("gpt_neox", {"bf16": True}),
        ("qwen3", LINEAR | {"bf16": True, "lora_dropout": 0.1}),
        ("qwen2", adapter(peft_use_dora=True, bf16=True)),
        ("llama", adapter(lora_modules_to_save=["embed_tokens"], bf16=True)),
        ("qwen2", QLORA | {"embeddings_skip_upcast": True, "bf16": True}),
        ("llama", QLORA | SINGLE | {"bf16": True}),
        ("qwen2", adapter(load_in_8bit=True, bf16=True)),
        ("llama", {"special_tokens": {"pad_token": "<new>"}, "bf16": False}),
    ],
    ids=["full", "neox", "lora", "dora", "saved", "double", "single", "8bit", "enlarged"],
)
def test_weights_are_those_of_the_host_and_activations_those_of_autograd(kind, changes, described):
    found = described(kind, changes)
    planned = found.run.model
    mine = [weight for weight in found.model.parameters() if weight.requires_grad]
    rest = [weight for weight in found.model.parameters() if not weight.requires_grad]
    if found.cfg.adapter:
        assert planned.adapter == sum(weight.numel() for weight in mine)
    layers = [one for one in found.model.modules() if isinstance(one, nn.Linear)]
    scales = sum(4 * one.out_features for one in layers if isinstance(one, Linear8bitLt))
    snapshot = take_snapshot(found.model).values()
    # Adapters in float32 whatever the base is in; `policies.tidy_adapters` sees to it.
    assert planned.trained_bytes == (4 * planned.adapter if planned.adapter else stored(snapshot))
    assert len(planned.trained) == len(snapshot)
    assert planned.weights == stored(rest if found.cfg.adapter else mine) + scales
    assert planned.width == (2 if found.cfg.bf16 else 4)
    wide = [one.weight for one in layers if one.weight.requires_grad and one.weight.itemsize == 4]
    quantised = [one for one in layers if isinstance(one, Linear4bit | Linear8bitLt)]
    largest = max((one.in_features * one.out_features for one in quantised), default=0)
    copied = largest + sum(weight.numel() for weight in wide if found.cfg.bf16)
    assert planned.copies == planned.width * copied
    assert planned.vocabulary == found.model.get_input_embeddings().num_embeddings
    if not found.cfg.load_in_8bit:
        each, square = planned.kept
        # Copies of weights are as large at any length; they are counted apart.
        longer = 4 * (96 - 48) * each + 4 * (96**2 - 48**2) * square
        assert longer == pytest.approx(kept(found, 96) - kept(found, 48), rel=0.03)


def test_a_mixture_counts_the_experts_that_a_token_passes(base_config, model_directory, load):
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2}
    cfg = load(base_config | {"base_model": str(model_directory("mixtral", **sizes))})
    found = describe(cfg, load_tokenizer(cfg), on_gpu=False)
    attention, expert = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 176
    assert found.matrices == 3 * (attention + 2 * expert)
    assert found.kept[0] > 0


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adagrad", torch.optim.Adagrad),
        ("adamw_8bit", AdamW8bit),
    ],
)
def test_states_are_as_large_as_the_optimizers_make_them(name, make):
    weights = [nn.Parameter(torch.ones(size)) for size in (100, 4096, 10_000)]
    optimizer = make(weights)
    for index, weight in enumerate(weights):
        weight.grad = torch.ones_like(weight)
        if name == "adamw_8bit":  # its step needs a GPU
            optimizer.check_overrides()
            optimizer.init_state(optimizer.param_groups[0], weight, 0, index)
    if name != "adamw_8bit":
        optimizer.step()
    # All weights share the two tables of 256.
    shared = ("step", "qmap1", "qmap2")
    states = [
        value for each in optimizer.state.values() for key, value in each.items()
        if torch.is_tensor(value) and key not in shared
    ]  # fmt: skip
    sizes = [(one.numel(), one.element_size(), False) for one in weights]
    assert sum(one.nbytes for one in states) == state_bytes(name, sizes)


def most_held(work, directory) -> int:
    """The most bytes that torch held at once beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(directory / "trace.json"))
    events = json.loads((directory / "trace.json").read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    sizes = [one["args"]["Bytes"] for one in sorted(changes, key=lambda one: one["ts"])]
    return int(np.cumsum(sizes).max())


WIDER = {"hidden_size": 256, "intermediate_size": 688}
#: A model that caps its logits, with far more words than the tokenizer has.
CAPPED = {"vocab_size": 16_000, "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "model", "changes", "on"),
    [
        ("llama", WIDER, {}, False),
        ("llama", WIDER, LINEAR, True),
        ("gemma2", CAPPED, {}, False),
    ],
    ids=["full", "lora", "capped"],
)
def test_a_training_pass_holds_what_is_planned(kind, model, changes, on, described, tmp_path):
    found = described(kind, changes, **model)
    run = found.run.changed({"gradient_checkpointing": on, "micro_batch_size": 2})
    if on:
        found.model.enable_input_require_grads()
        found.model.gradient_checkpointing_enable({"use_reentrant": False})
    completion = torch.ones_like(found.ids)
    completion[:, :16] = completion[0, -10:] = 0
    targets = Targets.of(found.ids, completion)

    def step():
        forward_logps(found.model, {"input_ids": found.ids}, targets)[0].sum().backward()

    step()  # gradients are there, as they are between the micro-batches of a step
    assert sum(run.training().values()) == pytest.approx(most_held(step, tmp_path), rel=0.1)


@pytest.mark.parametrize(("kind", "model"), [("llama", {}), ("gemma2", CAPPED)])
def test_a_run_plans_scoring_as_its_plan_does(kind, model, described, monkeypatch):
    """By the whole of a GPU's memory, whatever is free of it; logits that are capped count."""
    found = described(kind, {}, **model)
    gpu = SimpleNamespace(total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    planned = scoring_budget(found.model, torch.device("cuda"), 96).planned
    assert planned == replace(found.run, memory=8 * GIB).scored_tokens
    assert planned == {"llama": 32_768, "gemma2": 4_096}[kind]


@pytest.mark.parametrize("changes", [{}, LINEAR, QLORA])
def test_a_run_samples_in_the_batches_that_are_planned_before_and_after_steps(
    changes, described, monkeypatch
):
    """And does in a continued run, whose optimizer has no state yet."""
    found = described("llama", {"optimizer": "adamw_torch_fused"} | changes)
    memory = GIB + 2**27
    card = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    tidy_adapters(found.model, None) if changes else None
    gpu, planned = torch.device("cuda"), replace(found.run, memory=memory).batches

    def batches():
        return sampled_batches(found.model, gpu, found.run.model.width, 96, "adamw_torch_fused")

    resident = found.run.model
    kept = resident.resident + resident.trained_bytes + found.run.states + resident.copies
    assert resident_bytes(found.model, resident.width, "adamw_torch_fused") == kept
    assert planned == batches()
    assert 96 < planned.tokens < 2**18
    optimizer = torch.optim.AdamW(p for p in found.model.parameters() if p.requires_grad)
    found.model(found.ids).logits.float().sum().backward()
    optimizer.step()
    assert planned == batches()


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("llama", {}),
        pytest.param("gemma2", CAPPED, marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_scoring_holds_no_more_than_planned(kind, model, described, tmp_path):
    found = described(kind, {}, **model)
    random = np.random.default_rng(0)
    prompts, completions = (
        [random.integers(6, 30, size).astype(np.int32) for _ in range(24)] for size in (16, 80)
    )
    budget = scoring_budget(found.model, torch.device("cpu"), 96)

    def score():
        score_sequences(found.model, prompts, completions, pad_id=0, budget=budget)

    score()
    real = most_held(score, tmp_path)
    assert 0.9 * real < sum(found.run.scoring().values()) < 2 * real


def test_sampling_holds_no_more_than_planned(described, tmp_path):
    found = described("llama", {})
    random = np.random.default_rng(0)
    # 16,384 tokens are 42 prompts with 4 candidates each of 16 + 80.
    prompts = [random.integers(6, 30, 16).astype(np.int32) for _ in range(42)]
    method = Method(SeraConfig(candidates=4, max_new_tokens=80), False, False, 4, iterations=2)
    run = replace(found.run, method=method)
    prompts[0] = prompts[0][1:]  # without padding keys are not repeated for all queries
    sampler = TransformersSampler(found.model, 0, SAMPLED_ON_CPU)
    settings = SamplingSettings(4, 1.0, 0.95, 80, 96, (2,), seed=1)
    real = most_held(lambda: list(sampler.sample(prompts, settings)), tmp_path)
    assert 0.9 * real < sum(run.sampling().values()) < 1.4 * real
