"""A Python function as a judge and labeler: whatever it does costs a score, not the run."""

import json
import re
import sys
from operator import eq
from pathlib import Path
from time import monotonic

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from sera_plugin.algorithm.fit import fit_weights, judged
from sera_plugin.config.labelers import FunctionConfig, require_held_out
from sera_plugin.config.sera import SeraConfig
from sera_plugin.labeling.judging import Answered, JudgeFailed, Replies, Usage, make_judge
from sera_plugin.labeling.judging.function import FunctionJudge
from sera_plugin.rundir.journal import Journal
from sera_plugin.tools.report.page import write_report
from sera_plugin.tools.report.reading import Run, find_run
from tests.conftest import summary, table, write_rows

CHECKS = """
import os
import subprocess
import sys
import time
from helper import ONE

def score(question, answer):
    print("said on standard output")
    os.write(1, b"{}\\n")
    what = {
        "hangs": lambda: time.sleep(600),
        "starts": lambda: subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"]),
        "exits": lambda: os._exit(3),
        "crashes": lambda: os.kill(os.getpid(), 11),
        "leaves": lambda: sys.exit(1),
        "raises": lambda: [][ONE],
        "text": lambda: "7",
        "nan": lambda: float("nan"),
        "large": lambda: 10 ** 400,
        "unknown": lambda: None,
        "forks": lambda: time.sleep(0.2) or 9 if os.fork() else 5,
    }
    return what[answer]() if answer in what else len(answer) * ONE

def by_column(question, answer, /, *, reference, weight=1, **others):
    return float(answer == reference) * weight + len(others)

def whole(question, answer, **others):
    return len(others)

def asks(question): pass
def fails(question, answer): raise KeyError(answer)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A judge of a function in checks.py, which stands beside a module that it imports."""
    monkeypatch.chdir(tmp_path)
    Path("checks.py").write_text(CHECKS, encoding="utf-8")
    Path("helper.py").write_text("ONE = 1\n", encoding="utf-8")

    def judge(name, columns=(), **keys):
        config = FunctionConfig(call=f"checks.py:{name}", **keys)
        return FunctionJudge(config, Journal(tmp_path / "scores.jsonl"), columns)

    return judge


def scores(judge, *answers):
    found = dict(
        judge.score([Answered("q", one, row=f"row {at}") for at, one in enumerate(answers)])
    )
    judge._journal.close()
    return [found[at] for at in range(len(answers))]


def test_whatever_a_call_does_costs_its_score_and_no_more(make, sera_log):
    trouble = ("hangs", "starts", "exits", "crashes", "leaves", "raises", "text", "nan", "large")
    judge, began = make("score", timeout=1), monotonic()
    found = scores(
        judge, *(one for bad in trouble for one in (bad, "ok" + bad)), "unknown", "é日\0"
    )
    assert found == [one for bad in trouble for one in (None, 2 + len(bad))] + [None, 3]
    assert judge.usage == Usage(Replies(20), failed=9, unparsed=1)
    assert monotonic() - began < 60
    for said in (
        r"gave no score in 9 of 20 calls \(", r"2 took longer than 1 s",
        r"longer than 1 s .`timeout`. on the question of row (0 'q' .* 'hangs'|2 'q' .* 'starts')",
    ):  # fmt: skip
        assert re.search(said, sera_log.text)
    here = psutil.Process().children(recursive=True)
    assert not [one for one in here if "checks.py" in " ".join(one.cmdline())]
    # What has a score is not asked again; what had none is.
    Path("helper.py").write_text("ONE = 2\n", encoding="utf-8")
    assert scores(make("score"), "okhangs", "crashes", "okraises", "new") == [7, None, 8, 6]
    assert "ended its process (SIGSEGV) on the question of row 1" in sera_log.text
    Path("checks.py").write_text(CHECKS + "\n", encoding="utf-8")
    assert scores(make("score"), "okhangs") == [14]


