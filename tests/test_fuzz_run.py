"""Run directories of somebody else, malformed by the thousand: each is named, none is believed.

A case is a number, which makes it again. One thing in a good run is made wrong, and as a rule the
checksums are made right again, as whoever crafts a run would do. Everything that reads a run must
then do so, with a note of the file, or refuse it in a sentence.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sera_plugin.rundir import tables
from sera_plugin.rundir.checksums import seal
from sera_plugin.rundir.store import RunStore, write_json
from sera_plugin.tools.evaluation.models import find_models
from sera_plugin.tools.report import pairs
from sera_plugin.tools.report.compare import compare, show
from sera_plugin.tools.report.figures import figures
from sera_plugin.tools.report.page import render
from sera_plugin.tools.report.reading import Run, Texts, find_run
from tests.report_run import make_run

CASES = 1250
_NO_NUMBER: list[Any] = ["x", "7", [1], {"a": 1}, True, "NaN", [[]]]
_NO_COUNT = [*_NO_NUMBER, -1, 1.5, 10**40, None]
_NO_OBJECT: list[Any] = ["x", 5, [1], True, [[]]]
_NO_TEXT: list[Any] = [5, [1], {"a": 1}, True]
#: File -> place in it -> what it cannot be.
JSON: dict[str, dict[str, list[Any]]] = {
    "sera/run.json": {
        "config": [*_NO_OBJECT, None], "config.sera": [*_NO_OBJECT, None],
        "config.num_epochs": [*_NO_NUMBER, None, -1, 10**9], "config.sera.judge": _NO_OBJECT,
        "config.base_model": _NO_TEXT,
        "config.sera.labeler": [*_NO_TEXT, "magic", "__class__"],
        "config.sera.selection": [*_NO_TEXT, "magic"], "config.sera.gamma": _NO_NUMBER,
        "config.sera.candidates": [*_NO_NUMBER, 0, -3, 10**30],
        "config.sera.bootstrap_ratio": _NO_NUMBER, "per_token": ["x", 2, [1]],
        "pairs": ["x", [1], True, -1, 1.5], "end_ids": [5, "x", [-1], ["a"], [None], {"a": 1}],
        "versions": [*_NO_OBJECT, {"a": [1]}], "loss": _NO_TEXT, "beta": _NO_NUMBER,
        "format_version": ["x", 2, [1], True, None],
        "run_id": [*_NO_TEXT, "", "0" * 31, "0" * 32 + "\n", "G" * 32],
    },
    "sera/iteration-02/summary.json": {
        "iteration": [*_NO_COUNT, 0, 3], "pairs": [*_NO_OBJECT, {}, None],
        "pairs.kept": _NO_COUNT, "pairs.trained": _NO_COUNT, "lengths": [*_NO_OBJECT, {}, None],
        "lengths.chosen": [*_NO_NUMBER, 0, -1, None], "lengths.sampled": [*_NO_NUMBER, 0],
        "drift": [*_NO_OBJECT, {}], "drift.rejected": [*_NO_NUMBER, None],
        "seconds": _NO_OBJECT, "seconds.score_offline": [*_NO_NUMBER, None],
        "forwarded": [*_NO_OBJECT, {"a": 1}], "forwarded.sample": [*_NO_OBJECT, {"tokens": -1}],
        "margins": [*_NO_OBJECT, {"offline": 5}], "margins.kept": [5, "x", {"0.5": "x"}],
        "samples": [*_NO_OBJECT, {}], "samples.sampled": [*_NO_COUNT, 0],
        "samples.prompts": [*_NO_COUNT, 0], "samples.duplicates": _NO_COUNT,
        "evaluation": [*_NO_OBJECT, {}], "evaluation.accuracy": [*_NO_NUMBER, None],
        "evaluation.pairs": _NO_COUNT, "reward": _NO_OBJECT, "reward.weights": _NO_OBJECT,
        "reward.by_chance": [*_NO_NUMBER, None], "reward.accuracy": [*_NO_NUMBER, None],
        "spread": [*_NO_OBJECT, {"offline": "x"}],
        "offline_accuracy": _NO_NUMBER, "jaccard_with_previous": _NO_NUMBER,
    },
    "checkpoint-9/trainer_state.json": {
        "log_history": [5, "x", {"a": 1}, None, [5], [[]]],
        "log_history.0": [*_NO_OBJECT, {}, None], "log_history.0.step": _NO_COUNT,
    },
}  # fmt: skip
_PARQUET = ["sera/dataset.parquet"] + [
    f"sera/iteration-03/{name}.parquet"
    for name in ("offline", "evaluation", "candidates", "bootstrapped")
]


def change_json(rng: random.Random, file: Path, places: dict[str, list[Any]]) -> str:
    content = json.loads(file.read_text())
    place = rng.choice(list(places))
    target, *_ = [content]
    *above, last = place.split(".")
    for key in above:
        target = target[int(key) if isinstance(target, list) else key]
    key = int(last) if isinstance(target, list) else last
    value = target[key] = rng.choice(places[place])
    file.write_text(json.dumps(content))
    return f"{place} = {value!r}"


def _with(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def change_table(rng: random.Random, file: Path) -> str:
    table = pq.read_table(file)
    needed = list(tables._TABLES[file.stem])
    name = rng.choice(needed)
    column = table[name].combine_chunks()
    lists, whole = pa.types.is_list(column.type), pa.types.is_integer(column.type)
    values = column.to_pylist()
    at = rng.randrange(len(values))
    changes: dict[str, Callable[[], pa.Table]] = {
        "no column": lambda: table.drop_columns([name]),
        "twice": lambda: table.append_column(name, column),
        "text": lambda: _with(table, name, pa.array([str(one) for one in values], pa.binary())),
        "null": lambda: _with(table, name, pa.array([*values[:at], None, *values[at + 1 :]],
                                                    column.type)),
        "one row less": lambda: table.slice(0, len(table) - 1),
        "a row twice": lambda: pa.concat_tables([table, table.slice(at, 1)]),
        "no rows": lambda: table.slice(0, 0),
        "backwards": lambda: table.take(list(range(len(table)))[::-1]),
    }  # fmt: skip
    # What is not wrong in a table of pairs in any order.
    if file.stem == "bootstrapped":
        for way in ("one row less", "no rows", "backwards"):
            del changes[way]
    if whole:
        wrong = -1 if name.endswith("candidate") or name == "row" else 0
        for way, value in (("low", wrong), ("high", 2**31 - 1)):
            if way == "low" or name in ("row", "candidate") or name.endswith("_candidate"):
                changes[way] = lambda value=value: _with(
                    table, name, pa.array([*values[:at], value, *values[at + 1 :]], column.type)
                )
    if lists:
        inner = [float("nan")] if name == "logps" else [-1]
        for way, value in (("empty list", []), ("bad list", inner)):
            changes[way] = lambda value=value: _with(
                table, name, pa.array([*values[:at], value, *values[at + 1 :]], column.type)
            )
    if pa.types.is_floating(column.type):
        changes["infinite"] = lambda: _with(
            table, name, pa.array([*values[:at], float("inf"), *values[at + 1 :]])
        )
    if name == "finish_reason":
        changes["no reason"] = lambda: _with(table, name, pa.array(["x", *values[1:]]))
    way = rng.choice(list(changes))
    pq.write_table(changes[way](), file)
    return f"{name}: {way}"


def change_file(rng: random.Random, file: Path, outside: Path) -> str:
    whole = file.read_bytes()
    way = rng.choice(["empty", "cut", "noise", "deep", "link", "pipe", "directory", "huge number"])
    file.unlink()
    if way == "link":
        outside.write_bytes(whole)
        file.symlink_to(outside)
    elif way == "pipe":
        os.mkfifo(file)
    elif way == "directory":
        file.mkdir()
    else:
        contents = {
            "empty": b"", "cut": whole[: rng.randrange(1, len(whole) - 1)],
            "noise": rng.randbytes(300), "deep": b"[" * 100_000,
            "huge number": b'{"format_version": %s}' % (b"9" * 10_000),
        }  # fmt: skip
        file.write_bytes(contents[way])
    return way


def change(number: int, output_dir: Path) -> tuple[str, str]:
    """Make one thing of a run wrong; which file, and how."""
    rng = random.Random(number)
    kind = rng.choice(["json", "json", "table", "table", "file"])
    names = {"json": list(JSON), "table": _PARQUET, "file": [*JSON, *_PARQUET]}[kind]
    name = rng.choice(names)
    file = output_dir / name
    if kind == "json":
        how = change_json(rng, file, JSON[name])
    elif kind == "table":
        how = change_table(rng, file)
    else:
        how = change_file(rng, file, output_dir.parent / "outside")
    if rng.random() < 0.8:
        reseal(file.parent)
    return name, how


def reseal(directory: Path) -> None:
    """Checksums of what is there now; a link is listed by what it leads to."""
    pipes = [path for path in directory.iterdir() if not path.is_dir() and not path.is_file()]
    seal(directory)
    assert all(path.exists() for path in pipes)


def read_all(output_dir: Path, page: bool) -> list[str]:
    """Read a run in every way; the notes on it, or the sentence in which it is refused."""
    try:
        run = Run(find_run(output_dir))
    except ValueError as refusal:
        return [str(refusal)]
    texts = Texts(run)
    json.dumps(figures(run), default=str)
    show(compare([run, run]))
    if page:
        assert "</html>" in render(run)
    for row in (0, 5, 99):
        with_row(run, texts, row)
    for which in ("kept", "dropped", "bootstrapped"):
        path = output_dir.parent / "out.jsonl"
        path.unlink(missing_ok=True)
        refused(pairs.export, run, texts, path, which, None)
    refused(pairs.suspects, run, 5, texts)
    refused(find_models, [str(output_dir)], iterations=True)
    return run.notes


def with_row(run: Run, texts: Texts, row: int) -> None:
    refused(lambda: pairs.show_pair(pairs.describe_pair(run, row, texts), texts))


def refused(call: Callable[..., Any], *args: Any, **keys: Any) -> None:
    with suppress(ValueError):  # in a sentence
        call(*args, **keys)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A finished run of three iterations with held-out pairs, which has no notes."""
    output_dir = tmp_path_factory.mktemp("good") / "run"
    make_run(output_dir)
    state = output_dir / "checkpoint-9/trainer_state.json"
    history = [{"step": 1, "loss": 0.7, "sera/iteration": 1}, {"step": 2, "loss": 0.6}]
    write_json(state, {"log_history": history})
    seal(state.parent)
    assert read_all(output_dir, page=True) == []
    return output_dir


