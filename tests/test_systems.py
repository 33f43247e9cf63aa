"""Every system of the paper's comparison, followed by hand on three pairs.

The world is test_iteration's: every token id is a known completion whose log-probability under
theta_0, theta_1, theta_2 stands in its table.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_plugin.algorithm.method import Method, Pairs, Schedule
from sera_plugin.algorithm.protocols import Labeler, Ranked
from sera_plugin.algorithm.rewards import FloatArray, equalizing_alpha, regressed_alpha
from sera_plugin.algorithm.selection import (
    Annotations,
    annotate,
    pair_candidates,
    score_gap,
    select_largest,
    swap,
    swapped_rows,
)
from sera_plugin.algorithm.summary import noise_found, summarize
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.run import describe_run, require_same_run
from sera_plugin.rundir.store import make_table
from tests.test_iteration import CANDIDATES, END, Run, assert_reference_is, firsts


@dataclasses.dataclass
class System(Run):
    """One system on the three pairs."""

    annotations: Annotations = dataclasses.field(default_factory=Annotations)
    iterations: int = 3

    @property
    def method(self) -> Method:
        return Method(
            self.config,
            self.reference_free,
            self.per_token,
            total=3,
            iterations=self.iterations,
            seed=7,
            annotations=self.annotations,
        )


def system(directory: Path, annotations: Annotations | None = None, **block: Any) -> System:
    defaults = {"selection_ratio": 0.67, "bootstrap_ratio": 0.0, "candidates": 2}
    return System(
        directory, SeraConfig(**{**defaults, **block}), annotations=annotations or Annotations()
    )


def kept_rows(run: System, iteration: int) -> list[int]:
    return np.flatnonzero(run.offline(iteration)["selected"]).tolist()


def test_reference_logp_keeps_what_the_reference_prefers(tmp_path):
    """Under theta_1: -9 + 12 = 3, -21 + 20 = -1, -28 + 29 = 1; under theta_2: 7, 1, 2.

    Per token, lengths (2, 2), (4, 2), (2, 4): -9/2 + 12/2 = 1.5, -21/4 + 20/2 = 4.75,
    -28/2 + 29/4 = -6.75.
    """
    run = system(tmp_path / "sum", selection="reference_logp")
    trained = [run.prepare(t) for t in (1, 2, 3)]
    assert firsts(trained[0]) == [(1, 11, 12), (2, 21, 22), (3, 31, 32)]
    assert run.offline(2)["priority"] == [3, -1, 1]
    assert run.offline(3)["priority"] == [7, 1, 2]
    assert kept_rows(run, 2) == kept_rows(run, 3) == [0, 2]
    assert_reference_is(2, trained[2])
    run = system(tmp_path / "mean", selection="reference_logp")
    run.per_token = True
    run.prepare(1)
    run.prepare(2)
    assert run.offline(2)["priority"] == [1.5, 4.75, -6.75]
    assert kept_rows(run, 2) == [0, 1]


def test_score_keeps_the_widest_gaps(tmp_path):
    run = system(
        tmp_path,
        Annotations(score_gap=np.array([0.5, 4.0, 1.0])),
        selection="score",
        score_columns=["score_chosen", "score_rejected"],
    )
    run.prepare(1)
    run.prepare(2)
    assert kept_rows(run, 2) == [1, 2]
    assert run.offline(2)["margin"] == [3, -1, 1]  # recorded all the same


def test_random_is_another_draw_each_iteration_and_the_same_for_a_seed():
    asked = {"selection": "random", "selection_ratio": 0.5, "bootstrap_ratio": 0}

    def draws(seed: int) -> list[tuple[int, ...]]:
        method = Method(SeraConfig(**asked), False, False, total=40, seed=seed)
        none = np.zeros(40)
        priorities = [method.selection.priority(t, none, none) for t in (2, 3)]
        return [tuple(np.flatnonzero(select_largest(one, 20))) for one in priorities]

    masks = list(map(draws, (1, 1, 2)))
    assert masks[0] == masks[1]
    assert masks[0] != masks[2]
    assert masks[0][0] != masks[0][1]
    assert all(len(one) == 20 for pair in masks for one in pair)


def test_all_is_iterative_dpo(tmp_path):
    run = system(tmp_path, selection="all", selection_ratio=1.0)
    trained = [run.prepare(t) for t in (1, 2, 3)]
    for policy, table in enumerate(trained):
        assert len(firsts(table)) == 3
        assert_reference_is(policy, table)
    assert run.method.sizes == (3, 3, 3)


def test_curriculum_trains_on_each_prompts_next_easiest_pair(tmp_path):
    """Rows 0 and 2 have the same prompt; row 2's gap is wider, so it comes first."""
    annotations = Annotations(score_gap=np.array([1.0, 3.0, 2.0]), prompts=np.array([0, 1, 0]))
    run = system(
        tmp_path, annotations, selection="curriculum", score_columns=["gap"], selection_ratio=1
    )
    with pytest.raises(ValueError, match="none has more than 2"):
        _ = run.method.sizes
    run.iterations = 2
    assert run.method.sizes == (2, 1)
    trained = [run.prepare(t) for t in (1, 2)]
    assert firsts(trained[0]) == [(2, 21, 22), (3, 31, 32)]
    assert firsts(trained[1]) == [(1, 11, 12)]
    assert_reference_is(1, trained[1])


