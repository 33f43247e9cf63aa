"""The report of runs by other systems than SeRA's own."""

from __future__ import annotations

import numpy as np
import pytest

from sera_plugin.algorithm.protocols import Labeler
from sera_plugin.algorithm.selection import Annotations
from sera_plugin.tools.report.figures import figures
from sera_plugin.tools.report.page import render
from sera_plugin.tools.report.pairs import describe_pair, show_pair, show_suspects, suspects
from sera_plugin.tools.report.reading import Run, Texts
from tests.report_run import make_run

_FIRST = "selection keeps them first"
SWAPPED = np.arange(12) % 4 == 0


def shown(run: Run, row: int) -> str:
    texts = Texts(run)
    return show_pair(describe_pair(run, row, texts), texts)


@pytest.mark.parametrize(
    ("block", "keys", "said", "unsaid"),
    [
        ({"selection": "reference_logp"}, {}, "<dd>0.5 N by reference_logp</dd>", _FIRST),
        ({"selection": "random"}, {}, "<dd>0.5 N by random</dd>", _FIRST),
        ({"length_control": "auto", "offline_length_control": 0.5}, {}, "<dd>0.5 N</dd>",
         _FIRST),
        ({"reference": "initial"}, {}, "All iterations have the initial policy as reference",
         "Each iteration starts from its own"),
        ({}, {}, f"and {_FIRST}", "<dd>theta_0</dd>"),
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
    assert said in page
    assert unsaid not in page
    assert (found[-1]["threshold"] is None) == bool(block.keys() & {"selection", "length_control"})
    assert ("<dd>theta_0</dd>" in page) == ("reference" in block)
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
    listed = show_suspects(run, suspects(run, 12, Texts(run))).splitlines()
    for row in np.flatnonzero(run.iterations[-1].margin < 0).tolist():
        line = next(one for one in listed if one.split()[0] == str(row))
        assert line.endswith("swapped on purpose" if SWAPPED[row] else "as given")


def test_spins_report_tells_the_datasets_answers_from_samples(tmp_path):
    """Candidates 0 and 1 are samples of 2 and 3 tokens, 2 is the chosen answer of 4."""
    block = {"labeler": "spin", "selection_ratio": 0, "bootstrap_ratio": 1, "candidates": 2}
    store = make_run(tmp_path, sera=block)
    run = Run(store)
    assert not run.notes
    first, recorded = figures(run)["iterations"][0], run.iterations[0].summary
    assert (first["kept"], first["dropped"]) == (0, 12)
    assert first["pairs"]["bootstrapped_kept"] == 12
    assert first["samples"]["sampled"] == recorded["samples"]["sampled"] == 24
    assert first["lengths"]["sampled"] == recorded["lengths"]["sampled"] == 2.5
    assert first["lengths"]["bootstrapped_chosen"] == 4
    page = render(run)
    row = page[page.index('<th scope="row">1</th>') :].split("</tr>")[0]
    assert [cell.split("<")[0] for cell in row.split("<td>")[1:4]] == ["12", "0", "12"]
    assert "The dataset's chosen answers before samples of theta_2" in page
    assert "implicit reward tells apart" not in page
    assert "Jaccard index of" not in page
    said = shown(run, 3)
    assert "candidate 2: reward +1.000, 4 tokens, from the dataset, chosen in a pair" in said
    assert "candidates have rewards of labeler: spin" in said
    # A run that samples from its first step lacks what is missing of it.
    store.table_file(1, "candidates").unlink()
    assert Run(store).notes == ["sera/iteration-01/candidates.parquet is missing"]


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