def test_a_function_that_always_fails_stops_with_its_reason(make):
    many = make("fails", processes=3)
    with pytest.raises(
        JudgeFailed, match=r"checks.py:fails gave no score in 1\d of 1\d calls: rai"
    ):
        scores(many, *(f"a{at}" for at in range(50)))
    said = (
        r"in 10 of 10 calls: raised KeyError: '(a\d+)' on the question of row \d+ 'q' and .* '\1'\."
    )
    with pytest.raises(JudgeFailed, match=said):
        scores(make("fails"), *(f"a{at}" for at in range(50)))
    with pytest.raises(JudgeFailed, match=r"must return a finite number, or None"):
        scores(make("score"), "nan", "text")
    assert scores(make("score"), "nan", "text", "a") == [None, None, 1]
    # Of a call that forks the first process answers, and no other.
    assert scores(make("score"), *["forks", "a", "forks", "bb", "ccc"] * 2) == [9, 1, 9, 2, 3] * 2
    # The answers to the first few prompts fail, and all others do not.
    assert scores(make("score"), *["nan"] * 12, *["ok"] * 388) == [None] * 12 + [2] * 388


def test_no_process_outlives_a_judge_that_fails(make):
    judge, began = make("score", processes=2, timeout=300), monotonic()
    with pytest.raises(JudgeFailed) as failed:
        scores(judge, "hangs", *["nan"] * 14)
    here = psutil.Process().children(recursive=True)
    assert not [one for one in here if "checks.py" in " ".join(one.cmdline())]
    assert failed.value.__traceback__ is not None  # which holds all that had been under way
    assert monotonic() - began < 200


def test_it_takes_columns_of_the_row_by_their_names(make):
    judge = make("by_column", ("reference", "weight", "id"))
    rows = ({"reference": "a", "weight": 3, "id": 1}, {"reference": "b", "weight": 3, "id": 2}, {})
    asked = [Answered("q", "a", json.dumps(one)) for one in rows]
    with pytest.raises(JudgeFailed, match=r"TypeError"):
        scores(judge, "a")  # weight is null there
    assert dict(make("by_column", ("reference",)).score_all(asked)) == {0: 1, 1: 0, 2: 0}
    for name, columns, said in (
        ("by_column", ("weight",), r"takes 'reference' beside .*sera.score_columns \('weight'\)"),
        ("by_column", (), r"takes 'reference' .*it is empty"),
        ("by_column", None, r"takes 'reference' .*nothing else is given here. Give"),
        ("asks", (), r"checks.py:asks has to take two arguments: a question .of a check: the pr"),
        ("none", (), r"checks.py:none is no function of that file"),
    ):
        with pytest.raises(ValueError, match=said):
            make(name, columns)


def test_a_column_that_is_called_like_the_question_is_not_it(make):
    about = json.dumps({"question": "another", "reference": "a"})
    judge = make("whole", ("reference", "question"))
    assert dict(judge.score_all([Answered("q", "a", about)])) == {0: 1}


def test_a_module_is_looked_for_where_this_process_does(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "mine.py").write_text("def f(question, answer):\n    return 2.5\n")
    judge = make_judge("mine:f", Journal(tmp_path / "scores.jsonl"))
    assert scores(judge, "a") == [2.5]


def test_a_score_counts_by_what_it_explains():
    """Labels that follow a score alone, beside log-probabilities that say nothing."""
    random = np.random.default_rng(1)
    for pairs, least, most in ((4, -1.5, 1.5), (4000, 1.8, 2.2)):
        implicit, score = random.normal(size=(2, pairs))
        agrees = random.random(pairs) < 1 / (1 + np.exp(-2 * score))
        sign = np.where(agrees, 1, -1)
        differences = (
            np.stack([implicit, -implicit, np.zeros(pairs), score], axis=1) * sign[:, None]
        )
        found = judged((1.0, -1.0), differences, True, ["function"])
        assert least < found.scores[0] * np.sqrt(np.mean(score**2)) < most
    record = found.record([1, 0])
    assert list(record["weights"]) == ["theta_1", "theta_0", "length", "function"]
    assert record["accuracy"] > record["paper_accuracy"] + 0.2
    weights, _ = fit_weights(differences, np.array([1.0, -1.0, 0.0, 0.0]))
    np.testing.assert_array_equal([*found.weights, found.length, *found.scores], weights)
    # A score that is the same everywhere explains nothing.
    assert judged((1.0, -1.0), differences * [1, 1, 1, 0], True, ["function"]).scores == [0.0]


