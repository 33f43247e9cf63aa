"""A plan's arithmetic, by hand: counts, operations, states, what to change, how it is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from sera_plugin.algorithm.method import Method, Pairs
from sera_plugin.algorithm.schedule import Schedule
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model.memory import GIB
from sera_plugin.rundir.store import make_table
from sera_plugin.tools.planning import show
from sera_plugin.tools.planning.advice import Case, advise
from sera_plugin.tools.planning.compute import Speed, phase_flops
from sera_plugin.tools.planning.counts import Counting, Lengths, Work, evaluations, padding
from sera_plugin.tools.planning.disk import Saving, disk_parts
from sera_plugin.tools.planning.memory import device_phases
from sera_plugin.tools.planning.optimizers import state_bytes
from sera_plugin.tools.planning.plan import Device, Inputs, make_plan
from sera_plugin.tools.planning.setting import Setting, copied_bytes, snapshots
from sera_plugin.tools.planning.shape import Linear, Shape, Weight
from sera_plugin.tools.report.output import json_text

PROMPT, CHOSEN, REJECTED = [3, 5, 2, 4], [6, 2, 4, 8], [1, 7, 4, 4]


def lengths() -> Lengths:
    return Lengths(*map(np.array, (PROMPT, CHOSEN, REJECTED)))


def counting(iterations=3, sampled=None, held_out=None, sequence_len=16, **sera) -> Counting:
    config = SeraConfig(max_new_tokens=10, **sera)
    method = Method(config, False, False, total=4, iterations=iterations)
    schedule = Schedule(method.sizes, 2, 1)
    return Counting(method, schedule, lengths(), held_out, sequence_len, 0.0, 1.0, sampled)


def llama(hidden=4096, intermediate=14_336, layers=32, vocabulary=32_000) -> Shape:
    """Mistral-7B's shape unless told otherwise: 32 heads, 8 of keys and values, of width 128."""
    weights = [Weight("embed_tokens.weight", (vocabulary, hidden), "embedding", "table")]
    linears = []
    matrices = (
        ("self_attn", "normed", hidden, hidden),
        ("self_attn", "normed", hidden // 4, hidden),
        ("self_attn", "normed", hidden // 4, hidden),
        ("self_attn", "attention", hidden, hidden),
        ("mlp", "normed", intermediate, hidden),
        ("mlp", "normed", intermediate, hidden),
        ("mlp", "activated", hidden, intermediate),
    )
    for layer in range(layers):
        for number, (block, source, outputs, inputs) in enumerate(matrices):
            name = f"{layer}.{block}"
            weights.append(Weight(f"{name}.{number}.weight", (outputs, inputs), "plain", "linear"))
            linears.append(Linear(name, source, inputs, outputs))
        for norm in ("input_norm", "post_norm"):
            weights.append(Weight(f"{layer}.{norm}.weight", (hidden,), "norm", "other"))
    weights.append(Weight("norm.weight", (hidden,), "norm", "other"))
    weights.append(Weight("lm_head.weight", (vocabulary, hidden), "embedding", "other"))
    return Shape(
        kind="llama",
        weights=tuple(weights),
        linears=tuple(linears),
        adapter=(),
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
        heads=32,
        kv_heads=8,
        head=hidden // 32,
        gated=True,
    )


def setting(**changes) -> Setting:
    """Mistral-7B in bfloat16, fully trained with AdamW."""
    usual = Setting(
        width=2,
        bits=None,
        double_quantised=True,
        wide_norms=True,
        optimizer="adamw_torch_fused",
        micro_batch=2,
        accumulation=8,
        checkpointing=True,
        offloading=False,
        eager=False,
        dropout=0,
        longest=1024,
        completion=600,
        prompt=20,
        sample=384,
        candidates=4,
        sequence_len=1024,
        sampler="transformers",
    )
    return replace(usual, **changes)


# ------------------------------------------------------------------ counts


def test_what_is_known_is_counted_exactly():
    first, second, third = counting(held_out=lengths(), gamma=0.3).iterations()
    # 2 (3 + 5 + 2 + 4) + (6 + 2 + 4 + 8) + (1 + 7 + 4 + 4) = 28 + 20 + 16
    for one in (first, second, third):
        offline = one.phases["score_offline"]
        assert (offline.sequences, offline.tokens, offline.most) == (8, 64, 64)
        assert one.phases["score_evaluation"] == offline
        assert (offline.forwarded, offline.scored) == (64 - 14, 36)
    assert first.phases["train"].exact
    assert first.phases["train"].tokens == 64
    assert (first.pairs, first.steps) == (4, 2)
    assert "sample" not in first.phases
    # k = round(2.8) = 3, k~ = round(1.2) = 1.
    assert (second.kept, second.bootstrapped, second.steps) == (3, 1, 2)
    # Two policies in iteration 2's reward, three with gamma.
    assert second.phases["score_candidates"].sequences == 2 * 16
    assert third.phases["score_candidates"].sequences == 3 * 16
    assert third.phases["sample"].sequences == 16


def test_samples_are_bounded_and_expected_at_a_length():
    plan = counting(iterations=2, sequence_len=11)
    assert plan.limits.tolist() == [8, 6, 9, 7]  # 11 less the prompt, at most 10
    assert plan.expected.tolist() == [5, 5, 5, 5]  # as long as chosen answers, on average
    assert replace(plan, sampled=7.0).expected.tolist() == [7, 6, 7, 7]
    sampled = list(plan.iterations())[1].phases["sample"]
    assert (sampled.tokens, sampled.most) == (4 * 20, 4 * 30)
    candidates = list(plan.iterations())[1].phases["score_candidates"]
    assert candidates.tokens == 2 * (4 * 14 + 4 * 20)
    assert candidates.most == 2 * (4 * 14 + 4 * 30)
    assert candidates.forwarded == 2 * (14 + 4 * 20)


def test_the_most_that_an_iteration_can_train_on():
    second = list(counting(iterations=2, sequence_len=11).iterations())[1]
    # The three longest of the pairs, and a prompt with a sample of 11 tokens twice.
    pairs = [2 * p + c + r for p, c, r in zip(PROMPT, CHOSEN, REJECTED, strict=True)]
    assert second.phases["train"].most == sum(sorted(pairs)[-3:]) + 22
    assert second.phases["train"].tokens == round(3 / 4 * 64 + 2 * (14 / 4 + 5))


def test_without_sampling_and_with_one_epoch():
    (only,) = counting(iterations=1).iterations()
    assert set(only.phases) == {"score_offline", "train"}
    for one in counting(bootstrap_ratio=0).iterations():
        assert set(one.phases) == {"score_offline", "train"}
        assert one.bootstrapped == 0


def test_padding_is_that_of_batches():
    one = Lengths(np.array([2, 2]), np.array([4, 1]), np.array([2, 1]))
    # One batch: four lines as long as the longest, 6; without padding 6 + 4 + 3 + 3.
    assert padding(one, 2, None, 0) == pytest.approx(24 / 16)
    assert padding(one, 2, 8, 0) == pytest.approx(32 / 16)
    assert padding(one, 1, None, 0) == pytest.approx((12 + 6) / 16)


@pytest.mark.parametrize(
    ("strategy", "every", "expected"),
    [("no", None, 0), (None, None, 0), ("epoch", None, 1), ("steps", 1 / 3, 1), ("steps", 5, 2)],
)
def test_how_often_the_host_evaluates(strategy, every, expected):
    assert evaluations(strategy, every, steps=30, iterations=3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("iterations", "gamma", "loss", "expected"),
    [(1, 0.3, "dpo", 1), (2, 0.3, "dpo", 2), (3, 0.3, "dpo", 3), (9, 0.3, "dpo", 3),
     (3, 0.0, "dpo", 2), (9, 0.0, "dpo", 2), (3, 0.3, "simpo", 2)],
)  # fmt: skip
def test_policies_that_are_in_memory_at_once(iterations, gamma, loss, expected):
    method = Method(SeraConfig(gamma=gamma, loss=loss), loss == "simpo", False, 10)
    assert snapshots([method.oldest_policy(t) for t in range(1, iterations + 1)]) == expected


# ------------------------------------------------------------------ operations


def test_operations_by_hand():
    shape = replace(llama(), vocabulary=10, hidden=3, layers=2, heads=4, head=5)
    shape = replace(shape, linears=(Linear("b", "normed", 3, 7), Linear("b", "normed", 7, 3)))
    work = Work(sequences=1, tokens=6, most=6, forwarded=6.0, scored=4.0, squares=36.0)
    layers, head = 2 * 42 * 6 + 2 * 2 * 20 * 36, 2 * 10 * 3 * 4
    assert phase_flops(shape, "score_offline", work, True, 0) == layers + head
    assert phase_flops(shape, "train", work, False, 0) == 3 * (layers + head)
    assert phase_flops(shape, "train", work, True, 0) == 4 * layers + 3 * head
    # More logits than are kept: they are made again.
    assert phase_flops(shape, "train", work, False, 2**26) == 3 * layers + 4 * head
    lora = shape.with_lora(2)
    added = 2 * (3 + 7) * 2
    layers += 2 * added * 6
    assert phase_flops(lora, "score_offline", work, True, 0) == layers + head
    assert phase_flops(lora, "train", work, False, 0) == 2 * (layers + head) + 2 * added * 6


# ------------------------------------------------------------------ memory


def test_a_known_model_at_known_settings():
    shape = llama()
    assert shape.parameters == 7_241_732_096
    train = device_phases(shape, setting(), 80 * GIB)[-1]
    wide = 2 * 32_000 * 4096 + 65 * 4096  # embeddings and norms stay in float32
    assert train.parts["weights"] == 2 * (7_241_732_096 - wide) + 4 * wide
    assert train.parts["gradients"] == train.parts["weights"]
    assert train.parts["optimizer"] == 2 * train.parts["weights"]
    lora = shape.with_lora(16)
    qlora = setting(bits=4, wide_norms=False, optimizer="paged_adamw_8bit")
    train = device_phases(lora, qlora, 24 * GIB)[-1]
    # 4 bits and 0.127 for scales (QLoRA, section 3), the rest in 16 bits, the adapter in 32.
    expected = (7_241_732_096 - wide) * 4.127 / 8 + 2 * wide + 4 * lora.adapter_parameters
    assert train.parts["weights"] == pytest.approx(expected, rel=1e-3)
    assert lora.adapter_parameters == 41_943_040


def test_an_optimizer_that_copies_has_a_phase_of_its_own_on_a_gpu():
    shape, plain = llama(), setting(optimizer="adamw_torch")
    update = device_phases(shape, plain, 80 * GIB)[-1]
    assert update.name == "update"
    assert update.parts["other"] == GIB + update.parts["gradients"]
    assert [phase.name for phase in device_phases(shape, plain, None)] == [
        *("score", "sample", "train")
    ]
    (change,) = advise(case(shape, plain, 62))
    assert change.keys == "optimizer: adamw_torch_fused"
    assert change.case.fits


def test_copies_that_passes_make():
    shape = llama()
    assert copied_bytes(shape, setting()) == 2 * 32_000 * 4096  # the output layer
    assert copied_bytes(shape, setting(width=4)) == 0
    lora = shape.with_lora(16)
    assert copied_bytes(lora, setting(wide_norms=False)) == 2 * lora.adapter_parameters
    largest = 2 * 4096 * 14_336
    four = setting(wide_norms=False, bits=4)
    assert copied_bytes(lora, four) == 2 * lora.adapter_parameters + largest


def test_states_by_hand():
    weights = [(10_000, 2, False), (100, 4, False), (8_192, 4, True)]
    assert state_bytes("adamw_torch", weights) == 2 * (2 * 10_000 + 4 * 100 + 4 * 8_192)
    assert state_bytes("sgd", weights) == 0
    # Blocks of 256: 40 for the first; small ones and embeddings in float32.
    assert state_bytes("adamw_8bit", weights) == 2 * (10_000 + 160) + 8 * 100 + 8 * 8_192
    assert state_bytes("lion_8bit", weights[:1]) == 10_160
    assert state_bytes("something_new", weights) == 8 * (10_000 + 100 + 8_192)


def test_checkpointing_and_smaller_batches_keep_less():
    shape = llama()
    kept = {
        (checkpointing, size): device_phases(
            shape, setting(checkpointing=checkpointing, micro_batch=size, completion=60), None
        )[-1].parts["activations"]
        for checkpointing in (True, False)
        for size in (1, 2)
    }
    assert kept[True, 2] == 2 * kept[True, 1]
    assert kept[False, 1] > 10 * kept[True, 1]


@pytest.mark.parametrize(
    ("memory", "resident_moves", "note"),
    [(80, False, "beside"), (24, True, "wait in host memory"), (15, True, "4 bits")],
)
def test_an_engine_gets_what_make_room_would_give_it(memory, resident_moves, note):
    shape = llama().with_lora(16)
    qlora = setting(bits=4, wide_norms=False, optimizer="paged_adamw_8bit", sampler="vllm")
    _, sample, _ = device_phases(shape, qlora, memory * GIB)
    assert note in sample.note
    assert ("weights" not in sample.parts) == resident_moves
    assert (sample.waiting > 0) == resident_moves
    assert sample.fits(memory * GIB)


def test_a_share_that_an_engine_cannot_have_does_not_fit():
    shape = llama().with_lora(16)
    qlora = setting(bits=4, wide_norms=False, sampler="vllm", utilization=0.99)
    _, sample, _ = device_phases(shape, qlora, 24 * GIB)
    assert not sample.fits(24 * GIB)
    small = replace(qlora, utilization=0.1)  # not even the weights in 4 bits
    assert not device_phases(shape, small, 24 * GIB)[1].fits(24 * GIB)


# ------------------------------------------------------------------ what to change


def case(shape, changed, gib):
    random = np.random.default_rng(0)
    pairs = Lengths(*(random.integers(20, 500, 1000) for _ in range(3)))
    return Case(shape, changed, pairs, gib * GIB)


def test_changes_are_those_that_are_needed_and_no_more():
    lora = llama().with_lora(16)
    wide = case(lora, setting(wide_norms=False, micro_batch=8, checkpointing=False), 48)
    assert not wide.fits
    changes = advise(wide)
    assert [one.keys for one in changes] == ["micro_batch_size: 2, gradient_accumulation_steps: 32"]
    assert changes[-1].case.fits
    # A 7B model in 24 GB is not fully trained, whatever the batch.
    (change,) = advise(case(llama(), setting(), 24))
    assert change.keys.startswith("adapter: qlora, load_in_4bit: true, lora_r: 16")
    assert change.case.fits
    assert advise(case(lora, setting(wide_norms=False), 2))[-1].case.fits is False


def test_a_shorter_sequence_names_what_it_drops():
    lora = llama().with_lora(16)
    full = setting(
        bits=4, wide_norms=False, micro_batch=1, longest=16_384, completion=16_000, sample=0,
        optimizer="paged_adamw_8bit", sequence_len=16_384,
    )  # fmt: skip
    base = case(lora, full, 10)
    assert not base.fits
    (change,) = advise(base)
    assert change.keys.startswith("sequence_len: ")
    length = int(change.keys.split()[-1])
    assert change.case.setting.longest == length
    assert len(change.case.pairs) == (base.pairs.longer <= length).sum()
    assert change.remark == f"drops {1000 - len(change.case.pairs)} longer pairs"


# ------------------------------------------------------------------ disk, and all together


def pairs() -> Pairs:
    random = np.random.default_rng(0)
    columns = {
        f"{name}_ids": [random.integers(0, 500, size).astype(np.int32) for size in sizes]
        for name, sizes in (("prompt", PROMPT), ("chosen", CHOSEN), ("rejected", REJECTED))
    }
    return Pairs.from_table(make_table(columns))


@pytest.mark.parametrize(
    ("saving", "keep", "policies", "checkpoints"),
    [
        # Adapters are all kept; one more checkpoint is there while a new one is written.
        (Saving(100, 5000, 200, 10, 3, 2, True), False, 3, 3),
        (Saving(100, 0, 200, 10, 9, 2, True), False, 3, 3),
        (Saving(100, 0, 200, 10, 3, 4, False), False, 2, 3),
        (Saving(100, 0, 200, 10, 3, 4, False), True, 2, 3),
        (Saving(100, 0, 0, 10, 0, 4, False), False, 2, 0),
    ],
)
def test_what_is_saved(saving, keep, policies, checkpoints):
    plan = counting(keep_policies=keep)
    found = disk_parts(plan.method, pairs(), list(plan.iterations()), saving)
    one = 110 + 2**13
    assert found["policies"] == policies * one
    assert found["trained model"] == one + saving.base
    assert found["checkpoints"] == checkpoints * (one + saving.optimizer + 2**17)
    assert found["tables"] > 0


def test_samples_of_a_first_iteration_take_space_too():
    """Where the labeler needs no earlier policy: a log-probability and a reward for each sample."""
    from_start = counting(
        iterations=1, labeler="spin", candidates=1, selection_ratio=0, bootstrap_ratio=1
    )
    (first,) = from_start.iterations()
    assert first.phases["score_candidates"].sequences == 4  # not the dataset's own answers
    saving = Saving(100, 0, 200, 10, 9, 2, True)
    tables = [
        disk_parts(from_start.method, pairs(), [one], saving)["tables"]
        for one in (first, next(counting(iterations=1).iterations()))
    ]
    assert tables[0] - tables[1] >= 4 * (2 * 8 + 8)


def make(memory: int | None, speed: Speed | None = None):
    saving = Saving(100, 0, 200, 10, 3, 2, True)
    shape, found = llama(), setting()
    return make_plan(
        Inputs(
            about={"plan": "config.yaml"},
            shape=shape,
            setting=found,
            counting=counting(held_out=lengths()),
            pairs=pairs(),
            saving=saving,
            device=Device("a GPU", memory),
            room=(GIB, 2**20),
            notes=["A note."],
            speed=speed,
            speed_from="A clock.",
        )
    )


def test_a_plan_in_words():
    text = show.text(make(24 * GIB))
    assert "Does not fit: " in text
    assert "adapter: qlora" in text
    assert "A note." in text
    assert "1.00 GiB are free here, which is too little" in text
    assert "floating-point operations. A clock." in text
    text = show.text(make(200 * GIB, Speed(1e9, 1e9, 1e9, 0.5, 0.0, 30.0)))
    assert "Fits: at most " in text
    assert "1 min 10 s" in text  # 80 tokens and the engine's start
    assert "There is no GPU here to compare with" in show.text(make(None))


def test_a_plan_for_machines_has_the_same():
    plan = make(24 * GIB, Speed(1e9, 1e9, 1e9, 0.5, 0.25, 30.0))
    found = json.loads(json_text(show.data(plan)))
    assert found["memory"]["fits"] is False
    assert found["memory"]["bytes"] == 24 * GIB
    assert [one["steps"] for one in found["iterations"]] == [2, 2, 2]
    second = found["iterations"][1]
    assert second["phases"]["sample"]["most_tokens"] == 4 * sum(counting().limits.tolist())
    assert second["seconds"]["sample"] == 0.5 * second["phases"]["sample"]["tokens"] + 30
    assert second["seconds"]["select"] == 1.0
    assert second["seconds"]["score_offline"] == second["phases"]["score_offline"]["flops"] / 1e9
    assert found["changes"][-1]["fits"] is True
    assert json.loads(json_text(show.data(make(None))))["memory"]["fits"] is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.25, "0.2 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (7261, "2 h 01 min")],
)
def test_durations(seconds, said):
    assert show.duration(seconds) == said


def test_the_tables_of_a_large_dataset_are_estimated_from_a_part():
    many = Pairs.from_table(
        pa.table({name: make_table({name: [[7] * 50]})[name].combine_chunks().take([0] * 8_000)
                  for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
    )  # fmt: skip
    plan = counting(iterations=1)
    few = Saving(0, 0, 0, 0, 0, 1, True)
    assert disk_parts(plan.method, many, list(plan.iterations()), few)["tables"] > 8_000
