"""A plan's arithmetic, by hand: counts, operations, states, what to change, how it is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sera_plugin.algorithm.method import Method, Pairs, Schedule
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model.budget import GIB
from sera_plugin.rundir.store import make_table
from sera_plugin.tools.planning import show
from sera_plugin.tools.planning.advice import Case, advise
from sera_plugin.tools.planning.counts import (
    Counting,
    Iteration,
    Lengths,
    Work,
    evaluations,
    padding,
)
from sera_plugin.tools.planning.disk import disk_parts
from sera_plugin.tools.planning.memory import device_phases, snapshots
from sera_plugin.tools.planning.model import Model
from sera_plugin.tools.planning.plan import Plan, Speed, phase_flops
from sera_plugin.tools.planning.run import Run, state_bytes
from sera_plugin.tools.report.output import json_text

PROMPT, CHOSEN, REJECTED = [3, 5, 2, 4], [6, 2, 4, 8], [1, 7, 4, 4]
LAYERS, WIDE, LORA = 6_979_321_856, 262_410_240, 41_943_040


def lengths() -> Lengths:
    return Lengths(*map(np.array, (PROMPT, CHOSEN, REJECTED)))


def counting(iterations=3, sampled=None, held_out=None, sequence_len=16, **sera) -> Counting:
    config = SeraConfig(max_new_tokens=10, **sera)
    method = Method(config, False, False, total=4, iterations=iterations)
    schedule = Schedule(method.sizes, 2, 1)
    return Counting(method, schedule, lengths(), held_out, sequence_len, 0.0, 1.0, sampled)


def mistral(lora=False, bits=None) -> Model:
    """Mistral-7B in 16 bits, with or without a LoRA of rank 16 on all its linear layers."""
    linear = round(4.127 / 8 * LAYERS) if bits else 2 * LAYERS
    return Model(
        kind="mistral",
        parameters=LAYERS + WIDE,
        adapter=LORA * lora,
        weights=linear + (2 if lora else 4) * WIDE,
        trained=((LORA, 4, False),) if lora else ((LAYERS, 2, False), (WIDE, 4, True)),
        copies=0,
        matrices=LAYERS + LORA * lora,
        kept=(7.4e6, 64.0) if lora else (8.2e6, 64.0),
        width=2,
        hidden_width=2 if lora else 4,
        layers=32,
        hidden=4096,
        intermediate=14_336,
        vocabulary=32_000,
        queries=4096,
        kv_heads=8,
        head=128,
        gated=True,
    )


#: A micro-batch of 2 pairs with AdamW, fully trained, or as QLoRA.
FULL = {
    "optimizer": "adamw_torch_fused",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "sequence_len": 1024,
}
QLORA = FULL | {"adapter": "qlora", "load_in_4bit": True, "optimizer": "paged_adamw_8bit"}
LORA_16 = FULL | {"adapter": "lora"}


def described(cfg) -> Model:
    return mistral(bool(cfg.get("adapter")), cfg.get("load_in_4bit"))


def run(gib, cfg, longest=640, sampler="transformers", **sera) -> Run:
    """1,000 pairs of up to so many tokens."""
    random = np.random.default_rng(0)
    prompt, chosen, rejected = (random.integers(20, longest // 2, 1000) for _ in range(3))
    plan = counting(sequence_len=cfg["sequence_len"], **sera)
    plan = replace(plan, pairs=Lengths(prompt, chosen, rejected))
    memory = None if gib is None else gib * GIB
    return Run(cfg, described(cfg), plan, sampler, memory, described)


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
    model = replace(mistral(), vocabulary=10, hidden=3, layers=2, queries=20, matrices=42)
    work = Work(sequences=1, tokens=6, most=6, forwarded=6.0, scored=4.0, squares=36.0)
    layers, head = 2 * 42 * 6 + 2 * 2 * 20 * 36, 2 * 10 * 3 * 4

    def flops(phase, model=model, **cfg):
        case = replace(run(None, FULL | cfg), model=model)
        return phase_flops(case, Iteration(1, 4, 0, 2, {phase: work}), phase)

    assert flops("score_offline") == layers + head
    assert flops("train", gradient_checkpointing=False) == 3 * (layers + head)
    assert flops("train") == 4 * layers + 3 * head
    # More logits than are kept: they are made again.
    many = flops("train", gradient_checkpointing=False, micro_batch_size=2**20)
    assert many == 3 * layers + 4 * head
    lora = replace(model, adapter=40, matrices=82)
    layers += 2 * 40 * 6
    assert flops("score_offline", lora) == layers + head
    plain = flops("train", lora, gradient_checkpointing=False)
    assert plain == 2 * (layers + head) + 2 * 40 * 6


# ------------------------------------------------------------------ memory


def test_what_stays_in_training_is_added_up():
    train = device_phases(run(80, FULL))[-1]
    assert train.parts["weights"] == train.parts["gradients"] == 2 * LAYERS + 4 * WIDE
    assert train.parts["optimizer"] == 2 * train.parts["weights"]
    train = device_phases(run(80, QLORA))[-1]
    assert train.parts["weights"] == mistral(True, 4).weights + 4 * LORA
    assert train.parts["gradients"] == 4 * LORA


def test_an_optimizer_that_copies_has_a_phase_of_its_own_on_a_gpu():
    plain = FULL | {"optimizer": "adamw_torch"}
    update = device_phases(run(80, plain))[-1]
    assert update.name == "update"
    assert update.parts["other"] == GIB + update.parts["gradients"]
    names = [phase.name for phase in device_phases(run(None, plain))]
    assert names == ["score", "sample", "train"]
    (change,) = advise(Case(run(62, plain)))
    assert change.keys == "optimizer: adamw_torch_fused"
    assert change.case.fits


def test_states_by_hand():
    weights = [(10_000, 2, False), (100, 4, False), (8_192, 4, True)]
    assert state_bytes("adamw_torch", weights) == 2 * (2 * 10_000 + 4 * 100 + 4 * 8_192)
    assert state_bytes("sgd", weights) == 0
    # Blocks of 256: 40 for the first; small ones and embeddings in float32.
    assert state_bytes("adamw_8bit", weights) == 2 * (10_000 + 160) + 8 * 100 + 8 * 8_192
    assert state_bytes("lion_8bit", weights[:1]) == 10_160
    assert state_bytes("something_new", weights) == 8 * (10_000 + 100 + 8_192)


def test_checkpointing_and_smaller_batches_keep_less():
    kept = {}
    for checkpointing in (True, False):
        for size in (1, 2):
            changes = {"micro_batch_size": size, "gradient_checkpointing": checkpointing}
            train = device_phases(run(None, FULL | changes, longest=80))[-1]
            kept[checkpointing, size] = train.parts["activations"]
    assert kept[True, 2] == pytest.approx(2 * kept[True, 1], rel=0.01)
    assert kept[False, 1] > 10 * kept[True, 1]


@pytest.mark.parametrize(
    ("gib", "moves", "note"),
    [(80, False, "beside"), (24, True, "wait in host memory"), (15, True, "4 bits")],
)
def test_an_engine_gets_what_make_room_would_give_it(gib, moves, note):
    _, sample, _ = device_phases(run(gib, QLORA, sampler="vllm"))
    assert note in sample.note
    assert ("weights" not in sample.parts) == moves
    assert (sample.waiting > 0) == moves
    assert sample.fits(gib * GIB)


# 0.1 does not even hold the weights in 4 bits.
@pytest.mark.parametrize("share", [0.99, 0.1])
def test_a_share_that_an_engine_cannot_have_does_not_fit(share):
    cfg = QLORA | {"vllm": {"gpu_memory_utilization": share}}
    _, sample, _ = device_phases(run(24, cfg, sampler="vllm"))
    assert not sample.fits(24 * GIB)


# ------------------------------------------------------------------ what to change


@pytest.mark.parametrize(
    ("gib", "cfg", "keys"),
    [
        (
            48,
            LORA_16 | {"micro_batch_size": 8, "gradient_checkpointing": False},
            ["micro_batch_size: 2, gradient_accumulation_steps: 32"],
        ),
        (
            24,
            FULL,
            [
                "adapter: qlora, load_in_4bit: true, lora_r: 16, lora_alpha: 32, "
                "lora_target_linear: true"
            ],
        ),
        (12, LORA_16, ["adapter: qlora, load_in_4bit: true"]),
    ],
)
def test_changes_are_those_that_are_needed_and_no_more(gib, cfg, keys):
    case = Case(run(gib, cfg))
    assert not case.fits
    changes = advise(case)
    assert [one.keys for one in changes] == keys
    assert changes[-1].case.fits


def test_an_engine_that_has_no_room_gives_way():
    (change,) = advise(Case(run(8, QLORA, sampler="vllm", longest=100)))
    assert change.keys == "sera.sampler: transformers"
    share = QLORA | {"vllm": {"gpu_memory_utilization": 0.99}}
    (change,) = advise(Case(run(24, share, sampler="vllm")))
    assert change.keys == "vllm.gpu_memory_utilization: (remove)"


def test_what_nothing_helps_is_said_not_to_fit():
    assert advise(Case(run(2, LORA_16)))[-1].case.fits is False


def test_a_shorter_sequence_names_what_it_drops():
    cfg = QLORA | {"micro_batch_size": 1, "sequence_len": 16_384}
    before = run(10, cfg, longest=16_384, bootstrap_ratio=0)
    (change,) = advise(Case(before))
    length = int(change.keys.removeprefix("sequence_len: "))
    kept = (before.counting.pairs.longer <= length).sum()
    assert change.case.run.longest <= length
    assert change.remark == f"drops {1000 - kept} longer pairs"


# ------------------------------------------------------------------ disk, and all together


def pairs(times=1) -> Pairs:
    random = np.random.default_rng(0)
    columns = {
        f"{name}_ids": [random.integers(0, 500, size).astype(np.int32) for size in sizes] * times
        for name, sizes in (("prompt", PROMPT), ("chosen", CHOSEN), ("rejected", REJECTED))
    }
    return Pairs.from_table(make_table(columns))


@pytest.mark.parametrize(
    ("lora", "saving", "keep", "policies", "checkpoints"),
    [
        # Adapters are all kept; one more checkpoint is there while a new one is written.
        (True, {"save_total_limit": 2}, False, 3, 3),
        (True, {"save_total_limit": 2, "save_steps": 1}, False, 3, 3),
        (False, {}, False, 2, 3),
        (False, {}, True, 2, 3),
        (False, {"save_only_model": True, "save_strategy": "no"}, False, 2, 0),
    ],
)
def test_what_is_saved(lora, saving, keep, policies, checkpoints):
    cfg = (LORA_16 if lora else FULL) | saving
    case = replace(run(None, cfg), counting=counting(keep_policies=keep))
    found = disk_parts(case, pairs(), tokenizer=10)
    one = case.model.trained_bytes + 10 + 2**13
    assert found["policies"] == policies * one
    assert found["trained model"] == one + (case.model.weights if lora else 0)
    assert found["checkpoints"] == checkpoints * (one + case.states + 2**17)
    assert found["tables"] > 0


def test_a_checkpoint_without_its_optimizer():
    case = replace(run(None, FULL | {"save_only_model": True}), counting=counting())
    one = case.model.trained_bytes + 2**13
    assert disk_parts(case, pairs(), 0)["checkpoints"] == 3 * (one + 2**17)


def tables(plan: Counting, data: Pairs) -> int:
    return disk_parts(replace(run(None, FULL), counting=plan), data, 0)["tables"]


def test_samples_of_a_first_iteration_take_space_too():
    """Where the labeler needs no earlier policy: a log-probability and a reward for each sample."""
    from_start = counting(
        iterations=1, labeler="spin", candidates=1, selection_ratio=0, bootstrap_ratio=1
    )
    (first,) = from_start.iterations()
    assert first.phases["score_candidates"].sequences == 4  # not the dataset's own answers
    added = tables(from_start, pairs()) - tables(counting(iterations=1), pairs())
    assert added >= 4 * (2 * 8 + 8)


def test_the_tables_of_a_large_dataset_are_estimated_from_a_part():
    few, many = tables(counting(1), pairs(1_250)), tables(counting(1), pairs(2_500))
    assert many - few > 5_000 * 22  # as many figures and tokens again


def make(gib: int | None, speed: Speed | None = None) -> Plan:
    return Plan(
        about={"plan": "config.yaml"},
        run=replace(run(gib, FULL), counting=counting(held_out=lengths())),
        pairs=pairs(),
        tokenizer=10,
        device="a GPU",
        room=(GIB, 2**20),
        notes=["A note."],
        speed=speed,
        speed_from="A clock.",
    )


def test_a_plan_in_words():
    text = show.text(make(24))
    assert "Does not fit: " in text
    assert " GiB in `train`, of 24.00 GiB (a GPU). Phases that do not: " in text
    assert "adapter: qlora" in text
    assert "A note." in text
    assert "1.00 GiB are free here, which is too little" in text
    assert "floating-point operations. A clock." in text
    text = show.text(make(200, Speed(1e9, 1e9, 1e9, 0.5, 0.0, 30.0)))
    assert " GiB of 200.00 GiB (a GPU), in `train`." in text
    assert "1 min 10 s" in text  # 80 tokens and the engine's start
    assert "There is no GPU here to compare with" in show.text(make(None))


def test_a_plan_for_machines_has_the_same():
    found = json.loads(json_text(show.data(make(24, Speed(1e9, 1e9, 1e9, 0.5, 0.25, 30.0)))))
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
