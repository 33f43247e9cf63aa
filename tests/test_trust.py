"""What becomes of an iteration whose reward is not to be trusted, and which samples it ranks."""

import json
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset

from sera_plugin.algorithm.alarms import judge
from sera_plugin.algorithm.algorithm import prepare, select_rows
from sera_plugin.algorithm.fit import OUTRANKING, Reward
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.algorithm.summary import summarize
from sera_plugin.algorithm.trust import follows
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.rows import PROBLEM
from sera_plugin.host.datasets import hold_out
from sera_plugin.host.run import describe_start
from sera_plugin.labeling.labelers import ImplicitReward
from sera_plugin.rundir.store import make_table
from tests.three_pairs import CONFIG, PAIRS, Run, firsts

#: Iteration 2's samples have gained (2 - 1 + 0 + 1 + 6 + 0) / 2 tokens / 6 = 0.667 nats a token,
#: the chosen answers 1 / 2, -1 / 4 and 2 / 2, the rejected ones -2 / 2, 0 and 1 / 4.
GAP = (2 / 3 - 1.25 / 3) / np.std([1 / 2, -1 / 4, 2 / 2, -2 / 2, 0, 1 / 4])
EVERY = [(1, 11, 12), (2, 21, 22), (3, 31, 32)]


def changed(**keys) -> SeraConfig:
    return SeraConfig(**CONFIG.model_dump(exclude_unset=True) | keys)


@pytest.fixture
def strict(monkeypatch):
    """The three pairs' samples outrank their chosen answers, but not by a whole deviation."""
    assert GAP < OUTRANKING
    monkeypatch.setattr("sera_plugin.algorithm.trust.OUTRANKING", GAP - 0.01)


def test_samples_that_outrank_the_data_are_not_taken(tmp_path, strict):
    run = Run(tmp_path, changed(trust="act"))
    assert firsts(run.upto(2)) == EVERY
    assert run.offline(2)["selected"] == [True] * 3
    assert run.table(2, "bootstrapped")["selected"] == [False] * 3
    found = summarize(run.iteration(2))
    assert found["outranking"] == pytest.approx(GAP)
    assert found["reward"]["followed"] is False
    assert found["pairs"]["bootstrapped_kept"] == 0
    assert found["pairs"]["trained"] == 3


def test_a_run_killed_before_all_pairs_are_kept_keeps_them_when_it_goes_on(tmp_path, strict):
    run = Run(tmp_path, changed(trust="act"))
    run.upto(2)
    offline = run.store.read(2, "offline")
    run.store.write(2, "offline", select_rows(offline, False))
    assert firsts(run.prepare(2)) == EVERY
    assert run.offline(2)["selected"] == [True] * 3


def test_a_warning_changes_nothing(tmp_path):
    plain, warned = Run(tmp_path / "1"), Run(tmp_path / "2", changed(trust="warn", reward="paper"))
    assert plain.upto(3) == warned.upto(3)
    assert follows(warned.iteration(2))
    acting = Run(tmp_path / "3", changed(trust="act"))
    assert plain.prepare(2) == acting.upto(2)  # where nothing is wrong


SPIN = {"labeler": "spin", "bootstrap_ratio": 1.0}
SPUN = [(1, 11, 14), (2, 21, 24), (3, 31, 34)]
LIKE_A_COIN = "the reward is not followed: "


@pytest.mark.parametrize(
    ("keys", "expected", "said"),
    [
        # The labeler ranks the samples, and no margin an offline pair.
        (SPIN | {"selection_ratio": 0.0}, SPUN, ""),
        (SPIN, EVERY + SPUN, LIKE_A_COIN + "all offline pairs are kept\n"),
        # The rest of D_t would be empty.
        ({"selection": "random", "selection_ratio": 0.0}, EVERY,
         LIKE_A_COIN + "all offline pairs are kept, no samples taken\n"),
        ({"selection": "reference_logp"}, [EVERY[0], EVERY[2]], LIKE_A_COIN + "no samples taken\n"),
    ],
)  # fmt: skip
def test_what_a_coin_has_not_ranked_stays_as_it_is(tmp_path, keys, expected, said):
    run = Run(tmp_path, changed(trust="act", **keys))
    for t in (1, 2):
        it = replace(run.iteration(t), held_out=Pairs.from_table(make_table(PAIRS)))
        trained = firsts(prepare(it).to_pydict())
    assert trained == expected
    found = summarize(it)
    assert found["reward"].get("followed") is (False if said else None)
    told = describe_start(found, "nats")
    assert said in told
    assert (LIKE_A_COIN in told) is bool(said)


