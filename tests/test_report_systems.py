"""The report of runs by other systems than SeRA's own."""

from __future__ import annotations

import numpy as np
import pytest

from sera_plugin.report.figures import figures
from sera_plugin.report.page import render
from sera_plugin.report.reading import read_run
from sera_plugin.report.tokens import texts_of
from sera_plugin.store import RunStore
from tests.report_run import make_run


def page_of(store: RunStore) -> str:
    run = read_run(store)
    return render(run, texts_of(run))


@pytest.mark.parametrize(
    "block",
    [
        {"selection": "reference_logp"},
        {"selection": "random", "bootstrap_ratio": 0},
        {"selection": "all", "selection_ratio": 1.0, "bootstrap_ratio": 0},
        {"length_control": "auto", "offline_length_control": 0.5},
        {"reference": "initial"},
    ],
    ids=str,
)
def test_every_system_has_a_report(tmp_path, block):
    store = make_run(tmp_path, sera=block)
    page = page_of(store)
    if block.get("selection", "irm") != "irm":
        assert f"N by {block['selection']}" in page
    found = figures(read_run(store))["iterations"]
    assert [one["iteration"] for one in found] == [1, 2, 3]
    if "selection" in block and block["selection"] != "all":
        assert found[-1]["threshold"] is None
    if "length_control" in block:
        assert found[-1]["bootstrapped_ensemble"] is None


def test_swapped_labels_are_counted_and_marked(tmp_path):
    swapped = np.arange(12) % 4 == 0
    store = make_run(tmp_path, swapped=swapped)
    run = read_run(store)
    last = figures(run)["iterations"][-1]
    kept = run.iterations[-1].selected
    assert kept is not None
    assert last["label_noise"]["swapped"] == 3
    assert last["label_noise"]["recall"] == (swapped & ~kept).sum() / 3
    assert last["label_noise"]["precision"] == (swapped & ~kept).sum() / (~kept).sum()
    page = page_of(store)
    assert "of the 3 labels swapped on purpose" in page
    assert "swapped on purpose</" in page
