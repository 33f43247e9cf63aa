"""A plan's arithmetic, by hand: counts, operations, states, what to change, how it is shown."""

from dataclasses import replace

import numpy as np
import pytest
from axolotl.utils.dict import DictDefault

from sera_plugin.algorithm.method import Method
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model.budget import GIB
from sera_plugin.model.memory import state_bytes
from sera_plugin.rundir.store import make_table
from sera_plugin.tools.planning import counts, show
from sera_plugin.tools.planning.counts import Work, disk_parts, flops, iterations, lengths
from sera_plugin.tools.planning.model import Model
from sera_plugin.tools.planning.run import Run
from sera_plugin.tools.planning.show import advise

PROMPT, CHOSEN, REJECTED = map(np.array, ([3, 5, 2, 4], [6, 2, 4, 8], [1, 7, 4, 4]))
FOUR = lengths(PROMPT, CHOSEN, REJECTED)
LAYERS, WIDE, LORA = 6_979_321_856, 262_410_240, 41_943_040


def mistral(cfg) -> Model:
    """Mistral-7B in 16 bits, with or without a LoRA of rank 16 on all its linear layers."""
    lora = bool(cfg.get("adapter"))
    linear = round(4.127 / 8 * LAYERS) if cfg.get("load_in_4bit") else 2 * LAYERS
    return Model(
        parameters=LAYERS + WIDE,
        adapter=LORA * lora,
        weights=linear + (2 if lora else 4) * WIDE,
        outer=(2 if lora else 4) * WIDE,
        trained=((LORA, 4, False),) if lora else ((LAYERS, 2, False), (WIDE, 4, True)),
        matrices=LAYERS + LORA * lora,
        kept=(7.4e6, 64.0) if lora else (8.2e6, 64.0),
        hidden_width=2 if lora else 4,
        cache=2 * 32 * 8 * 128,
        copies=0, width=2, layers=32, hidden=4096, intermediate=14_336, vocabulary=32_000,
        queries=4096, whole=0, gated=True,
    )  # fmt: skip


#: A micro-batch of 2 pairs with AdamW, fully trained, or as QLoRA.
FULL = {
    "optimizer": "adamw_torch_fused", "gradient_checkpointing": True, "sequence_len": 1024,
    "micro_batch_size": 2, "gradient_accumulation_steps": 8,
}  # fmt: skip
QLORA = FULL | {"adapter": "qlora", "load_in_4bit": True, "optimizer": "paged_adamw_8bit"}
LORA_16 = FULL | {"adapter": "lora"}
FOREACH = FULL | {"optimizer": "adamw_torch"}


def few(cfg=FULL, epochs=3, held_out=FOUR[:0], gib=None, sequence_len=16, **sera) -> Run:
    """Four pairs; a step is a batch of two."""
    cfg = DictDefault({**cfg, "gradient_accumulation_steps": 1, "sequence_len": sequence_len})
    method = Method(SeraConfig(max_new_tokens=10, **sera), False, False, 4, iterations=epochs)
    gpu = None if gib is None else gib * GIB
    return Run(cfg, mistral(cfg), method, FOUR, held_out, "transformers", gpu, mistral)


