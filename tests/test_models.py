"""Every kind of model trains and samples alike; tests/test_scorer.py has how they are scored."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from axolotl.integrations.base import PluginManager
from axolotl.loaders import load_tokenizer
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import disable_dropout_in_model

from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import prepare_rows
from sera_plugin.host import datasets
from sera_plugin.model.budget import TokenBudget
from sera_plugin.model.forward import abilities
from sera_plugin.model.losses import (
    FLOAT32_LIMIT,
    LOW_PRECISION_LIMIT,
    Again,
    Objective,
    PreferenceLoss,
    check_step_zero,
    pass_again,
    rounding_limit,
)
from sera_plugin.model.scoring import score_sequences
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.tools.demo.base_model import build_tokenizer
from sera_plugin.tools.evaluation.answers import Decoding
from sera_plugin.tools.evaluation.engine import Engine
from sera_plugin.tools.evaluation.models import Model
from tests.conftest import ids, write_rows
from tests.doc_pages import ROOT
from tests.test_scorer import one_by_one
from tests.tiny_models import MODELS, build

every_model = pytest.mark.parametrize("name", MODELS)
PROMPTS, ANSWERS = ids(9, 3, 9, 7), ids(8, 5, 2, 11, seed=1)
GREEDY = SamplingSettings(1, 1.0, 1e-9, 10, 48, (2,), seed=3)


def batch_of(model):
    """Two pairs as a step gets them, padded on the right, with their own log pi as reference."""
    lines = [
        torch.from_numpy(np.concatenate(both)).long() for both in zip(PROMPTS, ANSWERS, strict=True)
    ]
    input_ids = pad_sequence(lines, batch_first=True, padding_value=0)
    place = torch.arange(input_ids.shape[1])[None]
    attended = (place < torch.tensor([[len(line)] for line in lines])).long()
    answer = attended * (place >= torch.tensor([[len(prompt)] for prompt in PROMPTS]))
    logps = torch.tensor(one_by_one(model, PROMPTS, ANSWERS))
    batch = {"input_ids": input_ids, "attention_mask": attended, "completion_mask": answer}
    return batch | {"ref_chosen_logps": logps[:2], "ref_rejected_logps": logps[2:]}


@every_model
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_step_sees_what_was_scored_and_reaches_every_trained_weight(name, kind):
    model = build(MODELS[name][0])
    batch = batch_of(model)
    if kind == "lora":
        # Of state-space layers PEFT refuses the output projection, and Mamba reads the weight of
        # its step size past the adapter.
        layers = [where for where, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
        layers = [one for one in layers if not one.endswith(("lm_head", "out_proj", "dt_proj"))]
        layers += [where for where, one in model.named_modules() if type(one).__name__ == "Conv1D"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=layers))
    disable_dropout_in_model(model)
    weight = 0.01 if name == "Mixtral" else None
    result = Objective(PreferenceLoss("dpo", 0.1), router_weight=weight)(model.train(), batch)
    figures = check_step_zero(batch, result.chosen_logps, result.rejected_logps, 1e-4)
    assert figures["nats_per_root_token"] < 1e-4
    result.loss.backward()
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert len(trained) > 4
    # A new adapter's second half is zero, so its first half has no gradient yet.
    idle = [name for name, one in trained.items() if one is None or not one.any()]
    assert [name for name in idle if "lora_A" not in name] == []
    assert all(one.isfinite().all() for one in trained.values())


def stepped(model, batch, masked=False):
    """The log-probabilities of a step, its gradients, and how attention was asked for."""
    objective, asked = Objective(PreferenceLoss("dpo", 0.1)), []
    abilities(model)  # which tries a mask
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **keys):
        asked.append((attn_mask is not None, key.shape[1] < query.shape[1], *sorted(keys)))
        return attend(query, key, value, attn_mask=attn_mask, **keys)

    def with_mask(module, args, keys):
        return args, keys | {"attention_mask": batch["attention_mask"]}

    model.zero_grad()
    with pytest.MonkeyPatch.context() as patched, ExitStack() as hooks:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        if masked:
            hooks.callback(model.register_forward_pre_hook(with_mask, with_kwargs=True).remove)
        result = objective(model, batch)
    result.loss.backward()
    gradients = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return {"chosen": result.chosen_logps, "rejected": result.rejected_logps} | gradients, asked


@every_model
def test_a_step_needs_no_mask_and_attention_is_given_none(name):
    """Keys and values that heads share are then not repeated either (`enable_gqa`)."""
    model = build(MODELS[name][0])
    batch = batch_of(model)
    found, asked = stepped(model, batch)
    assert not any(masked for masked, *_ in asked)
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    if getattr(text, "num_key_value_heads", heads) != heads:
        assert all(fewer and "enable_gqa" in keys for _, fewer, *keys in asked)
    expected, asked = stepped(model, batch, masked=True)
    assert all(masked for masked, *_ in asked)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_tokens_before_a_line_need_no_mask_either(kind):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(build(MODELS["Llama"][0]), config)
    batch = batch_of(model)
    found, _ = stepped(model, batch)
    assert len(found) > 2
    torch.testing.assert_close(found, stepped(model, batch, True)[0], rtol=1e-4, atol=1e-5)


def continued(model, prompt, tokens):
    """The likeliest answer by whole forward passes over one sequence, without a cache."""
    line = [int(token) for token in prompt]
    while len(line) < len(prompt) + tokens and line[-1] != 2:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([line]), use_cache=False).logits
        line.append(int(logits[0, -1].argmax()))
    return line[len(prompt) :]


@every_model
def test_samples_are_what_the_model_says_whatever_they_are_batched_with(name):
    model = build(MODELS[name][0])
    [chunk] = TransformersSampler(model, 0, 400).sample(PROMPTS, GREEDY)
    assert sorted(row for row, _ in chunk) == [0, 1, 2, 3]
    for row, [candidate] in chunk:
        assert list(candidate.token_ids) == continued(model, PROMPTS[row], 10)


@every_model
@pytest.mark.parametrize("grown", [0, 5])
def test_a_policy_on_disk_answers_as_it_was_trained(name, grown, tmp_path):
    """`axolotl sera eval` on an adapter; with new tokens, whose rows the base does not have."""
    base, tokenizer = build(MODELS[name][0]), build_tokenizer()
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    linear = [where for where, one in base.named_modules() if isinstance(one, torch.nn.Linear)]
    layers = [one for one in linear if one.endswith(("q_proj", "in_proj", "dense", "qkv_proj"))]
    layers += [where for where, one in base.named_modules() if type(one).__name__ == "Conv1D"]
    saved = []
    if grown:
        base.resize_token_embeddings(60 + grown, mean_resizing=False)
        saved = [
            where.rpartition(".")[2]
            for where, one in base.named_modules()
            if one in (base.get_input_embeddings(), base.get_output_embeddings())
        ]
    torch.manual_seed(2)
    config = LoraConfig(
        r=2, target_modules=layers, init_lora_weights=False, modules_to_save=saved or None
    )
    policy = get_peft_model(base, config).eval()
    policy.save_pretrained(tmp_path / "policy", save_embedding_layers=False)
    decoding = Decoding(0.0, 1.0, 8, seed=1, prompt_format="<s> <|user|> {prompt} <|assistant|>")
    model = Model("policy", "policy", str(tmp_path / "base"), tmp_path / "policy")
    engine = Engine(model, decoding, None, tmp_path / "log")
    said = ["a b c", "d e f g h"]
    answers = dict(engine([(text,) for text in said], done=(), seed=1))
    for row, text in enumerate(said):
        prompt = tokenizer(f"<s> <|user|> {text} <|assistant|>")["input_ids"]
        expected = continued(policy, prompt, 8)
        assert answers[row].tokens == len(expected)
        assert answers[row].text == tokenizer.decode(expected, skip_special_tokens=True).strip()


def noisy(jitter, asked=True):
    config, _ = MODELS["Mixtral"]
    model = build(config.__class__(**config.to_dict() | {"router_jitter_noise": jitter}))
    model.config.output_router_logits = asked
    return model


def test_the_balancing_loss_is_added_as_by_the_host_and_left_out_elsewhere():
    """TRL 1.9: loss + router_aux_loss_coef * outputs.aux_loss, over the tokens attended to."""
    model = noisy(0.0)
    batch = batch_of(model)
    found = Objective(PreferenceLoss("dpo", 0.1), router_weight=0.5)(model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model(**inputs, output_router_logits=True).aux_loss.item()
    assert found.metrics["aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert found.loss.item() - found.preference_loss.item() == pytest.approx(expected / 2, rel=1e-4)
    plain = Objective(PreferenceLoss("dpo", 0.1))(model, batch)
    assert "aux_loss" not in plain.metrics
    assert plain.loss == plain.preference_loss
    asked = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["output_router_logits"]), with_kwargs=True
    )
    score_sequences(model, PROMPTS, ANSWERS, pad_id=0, budget=TokenBudget(400))
    list(TransformersSampler(model, 0, 400).sample(PROMPTS, GREEDY))
    assert len(asked) > 5
    assert not any(asked)
    assert model.config.output_router_logits is True


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_what_a_model_draws_at_random_is_told_apart(jitter):
    model = noisy(jitter)
    batch = batch_of(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = pass_again(model.train(), batch)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    figures = check_step_zero(batch, *again.settled, FLOAT32_LIMIT)
    assert figures["nats_per_root_token"] < 1e-5
    assert (again.scatter > 0.05) == bool(jitter)


@pytest.mark.parametrize(
    ("jitter", "wrong", "passes"), [(0.3, 0.0, True), (0.3, 1.0, False), (0.0, 1.0, False)]
)
def test_the_gate_lets_noise_through_and_no_wrong_reference(jitter, wrong, passes):
    model = noisy(jitter)
    batch = batch_of(model)
    batch["ref_chosen_logps"] = batch["ref_chosen_logps"] + wrong
    found = Objective(PreferenceLoss("dpo", 0.1))(model.train(), batch)
    overs = []

    def repeat(over):
        overs.append(over)
        return pass_again(model, batch)

    logps = found.chosen_logps, found.rejected_logps
    if passes:
        figures = check_step_zero(batch, *logps, FLOAT32_LIMIT, repeat=repeat)
        assert figures["nats_per_root_token"] < 1e-5
        assert figures["scatter"] > 0.05
    else:
        with pytest.raises(ValueError, match="step-0 gate"):
            check_step_zero(batch, *logps, FLOAT32_LIMIT, repeat=repeat)
    assert overs == [True]
    # Training that differs from scoring each time in the same way draws nothing.
    same = Again((batch["ref_chosen_logps"], batch["ref_rejected_logps"]), scatter=1e-5)
    for again in (None, same):
        with pytest.raises(ValueError, match="step-0 gate"):
            check_step_zero(batch, *logps, FLOAT32_LIMIT, repeat=lambda over, again=again: again)


def test_rounding_may_change_experts_in_any_precision():
    limits = {name: rounding_limit(build(MODELS[name][0]), False) for name in ("Llama", "Mixtral")}
    assert limits == {"Llama": FLOAT32_LIMIT, "Mixtral": LOW_PRECISION_LIMIT}
    assert rounding_limit(build(MODELS["Llama"][0]), True) == LOW_PRECISION_LIMIT
    assert rounding_limit(build(MODELS["Llama"][0]).half(), False) == LOW_PRECISION_LIMIT


@pytest.mark.parametrize(
    ("name", "length", "held_to", "words"),
    [
        ("GPT-2", 65, 64, "65 is above the 64 positions that base_model has: longer rows do not"),
        ("Llama", 65, 65, "65 is above the 64 positions that base_model was made for"),
        ("Mamba", 65, 65, ""),
    ],
)
def test_rows_do_not_go_beyond_the_positions_of_a_model(
    name, length, held_to, words, base_config, load, tmp_path, monkeypatch
):
    base = tmp_path / "base"
    for part in (MODELS[name][0], build_tokenizer()):
        part.save_pretrained(base)
    rows = [
        {"prompt": "a b", "chosen": " ".join("c" * size), "rejected": "d"} for size in (56, 58, 59)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    base_config["datasets"][0]["path"] = str(tmp_path / "rows.jsonl")
    base_config |= {"base_model": str(base), "sequence_len": length, "test_datasets": None}
    base_config |= {"evals_per_epoch": None}
    said = []
    monkeypatch.setattr(datasets.LOG, "warning", lambda text, *args: said.append(text % args))
    cfg = load(base_config)
    data = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    assert cfg.sequence_len == held_to
    assert len(said) == bool(words)
    assert words in "".join(said)
    # The prompt is five tokens, and the answer has an end token.
    tokenizer, config = load_tokenizer(cfg), SeraConfig(**cfg.sera)
    kept = prepare_rows(data.train_dataset, tokenizer, [2], cfg, config, "train")
    assert sorted(map(len, kept.chosen_ids)) == [57, 59, 60][: held_to - 62]
    if held_to == 64:
        assert "dropped 1 row(s): longer than sequence_len: 64 (" in said[-1]


def test_the_page_has_the_models_and_what_they_take():
    page = (ROOT / "docs/models.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    told = {name: (in_head, shared) for name, _, in_head, shared in rows[1:]}
    found = {
        name: (
            "yes" if takes.in_head else "no: logits are changed after it",
            "yes" if takes.shared else "no: a state runs along the line",
        )
        for name, (_, takes) in MODELS.items()
    }
    assert told == found
