"""The claims harness at toy size, its statistics by hand, and the page in step with the results."""

import json
import math
import re
from random import Random

import numpy as np
import pytest

from benchmarks.claims import __main__ as command
from benchmarks.claims import (
    claims,
    criteria,
    measure,
    page,
    real,
    runs,
    systems,
    tables,
    world,
)
from benchmarks.claims.estimates import Comparison, Estimate, Results, Side, after, during, final
from benchmarks.claims.real_tables import real_table
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir.journal import Journal
from sera_plugin.tools.demo.world import true_reward

SYSTEMS = (*systems.CORE, *(one for sweep in systems.SWEEPS.values() for one in sweep))


def record(system: str, seed: int, rewards: list[float], noise: float = 0.2) -> dict:
    policies = [{"true_reward": value, "win_rate": value, "words": 6.0} for value in rewards]
    return {"system": system, "noise": noise, "seed": seed, "policies": policies, "iterations": []}


def test_the_pages_have_what_the_results_say():
    for path, text in page.render().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make docs`"


def test_kept_results_are_of_systems_and_worlds_that_exist():
    kept = [one for one in page.read() if "policies" in one]
    assert kept
    known = {(one.name, noise): one for one in SYSTEMS for noise in one.noises}
    worlds = {one.key: one for one in world.WORLDS.values()}
    for one in kept:
        system = known[one["system"], one["noise"]]
        run = runs.Run(system, one["noise"], one["seed"], worlds[one["world"]])
        assert run.key == one["key"], f"{one['system']} is another system now"
        assert one["versions"].keys() == set(command.PACKAGES)
    assert len({one["key"] for one in kept}) == len(kept)
    assert "| no |" not in tables.criteria_table(page.read())
    assert not set(criteria.SEEDS) & {*systems.SEEDS, *systems.FRESH}


#: A sentence's words, and where its figures come from: learning rate, system, figure, swapped.
LAST, ORDER = final("true_reward"), "order_found"
SAID = {
    "it ends {} below it": ("1e-4", "SeRA", "iterative DPO", 0.2),
    "at 3e-5 it is {} below": ("3e-5", "SeRA", "iterative DPO", 0.2),
    "ahead, by {}.": ("1e-5", "SeRA", "iterative DPO", 0.2),
    "{} of the pairs at 1e-4": ("1e-4", "SeRA", during(2, ORDER), 0.2),
    "{} at 1e-5 (20 % swapped)": ("1e-5", "SeRA", during(2, ORDER), 0.2),
    "are so at 1e-5 ({})": ("1e-5", "SeRA", during(3, ORDER), 0.2),
    "than by a coin ({})": ("3e-5", "SeRA", during(3, ORDER), 0.2),
    "mostly in reverse ({})": ("1e-4", "SeRA", during(3, ORDER), 0.2),
    "iterations ({}": ("3e-5", "SeRA", after(2, "true_reward"), 0.2),
    "and {}) and falls": ("3e-5", "iterative DPO", after(2, "true_reward"), 0.2),
    "falls to {} in the third": ("3e-5", "SeRA", LAST, 0.2),
    "from 0 ({})": ("1e-4", "SeRA, gamma 0", LAST, 0.2),
    "to 0.9 ({})": ("1e-4", "SeRA, gamma 0.9", LAST, 0.2),
    "samples as badly ({})": ("1e-4", "SeRA", during(3, "order_since_initial"), 0.2),
    "nearly always ({})": ("1e-4", "SeRA", during(3, "order_likelihood"), 0.2),
    "collapses at 1e-4 ({})": ("1e-4", "iterative SimPO", LAST, 0.2),
    "with SeRA it ends at {},": ("1e-4", "SeRA, SimPO", LAST, 0.2),
    "a tenth of N ends at {}": ("1e-4", "SeRA, 10% sampled", LAST, 0.2),
    "three N at {};": ("1e-4", "SeRA, k~ = 3 N", LAST, 0.2),
    "alone ends at {}.": ("1e-4", "SeRA, bootstrap only", LAST, 0.2),
    "it drops {} of them": ("1e-4", "SeRA, selection only", during(2, "recall"), 0.2),
    "with 40 % swapped, {}.": ("1e-4", "SeRA, selection only", during(2, "recall"), 0.4),
    "log-probabilities ({})": ("1e-4", "selection by reference", LAST, 0.2),
    "judge's score ({})": ("1e-4", "selection by score", LAST, 0.2),
    "than by margin ({})": ("1e-4", "SeRA, selection only", LAST, 0.2),
    "reaches {} at 1e-4": ("1e-4", "iterative DPO", LAST, 0.2),
    "shorter ({} words": ("1e-4", "SeRA, length control", final("words"), 0.2),
    "instead of {} at 1e-4": ("1e-4", "SeRA", final("words"), 0.2),
}


def test_every_figure_in_the_prose_is_that_of_the_results():
    text = re.sub(r"<!-- .*?<!-- end.*?-->", "", page.PAGES[0].read_text(), flags=re.DOTALL)
    prose = " ".join(" ".join(line for line in text.splitlines() if line[:1] != "|").split())
    records = page.read()
    worlds = [world.WORLDS[name] for name in page.TESTED]
    results = {tables.step_size(one): tables.compared(records, one) for one in worlds}
    others = prose
    for words, (rate, system, other, noise) in SAID.items():
        if isinstance(other, str):
            one = Comparison("", noise, Side(system), Side(other)).estimate(results[rate])
        else:
            one = Estimate.over(list(results[rate].of(system, noise, other).values()))
        mean = -one.mean if "below" in words else one.mean
        said = words.format(f"{mean:.{2 if mean > 2 else 3}f}")
        assert said in prose
        others = others.replace(said, words.format(""))
    assert not re.findall(r"\d\.\d{2,}", others)


def test_an_interval_is_students_and_a_verdict_is_where_it_lies():
    # Mean 2, standard deviation 1, three values: t(0.975, 2) = 4.302653, error 1 / sqrt 3.
    found = Estimate.over([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2.0 - found.low == pytest.approx(found.high - 2.0)
    for values, verdict in (
        ([1.0, 1.1, 0.9], "reproduced"),
        ([-1.0, -1.1, -0.9], "reversed"),
        ([-1.0, 0.1, 0.9], "not reproduced"),
        ([1.0, 1.1], "not measured"),
        ([], "not measured"),
    ):
        assert Estimate.over(values).verdict == verdict


def test_differences_are_paired_by_seed():
    # Seeds differ by 1, systems by 0.1; seed 9 has no partner.
    ours = [record("a", seed, [seed + 0.1]) for seed in (0, 1, 2, 9)]
    theirs = [record("b", seed, [float(seed)]) for seed in (2, 1, 0)]
    found = Comparison("a - b", 0.2, Side("a"), Side("b")).estimate(Results(ours + theirs))
    assert (found.seeds, found.low, found.high) == (3, pytest.approx(0.1), pytest.approx(0.1))
    assert Comparison("", 0.4, Side("a"), Side("b")).estimate(Results(ours)).seeds == 0
    constant = Comparison("", 0.2, Side("a"), Side(None, constant=0.3))
    assert constant.estimate(Results(ours[:1])).mean == pytest.approx(-0.2)
    one = record("a", 0, [0.1, 0.2]) | {"iterations": [{"recall": None}, {"recall": 0.4}]}
    figures = [final("true_reward"), *(after(t, "true_reward") for t in (1, 3))]
    figures += [during(t, "recall") for t in (1, 2)]
    assert [figure(one) for figure in figures] == [0.2, 0.1, None, None, 0.4]


def test_the_best_and_worst_of_a_ranking_are_compared_by_true_reward():
    reward = np.array([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
    true = np.array([[0.2, 0.7, 0.0], [0.1, 0.4, 0.9]])
    assert measure.extremes(reward, true) == pytest.approx([0.7 - 0.2, 0.1 - 0.4])


def test_criteria_look_at_baselines_only():
    base = {"true_reward": 0.6, "spread": 0.2, "words": 6.0}
    run = record(criteria.SYSTEM, 100, [0.7, 0.8, 0.8], noise=0.0)
    run["policies"][-1]["words"] = 6.7
    found = criteria.check([base], [run])
    assert [one.holds for one in found] == [True] * 5
    run["policies"][-1]["words"] = 6.1
    assert [one.holds for one in criteria.check([base], [run])] == [True, True, True, False, False]


def test_a_judges_scores_are_bradley_terry():
    # Equal true reward, two words more: log-odds 2 x 0.2 of being preferred.
    random = Random(0)
    prompt, short, long = "c b a d e f", "a b c", "um a b c um"
    wins = 0
    for _ in range(4000):
        one, other = (
            world.judged(true_reward(prompt, text), text, world.LABELLING, random)
            for text in (long, short)
        )
        wins += one.score > other.score
    expected = 1 / (1 + math.exp(-0.4))
    error = math.sqrt(expected * (1 - expected) / 4000)
    assert wins / 4000 == pytest.approx(expected, abs=4 * error)


def test_a_pair_has_the_higher_score_chosen_and_equal_answers_none():
    low, high = world.Answer("a", 0.9, -1.0), world.Answer("b", 0.1, 2.0)
    row = world.pair("b a", low, high)
    assert (row["chosen"], row["true_chosen"], row["score_rejected"]) == ("b", 0.1, -1.0)
    assert world.pair("b a", low, low) is None


def test_a_systems_lines_are_a_sera_block_and_comparisons_are_of_those_that_are_run(tmp_path):
    for system in SYSTEMS:
        run = runs.Run(system, 0.2, 0, world.WORLD)
        assert SeraConfig(**runs.config(run, tmp_path, tmp_path)["sera"]).label_noise == 0.2
        assert run.key != runs.Run(system, 0.4, 0, world.WORLD).key
    assert len({one.name for one in SYSTEMS}) == len(SYSTEMS)
    with pytest.raises(SystemExit, match="no system is called 'SERA'"):
        command.chosen(systems.CORE, ["SERA"])
    known = {(one.name, noise) for one in SYSTEMS for noise in one.noises}
    compared = [one for claim in (*claims.CLAIMS, *claims.OURS) for one in claim.comparisons]
    for one in compared:
        for side in (one.more, one.less):
            assert side.system is None or (side.system, one.noise) in known, one.label


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_is_measured_kept_and_not_made_again_and_one_that_fails_says_where(
    tmp_path, monkeypatch
):
    spin = ["--smoke", "--directory", str(tmp_path), "--only", "SPIN"]
    command.main(spin)
    lines = (tmp_path / "smoke.jsonl").read_text().splitlines()
    (one,) = [record for record in map(json.loads, lines) if "policies" in record]
    assert len(one["policies"]) == len(one["iterations"]) == 3
    assert 0 <= one["policies"][-1]["true_reward"] <= 1
    assert np.isfinite(one["policies"][-1]["r2_true"])
    assert 0 <= one["iterations"][-1]["order_likelihood"] <= 1
    job = runs.Job("a run", real.read_pairs, (), tmp_path / "scratch")  # which is a directory
    with pytest.raises(RuntimeError, match=r"a run failed: IsADirectoryError: .*log\.txt"):
        list(runs.perform_all([job], 1))
    assert "IsADirectoryError" in (tmp_path / "scratch" / "log.txt").read_text()
    monkeypatch.setattr(command, "perform_all", lambda *_: pytest.fail("ran again"))
    command.main(spin)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_dataset_with_scores_and_a_model_take_the_same_questions(tmp_path):
    """The world's own files, as a dataset and a model that somebody brings."""
    place, held_out = tmp_path / "world", tmp_path / "held-out.jsonl"
    pairs, base = place / "pairs.jsonl", place / "base-model"
    toy = runs.Job("world", runs.build, (world.SMOKE, 0, place, None), tmp_path / "scratch-world")
    list(runs.perform_all([toy], 1))
    with held_out.open("w") as file:
        for row in real.read_pairs(pairs)[32:]:
            responses = [
                {"text": row[s], "score": row[f"score_{s}"]} for s in ("chosen", "rejected")
            ]
            file.write(json.dumps({"prompt": row["prompt"], "responses": responses}) + "\n")
    settings = real.Settings(pairs=32, tokens=40, batch=16)
    arguments = (real.SYSTEMS[1], settings, 0, pairs, base, held_out)
    job = runs.Job("real", real.perform, arguments, tmp_path / "scratch")
    [(_, selected)] = runs.perform_all([job], 1)
    assert selected["pairs"] == 32
    assert [one["iteration"] for one in selected["iterations"]] == [2, 3]
    kept = selected["iterations"][0]["kept"]
    assert kept["score"]["score_gap"] >= max(one["score_gap"] for one in kept.values())
    assert kept["irm"]["jaccard_irm"] == 1.0
    assert kept["none"]["jaccard_irm"] == pytest.approx(22 / 32, abs=1e-5)
    answers = selected["held_out"]
    assert answers["answers"] == 2 * answers["prompts"] > 0
    assert len(answers["policies"]) == 3
    assert all(0 <= one["r2_score"] <= 1 and 0 <= one["order"] <= 1 for one in answers["policies"])
    table = real_table([selected])
    assert "| selection by irm | 2 |" in table
    assert f"on {answers['answers']} scored answers to {answers['prompts']} other" in table
    few = real.Settings(tokens=40, batch=4, judged=4)
    arguments = (real.SELF_JUDGING, few, 0, pairs, base, None)
    job = runs.Job("judged", real.perform, arguments, tmp_path / "scratch-judged")
    [(_, judged)] = runs.perform_all([job], 1)
    # This model knows no word of the judge's prompt, and writes no score.
    replies = judged["self_judging"]
    assert (judged["pairs"], replies["found"]) == (4, 0)
    assert replies["replies"] == replies["unparsed"] > 0


@pytest.mark.parametrize(
    ("read", "row", "said"),
    [
        (real.read_pairs, {"chosen": "b", "rejected": "c", "score_chosen": 1.0}, "score_rejected"),
        (real.read_responses, {"responses": ["an answer"]}, "a response"),
        (real.read_responses, {"responses": [{"text": "an answer"}]}, "a response"),
        (real.read_responses, {"responses": [{"score": 1.0}]}, "a response"),
    ],
)
def test_a_file_without_scores_is_refused_by_line(read, row, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", **row}) + "\n")
    with pytest.raises(ValueError, match=f"line 1 has (no )?{said}"):
        read(tmp_path / "rows.jsonl")


def test_a_second_run_says_how_many_figures_differ(tmp_path, monkeypatch):
    one, other, third = (
        runs.Run(system, 0.2, 0, world.SMOKE) for system in (systems.CORE[0], *systems.CORE[-2:])
    )
    found = {one.key: 0.5, other.key: 0.5}

    def again(asked, directory, journal, cores):
        assert [run.key for run in asked] == [one.key, other.key]
        for run in asked:
            journal.add(run.key, record(run.system.name, 0, [found[run.key]]) | {"seconds": 2.0})

    monkeypatch.setattr(command, "run_all", again)
    with Journal(tmp_path / "kept.jsonl") as journal:
        journal.add(one.key, record(one.system.name, 0, [0.5]) | {"seconds": 1.0})
        journal.add(other.key, record(other.system.name, 0, [0.6]) | {"seconds": 2.0})
        command.run_again([one, other, third], tmp_path, journal, 2)
    said = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert (said[-1]["again"]["runs"], said[-1]["again"]["differ"]) == (2, 1)
    assert f"| {said[-1]['again']['date']} | 2 | 1 |" in tables.again_table(said)
