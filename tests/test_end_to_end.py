"""Whole runs through the real host, checked independently.

The check shares no code with the package: plain transformers and PEFT in float32 load
`iteration-XX/policy`, score every completion on its own, without padding, and recompute margins,
selections and pairs from the parquet files.
"""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sera_plugin.config.kinds import LOSSES
from tests.conftest import DATA_TYPE, adapter, write_rows

pytestmark = pytest.mark.slow
SHARED = Path(__file__).parents[2] / "shared"
GAMMA = 0.3
KINDS = {"full": {}, "lora": adapter(), "qlora": adapter(adapter="qlora", load_in_4bit=True)}


def load_policy(run: Path, base: Path, iteration: int, four_bit: bool, low: bool):
    directory = run / f"iteration-{iteration:02d}" / "policy"
    # With bf16 the host rounds the base's weights when it loads them.
    options = {"dtype": torch.bfloat16 if low else torch.float32}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    if (directory / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(base, **options)
        model = PeftModel.from_pretrained(model, directory)
    elif (directory / "base_model.json").exists():
        pointer = json.loads((directory / "base_model.json").read_text())
        assert Path(pointer["base_model"]) == base
        model = AutoModelForCausalLM.from_pretrained(base, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return (model.float() if low else model).eval()


@torch.no_grad()
def logp(model, prompt, completion) -> float:
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum().item()


def equation_seven(values: list[np.ndarray]) -> np.ndarray:
    if len(values) == 2:
        return values[0] - values[1]
    return (1 - GAMMA) * (values[0] - values[1]) + GAMMA * (values[1] - values[2])


def naive_error(policies, data) -> float:
    """What bf16 does to this file's own forward pass: nats per root token, root mean square."""
    found = []
    for model in policies.values():
        for side in ("chosen", "rejected"):
            for p, c in zip(data["prompt_ids"], data[f"{side}_ids"], strict=True):
                with torch.autocast("cpu", torch.bfloat16):
                    low = logp(model, p, c)
                found.append((low - logp(model, p, c)) / math.sqrt(len(c)))
    return math.sqrt(np.mean(np.square(found)))


def check_run(result, base: Path, kept: int, sampled: int, four_bit=False, low=False):
    """Everything the run directory claims, recomputed; in `low` precision by bf16's own error."""
    run = result.run
    data = pq.read_table(run / "dataset.parquet").to_pydict()
    total = len(data["row"])
    policies = {t - 1: load_policy(run, base, t, four_bit, low) for t in (1, 2, 3)}
    mine: dict[tuple[int, str], np.ndarray] = {}
    # Of several hundred values that scatter by the naive error none is five times as far.
    error_of_token = 5 * naive_error(policies, data) if low else 0.0

    def tolerance(lengths):
        return error_of_token * np.sqrt(lengths) if low else 1e-4 * np.array(lengths)

    for t in (1, 2, 3):
        offline = pq.read_table(run / f"iteration-{t:02d}/offline.parquet").to_pydict()
        for side in ("chosen", "rejected"):
            scored = [
                logp(policies[t - 1], p, c)
                for p, c in zip(data["prompt_ids"], data[f"{side}_ids"], strict=True)
            ]
            allowed = tolerance(offline[f"{side}_length"])
            error = np.abs(np.array(offline[f"{side}_logp"]) - scored)
            assert (error <= allowed).all(), (t, side, (error / allowed).max())
            mine[t - 1, side] = np.array(offline[f"{side}_logp"])
            assert offline[f"{side}_length"] == [len(ids) for ids in data[f"{side}_ids"]]
        pairs = result.training_pairs[t]
        summary = json.loads((run / f"iteration-{t:02d}/summary.json").read_text())
        gate = summary["step_zero"]
        assert gate["loss"] == pytest.approx(gate["expected_loss"], abs=1e-4)
        assert gate["loss"] == pytest.approx(math.log(2), abs=0.05 if low else 1e-4)
        # Each policy scores the offline pairs once; those in its reward score a candidate.
        lengths = sum(
            2 * offline["prompt_length"][row]
            + offline["chosen_length"][row]
            + offline["rejected_length"][row]
            for row in range(total)
        )
        forwarded = dict(summary["forwarded"])
        assert forwarded.pop("score_offline") == {"sequences": 2 * total, "tokens": lengths}
        forwarded.pop("score_evaluation", None)
        # Pairs that are scored again tell the noise of bf16.
        again = forwarded.pop("score_again", {"sequences": 0})["sequences"]
        assert again == (2 * min(16, total) if low or four_bit else 0)
        samples = forwarded.pop("sample", {"sequences": 0})["sequences"]
        scored = forwarded.pop("score_candidates", {"sequences": 0})["sequences"]
        assert scored == samples * min(t, 3)
        assert samples == (4 * total if t > 1 else 0)
        assert not forwarded
        if t == 1:
            assert pairs.num_rows == total
            assert pairs["ref_chosen_logps"].to_pylist() == offline["chosen_logp"]
            continue

        history = range(t - 1, max(t - 4, -1), -1)
        margin = equation_seven([mine[p, "chosen"] for p in history]) - equation_seven(
            [mine[p, "rejected"] for p in history]
        )
        np.testing.assert_allclose(offline["margin"], margin, atol=1e-9)
        selected = np.zeros(total, dtype=bool)
        selected[np.argsort(-np.array(offline["margin"]), kind="stable")[:kept]] = True
        assert offline["selected"] == selected.tolist()

        expected = [
            (data["chosen_ids"][row], data["rejected_ids"][row], offline["chosen_logp"][row])
            for row in np.flatnonzero(selected)
        ]
        expected += check_candidates(run, t, data, policies, sampled, tolerance)
        assert pairs.num_rows == kept + sampled == len(expected)
        assert pairs["chosen_ids"].to_pylist() == [chosen for chosen, _, _ in expected]
        assert pairs["rejected_ids"].to_pylist() == [rejected for _, rejected, _ in expected]
        assert pairs["ref_chosen_logps"].to_pylist() == [logp for _, _, logp in expected]


def check_candidates(run, t, data, policies, sampled, tolerance):
    """Recompute rewards and pairs of the sampled candidates; returns the kept ones."""
    table = pq.read_table(run / f"iteration-{t:02d}/candidates.parquet").to_pydict()
    by_row: dict[int, list[int]] = {}
    history = range(t - 1, max(t - 4, -1), -1)
    for index, (row, ids) in enumerate(zip(table["row"], table["token_ids"], strict=True)):
        by_row.setdefault(row, []).append(index)
        prompt = data["prompt_ids"][row]
        scored = [logp(policies[policy], prompt, ids) for policy in history]
        error = np.abs(np.array(table["logps"][index]) - scored)
        assert (error <= tolerance(len(ids))).all(), error
    reward = equation_seven(list(np.array(table["logps"]).T))
    np.testing.assert_allclose(table["reward"], reward, atol=1e-9)
    assert len(by_row) == len(data["row"])
    found = []
    for row, indices in sorted(by_row.items()):
        assert len(indices) == 4
        distinct = list({tuple(table["token_ids"][i]): i for i in reversed(indices)}.values())
        best = max(distinct, key=lambda i: (table["reward"][i], -i))
        worst = min(distinct, key=lambda i: (table["reward"][i], -i))
        margin = table["reward"][best] - table["reward"][worst]
        if margin > 0:
            found.append((margin, row, best, worst))
    order = sorted(range(len(found)), key=lambda i: (-found[i][0], i))[:sampled]
    chosen = [found[i] for i in sorted(order)]
    stored = pq.read_table(run / f"iteration-{t:02d}/bootstrapped.parquet").to_pydict()
    kept = [i for i, keep in enumerate(stored["selected"]) if keep]
    assert [stored["row"][i] for i in kept] == [row for _, row, _, _ in chosen]
    assert [stored["chosen_candidate"][i] for i in kept] == [
        table["candidate"][best] for _, _, best, _ in chosen
    ]
    return [
        (table["token_ids"][best], table["token_ids"][worst], table["logps"][best][0])
        for _, _, best, worst in chosen
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_run_is_what_it_says(world, base_config, train, kind):
    base_config["sera"]["keep_policies"] = True
    result = train(base_config | KINDS[kind])
    check_run(result, world.base, kept=17, sampled=7, four_bit=kind == "qlora")
    assert result.trainer.ref_model is None
    assert result.trainer.state.global_step == result.trainer.state.max_steps == 9


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_run_in_bf16_is_what_it_says(world, base_config, train, kind):
    base_config["sera"]["keep_policies"] = True
    result = train(base_config | KINDS[kind] | {"bf16": True})
    check_run(result, world.base, kept=17, sampled=7, low=True)
    for t in (2, 3):
        noise = json.loads((result.run / f"iteration-{t:02d}/summary.json").read_text())["noise"]
        assert 0 < noise["margin"] < 1
        assert 0 <= noise["within"] < 1


@pytest.mark.nightly
@pytest.mark.parametrize("loss", [*LOSSES, "host"])
def test_every_loss_passes_its_gate_in_bf16(base_config, train, loss):
    keys = {"host": {"dpo_loss_type": ["apo_zero"]}, "robust": {"dpo_label_smoothing": 0.1}}
    base_config["sera"] |= {} if loss == "host" else {"loss": loss}
    result = train(
        base_config | KINDS["lora"] | {"bf16": True, "num_epochs": 2} | keys.get(loss, {})
    )
    for t in (1, 2):
        summary = json.loads((result.run / f"iteration-{t:02d}/summary.json").read_text())
        assert 0 <= summary["step_zero"]["nats_per_root_token"] < 0.05
        assert "train" in summary["seconds"]
    evaluated = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert len(evaluated) >= 2
    assert np.isfinite(evaluated).all()


@pytest.mark.skipif(not SHARED.exists(), reason="the larger model and real data are not here")
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("full", "lora")), "qlora"]
)
def test_run_on_real_preferences(base_config, tmp_path, train, kind):
    with gzip.open(SHARED / "data/alpacaeval_prefs_train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    short = [r for r in rows if len(r["chosen"]) + len(r["rejected"]) + len(r["prompt"]) < 700]
    write_rows(tmp_path / "real.jsonl", short[:10])
    formats = {"prompt_format": "<s><|user|>{prompt}<|assistant|>"}
    formats |= {"chosen_format": "{chosen}", "rejected_format": "{rejected}"}
    data = {"path": str(tmp_path / "real.jsonl"), "type": DATA_TYPE | formats}
    base_config["datasets"][0] |= data
    base = SHARED / "models/tiny-lm"
    base_config |= {"base_model": str(base), "sequence_len": 512}
    base_config |= {"test_datasets": None, "evals_per_epoch": None}
    base_config["sera"] |= {"keep_policies": True, "max_new_tokens": 24}
    result = train(base_config | KINDS[kind])
    check_run(result, base, kept=7, sampled=3, four_bit=kind == "qlora")
