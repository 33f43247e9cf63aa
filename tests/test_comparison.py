"""Systems compared where labelled pairs are held out: their worlds, figures, tables and rule."""

import json
import math
import re
from dataclasses import replace
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.claims import __main__ as command
from benchmarks.claims import (
    comparison,
    criteria,
    labelled,
    language,
    page,
    runs,
    systems,
    world,
)
from benchmarks.claims.estimates import Estimate
from benchmarks.harness import ROOT
from sera_plugin.config.sera import SeraConfig
from tests.test_claims import record

README = (ROOT / "README.md").read_text()


def test_kept_comparisons_are_of_systems_and_worlds_that_exist():
    records = [one for one in page.read(page.COMPARISON) if "policies" in one]
    assert records
    known = {one.name: one for one in systems.COMPARED}
    worlds = {
        at.key: at
        for of_task, rates in world.COMPARED.values()
        for at in (replace(of_task, learning_rate=rate) for rate in rates)
    }
    assert systems.COMPARED_SEEDS.keys() == world.COMPARED.keys()
    for one in records:
        run = runs.Run(known[one["system"]], one["noise"], one["seed"], worlds[one["world"]])
        assert run.key == one["key"], f"{one['system']} is another system now"
        assert one["kept"] in range(1, len(one["policies"]) + 1)
        assert one["seed"] in systems.COMPARED_SEEDS[worlds[one["world"]].task]
    assert len({one["key"] for one in records}) == len(records)


def compared_records(gains: dict[str, list[float]]) -> list[dict]:
    """Three seeds of two systems, whose kept policy differs by this at every rate of a world."""
    records = []
    for name, (of_task, rates) in world.COMPARED.items():
        for rate in rates:
            key = replace(of_task, learning_rate=rate).key
            for seed, gain in zip(systems.COMPARED_SEEDS[name], gains[name], strict=False):
                iterative = record(comparison.BASELINE, seed, [0.1, 0.5], noise=0.0)
                new = record(
                    comparison.SIDES[comparison.NEW][0], seed, [0.5 + gain, 0.0], noise=0.0
                )
                records += [
                    one | {"world": key, "kept": kept} for one, kept in ((iterative, 2), (new, 1))
                ]
    return records


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ({"fillers": [0.1, 0.11, 0.12], "language": [0.1, 0.11, 0.12]}, "`reward: fitted`"),
        ({"fillers": [-0.1, 0.11, 0.12], "language": [0.1, 0.11, 0.12]}, "`reward: fitted`"),
        ({"fillers": [-0.1, 0.11, 0.12], "language": [-0.1, 0.11, 0.12]}, "stay the paper's"),
        ({"fillers": [-0.1, -0.11, -0.12], "language": [0.1, 0.11, 0.12]}, "stay the paper's"),
        ({"fillers": [0.1, 0.11], "language": [0.1, 0.11, 0.12]}, "Not decided"),
    ],
)
def test_the_rule_for_the_defaults(gains, says):
    found = comparison.decision(compared_records({"letters": [0.1, 0.11, 0.12], **gains}))
    assert says in found.splitlines()[-1]
    assert "- letters, mean over rates: +0.110 (+0.085 to +0.135), 3 seeds" in found


def test_the_language_worlds_criteria_look_at_iterative_dpo_only():
    slow, middle, fast = (
        record(criteria.ITERATIVE, 100, rewards, noise=0.0)
        for rewards in ([0.5, 0.5, 0.5], [0.52, 0.54, 0.51], [0.6, 0.6, 0.4])
    )
    fast["policies"][-1]["drift"] = -0.8
    base = {"true_reward": 0.5, "spread": 0.1}
    found = criteria.check_language([base], [[slow], [middle], [fast]])
    assert [one.figure for one in found] == [0.1, pytest.approx(0.04), 0.8]
    assert all(one.holds for one in found)
    assert not criteria.check_language([base], [[slow], [slow], [fast]])[1].holds
    seeds = {*criteria.SEEDS, *criteria.LANGUAGE_SEEDS}
    assert not seeds & {*systems.SEEDS, *systems.FRESH}
    assert not seeds & {seed for seeds in systems.COMPARED_SEEDS.values() for seed in seeds}


