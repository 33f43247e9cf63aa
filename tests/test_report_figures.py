"""The report's figures against values derived by hand, and what it says of other systems."""

import math

import numpy as np
import pytest

from sera_plugin.algorithm.method import Labeler
from sera_plugin.algorithm.selection import Annotations
from sera_plugin.tools.report.figures import dataset_scores, figures, r_squared
from sera_plugin.tools.report.page import curve, published_runs, render
from sera_plugin.tools.report.pairs import describe_pair, show_pair, show_suspects, suspects
from sera_plugin.tools.report.reading import Run, Texts
from tests.report_run import make_run

# Four pairs. Rejected answers keep their log-probability, so that a margin is the change in the
# chosen one's: from theta_0 to theta_1 by 4, 0, 1, 0, from theta_1 to theta_2 by 0, 1, 2, 1/2.
FOUR = {
    0: ([-10, -10, -10, -10], [-5] * 4),
    1: ([-6, -10, -9, -10], [-5] * 4),
    2: ([-6, -9, -7, -9.5], [-5] * 4),
}
about = pytest.approx


def of_four(output_dir, sera=None, **keys):
    block = {"bootstrap_ratio": 0, **(sera or {})}
    return figures(Run(make_run(output_dir, pairs=4, logps=FOUR, sera=block, held_out=0, **keys)))


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
    assert r_squared(x, y) == (share and about(share))


def test_margins_selections_and_drift(tmp_path):
    found = of_four(tmp_path)
    first, second, third = found["iterations"]
    assert "margins" not in first
    assert second["margins"]["offline"]["1.0"] == about(4)
    assert second["threshold"] == about(1)
    # 0.7 x (0, 1, 2, 1/2) + 0.3 x (4, 0, 1, 0) = 1.2, 0.7, 1.7, 0.35
    assert third["margins"]["offline"]["0.5"] == about((0.7 + 1.2) / 2)
    assert third["threshold"] == about(1.2)
    assert (third["kept"], third["dropped"]) == (2, 2)
    # Margins are 4, 0, 1, 0 in the second: a tie is half right.
    assert (second["offline_accuracy"], third["offline_accuracy"]) == (0.75, 1.0)
    # Without the ensemble margins are 0, 1, 2, 1/2: rows 1 and 2; with it rows 0 and 2.
    assert third["ensemble"] == {"exchanged": 1, "kept": 2, "jaccard": about(1 / 3)}
    assert second["ensemble"] is None
    # Two random halves of four share one pair of three.
    same = [[1.0, 1.0], [1.0, 1.0]]
    assert found["jaccard"] == {"iterations": [2, 3], "matrix": same, "by_chance": about(1 / 3)}
    # From the initial policy.
    assert [one["drift"]["chosen"] for one in found["iterations"]] == about([0, 1.25, 2.125])
    assert third["drift"]["rejected"] == 0


def test_the_noise_of_margins_stands_beside_them(tmp_path):
    store = make_run(tmp_path, pairs=4, logps=FOUR, held_out=0)
    assert "rounding moves" not in render(Run(store))
    moved = {"chosen": [0.1] * 4, "rejected": [0.0] * 4}
    store.write_summary(2, store.summary(2) | {"noise": moved | {"margin": 0.123}})
    store.write_summary(3, store.summary(3) | {"noise": moved | {"margin": 0.5, "within": 0.25}})
    page = render(Run(store))
    assert "(0.2%). From batch to batch rounding moves a margin by 0.12.<" in page
    assert "rounding moves a margin by 0.5; 25% of the pairs are nearer to the cut than" in page


def test_a_run_lies_among_published_ones(tmp_path):
    page = render(Run(make_run(tmp_path, pairs=4, logps=FOUR, held_out=0)))
    # Chosen answers have four tokens and are up by (4 + 1 + 3 + 1/2) / 4 nats on average.
    said = "Iteration 3 began +0.53 nats per token from the initial policy. Of 25 published DPO"
    assert f"{said} runs half ended between -0.41 and -0.09, all between -0.91 and 0.00" in page
    for one in published_runs():
        assert f">beta {one['beta']}<" in page
        each = float(one["nats_per_answer"]) / float(one["tokens"])
        assert float(one["nats_per_token"]) == about(each, abs=3e-4)