def check(good: Path, number: int, place: Path, page: bool = False) -> None:
    shutil.rmtree(place, ignore_errors=True)
    output_dir = place / "run"
    shutil.copytree(good, output_dir)
    name, how = change(number, output_dir)
    notes = read_all(output_dir, page)
    file = name.removeprefix("sera/") if len(notes) == 1 and "run.json" in notes[0] else name
    assert any(file in note for note in notes), (number, name, how, notes)
    assert all(note.isprintable() for note in notes), (number, notes)


def test_malformed_runs_are_named_and_read_as_far_as_they_go(good, tmp_path):
    for number in range(0, CASES, 25):
        check(good, number, tmp_path / "case", page=number % 250 == 0)


def add(name: str, value: int) -> Callable[[pa.Table], pa.Table]:
    return lambda t: _with(t, name, pc.add(t[name], pa.scalar(value, t[name].type)))


def without(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns([name])


def of_row(table: pa.Table, name: str, row: int) -> pa.Table:
    return table.filter(pc.not_equal(table[name], row))


#: Of a run that is continued: what is changed in a table, and what is said of it.
UNFIT: dict[str, tuple[str, Callable[[pa.Table], pa.Table], str]] = {
    "fewer pairs": ("02/offline", lambda t: t.slice(0, 7), "has 7 rows, and the run 12 pairs"),
    "no margins": ("03/offline", without("margin"), "no column margin"),
    "no selection": ("03/offline", without("selected"), "no column selected"),
    "no lengths": ("01/offline", without("prompt_length"), "no column prompt_length"),
    "fewer held out": ("01/evaluation", lambda t: t.slice(0, 2), "the run 4 held-out pairs"),
    "a row less": ("03/candidates", lambda t: of_row(t, "row", 11), "candidates of 11 rows"),
    "other rows": ("03/candidates", add("row", 1), "the same number of candidates for each row"),
    "one each": ("03/candidates", lambda t: t.filter(pc.equal(t["candidate"], 0)),
                 "1 candidates of each row, not 4"),
    "no text": ("03/candidates", lambda t: _with(t, "finish_reason", bad_text(len(t))), "UTF8"),
    "high rows": ("03/bootstrapped", add("row", 10**12), "and there are 12 from 0 on"),
    "high candidates": ("03/bootstrapped", add("chosen_candidate", 4), "there are 4 from 0 on"),
    "one answer twice": (
        "02/bootstrapped", lambda t: _with(t, "rejected_candidate", t["chosen_candidate"]), "twice"
    ),
    "pairs twice": ("03/bootstrapped", lambda t: pa.concat_tables([t, t]), "a candidate twice"),
}  # fmt: skip


def bad_text(count: int) -> pa.Array:
    """Strings of a byte that is no UTF-8."""
    ends = pa.py_buffer(np.arange(count + 1, dtype=np.int32).tobytes())
    return pa.StringArray.from_buffers(count, ends, pa.py_buffer(b"\xff" * count))


@pytest.mark.parametrize("what", UNFIT)
def test_a_table_that_does_not_fit_its_run_is_made_again_by_it_and_noted(
    good, tmp_path, caplog, what
):
    name, made, said = UNFIT[what]
    shutil.copytree(good, output_dir := tmp_path / "run")
    path = output_dir / f"sera/iteration-{name}.parquet"
    pq.write_table(made(pq.read_table(path)), path)
    seal(path.parent)
    [note] = [one for one in Run(find_run(output_dir)).notes if path.name in one]
    assert said in note
    make_run(output_dir)
    assert f"{path.name} cannot be used (" in caplog.text
    assert said in caplog.text
    before, after = (
        pq.read_table(top / path.relative_to(output_dir)) for top in (good, output_dir)
    )
    assert after.equals(before)


@pytest.mark.parametrize("unknown", ["run.json", "dataset.parquet"])
def test_no_pair_is_shown_with_the_answers_of_another_row(good, tmp_path, unknown):
    """Also where what says how many rows there are is missing."""
    shutil.copytree(good, output_dir := tmp_path / "run")
    path = output_dir / "sera/iteration-03/candidates.parquet"
    pq.write_table(of_row(pq.read_table(path), "row", 0), path)
    seal(path.parent)
    (output_dir / "sera" / unknown).unlink()
    run = Run(find_run(output_dir)) if unknown != "run.json" else Run(RunStore(output_dir))
    assert not run.begun[3].candidates
    assert not run.begun[2].bootstrapped or run.begun[2].candidates


@pytest.mark.nightly
def test_all_malformed_runs_are_named_and_have_a_page(good, tmp_path):
    for number in range(CASES):
        check(good, number, tmp_path / "case", page=number % 4 == 1)