def test_the_initial_policy_as_reference(tmp_path):
    run = system(tmp_path, reference="initial", bootstrap_ratio=0.67)
    for iteration in (1, 2, 3):
        trained = run.prepare(iteration)
        assert_reference_is(0, trained)
        # What the gate compares with is the policy itself.
        policy = dict(zip(firsts(trained), trained["policy_chosen_logps"], strict=True))
        assert policy[1, 11, 12] == [-10, -9, -8][iteration - 1]
    assert run.method.oldest_policy(3) == 0
    # No policy scores the same pairs twice for it: theta_0 has scored them in iteration 1.
    assert [call for call in run.scorer.calls if call[1] == "score_offline"] == [
        (policy, "score_offline", 6) for policy in (0, 1, 2)
    ]


def test_an_initial_reference_is_scored_once_more_where_no_reward_needs_it(tmp_path):
    run = system(tmp_path, reference="initial", labeler="spin", bootstrap_ratio=1.0)
    for iteration in (1, 2, 3):
        trained = run.prepare(iteration)
        assert_reference_is(0, trained)
    table = run.table(3, "candidates")
    assert table["logps"][:2] == [[-2], [-6]]  # theta_2 of 13 and 14
    assert table["reference_logp"][:2] == [-5, -5]  # theta_0


class ByToken(Labeler):
    """Prefers what a table says, by an answer's first token."""

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.seen: list[Ranked] = []

    def rewards(self, ranked: Ranked) -> FloatArray:
        self.seen.append(ranked)
        return np.array([REWARDS[int(answer[0])] for answer in ranked.answers])


REWARDS = {13: 0.0, 14: 1.0, 23: 5.0, 24: np.nan, 33: 4.0, 34: 2.0}


def test_a_labeler_of_its_own_decides_and_needs_the_current_policy_alone(tmp_path):
    """Row 0: 14 over 13 by 1; row 1: one sample has no reward; row 2: 33 over 34 by 2."""
    run = system(tmp_path, labeler="reward_model", reward_model="m", bootstrap_ratio=1.0)
    labeler = ByToken(run.method)
    run.prepare(1)
    trained = run.prepare(2, labeler)
    assert firsts(trained)[-2:] == [(1, 14, 13), (3, 33, 34)]
    table = run.table(2, "candidates")
    assert table["logps"] == [[-3], [-6], [-6], [-5], [-1], [-7]]  # theta_1 alone
    assert [call[0] for call in run.scorer.calls if call[1] == "score_candidates"] == [1]
    assert run.table(2, "bootstrapped")["margin"] == [1, 2]
    assert labeler.seen[0].per_prompt == 2


