"""The report's figures against values derived by hand."""

from __future__ import annotations

import math

import pytest

from sera_plugin.tools.report.figures import figures, r_squared, score_columns
from sera_plugin.tools.report.reading import Run, find_run
from sera_plugin.tools.report.sections import curve
from tests.report_run import make_run

# Four pairs. Rejected answers keep their log-probability, so that a margin is the change in the
# chosen one's: from theta_0 to theta_1 by 4, 0, 1, 0, from theta_1 to theta_2 by 0, 1, 2, 1/2.
FOUR = {
    0: ([-10, -10, -10, -10], [-5] * 4),
    1: ([-6, -10, -9, -10], [-5] * 4),
    2: ([-6, -9, -7, -9.5], [-5] * 4),
}


def read(output_dir):
    return Run(find_run(output_dir))


def of(output_dir, **keys):
    make_run(output_dir, **keys)
    return figures(read(output_dir))


@pytest.fixture
def four(tmp_path):
    return of(tmp_path, pairs=4, logps=FOUR, sera={"bootstrap_ratio": 0}, held_out=0)


@pytest.mark.parametrize(
    ("x", "y", "share"),
    [
        # Deviations (-4, -1, 5) / 3 and (-1, 1, 0): 1^2 / (42 / 9 x 2).
        ([1, 2, 4], [1, 3, 2], 9 / 84),
        ([1, 2, 3], [6, 4, 2], 1),
        ([1, 2, 3, math.nan], [2, 4, 6, 0], 1),
        ([1, 2], [1, 2], None),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_r_squared_needs_three_points_that_differ(x, y, share):
    assert r_squared(x, y) == (share and pytest.approx(share))


def test_margins_and_where_pairs_are_kept(four):
    first, second, third = four["iterations"]
    assert "margins" not in first
    assert second["margins"]["offline"]["1.0"] == pytest.approx(4)
    assert second["threshold"] == pytest.approx(1)
    # 0.7 x (0, 1, 2, 1/2) + 0.3 x (4, 0, 1, 0) = 1.2, 0.7, 1.7, 0.35
    assert third["margins"]["offline"]["0.5"] == pytest.approx((0.7 + 1.2) / 2)
    assert third["threshold"] == pytest.approx(1.2)
    assert (third["kept"], third["dropped"]) == (2, 2)
    # Margins of 0 do not agree with their label.
    assert (second["offline_accuracy"], third["offline_accuracy"]) == (0.5, 1.0)


def test_the_ensemble_exchanged_one_pair(four):
    # Without it margins are 0, 1, 2, 1/2: rows 1 and 2; with it rows 0 and 2.
    assert four["iterations"][2]["ensemble"] == {
        "exchanged": 1,
        "kept": 2,
        "jaccard": pytest.approx(1 / 3),
    }
    assert four["iterations"][1]["ensemble"] is None


def test_selections_are_compared_with_each_other_and_with_chance(four):
    assert four["jaccard"] == {
        "iterations": [2, 3],
        "matrix": [[1.0, 1.0], [1.0, 1.0]],
        # Two random halves of four share one pair of three.
        "by_chance": pytest.approx(1 / 3),
    }


def test_drift_is_from_the_initial_policy(four):
    assert [one["drift"]["chosen"] for one in four["iterations"]] == pytest.approx([0, 1.25, 2.125])
    assert four["iterations"][2]["drift"]["rejected"] == 0


def test_recomputed_rewards_are_those_recorded(tmp_path):
    make_run(tmp_path, sera={"gamma": 0.4})
    run = read(tmp_path)
    for one in run.iterations[1:]:
        assert run.implicit_margin(one.number) == pytest.approx(one.margin)


def test_the_ensemble_s_part_in_sampled_pairs(tmp_path):
    make_run(tmp_path)
    run = read(tmp_path)
    third = run.iterations[2]
    candidates, pairs = third.candidates, third.bootstrapped
    reward = candidates.logps[:, 0] - candidates.logps[:, 1]
    ranked = reward.reshape(-1, 4).argsort(axis=1)
    spread = reward.reshape(-1, 4).max(axis=1) - reward.reshape(-1, 4).min(axis=1)
    best = {(row, ranked[row, 3], ranked[row, 0]) for row in (-spread).argsort()[:6]}
    names = ("row", "chosen_candidate", "rejected_candidate")
    now = set(zip(*(pairs[name][pairs["selected"]] for name in names), strict=True))
    assert figures(run)["iterations"][2]["bootstrapped_ensemble"] == {
        "exchanged": len(now - best),
        "kept": 6,
    }
    assert len(now - best) > 0


def test_simpo_is_per_token_and_has_no_reference(tmp_path):
    # Chosen answers have 4 tokens and rejected ones 2: -6 / 4 - -5 / 2 = 1 and so on.
    keys = {"sera": {"loss": "simpo", "bootstrap_ratio": 0}, "loss": "simpo", "per_token": True}
    found = of(tmp_path, pairs=4, logps=FOUR, held_out=0, **keys)
    assert found["run"]["unit"] == "nats per token"
    assert found["iterations"][1]["margins"]["offline"]["1.0"] == pytest.approx(1)
    # Row 0 is -1.5 and -1.5, row 2 -9 / 4 and -7 / 4; both policies weigh in, and both are kept.
    assert found["iterations"][2]["ensemble"]["exchanged"] == 0
    assert found["iterations"][2]["threshold"] == pytest.approx(0.7 * -1.75 + 0.3 * -2.25 + 2.5)


def test_length_and_scores_explain_rewards(tmp_path):
    scores = {
        "score_chosen": [4, 0, 1, 0],
        "score_rejected": [0, 0, 0, None],
        "source": ["a", "a", "b", "b"],
        "gap": [8.0, 0.0, 2.0, 0.0],
        "swapped": [False, True, False, True],
    }
    found = of(
        tmp_path, pairs=4, logps=FOUR, scores=scores, sera={"bootstrap_ratio": 0}, held_out=0
    )
    second = found["iterations"][1]
    # Rewards 4, 0, 1, 0 of chosen and 0 of rejected answers are the scores themselves.
    assert second["scores"]["score"]["reward"] == pytest.approx(1)
    assert second["scores"]["score"]["agreement"] == 1
    assert second["scores"]["gap"] == {"margin": pytest.approx(1)}
    # Lengths 4 and 2, rewards of mean 5/4 and 0: (8 x 5/8)^2 / (8 x (17 - 25/8)).
    assert second["length_r2"]["reward"] == pytest.approx(25 / 111)
    assert second["length_r2"]["margin"] is None  # all differences in length are 2
    assert second["groups"]["swapped"] == [
        {"value": False, "pairs": 2, "kept": 1.0, "median_margin": pytest.approx(2.5)},
        {"value": True, "pairs": 2, "kept": 0.0, "median_margin": pytest.approx(0)},
    ]
    assert [group["kept"] for group in second["groups"]["source"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    "found",
    [
        {"rating": ("chosen_rating", "rejected_rating"), "gap": ("gap",), "score_chosen": None},
        {
            "score_chosen": ("score_chosen", "score_rejected"),
            "gpt": ("chosen_gpt", "rejected_gpt"),
            "gpt_chosen": ("gpt_chosen", "gpt_rejected"),
            "score": None,
        },
    ],
    ids=["in-pairs-or-alone", "of-one-name"],
)
def test_scores_are_found_and_told_apart(tmp_path, found):
    found = {name: columns or (name,) for name, columns in found.items()}
    columns = [column for both in found.values() for column in both]
    scores = {name: [1.0, 2.0, 3.0, 4.0] for name in columns} | {"note": ["x"] * 4}
    make_run(tmp_path, pairs=4, scores=scores)
    assert score_columns(read(tmp_path)) == found


def test_samples_and_lengths(tmp_path):
    second = of(tmp_path, pairs=14)["iterations"][1]
    # 14 prompts of 4 answers of 2, 3, 4 and 5 tokens; those of rows 0 and 7 are cut off.
    assert second["samples"] == {
        "prompts": 14,
        "sampled": 56,
        "unfinished": 8,
        "duplicates": 0,
        "ties": 0,
        "too_few": 0,
        "unranked": 0,
    }
    assert second["lengths"]["sampled"] == 3.5
    assert (second["lengths"]["chosen"], second["lengths"]["rejected"]) == (4, 2)


def test_held_out_accuracy_is_that_of_the_summary(tmp_path):
    make_run(tmp_path, held_out=9)
    run = read(tmp_path)
    for one, found in zip(run.iterations, figures(run)["iterations"], strict=True):
        recorded = one.summary.get("evaluation")
        assert (found["held_out"] or {}).get("accuracy") == (recorded or {}).get("accuracy")
    assert figures(run)["iterations"][2]["held_out"]["pairs"] == 9


def test_curves_have_a_gap_where_an_iteration_starts():
    history = [
        {"step": 0, "loss": 0.7},
        {"step": 0, "sera/iteration": 1.0},
        {"step": 2, "loss": 0.6},
        {"step": 4, "loss": 0.5, "eval_loss": "nan"},
        {"step": 4, "sera/iteration": 2.0},
        {"step": 6, "loss": 0.7},
    ]
    steps, losses = curve(history, "loss")
    assert steps == [0, 2, 4, 6, 6]
    assert losses == pytest.approx([0.7, 0.6, 0.5, math.nan, 0.7], nan_ok=True)
    assert curve(history, "eval_loss") == ([], [])