def test_weights_are_told_by_how_far_back_a_policy_is(tmp_path):
    settings = {"reward": "fitted", "trust": "warn"}
    run = Run(make_run(tmp_path, iterations=4, sera=settings, held_out=40))
    page = render(run)
    names = "likelihood now", "one iteration ago", "two ago", "length"
    head = '</th><th scope="col">'.join(names)
    assert f'"col">{head}<' in page
    table = page[page.index("What the reward counts") :]
    for one in run.iterations[1:]:
        found = one.summary["reward"]
        names = [*(f"theta_{one.number - back}" for back in (1, 2, 3)), "length"]
        both = [(found["weights"].get(name), found["errors"].get(name)) for name in names]
        cells = [
            "-" if weight is None else f"{weight:+.2f} ± {error:.2f}" for weight, error in both
        ]
        assert f"<td>{'</td><td>'.join(cells)}</td>" in table


def test_simpo_is_per_token_and_has_no_reference(tmp_path):
    # Chosen answers have 4 tokens and rejected ones 2: -6 / 4 - -5 / 2 = 1 and so on.
    found = of_four(tmp_path, {"loss": "simpo"})
    assert found["run"]["unit"] == "nats per token"
    assert found["iterations"][1]["margins"]["offline"]["1.0"] == about(1)
    # Row 0 is -1.5 and -1.5, row 2 -9 / 4 and -7 / 4; both policies weigh in, and both are kept.
    assert found["iterations"][2]["ensemble"]["exchanged"] == 0
    assert found["iterations"][2]["threshold"] == about(0.7 * -1.75 + 0.3 * -2.25 + 2.5)


