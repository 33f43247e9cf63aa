"""The scorer: every way to put sequences into a forward pass gives the same log-probabilities."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, MistralConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sera_plugin.model import forward
from sera_plugin.model.budget import TokenBudget, batches_by_length, whole_logits
from sera_plugin.model.forward import (
    Abilities,
    Targets,
    abilities,
    collate,
    completion_logps,
    forward_logps,
)
from sera_plugin.model.lines import Sharing, plan_lines
from sera_plugin.model.scoring import score_sequences
from sera_plugin.rundir.ranks import Shard
from sera_plugin.rundir.tokens import TOKENS, TokenColumn
from tests.conftest import ids
from tests.tiny_models import MODELS, SMALL, build, in_segments


def one_by_one(model, prompts, completions) -> list[float]:
    """The definition: each sequence alone, all of its logits, in float64."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        whole = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        logps = logits.double().log_softmax(-1).gather(1, whole[0, len(prompt) :, None])
        scores.append(logps.sum().item())
    return scores


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_scored_right_in_the_ways_it_takes(name):
    config, expected = MODELS[name]
    model = build(config)
    assert abilities(model) == expected
    assert whole_logits(model) == (0 if expected.in_head else 60)
    prompts, completions = ids(9, 3, 9, 7, 9), ids(8, 5, 2, 1, 11, seed=1)
    prompts[2] = prompts[4] = prompts[0]
    defined = one_by_one(model, prompts, completions)
    for budget in (1, 40, 200):
        model.train(budget == 40)
        keys = {"pad_id": 0, "budget": TokenBudget(budget)}
        scores = score_sequences(model, prompts, completions, **keys)
        assert scores.tolist() == pytest.approx(defined, abs=1e-4)
        parts = [
            score_sequences(model, prompts, completions, shard=Shard(index, 2), **keys)
            for index in range(2)
        ]
        assert budget == 200 or all(part.any() for part in parts)
        np.testing.assert_array_equal(sum(parts), scores)
        assert model.training == (budget == 40)


def test_batches_hold_every_index_once_within_the_budget():
    batches = list(batches_by_length([5, 30, 7, 7, 2, 11], 16))
    assert batches == [[1], [5], [2, 3], [0, 4]]


def test_packed_lines_are_told_apart_by_their_positions():
    """The kernel for them needs a GPU; elsewhere transformers makes a mask of the positions."""
    model = build(LlamaConfig(**SMALL))
    prompts, completions = ids(9, 7, 4), ids(8, 5, 3, seed=1)
    lines = [(0,), (1,), (2,)]
    inputs, targets = collate(prompts, completions, lines, 0, torch.device("cpu"), packed=True)
    assert inputs["input_ids"].shape == (1, 36)
    with torch.no_grad():
        logps, _ = forward_logps(model, inputs, targets)
    assert logps.tolist() == pytest.approx(one_by_one(model, prompts, completions), abs=1e-3)


def test_flash_attention_is_told_once_where_packed_lines_end(monkeypatch):
    """A kernel of its own in the name of one, which needs a GPU: it reads no positions."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_in_segments", in_segments)
    model = build(LlamaConfig(**SMALL))
    model.config._attn_implementation = "flash_in_segments"
    assert abilities(model) == Abilities(in_head=True, packed=True, shared=False)
    prompts, completions = ids(9, 7, 4, 9), ids(8, 5, 3, 2, seed=1)
    scores = score_sequences(model, prompts, completions, pad_id=0, budget=TokenBudget(40))
    model.config._attn_implementation = "sdpa"
    assert scores.tolist() == pytest.approx(one_by_one(model, prompts, completions), abs=1e-4)


def test_a_shared_prompt_is_forwarded_once():
    model = build(LlamaConfig(**SMALL))
    abilities(model)
    prompts = [ids(30)[0]] * 4
    completions = ids(3, 4, 5, 6, seed=2)
    sizes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score_sequences(model, prompts, completions, pad_id=0, budget=TokenBudget(500))
    assert sizes == [30 + 3 + 4 + 5 + 6]


def test_a_window_keeps_prompts_apart():
    for config, longest in (({"sliding_window": 6}, 6), ({"sliding_window": None}, 500)):
        assert Sharing.of(build(MistralConfig(**SMALL, **config)), 500).longest == longest


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=30),
    st.floats(0, 0.2),
    st.integers(5, 60),
)
def test_lines_hold_every_completion_once_after_its_own_prompt(pairs, attention, longest):
    prompts = [np.full(3 + which, which, dtype=np.int32) for which, _ in pairs]
    completions = [np.zeros(length, dtype=np.int32) for _, length in pairs]
    sharing = Sharing(attention, longest)
    lines = plan_lines(prompts, completions, sharing)
    assert sorted(index for line in lines for index in line) == list(range(len(pairs)))
    for line in lines:
        assert len({pairs[index][0] for index in line}) == 1
        tokens = len(prompts[line[0]]) + sum(pairs[index][1] for index in line)
        assert len(line) == 1 or tokens <= longest
    assert plan_lines(prompts, completions, None) == [(index,) for index in range(len(pairs))]


def planned_one_by_one(prompts, completions, sharing: Sharing):
    """The definition: of all ways to cut a prompt's completions, shortest first, the cheapest."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(prompt), []).append(index)

    def cost(line) -> float:
        tokens = len(prompts[line[0]]) + sum(len(completions[index]) for index in line)
        if len(line) == 1:
            return tokens + sharing.attention * tokens**2 / 2
        return tokens + sharing.attention * tokens**2 if tokens <= sharing.longest else np.inf

    lines = []
    for indices in by_prompt.values():
        indices.sort(key=lambda index: len(completions[index]))
        plans = [
            [tuple(indices[at : at + size]) for at in range(0, len(indices), size)]
            for size in range(1, min(len(indices), 8) + 1)
        ]
        lines += min(plans, key=lambda plan: sum(map(cost, plan)))
    return lines


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=40),
    st.floats(0, 0.2),
    st.integers(5, 60),
)
def test_lines_are_the_cheapest_of_all_ways_to_cut(rows, pairs, attention, longest):
    picked = np.array([which % len(rows) for which, _ in pairs], dtype=np.int64)
    prompts = TokenColumn(pa.array(rows, TOKENS)).take(picked)
    completions = [np.zeros(length, dtype=np.int32) for _, length in pairs]
    sharing = Sharing(attention, longest)
    expected = planned_one_by_one(list(prompts), completions, sharing)
    assert plan_lines(prompts, completions, sharing) == expected
    assert plan_lines(list(prompts), completions, sharing) == expected