def run(gib, cfg, longest=640, sampler="transformers", **sera) -> Run:
    """1,000 pairs of up to so many tokens."""
    random = np.random.default_rng(0)
    pairs = lengths(*(random.integers(20, longest // 2, 1000) for _ in range(3)))
    return replace(
        few(gib=gib, **sera), cfg=DictDefault(cfg), model=mistral(cfg), pairs=pairs, sampler=sampler
    )


def test_what_is_known_is_counted_exactly():
    first, second, third = iterations(few(held_out=FOUR, gamma=0.3, keep="last"))
    # 2 (3 + 5 + 2 + 4) + (6 + 2 + 4 + 8) + (1 + 7 + 4 + 4) = 28 + 20 + 16
    for one in (first, second, third):
        offline = one.phases["score_offline"]
        assert (offline.sequences, offline.tokens, offline.most) == (8, 64, 64)
        assert one.phases["score_evaluation"] == offline
        assert (offline.forwarded, offline.scored) == (64 - 14, 36)
    assert first.phases["train"].tokens == first.phases["train"].most == 64
    assert (first.pairs, first.steps) == (4, 2)
    assert "sample" not in first.phases
    # k = round(2.8) = 3, k~ = round(1.2) = 1.
    assert (second.kept, second.bootstrapped, second.steps) == (3, 1, 2)
    # Two policies in iteration 2's reward, three with gamma.
    assert second.phases["score_candidates"].sequences == 2 * 16
    assert third.phases["score_candidates"].sequences == 3 * 16
    assert third.phases["sample"].sequences == 16
    # `keep: best` compares theta_3 too, which no reward needs.
    end = iterations(few(held_out=FOUR, gamma=0.3))[-1].phases
    assert end["score_evaluation"] == offline.times(2)
    assert end == third.phases | {"score_evaluation": offline.times(2)}
    assert "score_evaluation" not in iterations(few())[-1].phases


def test_samples_are_bounded_and_expected_at_a_length():
    plan = few(epochs=2, sequence_len=11)
    assert plan.limits.tolist() == [8, 6, 9, 7]  # 11 less the prompt, at most 10
    assert plan.expected.tolist() == [5, 5, 5, 5]  # as long as chosen answers, on average
    assert replace(plan, sampled=7.0).expected.tolist() == [7, 6, 7, 7]
    phases = iterations(plan)[1].phases
    assert (phases["sample"].tokens, phases["sample"].most) == (4 * 20, 4 * 30)
    candidates = phases["score_candidates"]
    assert candidates[1:3] == (2 * (4 * 14 + 4 * 20), 2 * (4 * 14 + 4 * 30))
    assert candidates.forwarded == 2 * (14 + 4 * 20)
    # Trained are the three longest pairs at most, and a prompt with a sample of 11 tokens twice.
    both = 2 * PROMPT + CHOSEN + REJECTED
    assert phases["train"].most == sum(sorted(both)[-3:]) + 22
    assert phases["train"].tokens == round(3 / 4 * 64 + 2 * (14 / 4 + 5))


def test_padding_is_that_of_batches():
    pairs = lengths(np.array([2, 2]), np.array([4, 1]), np.array([2, 1]))
    one = replace(few(), pairs=pairs)
    # One batch: four lines as long as the longest, 6; without padding 6 + 4 + 3 + 3.
    assert counts.padding(one) == pytest.approx(24 / 16)
    assert counts.padding(one.changed({"pad_to_multiple_of": 8})) == pytest.approx(32 / 16)
    assert counts.padding(one.changed({"micro_batch_size": 1})) == pytest.approx((12 + 6) / 16)


@pytest.mark.parametrize(
    ("strategy", "every", "expected"),
    [("no", None, 0), ("epoch", None, 1), ("steps", 1 / 3, 1), ("steps", 3, 2 / 3)],
)
def test_how_often_the_host_evaluates(strategy, every, expected):
    plan = few(FULL | {"eval_strategy": strategy, "eval_steps": every}, held_out=FOUR)
    assert counts.evaluations(plan) == pytest.approx(expected)  # 6 steps in 3 iterations
    assert ("evaluate" in iterations(plan)[0].phases) == (expected > 0)
    for plan in (few(epochs=1), few(bootstrap_ratio=0)):  # nothing is held out or sampled
        assert all(set(one.phases) == {"score_offline", "train"} for one in iterations(plan))


@pytest.mark.parametrize(
    ("epochs", "gamma", "loss", "expected"),
    [(1, 0.3, "dpo", 1), (2, 0.3, "dpo", 2), (3, 0.3, "dpo", 3), (9, 0.3, "dpo", 3),
     (3, 0.0, "dpo", 2), (9, 0.0, "dpo", 2), (3, 0.3, "simpo", 2)],
)  # fmt: skip
def test_policies_that_are_in_memory_at_once(epochs, gamma, loss, expected):
    plan = few(epochs=epochs, gamma=gamma, loss=loss)
    plan = replace(plan, method=replace(plan.method, reference_free=loss == "simpo"))
    assert plan.host_parts()["policies"] == expected * plan.model.trained_bytes


def test_operations_by_hand():
    model = replace(mistral({}), vocabulary=10, hidden=3, layers=2, queries=20, matrices=42)
    work = Work(sequences=1, tokens=6, most=6, forwarded=6.0, scored=4.0, squares=36.0)
    layers, head = 2 * 42 * 6 + 2 * 2 * 20 * 36, 2 * 10 * 3 * 4

    def count(phase, model=model, **cfg):
        return flops(replace(run(None, FULL | cfg), model=model), phase, work)

    assert count("score_offline") == layers + head
    assert count("train", gradient_checkpointing=False) == 3 * (layers + head)
    assert count("train") == 4 * layers + 3 * head
    # More logits than are kept: they are made again.
    many = count("train", gradient_checkpointing=False, micro_batch_size=2**20)
    assert many == 3 * layers + 4 * head
    lora = replace(model, adapter=40, matrices=82)
    layers += 2 * 40 * 6
    assert count("score_offline", lora) == layers + head
    assert count("train", lora, gradient_checkpointing=False) == 2 * (layers + head) + 2 * 40 * 6


def test_what_stays_in_training_is_added_up_and_copies_have_a_phase_of_their_own():
    train = run(80, FULL).phases[-1].parts
    assert train["weights"] == train["gradients"] == 2 * LAYERS + 4 * WIDE
    assert train["optimizer"] == 2 * train["weights"]
    train = run(80, QLORA).phases[-1].parts
    assert train["gradients"] == train["weights"] - mistral(QLORA).weights == 4 * LORA
    *_, update = run(80, FOREACH).phases
    assert update.name == "update"
    assert update.parts["other"] == GIB + update.parts["gradients"]
    assert [phase.name for phase in run(None, FOREACH).phases] == ["score", "sample", "train"]


def test_batches_that_are_sampled_fill_the_card_by_hand():
    """Mistral-7B as QLoRA on 24 GiB, prompts of 256 tokens and 384 sampled ones.

    The run keeps 3.60e9 bytes of layers in 4 bits, 0.52e9 of embeddings and output layer, 0.17e9
    each of adapter and gradients, 0.09e9 of 8-bit states: 4.55e9. A token in the cache takes
    131,072 bytes, 2,048 as one layer's keys are copied, 16,384 as they are repeated: 149,504.
    7/8 of 24 GiB less 1 GiB and that are 117,000 of them; with four binary digits 114,688. A
    sequence has 640, and 48 * 32,000 bytes of logits are 11 more: 176 sequences, 44 prompts.
    A prompt's token takes 131,072 + 102,400 bytes while prompts are computed: 1.56 tokens.
    """
    batches = run(24, QLORA).batches
    assert batches.tokens == 114_688
    assert batches.size(256, 384) == 640 + 11
    assert 114_688 // batches.size(256, 384) == 176
    assert batches.size(900, 100) == pytest.approx(1.5617 * 900 + 11, abs=1)


@pytest.mark.parametrize(("gib", "tokens"), [(4, 1024), (6, 4_608), (80, 2**18), (None, 16_384)])
def test_a_batch_has_the_longest_sequence_at_least_and_is_not_without_end(gib, tokens):
    assert run(gib, QLORA).batches.tokens == tokens


def test_states_of_optimizers_that_are_not_made_in_test_plan_model():
    weights = [(10_000, 2, False), (8_192, 4, True)]
    assert state_bytes("sgd", weights) == 0
    assert state_bytes("something_new", weights) == 8 * (10_000 + 8_192)
    # Embeddings, and blocks of 256: 40 of them.
    assert state_bytes("lion_8bit", weights) == 10_000 + 4 * 40 + 4 * 8_192


def test_checkpointing_smaller_batches_and_offloading_keep_less():
    def kept(**cfg):
        return run(None, FULL | cfg, longest=80).phases[-1].parts["activations"]

    assert kept() == pytest.approx(2 * kept(micro_batch_size=1), rel=0.01)
    assert kept(gradient_checkpointing=False) > 10 * kept()
    assert kept(activation_offloading=True) < kept()
    away = run(None, LORA_16 | {"activation_offloading": True}).host_parts()
    assert away["offloaded activations"] > 0


@pytest.mark.parametrize(
    ("gib", "moves", "note"),
    [(80, False, "beside"), (24, True, "wait in host memory"), (15, True, "4 bits")],
)
def test_an_engine_gets_what_make_room_would_give_it(gib, moves, note):
    plan = run(gib, QLORA, sampler="vllm")
    sample = plan.phases[1]
    assert note in sample.note
    assert ("weights" not in sample.parts) == moves
    assert (plan.host_parts().get("waiting for the GPU", 0) > 0) == moves
    assert "sample" not in plan.failing


@pytest.mark.parametrize(("gib", "moves"), [(80, False), (24, True)])
def test_a_reward_model_that_ranks_has_a_phase_of_its_own(gib, moves, tmp_path):
    """One of 18 GiB on the disk; a pass takes an eighth of the memory, in tokens of a MiB each, a
    power of two of them: 2 GiB, or 8."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(18 * GIB)
    plan = run(gib, QLORA, labeler="reward_model", reward_model=str(tmp_path))
    (rank,) = (phase for phase in plan.phases if phase.name == "rank")
    assert rank.parts["judge"] == 18 * GIB
    assert rank.parts["activations"] == (2 if moves else 8) * GIB
    assert ("weights" not in rank.parts) == moves
    assert (plan.host_parts().get("waiting for the GPU", 0) > 0) == moves
    assert "rank" not in plan.failing


#: 0.1 does not even hold the weights in 4 bits, and 0.99 is more than is free.
SHARES = [QLORA | {"vllm": {"gpu_memory_utilization": share}} for share in (0.99, 0.1)]
VLLM = {"sampler": "vllm"}
MANY = LORA_16 | {"micro_batch_size": 8, "gradient_checkpointing": False}
ALL = "adapter: qlora, load_in_4bit: true, lora_r: 16, lora_alpha: 32, lora_target_linear: true"


@pytest.mark.parametrize(
    ("gib", "cfg", "options", "keys"),
    [
        (48, MANY, {}, "micro_batch_size: 2, gradient_accumulation_steps: 32"),
        (24, FULL, {}, ALL),
        (12, LORA_16, {}, "adapter: qlora, load_in_4bit: true"),
        (62, FOREACH, {}, "optimizer: adamw_torch_fused"),
        (8, QLORA, VLLM | {"longest": 100}, "sera.sampler: transformers"),
        (24, SHARES[0], VLLM, "vllm.gpu_memory_utilization: (remove)"),
        (24, SHARES[1], VLLM, "vllm.gpu_memory_utilization: (remove)"),
    ],
)
def test_changes_are_those_that_are_needed_and_no_more(gib, cfg, options, keys):
    before = run(gib, cfg, **options)
    assert before.failing
    (change,) = advise(before)
    assert change.keys == keys
    assert not change.run.failing
    assert advise(change.run) == []


def test_a_shorter_sequence_names_what_it_drops():
    cfg = QLORA | {"micro_batch_size": 1, "sequence_len": 16_384}
    before = run(10, cfg, longest=16_384, bootstrap_ratio=0)
    (change,) = advise(before)
    length = int(change.keys.removeprefix("sequence_len: "))
    assert change.run.longest <= length
    kept = int((before.pairs.longer <= length).sum())
    assert len(change.run.pairs) == kept
    assert change.remark == f"drops {1000 - kept} longer pairs"
    assert advise(run(2, LORA_16))[-1].run.failing  # nothing helps


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
        (False, {}, True, 2, 3),
        (False, {"save_only_model": True}, False, 2, 3),
        (False, {"save_strategy": "no"}, False, 2, 0),
    ],
)
def test_what_is_saved(lora, saving, keep, policies, checkpoints):
    plan = few((LORA_16 if lora else FULL) | saving, keep_policies=keep)
    found = disk_parts(plan, pairs(), tokenizer=10)
    one, states = plan.model.trained_bytes + 10 + 2**13, plan.states
    states *= "save_only_model" not in saving
    assert found["policies"] == policies * one
    assert found["trained model"] == one
    assert found["checkpoints"] == checkpoints * (one + states + 2**17)
    assert found["tables"] > 0


def test_tables_have_samples_of_a_first_iteration_too_and_are_estimated_from_a_part():
    """Where the labeler needs no earlier policy: a log-probability and a reward for each sample."""
    spin = few(epochs=1, labeler="spin", candidates=1, selection_ratio=0, bootstrap_ratio=1)
    candidates = iterations(spin)[0].phases["score_candidates"]
    assert candidates.sequences == 4  # not the dataset's own answers

    def tables(plan, times=1):
        return disk_parts(plan, pairs(times), 0)["tables"]

    plain = few(epochs=1)
    assert tables(spin) - tables(plain) >= 4 * (2 * 8 + 8)
    assert tables(plain, 2_500) - tables(plain, 1_250) > 5_000 * 22  # as many figures and tokens


def make(gib: int | None, speed: counts.Speed | None = None) -> dict:
    plan = replace(run(gib, FULL), pairs=FOUR, held_out=FOUR)
    plan = plan.changed({"gradient_accumulation_steps": 1, "sequence_len": 16})
    about, disk = {"plan": "config.yaml"}, disk_parts(plan, pairs(), 10)
    said = {"speed_from": "A clock.", "notes": ["A note."]}
    return show.figures(plan, speed, about, "a GPU", (GIB, 2**20), disk, **said)


def test_a_plan_for_machines_and_in_words():
    found = make(24, counts.Speed(1e9, 1e9, 1e9, 0.5, 0.25, 30.0))
    assert (found["memory"]["fits"], found["memory"]["bytes"]) == (False, 24 * GIB)
    assert [one["steps"] for one in found["iterations"]] == [2, 2, 2]
    second = found["iterations"][1]
    phases, seconds = second["phases"], second["seconds"]
    assert phases["sample"]["most_tokens"] == 4 * sum(few().limits.tolist())
    assert seconds["sample"] == 0.5 * phases["sample"]["tokens"] + 30
    assert seconds["select"] == 1.0
    assert seconds["score_offline"] == phases["score_offline"]["flops"] / 1e9
    assert found["changes"][-1]["fits"] is True
    assert make(None)["memory"]["fits"] is None
    text = show.text(found, ["sample: a remark"])
    for part in (
        " GiB in `train`, of 24.00 GiB (a GPU). Phases that do not: ", "\nsample: a remark\n",
        "\n  adapter: qlora", "1 min 10 s",  # 80 tokens and the engine's start
        "1.00 GiB are free here, which is too little", " floating-point operations. A clock.",
    ):  # fmt: skip
        assert part in text
    assert text.endswith("A note.")
    assert " GiB of 200.00 GiB (a GPU), in `sample`." in show.text(make(200), [])
    without = show.text(make(None), [])
    assert "Memory is not estimated for a CPU" in without
    assert not [part for part in ("activations", "host memory") if part in without]
    durations = {0.25: "0.2 s", 59.94: "59.9 s", 61: "1 min 01 s", 7261: "2 h 01 min"}
    assert list(map(show.duration, durations)) == list(durations.values())


def zero(stage, **keys) -> dict:
    """FULL under DeepSpeed, in bf16."""
    return FULL | {"deepspeed": {"zero_optimization": {"stage": stage, **keys}}, "bf16": True}


CPU = {"device": "cpu"}
#: Weights of Mistral-7B in 16 bits, its tables in float32; its weights in float32; AdamW's state.
STORED, MASTERS, ADAMW = 2 * LAYERS + 4 * WIDE, 4 * (LAYERS + WIDE), 4 * LAYERS + 8 * WIDE
#: A layer of 32 at work and the next one; under FSDP2 beside the tables.
TWO = 2 * 2 * LAYERS // 32
TABLES = 4 * WIDE
ROOT = TWO + TABLES


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (FULL, (STORED, ADAMW, STORED)),  # DDP: each has all of it
        (zero(1), (STORED, 3 * MASTERS // 8, STORED)),
        (zero(2), (STORED, 3 * MASTERS // 8, STORED // 8)),
        (zero(3), (STORED // 8 + TABLES, 3 * MASTERS // 8, STORED // 8)),
        (zero(2, offload_optimizer=CPU), (STORED, 0, STORED // 8)),
        (zero(3, offload_optimizer=CPU, offload_param=CPU), (TABLES, 0, STORED // 8)),
        (FULL | {"fsdp_config": {"a": 1}}, (STORED // 8 + ROOT, ADAMW // 8, STORED // 8)),
        (FULL | {"fsdp_config": {"offload_params": True}}, (ROOT, 0, STORED // 8)),
    ],
    ids=["ddp", "zero-1", "zero-2", "zero-3", "offload", "all offloaded", "fsdp", "fsdp offloaded"],
)
def test_processes_share_out_what_they_hold(cfg, expected):
    run = replace(few(cfg, gib=80), processes=8)
    train = next(phase.parts for phase in run.phases if phase.name == "train")
    found = [train[name] for name in ("weights", "optimizer", "gradients")]
    assert found == pytest.approx(expected, abs=1)  # rounded up
    # Eight processes of one machine: what each keeps in its memory.
    moved = run.placement.host_parts(run.model, run.states)
    # Under DeepSpeed the masters and both of AdamW's states in float32.
    optimizer = 3 * MASTERS if "deepspeed" in cfg else ADAMW
    optimizer *= expected[1] == 0
    assert moved.get("offloaded optimizer", 0) == pytest.approx(optimizer, abs=8)
    assert moved.get("offloaded weights", 0) == STORED * (expected[0] in (TABLES, ROOT))


def test_what_is_whole_only_while_it_is_loaded():
    cfg = FULL | {"fsdp_config": {"a": 1}}
    loading = {"models while they are loaded": 8 * STORED}
    assert replace(few(cfg, gib=80), processes=8).host_parts() == loading
    cfg["fsdp_config"] = {"cpu_ram_efficient_loading": True}
    assert loading.keys().isdisjoint(replace(few(cfg, gib=80), processes=8).host_parts())
    # Loaded whole on each GPU, and shared out by DeepSpeed from then on.
    four_bits = replace(few(QLORA | {"deepspeed": zero(3)["deepspeed"]}, gib=80), processes=8)
    load, *others = four_bits.phases
    assert (load.name, load.parts["weights"]) == ("load", four_bits.model.resident)
    assert all(phase.parts["weights"] < load.parts["weights"] / 2 for phase in others)


def test_nothing_is_advised_that_is_refused_with_sharded_weights():
    cfg = FULL | {"fsdp_config": {"reshard_after_forward": True}}
    changes = advise(replace(few(cfg, gib=16), processes=2))
    assert [one.keys for one in changes] == ["fsdp_config.offload_params: true"]


def test_processes_train_their_batches_together():
    # Four pairs, two in a batch: two steps; of two processes one.
    assert few().schedule.total_steps == 2 * replace(few(), processes=2).schedule.total_steps == 6
