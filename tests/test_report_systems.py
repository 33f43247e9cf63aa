"""The report of runs by other systems than SeRA's own."""

from __future__ import annotations

import numpy as np
import pyarrow.json as pa_json
import pyarrow.parquet as pq
import pytest

from sera_plugin.algorithm.protocols import Labeler
from sera_plugin.algorithm.selection import Annotations
from sera_plugin.rundir.store import RunStore
from sera_plugin.tools.report.figures import figures
from sera_plugin.tools.report.page import render
from sera_plugin.tools.report.pairs import (
    describe_pair,
    export,
    show_pair,
    show_suspects,
    suspects,
)
from sera_plugin.tools.report.reading import Run
from sera_plugin.tools.report.tokens import Texts
from tests.report_run import make_run


def page_of(store: RunStore) -> str:
    return render(Run(store))


def shown(run: Run, row: int) -> str:
    texts = Texts(run)
    return show_pair(describe_pair(run, row, texts), texts)


@pytest.mark.parametrize(
    "block",
    [
        {"selection": "reference_logp"},
        {"selection": "random", "bootstrap_ratio": 0},
        {"length_control": "auto", "offline_length_control": 0.5},
        {"reference": "initial"},
    ],
    ids=str,
)
def test_every_system_has_a_report(tmp_path, block):
    store = make_run(tmp_path, sera=block)
    page = page_of(store)
    assert f"<dd>0.5 N{' by ' * ('selection' in block)}{block.get('selection', '')}</dd>" in page
    found = figures(Run(store))["iterations"]
    assert [one["iteration"] for one in found] == [1, 2, 3]
    if "selection" in block:
        assert found[-1]["threshold"] is None
    assert ("selection keeps them first" in page) == (block.keys() == {"reference"})
    if "length_control" in block:
        assert found[-1]["bootstrapped_ensemble"] is None