def test_a_prompt_is_shared_when_that_costs_less():
    long, short, answers = ([np.zeros(size, np.int32)] * 2 for size in (100, 10, 50))
    # Shared: 200 tokens and 40,000 pairs. Apart: 300 tokens and 2 x 22,500 / 2 pairs.
    assert plan_lines(long, answers, Sharing(0.005, 999)) == [(0, 1)]
    assert plan_lines(long, answers, Sharing(0.006, 999)) == [(0,), (1,)]
    # Shared: 110 tokens and 12,100 pairs. Apart: 120 tokens and 2 x 3,600 / 2 pairs.
    assert plan_lines(short, answers, Sharing(0.001, 999)) == [(0, 1)]
    assert plan_lines(short, answers, Sharing(0.002, 999)) == [(0,), (1,)]
    assert plan_lines(long, answers, Sharing(0.0, 199)) == [(0,), (1,)]


def targets_of(labels: list[list[int]]) -> Targets:
    flat = torch.tensor([label for one in labels for label in one])
    zeros = torch.zeros_like(flat)
    return Targets(zeros, zeros, flat, [len(one) for one in labels])


def test_logps_sum_the_tokens_of_each_completion_by_hand():
    # Uniform over 4: each token has log(1/4).
    logits = torch.zeros(3, 4, dtype=torch.bfloat16)
    logps = completion_logps(lambda part: part, logits, targets_of([[2, 3], [1]]), 4)
    assert logps.dtype == torch.float32
    assert logps.tolist() == pytest.approx([2 * math.log(0.25), math.log(0.25)])


def test_logits_in_chunks_give_the_same_values_and_gradients(monkeypatch):
    targets = targets_of([[1, 2, 3], [4, 0, 1, 2], [3]])
    weight = torch.randn(16, 5)
    largest = []

    def run():
        states = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        head = weight.clone().requires_grad_()

        def logits(part):
            largest.append(len(part))
            return part @ head

        logps = completion_logps(logits, states, targets, 5)
        (logps * torch.tensor([1.0, 2.0, -1.0])).sum().backward()
        return logps.detach(), states.grad, head.grad

    whole = run()
    assert largest == [8]
    largest.clear()
    monkeypatch.setattr(forward, "LOGITS", 15)
    monkeypatch.setattr(forward, "KEPT_LOGITS", 15)
    chunked = run()
    assert sorted(largest) == [2, 2, 3, 3, 3, 3]  # once more in the backward pass
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_on_any_layer_is_scored_and_trained_as_by_the_whole_logits(modules):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    model = get_peft_model(build(LlamaConfig(**SMALL)), config)
    assert abilities(model).in_head
    input_ids = torch.arange(16).view(2, 8)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    targets = Targets.of(input_ids, mask)
    found = []
    for in_head in (True, False):
        model.zero_grad()
        logps, _ = forward_logps(model, inputs, targets, in_head)
        logps.sum().backward()
        gradients = [w.grad.clone() for w in model.parameters() if w.grad is not None]
        found.append([logps.detach(), *gradients])
    assert len(found[0]) > 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_output_layer_is_itself_again_even_after_an_error():
    model = build(LlamaConfig(**SMALL))
    abilities(model)
    inputs, targets = collate(ids(3), ids(4), [(0,)], 0, torch.device("cpu"))
    inputs["input_ids"] = inputs["input_ids"] + 10**6
    with pytest.raises(IndexError):
        forward_logps(model, inputs, targets)
    assert "forward" not in vars(model.lm_head)