@pytest.mark.parametrize("trust", ["act", "warn"])
def test_a_reward_that_ranks_like_a_coin_samples_nothing(tmp_path, trust):
    """Of the three pairs, here held out as well, theta_1 - theta_0 ranks two as labelled."""
    run = Run(tmp_path, changed(trust=trust))
    held_out = Pairs.from_table(make_table(PAIRS))
    for t in (1, 2):
        it = replace(run.iteration(t), held_out=held_out)
        trained = firsts(prepare(it).to_pydict())
    found = summarize(it)
    assert found["reward"]["accuracy"] == found["reward"]["paper_accuracy"] == 2 / 3
    assert found["reward"]["followed"] is (trust == "warn")
    if trust == "act":
        assert trained == EVERY
        assert run.sampler.calls == 0
        assert found["pairs"]["bootstrapped_wanted"] == 0
    else:
        assert len(trained) == 4
        assert run.sampler.calls == 1


MIXED = {"labeler": ["implicit", "function"], "function": "a.py:f", "reward": "fitted"}
SAMPLED = [(1, 13, 14), (3, 33, 34)]
ALL_KEPT = "the reward without scores is not followed: all offline pairs are kept\n"
NOT_TAKEN = "the reward with scores is not followed: no samples taken\n"


class Scored(ImplicitReward):
    """Ranks as the implicit reward does, and says how well on held-out pairs."""

    by_chance = 0.01

    def rewards(self, ranked):
        found = {"weights": {}, "pairs": 3, "accuracy": 0.5, "by_chance": self.by_chance}
        self.report["reward"] = found
        self.report["judges"] = {}
        return super().rewards(ranked)


@pytest.mark.parametrize(
    ("alone", "mixed", "keys", "followed", "said"),
    [
        (0.01, 0.01, {}, (True, True), ""),
        (0.01, 0.5, {}, (True, False), NOT_TAKEN),
        (0.5, 0.01, {}, (False, True), ALL_KEPT),
        (0.5, 0.5, {}, (False, False),
         "the reward is not followed: all offline pairs are kept, no samples taken\n"),
        # The reward without scores ranks nothing.
        (0.5, 0.01, {"selection": "random"}, (None, True), ""),
        (0.5, 0.01, {"selection_ratio": 0.0}, (None, True), ""),
        # Without samples nothing would be left.
        (0.01, 0.5, {"selection_ratio": 0.0}, (None, False),
         "the reward with scores is not followed: all offline pairs are kept, no samples taken\n"),
    ],
)  # fmt: skip
def test_each_of_two_rewards_is_followed_by_itself(
    tmp_path, monkeypatch, alone, mixed, keys, followed, said
):
    """What scores are mixed to ranks the samples, and the reward without them the offline pairs."""
    judged = Reward((1.0, -1.0), pairs=3, accuracy=0.5, paper_accuracy=0.5, by_chance=alone)
    monkeypatch.setattr("sera_plugin.algorithm.trust.judged", lambda *_: judged)
    run = Run(tmp_path, changed(trust="act", **MIXED | keys))
    for t in (1, 2):
        it = replace(
            run.iteration(t, Scored(run.method)), held_out=Pairs.from_table(make_table(PAIRS))
        )
        it.labeler.by_chance = mixed
        trained = firsts(prepare(it).to_pydict())
    found = summarize(it)
    assert (found["reward"].get("followed"), found["labeler"]["reward"]["followed"]) == followed
    assert set(SAMPLED) & set(trained) == (set(SAMPLED) if followed[1] else set())
    kept = 0 if keys.get("selection_ratio") == 0 and followed[1] else 2
    kept = 3 if "all offline" in said else kept
    assert len(trained) == kept + 2 * followed[1] == found["pairs"]["trained"]
    told = describe_start(found, "nats")
    assert said in told
    assert ("not followed" in told) is bool(said)
    # The alarm is that of the worse one of those that rank something.
    chance = max(mixed, alone if followed[0] is not None else 0)
    (coin,) = [one for one in judge([found]) if one.name == "coin"]
    assert coin.figure == chance
    which = "without" if chance > mixed or alone == mixed == 0.01 else "with"
    assert coin.raised is (chance > 0.05)
    if coin.raised and alone != mixed:
        assert coin.text.startswith(f"the reward {which} scores ranks 50.0% of 3 held-out pairs")
        assert "this iteration does not follow it" in coin.text


def test_samples_that_outrank_the_data_are_not_followed_by_either_reward(tmp_path, strict):
    run = Run(tmp_path, changed(trust="act", **MIXED))
    for t in (1, 2):
        it = run.iteration(t, Scored(run.method))
        trained = firsts(prepare(it).to_pydict())
    assert trained == EVERY
    found = summarize(it)
    assert not found["reward"]["followed"]
    assert not found["labeler"]["reward"]["followed"]


