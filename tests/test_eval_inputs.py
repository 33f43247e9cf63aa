"""What an evaluation reads: prompt sets in their published formats, and what is compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sera_plugin.rundir.checksums import seal
from sera_plugin.rundir.store import RunStore, write_json
from sera_plugin.tools.evaluation.models import find_models
from sera_plugin.tools.evaluation.prompts import Prompt, read_prompts
from tests.conftest import write_rows
from tests.report_run import make_run

# ------------------------------------------------------------------ prompts

PUBLISHED = {
    "AlpacaEval": ({"dataset": "koala", "instruction": "Why?", "output": "So."}, "koala"),
    "Vicuna": ({"question_id": 1, "category": "generic", "turns": ["Why?"]}, "generic"),
    "Vicuna, the older table": ({"text": "Why?", "category": "generic"}, "generic"),
    "Evol-Instruct": ({"idx": 1, "Skill": "Math", "Instruction": "Why?"}, "Math"),
    "UltraFeedback": ({"prompt": "Why?", "chosen": [{"content": "Why?", "role": "user"}]}, ""),
    "MT-Bench": ({"category": "writing", "turns": ["Why?", "Shorter."]}, "writing"),
    "one's own": ({"prompt": "Wie? 🙂\u2028{}", "category": 3}, "3"),
    "no category": ({"prompt": "Why?", "category": None}, ""),
}


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_prompt_sets_are_read_as_published(tmp_path, name, form):
    row, category = PUBLISHED[name]
    path = tmp_path / f"prompts.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([row] * 2), path)
    elif form == "json":
        text = "\ufeff" + json.dumps([row] * 2, ensure_ascii=False, indent=2)
        path.write_text(text, encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False)] * 2
        path.write_text("\n\n".join(lines), encoding="utf-8")
    turns = {"MT-Bench": ("Why?", "Shorter."), "one's own": ("Wie? 🙂\u2028{}",)}
    texts = turns.get(name, ("Why?",))
    assert read_prompts(path) == [Prompt(texts, category, number) for number in (0, 1)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"holds no prompts"),
        ("\n \n", r"holds no prompts"),
        ("[]", r"holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', r"line 2 is not JSON"),
        ('{"prompt": "a"}\n["a"]', r"line 2 is \['a'\], not an object"),
        ('[{"prompt": "a"}, 3]', r"row 1 is 3, not an object"),
        ("[" * 100_000, r"is not JSON"),
        ('{"question": "a", "id": 1}', r"row 0 has no prompt.*turns, inst.*'question', 'id'"),
        ("{}", r"row 0 has no prompt.*has no fields"),
        ('{"prompt": "a"}\n{"prompt": null}', r"row 1: prompt is None, not text"),
        ('{"instruction": 5}', r"row 0: instruction is 5, not text"),
        ('{"turns": "a"}', r"row 0: turns is 'a', not a list"),
        ('{"turns": []}', r"row 0: turns is \[\], not a list"),
        ('{"turns": ["a", {}]}', r"row 0: turns is {}, not text"),
        ('{"prompt": " \\n\\u200b"}', r"row 0: prompt is empty"),
        ('{"prompt": "\\ud800"}', r"row 0: prompt is not valid Unicode"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, content, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"prompts\.jsonl.*{said}"):
        read_prompts(path)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a parquet file"):
        read_prompts(tmp_path / "a.parquet")
    with pytest.raises(OSError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_a_limit_draws_and_a_larger_one_has_those_of_the_smaller(tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": str(number)} for number in range(50)])
    few, more, other = (
        [prompt.row for prompt in read_prompts(tmp_path / "p.jsonl", limit, seed)]
        for limit, seed in ((5, 0), (20, 0), (5, 1))
    )
    assert len(few) == 5
    assert set(few) < set(more)
    assert few != other
    assert more == sorted(more) != list(range(20))
    assert len(read_prompts(tmp_path / "p.jsonl", 99)) == 50


# ------------------------------------------------------------------ what is compared


def make_model(path: Path, **keys: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(keys))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def make_adapter(path: Path, base: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "r": 4})
    )
    (path / "adapter_model.safetensors").write_bytes(b"adapter")
    return path


@pytest.fixture
def run(tmp_path):
    """A finished run of adapters with three iterations."""
    base = make_model(tmp_path / "base")
    store = make_run(tmp_path / "run", config={"base_model": str(base)})
    for iteration in (1, 2, 3):
        make_adapter(store.policy(iteration), base)
        seal(store.policy(iteration))
    make_adapter(tmp_path / "run", base)
    return tmp_path / "run"


def names(models) -> list[str]:
    return [model.name for model in models]


def test_a_run_alone_is_compared_with_what_it_started_from(run):
    first, last = find_models([str(run)])
    assert names([first, last]) == ["run@0", "run"]
    assert first.adapter == run / "sera/iteration-01/policy"
    assert last.adapter == run
    assert first.weights == last.weights == str(run.parent / "base")
    assert first.end_ids == (0,)


def test_policies_of_a_run(run):
    assert names(find_models([str(run)], iterations=True)) == ["run@0", "run@1", "run@2", "run"]
    models = find_models([f"{run}@2", str(run / "sera"), f"{run}@1", f"{run}@3"])
    assert names(models) == ["run@2", "run", "run@1"]  # theta_3 is the last policy
    assert models[0].adapter == run / "sera/iteration-03/policy"


def test_a_run_of_whole_weights(tmp_path):
    base = make_model(tmp_path / "base")
    store = make_run(tmp_path / "run", config={"base_model": "moved/away"})
    write_json(store.policy(1) / "base_model.json", {"base_model": str(base)})
    seal(store.policy(1))
    make_model(store.policy(3))
    seal(store.policy(3))
    make_model(tmp_path / "run")
    models = find_models([str(tmp_path / "run")], iterations=True)
    assert names(models) == ["run@0", "run@2", "run"]
    assert models[0].weights == str(base)
    with pytest.raises(ValueError, match=r"run@1 is in .*does not exist.*keep_policies: true"):
        find_models([f"{tmp_path}/run@1", str(base)])


def test_models_adapters_and_answers(run, tmp_path):
    base = tmp_path / "base"
    answers = tmp_path / "gpt.json"
    answers.write_text("[]")
    other = make_adapter(tmp_path / "deep/base", base)
    models = find_models(
        [str(answers), str(base), str(other), str(run / "sera/iteration-02/policy")]
    )
    assert names(models) == ["gpt", "base", "base-2", "iteration-02"]
    assert models[0].answers == answers
    assert models[2].adapter == other


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (["{}/base"], r"base would be compared with itself"),
        (["{}/base", "{}/base"], r"compared with itself"),
        (["{}/base", "{}/run@4"], r"run@4: the run has the policies 0 to 3"),
        (["{}/base", "{}/nowhere@1"], r"nowhere: no SeRA run there"),
        (["{}/base", "{}/none.json"], r"there is no file .*none.json"),
        (["{}/base", "{}/empty"], r"empty holds no model: neither config.json"),
        (["{}/base", "{}/pickled"], r"pickled has no adapter_model.safetensors"),
        (["{}/base", "{}/lost"], r"lost stands on no/such-model: .*nothing is downloaded"),
        (["{}/base", "no-such/model"], r"no-such/model is neither a directory nor in the local"),
        (["{}/base", "so what"], r"'so what' is neither a run, a model directory"),
        (["{}/base", "../x/y/z"], r"is neither a run, a model directory"),
    ],
)
def test_what_is_not_there_is_named(run, tmp_path, specs, said):
    (tmp_path / "empty").mkdir()
    make_adapter(tmp_path / "lost", Path("no/such-model"))
    make_adapter(tmp_path / "pickled", tmp_path / "base")
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    with pytest.raises(ValueError, match=said):
        find_models([spec.format(tmp_path) for spec in specs])


def test_a_run_that_has_not_finished_has_its_earlier_policies(run):
    store = RunStore(run)
    shutil.rmtree(store.iteration(3))
    assert names(find_models([str(run)])) == ["run@0", "run"]  # early stopping has ended it
    # Ctrl-C has the host save what is in training; that iteration has no time of training then.
    record = store.summary(2)
    del record["seconds"]["train"]
    store.write_summary(2, record)
    with pytest.raises(ValueError, match=r"run has not finished: iteration 2 is not trained"):
        find_models([str(run)])
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"run has not finished: .*run@t is its policy"):
        find_models([str(run)])
    assert names(find_models([f"{run}@0", f"{run}@1"])) == ["run@0", "run@1"]


def test_a_finished_run_without_its_last_weights_has_not_finished(run):
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"run has not finished: .*or .*run has no weights"):
        find_models([str(run)])


def test_a_damaged_policy_and_a_base_model_that_has_moved_are_named(run):
    (run / "sera/iteration-02/policy/adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"run@1 is in .*the checksum of adapter_model"):
        find_models([str(run)], iterations=True)
    (run.parent / "base").rename(run.parent / "elsewhere")
    with pytest.raises(ValueError, match=r"policy stands on .*base: .*nothing is downloaded"):
        find_models([str(run)])


def test_models_whose_names_read_alike_have_files_of_their_own(tmp_path):
    places = [make_model(tmp_path / name) for name in ("my run", "my_run", "deep/my run")]
    models = find_models(list(map(str, places)))
    assert names(models) == ["my run", "my_run-2", "my run-3"]
    assert [one.file for one in models] == ["my_run", "my_run-2", "my_run-3"]


def test_a_model_is_another_one_when_its_files_change(run):
    def identities():
        return [model.identity for model in find_models([str(run)], iterations=True)]

    before = identities()
    assert len(set(before)) == 2  # the fixture's policies are the same; the last is not sealed
    (run / "adapter_model.safetensors").write_bytes(b"longer weights")
    (run / "events.log").write_text("not a part of the model")
    after = identities()
    assert after[:3] == before[:3]
    assert after[3] != before[3]