def test_spin_puts_the_datasets_answer_before_a_sample_from_the_first_iteration_on(tmp_path):
    run = system(tmp_path, labeler="spin", selection_ratio=0.0, bootstrap_ratio=1.0)
    assert run.config.first_iteration == 1
    assert run.method.sizes == (3, 3, 3)
    for iteration in (1, 2):
        trained = run.prepare(iteration)
        assert firsts(trained) == [(1, 11, 14), (2, 21, 24), (3, 31, 34)]
        assert_reference_is(iteration - 1, trained)
        assert not any(run.offline(iteration)["selected"])
    table = run.table(1, "candidates")
    assert table["finish_reason"] == ["stop", "stop", "dataset"] * 3
    assert table["token_ids"][2] == [11, END]


def test_no_policy_scores_the_datasets_answers_again_for_spin(tmp_path):
    """Each has with the offline pairs; with theta_0 as reference too."""
    run = system(
        tmp_path, labeler="spin", selection_ratio=0.0, bootstrap_ratio=1.0, reference="initial"
    )
    for iteration in (1, 2):
        run.prepare(iteration)
        candidates, chosen = run.table(iteration, "candidates"), run.offline(iteration)
        assert [logp for (logp,) in candidates["logps"][2::3]] == chosen["chosen_logp"]
    assert candidates["reference_logp"][2::3] == run.offline(1)["chosen_logp"]
    # Three prompts with two samples each.
    assert [call for call in run.scorer.calls if call[1] == "score_candidates"] == [
        (policy, "score_candidates", 6) for policy in (0, 1, 0)
    ]


def test_spin_beside_offline_pairs_begins_with_selection(tmp_path):
    run = system(tmp_path, labeler="spin", selection_ratio=0.67, bootstrap_ratio=1.0)
    assert run.method.sizes == (3, 5, 5)
    assert len(firsts(run.prepare(1))) == 3


@pytest.mark.parametrize("repeated", [0, 1])
def test_a_sample_that_is_the_datasets_answer_stands_for_it(tmp_path, monkeypatch, repeated):
    """Row 0 has it and 13 or 14 beside it, row 1 has it twice and no pair, row 2 has it never."""
    other = CANDIDATES[0][1 - repeated]
    samples = [other, other]
    samples[repeated] = [11, END]
    monkeypatch.setitem(CANDIDATES, 0, samples)
    monkeypatch.setitem(CANDIDATES, 1, [[21, 0, 0, END]] * 2)
    run = system(tmp_path, labeler="spin", selection_ratio=0.0, bootstrap_ratio=1.0)
    trained = run.prepare(1)
    assert firsts(trained) == [(1, 11, other[0]), (3, 31, 34)]
    assert run.store.read(1, "bootstrapped").schema.metadata[b"ties"] == b"0"


def test_a_fixed_alpha_is_taken_off_every_token(tmp_path):
    """Margins 3, -1, 1 of pairs longer by 0, 2, -2: less 1.5 each, 3, -4, 4."""
    run = system(tmp_path, offline_length_control=1.5)
    run.prepare(1)
    run.prepare(2)
    assert run.offline(2)["margin"] == [3, -1, 1]
    assert run.offline(2)["priority"] == [3, -4, 4]
    assert kept_rows(run, 2) == [0, 2]


def test_regressed_alpha_by_hand():
    """Within groups: lengths -1, 1 and -2, 2; rewards -1, 1 and -3, 3: 14 / 10."""
    assert regressed_alpha([[1, 3], [0, 6]], [[2, 4], [1, 5]]) == pytest.approx(1.4)
    assert regressed_alpha([[1, np.nan], [0, 6]], [[2, 400], [1, 5]]) == pytest.approx(1.5)
    assert regressed_alpha([[1, 2]], [[3, 3]]) == 0.0


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(-0.5, 0.5))
def test_auto_makes_chosen_and_rejected_equally_long(seed, slope):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, (200, 4))
    rewards = slope * lengths + rng.normal(0, 3, lengths.shape)
    identity = np.arange(800).reshape(200, 4)

    def longer(controlled):
        found = pair_candidates(identity, controlled)
        return (lengths[found.prompt, found.chosen] - lengths[found.prompt, found.rejected]) * 1.0

    alpha = equalizing_alpha(rewards, lengths, longer)
    before, after = (abs(longer(rewards - a * lengths).mean()) for a in (0.0, alpha))
    assert after <= before
    # One pair's answers changing places moves the mean by at most twice 55 tokens / 200 pairs.
    assert after < 0.6