def test_a_fitted_reward_is_kept_and_ranks_all_that_an_iteration_ranks(tmp_path):
    run = Run(tmp_path, changed(reward="fitted"))
    for t in (1, 2):
        prepare(replace(run.iteration(t), held_out=Pairs.from_table(make_table(PAIRS))))
    table = run.store.read(2, "offline")
    reward = json.loads(table.schema.metadata[b"reward"])
    assert list(reward["weights"]) != [1.0, -1.0]
    newest, before = [run.offline(t)["chosen_logp"][0] for t in (2, 1)]
    expected = np.dot(reward["weights"], [newest, before]) + reward["length"] * 2
    assert table["chosen_reward"].to_pylist()[0] == pytest.approx(expected)
    # Another process, without the held-out pairs at hand, ranks by the same weights.
    assert summarize(run.iteration(2))["reward"]["weights"]["theta_1"] == reward["weights"][0]


def test_candidates_outside_the_support_are_unranked(tmp_path):
    """Offline answers have 2 to 4 tokens at -5 to -15 nats a token under theta_0; the samples, at
    -2.5 to -3.5 nats, are likelier: all are ranked until they are longer."""
    run = Run(tmp_path, changed(reward="fitted", length_control=0.0))
    run.upto(2)
    assert np.isfinite(run.table(2, "candidates")["reward"]).all()
    short = Run(tmp_path / "short", changed(reward="fitted"))
    pairs = make_table({**PAIRS, **dict.fromkeys(["chosen_ids", "rejected_ids"])} | {
        "chosen_ids": [[11], [21], [31]], "rejected_ids": [[12], [22], [32]],
    })  # fmt: skip
    for t in (1, 2):
        prepare(replace(short.iteration(t), pairs=Pairs.from_table(pairs)))
    assert np.isnan(short.table(2, "candidates")["reward"]).all()
    metadata = short.store.read(2, "bootstrapped").schema.metadata
    assert metadata[b"unranked"] == b"6"


@pytest.mark.parametrize(
    ("keys", "total", "expected"),
    [
        ({}, 5_000, 250),
        ({"reward": "paper"}, 5_000, 250),
        ({"reward": "paper", "keep": "last"}, 5_000, 0),
        ({"reward": "fitted"}, 500, 50),
        ({"reward": "fitted"}, 1_500, 100),
        ({"reward": "fitted"}, 10_000, 500),
        ({"reward": "fitted"}, 100_000, 2_000),
        ({"reward": "fitted"}, 9, 0),
        ({"keep": "last", "selection": "all", "bootstrap_ratio": 0}, 5_000, 0),
        ({"held_out": 0.2}, 50, 10),
        ({"held_out": 7}, 50, 7),
        ({"held_out": 0, "reward": "fitted"}, 5_000, 0),
    ],
)
def test_how_many_pairs_are_held_out(keys, total, expected):
    assert SeraConfig(**keys).pairs_held_out(total) == expected


def test_held_out_rows_are_drawn_by_the_seed_and_trained_on_by_nobody():
    texts = [f"p{row}" for row in range(50)]
    rows = Dataset.from_dict({"row": list(range(50)), "prompt": texts, PROBLEM: [""] * 50})
    train, aside = hold_out(rows, 10, seed=1)
    assert len(aside["row"]) == 10
    assert sorted([*train["row"], *aside["row"]]) == rows["row"][:]
    assert train["row"][:] == sorted(train["row"])
    assert hold_out(rows, 10, seed=1)[1]["row"][:] == aside["row"][:]
    assert hold_out(rows, 10, seed=2)[1]["row"][:] != aside["row"][:]
    assert hold_out(rows, 0, seed=1) == (rows, None)
    # Rows of prompts that are all different are those with the smallest numbers.
    drawn = np.random.default_rng((1, 50)).permutation(50)
    assert aside["row"][:] == np.flatnonzero(drawn < 10).tolist()


def test_a_prompt_is_held_out_with_all_its_pairs():
    texts = [f"p{row % 20}" for row in range(98)]
    rows = Dataset.from_dict({"prompt": [*texts, "-", "-"], PROBLEM: [""] * 98 + ["bad", "bad"]})
    for seed in range(5):
        train, aside = hold_out(rows, 11, seed)
        assert len(train) + len(aside) == 100
        assert 11 <= len(aside) < 11 + 5
        assert set(train["prompt"]).isdisjoint(set(aside["prompt"]) - {"-"})
    # Rows that will be dropped have no prompt in common.
    sides = [hold_out(rows, 50, seed)[1]["prompt"][:].count("-") for seed in range(20)]
    assert 1 in sides
    alone = Dataset.from_dict({"prompt": ["p"] * 10, PROBLEM: [""] * 10})
    assert len(hold_out(alone, 3, seed=0)[1]) == 3