def test_length_and_scores_explain_rewards(tmp_path):
    scores = {
        "score_chosen": [4, 0, 1, 0],
        "score_rejected": [0, 0, 0, None],
        "source": ["a", "a", "b", "b"],
        "gap": [8.0, 0.0, 2.0, 0.0],
        "swapped": [False, True, False, True],
    }
    second = of_four(tmp_path, scores=scores)["iterations"][1]
    # Rewards 4, 0, 1, 0 of chosen and 0 of rejected answers are the scores themselves.
    assert second["scores"]["score"]["reward"] == about(1)
    assert second["scores"]["score"]["agreement"] == 1
    assert second["scores"]["gap"] == {"margin": about(1)}
    # Lengths 4 and 2, rewards of mean 5/4 and 0: (8 x 5/8)^2 / (8 x (17 - 25/8)).
    assert second["length_r2"]["reward"] == about(25 / 111)
    assert second["length_r2"]["margin"] is None  # all differences in length are 2
    assert second["groups"]["swapped"] == [
        {"value": False, "pairs": 2, "kept": 1.0, "median_margin": about(2.5)},
        {"value": True, "pairs": 2, "kept": 0.0, "median_margin": about(0)},
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
    names = [column for both in found.values() for column in both]
    scores = {name: [number, None, 3.0, 4.0] for number, name in enumerate(names)}
    run = Run(make_run(tmp_path, pairs=4, scores=scores | {"note": ["x"] * 4}))
    read = {name: [values[0] for values in both] for name, both in dataset_scores(run).items()}
    assert read == {name: [names.index(one) for one in both] for name, both in found.items()}


def test_samples_lengths_and_held_out_pairs(tmp_path):
    run = Run(make_run(tmp_path, pairs=14, held_out=9, sera={"gamma": 0.4}))
    first, second, third = figures(run)["iterations"]
    # 14 prompts of 4 answers of 2, 3, 4 and 5 tokens; those of rows 0 and 7 are cut off.
    none = dict.fromkeys(("duplicates", "ties", "too_few", "unranked"), 0)
    assert second["samples"] == {"prompts": 14, "sampled": 56, "unfinished": 8} | none
    assert second["lengths"]["sampled"] == 3.5
    assert (second["lengths"]["chosen"], second["lengths"]["rejected"]) == (4, 2)
    assert first["held_out"] is None
    for one, found in ((2, second), (3, third)):
        recorded = run.begun[one].summary["evaluation"]
        assert found["held_out"] == {key: recorded[key] for key in found["held_out"]}
        assert found["held_out"]["pairs"] == 9


def test_the_ensemble_s_part_in_sampled_pairs(tmp_path):
    run = Run(make_run(tmp_path))
    logps, pairs = run.iterations[2].candidates["logps"], run.iterations[2].bootstrapped
    reward = (logps[:, 0] - logps[:, 1]).reshape(-1, 4)
    ranked, spread = reward.argsort(axis=1), reward.max(axis=1) - reward.min(axis=1)
    best = {(row, ranked[row, 3], ranked[row, 0]) for row in (-spread).argsort()[:6]}
    names = ("row", "chosen_candidate", "rejected_candidate")
    now = set(zip(*(pairs[name][pairs["selected"]] for name in names), strict=True))
    found = figures(run)["iterations"][2]["bootstrapped_ensemble"]
    assert found == {"exchanged": len(now - best), "kept": 6}
    assert len(now - best) > 0


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
    assert losses == about([0.7, 0.6, 0.5, math.nan, 0.7], nan_ok=True)
    assert curve(history, "eval_loss") == ([], [])


def test_no_accuracy_is_shown_of_a_policy_that_is_its_own_reference():
    """Before the first step of an iteration, and in it: all rewards are 0 there."""
    train, held_out = "rewards/accuracies", "eval_rewards/accuracies"
    history = [
        {"step": 0, held_out: 0.0},
        {"step": 0, "sera/iteration": 1.0},
        {"step": 1, train: 0.0},
        {"step": 2, train: 0.6},
        {"step": 2, held_out: 0.7},
        {"step": 2, "sera/iteration": 2.0},
        {"step": 3, train: 0.1},
        {"step": 4, train: 0.8},
        {"step": 4, held_out: 0.9},
    ]
    assert curve(history, train) == ([2, 4, 4], about([0.6, math.nan, 0.8], nan_ok=True))
    assert curve(history, held_out) == ([2, 4, 4], about([0.7, math.nan, 0.9], nan_ok=True))


_FIRST = "selection keeps them first"
SWAPPED = np.arange(12) % 4 == 0


def shown(run: Run, row: int) -> str:
    texts = Texts(run)
    return show_pair(describe_pair(run, row, texts), texts)


@pytest.mark.parametrize(
    ("block", "keys", "said", "unsaid"),
    [
        ({}, {"iterations": 1}, "Sampled answers", "margin, nats"),
        ({}, {"iterations": 2}, "margin, nats<", "the ensemble exchanged"),
        ({"gamma": 0}, {"iterations": 7}, "Iteration 7: offline pairs", "the ensemble exchanged"),
        ({"bootstrap_ratio": 0}, {}, "<dd>nothing</dd>", '<section id="samples">'),
        ({"selection_ratio": 0}, {}, "Iteration 3: sampled pairs", "offline pairs above"),
        ({"selection_ratio": 1}, {}, "Iteration 3: all offline pairs are kept", "pairs above"),
        ({"selection_ratio": 1, "bootstrap_ratio": 1}, {"pairs": 1}, "<dd>1 of the",
         "0.5 of"),
        ({}, {"held_out": 0}, "of offline pairs, ", "pairs are held out"),
        ({"candidates": 6, "bootstrap_ratio": 2.5}, {}, "2.5 times as many pairs, of 6 answers",
         "nats per token<"),
        ({"loss": "ipo"}, {}, "nats per token<", "nats<"),
        ({"loss": "simpo"}, {}, "<dd>none</dd>", "nats<"),
        ({"selection": "reference_logp"}, {}, "<dd>0.5 of the pairs (by reference_logp)</dd>",
         _FIRST),
        ({"selection": "random"}, {}, "<dd>0.5 of the pairs (at random)</dd>", _FIRST),
        ({"length_control": "auto", "offline_length_control": 0.5}, {},
         "<dd>0.5 of the pairs (the largest margins)</dd>", _FIRST),
        ({"reference": "initial"}, {}, "All iterations have the initial policy as reference",
         "Each iteration starts from its own"),
        ({}, {}, f"and {_FIRST}", "<dd>the initial policy</dd>"),
        # A run that keeps everything has no choice to compare.
        ({"selection": "all", "selection_ratio": 1.0, "bootstrap_ratio": 0}, {},
         "<dd>all pairs</dd>", "Jaccard index of"),
        # Three prompts of four pairs each: iteration t has each prompt's t-th.
        ({"selection": "curriculum", "selection_ratio": 1, "score_columns": ["gap"]},
         {"annotations": Annotations(np.arange(12.0), np.arange(12) // 4, SWAPPED),
          "scores": {"gap": list(range(12))}},
         "<dd>each prompt&#39;s t-th easiest pair</dd>", "never influence"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, dict) else "",
)  # fmt: skip
def test_every_system_has_a_report(tmp_path, block, keys, said, unsaid):
    run = Run(make_run(tmp_path, sera={"bootstrap_ratio": 0.5, **block}, **keys))
    page, found = render(run), figures(run)["iterations"]
    assert "SeRA run, <strong>finished</strong>" in page
    assert not run.notes
    assert said in page
    assert unsaid not in page
    if block.keys() & {"selection", "length_control"}:
        assert found[-1]["threshold"] is None
    assert ("<dd>the initial policy</dd>" in page) == ("reference" in block)
    if "length_control" in block:
        assert found[-1]["bootstrapped_ensemble"] is None
    if "score_columns" in block:
        assert "sera.selection: curriculum chooses pairs by the first of them" in page
        assert [(one["kept"], one["dropped"]) for one in found] == [(3, 9)] * 3
        assert all("label_noise" not in one for one in found)


def test_swapped_labels_are_counted_and_marked(tmp_path):
    run = Run(make_run(tmp_path, annotations=Annotations(swapped=SWAPPED)))
    last, kept = figures(run)["iterations"][-1], run.iterations[-1].offline["selected"]
    assert last["label_noise"]["swapped"] == 3
    assert last["label_noise"]["recall"] == (SWAPPED & ~kept).sum() / 3
    assert last["label_noise"]["precision"] == (SWAPPED & ~kept).sum() / (~kept).sum()
    page = render(run)
    assert "of the 3 labels swapped on purpose" in page
    assert "swapped on purpose</" in page
    assert "label: swapped on purpose" in shown(run, 4)
    assert "swapped" not in shown(run, 5)
    doubted = np.flatnonzero(run.iterations[-1].margin < 0)
    listed = show_suspects(run, suspects(run, 12, Texts(run))).splitlines()[1 : 1 + len(doubted)]
    said = {int(line.split()[0]): line.endswith("swapped on purpose") for line in listed}
    assert said == {row: SWAPPED[row] for row in doubted}


def test_spins_report_tells_the_datasets_answers_from_samples(tmp_path):
    """Candidates 0 and 1 are samples of 2 and 3 tokens, 2 is the chosen answer of 4."""
    block = {"labeler": "spin", "selection_ratio": 0, "bootstrap_ratio": 1, "candidates": 2}
    store = make_run(tmp_path, sera=block)
    run = Run(store)
    assert not run.notes
    first = figures(run)["iterations"][0]
    assert (first["kept"], first["dropped"]) == (0, 12)
    assert first["pairs"]["bootstrapped_kept"] == 12
    assert first["samples"]["sampled"] == 24
    assert first["lengths"]["sampled"] == 2.5
    assert first["lengths"]["bootstrapped_chosen"] == 4
    page = render(run)
    row = page[page.index('<th scope="row">1</th>') :].split("</tr>")[0]
    assert [cell.split("<")[0] for cell in row.split("<td>")[1:4]] == ["12", "0", "12"]
    assert "The dataset's chosen answers before samples of the policy after iteration 2" in page
    assert "implicit reward tells apart" not in page
    assert "Jaccard index of" not in page
    said = shown(run, 3)
    assert "candidate 2: reward +1.000, 4 tokens, from the dataset, chosen in a pair" in said
    assert "candidates have rewards of labeler: spin" in said
    # A run that samples from its first step lacks what is missing of it.
    store.table_file(1, "candidates").unlink()
    assert Run(store).notes == ["sera/iteration-01/candidates.parquet is missing"]


def test_samples_that_a_reward_without_trust_never_asked_for_are_not_missing(tmp_path):
    store = make_run(tmp_path, sera={"reward": "fitted", "trust": "act"}, held_out=2)
    run = Run(store)
    wanted = [one["pairs"]["bootstrapped_wanted"] for one in figures(run)["iterations"]]
    assert wanted == [0, 0, 0]
    assert not store.table_file(2, "candidates").exists()
    assert run.notes == []
    store.table_file(2, "offline").unlink()
    assert Run(store).notes == ["sera/iteration-02/offline.parquet is missing"]


class _Judge(Labeler):
    """Likes longer answers; has no verdict on the third of a prompt."""

    def rewards(self, ranked):
        number = np.arange(len(ranked.answers)) % ranked.per_prompt
        return np.where(number == 2, np.nan, number * 1.0)


def test_a_judges_rewards_are_not_taken_for_nats(tmp_path):
    run = Run(make_run(tmp_path, sera={"labeler": "self_judge"}, labeler=_Judge))
    page, said = render(run), shown(run, 3)
    assert "that its own verdict in words tells apart most" in page
    assert "12 (25%)" in page  # of the 48 samples got no verdict
    assert "candidate 2: reward -, 4 tokens" in said
    assert "in its own unit" in said