def test_several_labelers_need_pairs_that_are_held_out():
    mixed = SeraConfig(labeler=["implicit", "function"], function="a.py:f")
    assert SeraConfig(**mixed.model_dump(mode="json")) == mixed
    assert SeraConfig(labeler=["implicit"]).labeler == "implicit"
    for config, pairs in ((mixed, 1), (SeraConfig(), 0)):
        require_held_out(config, pairs)
    with pytest.raises(ValueError, match=r"none are held out. Set sera.held_out, val_set_size"):
        require_held_out(mixed, 0)


def test_a_function_and_the_implicit_reward_rank_together(
    base_config, train, tmp_path, monkeypatch
):
    """Its score alone agrees with the labels: chosen answers have more words of the reference."""
    monkeypatch.chdir(tmp_path)
    Path("checks.py").write_text(
        "def score(question, answer, reference):\n"
        "    if answer.startswith('a'):\n        return None\n"
        "    return sum(a == b for a, b in zip(reference.split(), answer.split()))\n",
        encoding="utf-8",
    )
    for name in ("train", "test"):
        given = Path(base_config["datasets"][0]["path"]).with_name(f"{name}.jsonl")
        rows = [json.loads(line) for line in given.open()]
        write_rows(tmp_path / f"{name}.jsonl", [row | {"reference": row["chosen"]} for row in rows])
    for key, name in (("datasets", "train"), ("test_datasets", "test")):
        base_config[key][0]["path"] = str(tmp_path / f"{name}.jsonl")
    write_rows(tmp_path / "more.jsonl", [{"prompt": "b a", "reference": "a b"}])
    more = {"path": str(tmp_path / "more.jsonl"), "ds_type": "json", "split": "train"}
    base_config["sera"] |= {
        "labeler": ["implicit", "function"], "function": "checks.py:score", "reward": "fitted",
        "score_columns": ["reference"], "prompts": [more],
    }  # fmt: skip
    base_config["num_epochs"] = 2
    result = train(base_config)
    found = summary(result.run, 2)
    mixed = found["labeler"]["reward"]
    names = ["theta_1", "theta_0", "length", "function"]
    assert mixed["weights"].keys() == set(names)
    assert mixed["weights"]["function"] > 0
    assert found["reward"]["weights"].keys() == mixed["weights"].keys() - {"function"}
    assert found["labeler"]["unscored"]["function"] > 0
    page = write_report(result.output).read_text()
    assert "What the samples are ranked by, with further scores" in page
    assert Run(find_run(result.output)).notes == []
    # Rewards are the fitted features of each candidate, and the score less its prompt's mean.
    candidates = table(result.run, 2, "candidates")
    assert max(candidates["row"]) == 24
    logps = np.array(candidates["logps"])
    lengths = np.array([len(one) for one in candidates["token_ids"]])
    weights = [mixed["weights"][name] for name in names]
    own = logps @ weights[:2] + lengths * weights[2]
    kept = [pq.read_table(result.run / f"{one}.parquet") for one in ("dataset", "prompts")]
    references = [one for each in kept for one in each["reference"].to_pylist()]
    assert references[24:] == ["a b"]
    scored = []
    for row, ids in zip(candidates["row"], candidates["token_ids"], strict=True):
        text = result.trainer.processing_class.decode(ids, skip_special_tokens=True).strip()
        right = sum(map(eq, references[row].split(), text.split()))
        scored.append(np.nan if text.startswith("a") else right)
    scored = np.array(scored).reshape(-1, 4)
    centred = np.nan_to_num(scored - np.nanmean(scored, axis=1, keepdims=True)).ravel()
    reward = np.array(candidates["reward"])
    ranked = ~np.isnan(reward)  # the others are unlike the data's answers
    assert ranked.any()
    np.testing.assert_allclose(reward[ranked], (own + weights[3] * centred)[ranked], atol=1e-6)
