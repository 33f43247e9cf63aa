"""The benchmark harness at toy size, and the page in step with the results."""

import importlib
import json
from pathlib import Path
from random import Random
from statistics import mean

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness, many_ranks, report, scoring, step, workload


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.name)
def test_pages_have_what_the_results_say(path):
    page = path.read_text(encoding="utf-8")
    assert page == report.render(page, report.PAGES[path]), "run `make docs`"
    assert sorted(part for parts in report.PAGES.values() for part in parts) == sorted(report.PARTS)


@pytest.mark.parametrize("part", report.PARTS)
def test_kept_results_are_of_five_rounds_and_a_known_machine(part):
    paths = sorted((report.RESULTS / part).glob("*.json"))
    if not paths:
        assert report.tables(part) == report.NOTHING
    for path in paths:
        kept = json.loads(path.read_text(encoding="utf-8"))
        once = getattr(importlib.import_module(f"benchmarks.{part}"), "ROUNDS", None)
        assert kept["about"]["rounds"] == once or (
            once is None and kept["about"]["rounds"] >= command.FEWEST_ROUNDS
        )
        assert kept["about"]["commit"]
        assert kept["about"]["cpu"]
        assert path.name.startswith(kept["about"]["device"])


def test_sides_take_turns_and_a_ratio_is_taken_round_by_round():
    seen = []
    sides = {name: lambda name=name: seen.append(name) or len(seen) for name in "ab"}
    results = harness.interleave(sides, 2, warm_up=True)
    assert seen == ["a", "b"] * 3
    assert results == {"a": [3, 5], "b": [4, 6]}
    # Medians of the sides are 10 and 10; of the ratios it is 2.
    assert harness.times([10.0, 40.0, 4.0], [10.0, 20.0, 2.0]) == "2.00 (1.00 to 2.00)"
    assert harness.figure([1234.4, 1000.0, 2000.0]) == "1,234 (1,000 to 2,000)"


def test_lengths_have_the_deciles_they_were_made_from():
    found = workload.lengths(workload.ANSWER_DECILES, 1000, Random(0))
    expected = np.array(workload.ANSWER_DECILES[1:-1]) / workload.CHARACTERS_PER_TOKEN
    np.testing.assert_allclose(np.quantile(found, np.linspace(0.1, 0.9, 9)), expected, rtol=0.03)
    rows = workload.make_rows(50, 512, 128)
    longest = max(len(r["prompt"].split()) + len(r["chosen"].split()) for r in rows)
    assert longest <= 127  # and the end token
    assert rows == workload.make_rows(50, 512, 128)
    assert mean(len(r["prompt"].split()) for r in rows) > 10


def test_shapes_are_those_they_are_named_after():
    for name, size in (("tinyllama-1.1b", 1_100_048_384), ("mistral-7b", 7_241_732_096)):
        config = workload.AutoConfig.for_model(**workload.SHAPES[name], tie_word_embeddings=False)
        with torch.device("meta"):
            model = workload.AutoModelForCausalLM.from_config(config)
        assert sum(weight.numel() for weight in model.parameters()) == size


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_or_a_model_for_data_it_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        command.main(["--data", "x.jsonl"])
    assert "--data needs --model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"needs a CUDA GPU.*`make bench` measures on the CPU"):
        command.main(["--device", "cuda", "--shape", "tinyllama-1.1b", "mistral-7b"])


def test_both_sides_score_the_same_pairs_and_a_toy_is_not_kept(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(scoring, "BATCHES", (1, 2))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    command.main(["--shape", "toy", "--rounds", "1", "--pairs", "3", "--only", "scoring"])
    printed = capsys.readouterr().out
    assert "3 pairs, " in printed
    assert "| `score_sequences` | " in printed
    assert "not kept" in printed
    assert list(tmp_path.iterdir()) == []


def test_configurations_of_both_sides_are_one_but_for_the_method(tmp_path):
    setup = harness.Setup("cpu", "toy", 1, None, None, None, Path(tmp_path))
    from benchmarks.host import host_config

    config = host_config(setup, workload.make_model(setup), tmp_path / "rows.jsonl")
    for changes in step.SIDES.values():
        assert changes.keys() & config.keys() == {"rl"}


@pytest.mark.slow
@pytest.mark.nightly
def test_two_of_many_ranks_go_through_a_run_and_find_the_same(tmp_path):
    setup = harness.Setup("cpu", "toy", 1, 300, None, None, Path(tmp_path))
    result = many_ranks.measure(setup)
    [(main, other)] = result["runs"].values()
    assert main["trained"] == other["trained"]
    assert main["summed"] == other["summed"]
    assert main["chunks"] == 2  # of two iterations; the others have sampled the rest
    assert other["chunks"] > 2
    assert f"| memory at most, rank 1, GiB | {other['peak'] / 2**30:.2f} |" in many_ranks.table(
        result
    )