def test_forms_of_the_language_world_can_be_kept_to():
    good = {
        "Describe {} in five": "A very quiet grey morning.",
        "Describe {} in ten": "It is a place where I like to sit down.",
        "At most six": "Wet and cold.",
        "at most ten": "Wet and cold.",
        "title of four": '"The Last Train Home"',
        "Ask one": "Do you like cats?",
        "One question": "Do you like cats?",
        "one short sentence about {}.": "I like cats.",
        "How do you": "I like cats.",
        "never": "I never like cats.",
        "because": "I like cats because they sleep.",
        "today": "Today I like cats.",
    }
    bad = "Cats. They sleep and sleep and sleep and sleep all day long, and then they eat"
    for form, kept_to in language.FORMS.items():
        (text,) = [text for words, text in good.items() if words in form]
        assert kept_to(text) == 1.0 > kept_to(bad) >= 0.0, form
    assert language.exactly(5, "One two three four.") == pytest.approx(0.8)
    assert language.at_most(4, "one two three four five six") == pytest.approx(0.5)
    texts = ("No", "No.", "Oh! So?", 'He said "no."', "Cats. And", "")
    assert [language.one_sentence(text) for text in texts] == [0, 1, 0, 1, 0, 0]


def test_the_language_worlds_truth_is_sentiment_and_form(monkeypatch):
    class Pleased:
        def polarity_scores(self, text: str) -> dict[str, float]:
            return {"compound": 0.5}

    monkeypatch.setattr(language, "_analyzer", Pleased)
    task, prompt = language.Language(), "Describe the sea in five words."
    assert task.parts(prompt, "Blue.") == {"sentiment": 0.75, "form": pytest.approx(0.2)}
    assert task.reward(prompt, "Blue.") == pytest.approx(0.475)
    assert task.reward(prompt, " ") == 0.0
    asked = task.prompts(Random(0), 600)
    others = task.prompts(Random(1), 500, taken=set(asked))
    assert len({*asked, *others}) == 1_100 <= len(language.PROMPTS)
    decoded = "user\nDescribe the sea in five words.\nassistant\n"
    assert task.prompt_of(decoded) == prompt


def test_fillers_disagree_with_likelihood():
    task = world.task_of("fillers")
    plain, right, long = "a b c d e f", "um a b c d e f so", "um so um so a b c d e f"
    rewards = [task.reward("f e d c b a", text) for text in (plain, right, long)]
    assert rewards == pytest.approx([0.4, 1.0, 0.4])


def test_a_share_of_pairs_is_swapped_with_all_that_is_known_of_them():
    rows = [
        world.pair("b a", world.Answer("a", 0.9, n), world.Answer("b", 0.1, -n))
        for n in range(1, 11)
    ]
    swapped = world.swap(rows, 0.2, Random(0))
    turned = [(old, new) for old, new in zip(rows, swapped, strict=True) if new != old]
    assert len(turned) == 2
    for old, new in turned:
        assert (new["chosen"], new["score_chosen"], new["true_chosen"]) == (
            old["rejected"],
            old["score_rejected"],
            old["true_rejected"],
        )
        assert (new["rejected"], new["prompt"]) == (old["chosen"], "b a")


def test_figures_of_held_out_pairs_by_hand():
    def scores(chosen: list[float], rejected: list[float]) -> pa.Table:
        columns = {"chosen_length": [2, 4], "rejected_length": [2, 4]}
        return pa.table({**columns, "chosen_logp": chosen, "rejected_logp": rejected})

    pairs = [{"true_chosen": 0.9, "true_rejected": 0.1}, {"true_chosen": 0.2, "true_rejected": 0.3}]
    base = scores([-4.0, -8.0], [-5.0, -6.0])
    # Gains: chosen 1 and -2, rejected -1 and 0; so margins 2 and -2.
    found = labelled.pair_figures(scores([-3.0, -10.0], [-6.0, -6.0]), base, pairs, beta=0.5)
    assert found == {
        "chosen_logp": -6.5,
        "rejected_logp": -6.0,
        "drift": pytest.approx((1 / 2 - 2 / 4) / 2),
        "accuracy": 0.5,
        "loss": pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2),
        "likelihood_accuracy": 0.5,
        "order": 1.0,
    }
    assert labelled.pair_figures(base, base, pairs, beta=0.5)["accuracy"] is None


def test_a_language_pair_is_of_the_first_two_whole_answers_that_differ():
    one, two, empty = (world.Answer(text, 0.5, 0.0) for text in ("A dog.", "A cat.", ""))
    compared = language.Language().compared
    assert compared([empty, one, one, two]) == [one, two]
    # None is made of these.
    assert world.pair("prompt", *compared([one, one, empty, one])) is None
    assert world.pair("prompt", *compared([empty] * 4)) is None