def test_length_control_of_samples_is_recorded(tmp_path):
    run = system(tmp_path, bootstrap_ratio=1.0, length_control=2.0)
    run.prepare(1)
    run.prepare(2)
    table = run.store.read(2, "bootstrapped")
    assert float(table.schema.metadata[b"alpha"]) == 2.0
    # All samples have two tokens, so nothing else changes.
    assert table["margin"].to_pylist() == [3, 1, 6]


def test_noise_swaps_the_share_that_is_asked_for_and_what_belongs_to_an_answer():
    swapped = swapped_rows(10, 0.25, seed=3)
    assert swapped.sum() == 2  # round(2.5)
    assert (swapped == swapped_rows(10, 0.25, seed=3)).all()
    assert (swapped != swapped_rows(10, 0.25, seed=4)).any()
    columns = {"chosen_ids": [1, 2], "rejected_ids": [3, 4], "source": ["a", "b"],
               "score_chosen": [9, 8], "score_rejected": [1, 2]}  # fmt: skip
    assert swap(columns, np.array([False, True])) == {
        "chosen_ids": [1, 4], "rejected_ids": [3, 2], "source": ["a", "b"],
        "score_chosen": [9, 2], "score_rejected": [1, 8],
    }  # fmt: skip


def test_noise_is_recorded_per_row_and_counted(tmp_path):
    annotations = Annotations(swapped=np.array([False, True, False]))
    run = system(tmp_path, annotations, label_noise=0.33)
    run.prepare(1)
    run.prepare(2)
    assert run.offline(1)["swapped"] == run.offline(2)["swapped"] == [False, True, False]
    summary = summarize(run.iteration(2))
    assert summary["label_noise"] == {
        "swapped": 1, "swapped_dropped": 1, "precision": 1.0, "recall": 1.0,
    }  # fmt: skip


def test_a_curriculum_drops_no_pair_for_its_label(tmp_path):
    """What is not kept has had its turn or is to have it, which says nothing of a label."""
    swapped = np.array([False, True, False])
    run = system(
        tmp_path,
        Annotations(np.array([3.0, 1.0, 2.0]), np.array([0, 0, 1]), swapped),
        selection="curriculum",
        selection_ratio=1.0,
        score_columns=["gap"],
        label_noise=0.33,
    )
    run.iterations = 2
    for iteration in (1, 2):
        run.prepare(iteration)
        assert run.offline(iteration)["swapped"] == swapped.tolist()
        summary = summarize(run.iteration(iteration))
        assert summary["pairs"]["kept"] in (1, 2)
        assert "label_noise" not in summary


@pytest.mark.parametrize("kept", [[True] * 3, [False] * 3])
def test_where_no_pair_is_told_from_another_no_noise_is_found(kept):
    assert noise_found("irm", np.array([True, False, False]), np.array(kept)) is None
    assert noise_found("irm", None, np.array([True, False, False])) is None


def test_noise_that_has_swapped_nothing_has_no_recall():
    found = noise_found("irm", np.zeros(3, dtype=bool), np.array([True, False, False]))
    assert found == {"swapped": 0, "swapped_dropped": 0, "precision": 0.0, "recall": None}


def test_a_score_is_a_gap_of_two_columns_or_a_column_that_is_one():
    assert score_gap({"source": ["a"], "s_rejected": [1], "s_chosen": [4]}).tolist() == [3]
    assert score_gap({"source": ["a", "b"], "gap": [1, 2.5]}).tolist() == [1, 2.5]
    # A swapped label turns a gap's sign; two columns have changed places by themselves.
    swapped = np.array([False, True])
    assert score_gap({"gap": [1, 2.5]}, swapped).tolist() == [1, -2.5]
    sides = swap({"s_chosen": [4, 4], "s_rejected": [1, 1]}, swapped)
    assert score_gap(sides, swapped).tolist() == [3, -3]
    with pytest.raises(ValueError, match="has no numbers to select by"):
        score_gap({"source": ["a"]})
    with pytest.raises(ValueError, match="column 'gap' is None in row 1"):
        score_gap({"gap": [1, None]})
    with pytest.raises(ValueError, match="column 's_rejected' is nan in row 0"):
        score_gap({"s_chosen": [1.0], "s_rejected": [float("nan")]})