def test_swapped_labels_are_counted_and_marked(tmp_path):
    swapped = np.arange(12) % 4 == 0
    store = make_run(tmp_path, annotations=Annotations(swapped=swapped))
    run = Run(store)
    last = figures(run)["iterations"][-1]
    kept = run.iterations[-1].selected
    assert kept is not None
    assert last["label_noise"]["swapped"] == 3
    assert last["label_noise"]["recall"] == (swapped & ~kept).sum() / 3
    assert last["label_noise"]["precision"] == (swapped & ~kept).sum() / (~kept).sum()
    page = page_of(store)
    assert "of the 3 labels swapped on purpose" in page
    assert "swapped on purpose</" in page
    block = {"selection": "curriculum", "selection_ratio": 1.0, "score_columns": ["gap"]}
    asked = Annotations(np.arange(12.0), np.arange(12) // 4, swapped)
    by_turns = Run(make_run(tmp_path / "turns", sera=block, annotations=asked))
    assert all("label_noise" not in one for one in figures(by_turns)["iterations"])
    assert "label: swapped on purpose" in shown(run, 4)
    assert "swapped" not in shown(run, 5)
    listed = show_suspects(run, suspects(run, 12, Texts(run))).splitlines()
    for row in np.flatnonzero(run.iterations[-1].margin < 0).tolist():
        line = next(one for one in listed if one.split()[0] == str(row))
        assert line.endswith("swapped on purpose" if swapped[row] else "as given")


def test_an_export_says_which_labels_were_swapped_on_purpose(tmp_path):
    swapped = np.arange(12) % 4 == 0
    run = Run(make_run(tmp_path, annotations=Annotations(swapped=swapped)))
    for suffix, read in (("jsonl", pa_json.read_json), ("parquet", pq.read_table)):
        path, made = tmp_path / f"kept.{suffix}", tmp_path / f"made.{suffix}"
        export(run, Texts(run), path, "kept", 1)
        assert read(path)["swapped"].to_pylist() == swapped.tolist()
        assert export(run, Texts(run), made, "bootstrapped", 2)[0] > 0
        assert "swapped" not in read(made).column_names


def test_spins_report_tells_the_datasets_answers_from_samples(tmp_path):
    """Candidates 0 and 1 are samples of 2 and 3 tokens, 2 is the chosen answer of 4."""
    block = {"labeler": "spin", "selection_ratio": 0, "bootstrap_ratio": 1, "candidates": 2}
    store = make_run(tmp_path, sera=block)
    run = Run(store)
    assert not run.notes
    first = figures(run)["iterations"][0]
    assert (first["kept"], first["dropped"]) == (0, 12)
    assert first["pairs"]["bootstrapped_kept"] == 12
    assert first["samples"]["sampled"] == run.iterations[0].summary["samples"]["sampled"] == 24
    assert first["lengths"]["sampled"] == run.iterations[0].summary["lengths"]["sampled"] == 2.5
    assert first["lengths"]["bootstrapped_chosen"] == 4
    page = page_of(store)
    row = page[page.index('<th scope="row">1</th>') :].split("</tr>")[0]
    assert [cell.split("<")[0] for cell in row.split("<td>")[1:4]] == ["12", "0", "12"]
    assert "The dataset's chosen answers before samples of theta_2" in page
    assert "implicit reward tells apart" not in page
    assert "Jaccard index of" not in page
    said = shown(run, 3)
    assert "candidate 2: reward +1.000, 4 tokens, from the dataset, chosen in a pair" in said
    assert "candidates have rewards of labeler: spin" in said


def test_what_an_online_run_lacks_of_its_first_iteration_is_named(tmp_path):
    block = {"labeler": "spin", "selection_ratio": 0, "bootstrap_ratio": 1, "candidates": 2}
    store = make_run(tmp_path, sera=block)
    store.table_file(1, "candidates").unlink()
    assert Run(store).notes == ["sera/iteration-01/candidates.parquet is missing"]


class _Judge(Labeler):
    """Likes longer answers; has no verdict on the third of a prompt."""

    def rewards(self, ranked):
        number = np.arange(len(ranked.answers)) % ranked.per_prompt
        return np.where(number == 2, np.nan, number * 1.0)


def test_a_judges_rewards_are_not_taken_for_nats(tmp_path):
    store = make_run(tmp_path, sera={"labeler": "self_judge"}, labeler=_Judge)
    run = Run(store)
    page = page_of(store)
    assert "that its own verdict in words tells apart most" in page
    assert "12 (25%)" in page  # of the 48 samples got no verdict
    said = shown(run, 3)
    assert "candidate 2: reward -, 4 tokens" in said
    assert "in its own unit" in said


def test_a_curriculums_first_choice_is_shown(tmp_path):
    """Three prompts of four pairs each: iteration t has each prompt's t-th."""
    annotations = Annotations(score_gap=np.arange(12.0), prompts=np.arange(12) // 4)
    block = {"selection": "curriculum", "selection_ratio": 1, "bootstrap_ratio": 0}
    scores = {"gap": list(range(12))}
    store = make_run(
        tmp_path, sera={**block, "score_columns": ["gap"]}, annotations=annotations, scores=scores
    )
    found = figures(Run(store))["iterations"]
    assert [(one["kept"], one["dropped"]) for one in found] == [(3, 9)] * 3
    page = page_of(store)
    assert "<dd>each prompt&#39;s t-th easiest pair</dd>" in page
    assert "sera.selection: curriculum chooses pairs by the first of them" in page
    assert "never influence" not in page


def test_a_run_that_keeps_everything_has_no_choice_to_compare(tmp_path):
    block = {"selection": "all", "selection_ratio": 1.0, "bootstrap_ratio": 0}
    page = page_of(make_run(tmp_path, sera={**block, "reference": "initial"}))
    assert "<dd>all pairs</dd>" in page
    assert "<dd>theta_0</dd>" in page
    assert "Jaccard index of" not in page
    assert "All iterations have the initial policy as reference" in page