@pytest.mark.slow
@pytest.mark.nightly
def test_systems_are_compared_by_pairs_that_are_held_out_and_found_again(tmp_path, capsys):
    arguments = ["--compare", "--smoke", "--seeds", "50", "--rates", "1e-4", "--cores", "1"]
    arguments += ["--directory", str(tmp_path), "--only", "SeRA, fitted"]
    command.main([*arguments, "iterative DPO", "--keep", str(tmp_path / "kept")])
    records = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    (base,) = [one for one in records if one.get("system") == "base model"]
    fitted, iterative = (one for one in records if "policies" in one)
    (place,) = tmp_path.glob("world-*")
    pairs, held_out = (world.read_rows(place / f"{name}.jsonl") for name in ("pairs", "test"))
    assert base["pairs"] == len(pairs) > len(held_out) == world.SMALL["test_pairs"]
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in held_out}
    # One epoch on the same pairs: theta_1 is the same, and is asked once.
    assert iterative["policies"][0] == fitted["policies"][0]
    assert len(list((place / "answers").glob("*.json"))) == 5
    assert fitted["kept"] in (1, 2, 3)
    assert fitted["base"]["accuracy"] is None
    assert fitted["base"]["chosen_logp"] != fitted["policies"][0]["chosen_logp"]
    for one in fitted["iterations"][1:]:
        assert {"theta_0", "length"} < one["reward"]["weights"].keys()
        assert {"by_chance", "paper_accuracy", "followed"} < one["reward"].keys()
        assert 0 <= one["held_out_accuracy"] <= 1
        assert np.isfinite(one["outranking"])
    # The run's own scores and those of its last policy are of the same pairs.
    (kept,) = (tmp_path / "kept").glob("*-SeRA-fitted")
    tables = [pq.read_table(kept / at / labelled.EVALUATION) for at in ("sera/iteration-03", "")]
    assert tables[0].schema.equals(tables[1].schema)
    assert tables[0].drop(["chosen_logp", "rejected_logp"]) == tables[1].drop(
        ["chosen_logp", "rejected_logp"]
    )
    capsys.readouterr()
    command.main([*arguments, "--again"])
    assert re.search(r"1 runs in \d+ min, 0 gave other figures", capsys.readouterr().out)


def test_a_world_without_pairs_to_train_on_is_refused(tmp_path):
    few = world.World(**{**world.SMALL, "pairs": 4})
    with pytest.raises(ValueError, match=r"test_pairs: 8 .* out of \d pairs.*`pairs` \(4\)"):
        world.make_world(tmp_path / "world", few, 0, None)


def test_what_the_readme_and_the_findings_say_is_in_the_results():
    records = page.read(page.COMPARISON)
    readme, findings = (" ".join(text.split()) for text in (README, page.PAGES[0].read_text()))
    decided = comparison.decision(records)
    assert "- Worse than iterative DPO by the interval: nowhere." in decided
    assert "- Better in: letters, language." in decided
    ours = SeraConfig()
    says = f"`reward: {ours.reward}`, `trust: {ours.trust}` and `keep: {ours.keep}`."
    assert decided.endswith(f"So the defaults are {says}")
    assert "95 % interval, and better in two" in readme
    means = []
    for name in ("letters", "fillers"):
        for rate in world.COMPARED[name][1]:
            results = comparison.results_at(records, name, rate)
            found = comparison.gain(results, comparison.NEW)
            means.append(Estimate.over(list(found.values())).mean)
    assert f"it gains {min(means):.2f} to {max(means):.2f} in true reward" in readme

    # In language trust lets sampled pairs into two runs of fifteen, and `keep` does the rest.
    keys = {
        replace(world.COMPARED["language"][0], learning_rate=rate).key
        for rate in world.COMPARED["language"][1]
    }
    of = {name: {} for name in ("iterative DPO", "SeRA, fitted and trusted")}
    for one in records:
        if one.get("system") in of and one["world"] in keys:
            of[one["system"]][one["world"], one["seed"]] = one
    iterative, trusted = of.values()
    sampled = [
        key for key, one in trusted.items() if any(it["sampled"] for it in one["iterations"])
    ]
    assert len(trusted) == 15
    assert len(sampled) == 2
    assert "sampled pairs into two of fifteen runs" in findings
    last = {key for key in trusted if trusted[key]["policies"] == iterative[key]["policies"]}
    assert last == trusted.keys() - set(sampled)


def test_a_world_that_is_not_compared_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        command.main(["--compare", "--world", "fixed"])
    assert "--world fixed is not among letters, fillers, language" in capsys.readouterr().err