def test_prompts_are_numbered_for_a_curriculum():
    ids = {"prompt_ids": [[1], [2], [1]], "chosen_ids": [[3]] * 3, "rejected_ids": [[4]] * 3}
    pairs = Pairs.from_table(make_table(ids))
    config = SeraConfig(selection="curriculum", score_columns=["gap"], bootstrap_ratio=0)
    annotations = annotate(config, pairs.prompt_ids, {"gap": [1, 2, 3]}, None)
    assert annotations.prompts is not None
    first, second, third = annotations.prompts
    assert first == third != second
    assert annotations.score_gap.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"selection": "all", "selection_ratio": 0.5}, "Remove selection_ratio"),
        ({"selection": "score"}, "none is named"),
        ({"labeler": "spin", "bootstrap_ratio": 2.0, "candidates": 4}, "one chosen answer"),
        ({"labeler": "spin", "bootstrap_ratio": 0}, "samples none"),
        ({"labeler": "reward_model"}, "do not go together"),
        ({"reward_model": "here"}, "do not go together"),
        ({"candidates": 1}, "Raise candidates to 2"),
        ({"length_control": float("inf")}, "not finite"),
        ({"length_control": True}, "not a number"),
        ({"length_control": "some"}, "length_control"),
        ({"length_control": 0.1, "labeler": "spin"}, "no rewards to take it off"),
        ({"offline_length_control": "auto", "selection": "random"}, "has no effect"),
        ({"reference": "initial", "loss": "orpo"}, "has no reference. Remove reference"),
    ],
)
def test_what_does_not_go_together_is_refused(block, said):
    with pytest.raises(ValueError, match=said):
        SeraConfig(**block)


def test_a_block_that_was_written_out_is_read_again():
    config = SeraConfig(selection="all", bootstrap_ratio=0)
    assert config.selection_ratio == 1
    assert SeraConfig(**config.model_dump(mode="json")) == config


def described(annotations: Annotations | None = None, **block: Any) -> dict[str, Any]:
    config = SeraConfig(**{"bootstrap_ratio": 0, **block})
    method = Method(config, False, False, total=1, annotations=annotations or Annotations())
    ids = make_table({f"{name}_ids": [[1]] for name in ("prompt", "chosen", "rejected")})
    cfg = {"sera": config.model_dump(mode="json")}
    pairs, schedule = Pairs.from_table(ids), Schedule((1,), 1, 1)
    return describe_run(cfg, "dpo", 0.1, method, schedule, pairs, None, (END,))


def test_a_run_is_continued_with_the_scores_that_it_selects_by():
    by_score = {"selection": "score", "score_columns": ["gap"]}
    one, other = (
        described(Annotations(score_gap=np.array([gap])), **by_score) for gap in (1.0, 2.0)
    )
    require_same_run(one, one, Path("run"))
    with pytest.raises(ValueError, match="the scores that select"):
        require_same_run(one, other, Path("run"))
    # Columns that are only kept for reading may be others.
    require_same_run(described(), described(score_columns=["gap"]), Path("run"))


def test_every_figure_of_what_a_run_is_makes_another_one_of_it():
    one = described()
    for key in one.keys() - {"format_version", "versions", "config", "evaluation_pairs"}:
        with pytest.raises(ValueError, match="cannot be continued"):
            require_same_run(one, one | {key: "other"}, Path("run"))


def test_a_judge_that_did_not_answer_in_time_may_be_given_more():
    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    online = {"labeler": "judge", "bootstrap_ratio": 1}
    one, slow, other = (
        described(**online, judge=judge | change)
        for change in ({}, {"timeout": 900, "concurrency": 1, "api_key_env": "K"}, {"model": "n"})
    )
    require_same_run(one, slow, Path("run"))
    with pytest.raises(ValueError, match=r"sera\.judge\.model: 'm' -> 'n'"):
        require_same_run(one, other, Path("run"))
