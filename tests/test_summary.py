"""Figures of summary.json that are derived, on the three pairs of tests/three_pairs.py."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from sera_plugin.algorithm.summary import summarize
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.run import describe_start
from sera_plugin.rundir.store import make_table
from tests.three_pairs import CANDIDATES, Run


def summary(run: Run, iteration: int) -> dict[str, Any]:
    for t in range(1, iteration + 1):
        run.prepare(t)
    return summarize(run.iteration(iteration))


@pytest.mark.parametrize(
    ("per_token", "offline"),
    [
        # Margins 3, -1 and 1: quartiles 0 and 2; 16 tokens in 6 completions.
        (False, 2 / (16 / 6)),
        # Margins per token 1/2 + 2/2, -1/4 - 0/2 and 2/2 - 1/4: quartiles 1/4 and 9/8.
        (True, 9 / 8 - 1 / 4),
    ],
)
def test_spread_is_in_nats_per_token(tmp_path: Path, per_token: bool, offline: float) -> None:
    """Rewards of the candidates are (2, -1), (0, 1) and (6, 0), of two tokens each."""
    spread = summary(Run(tmp_path, per_token=per_token), 2)["spread"]
    assert spread["offline"] == pytest.approx(offline)
    assert spread["sampled"] == pytest.approx(3 / 2)


def test_equal_candidates_have_no_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 1 and 2 give one answer twice; row 0's range of 3 nats over 2 tokens is all there is."""
    monkeypatch.setitem(CANDIDATES, 1, CANDIDATES[1][:1] * 2)
    monkeypatch.setitem(CANDIDATES, 2, CANDIDATES[2][:1] * 2)
    assert summary(Run(tmp_path / "some"), 2)["spread"]["sampled"] == pytest.approx(3 / 2)
    monkeypatch.setitem(CANDIDATES, 0, CANDIDATES[0][:1] * 2)
    assert summary(Run(tmp_path / "none"), 2)["spread"]["sampled"] is None


def test_lengths_of_what_is_trained(tmp_path: Path) -> None:
    """Kept are rows 0 and 2 (chosen 2, 2 tokens, rejected 2, 4) and two sampled pairs of 2."""
    lengths = summary(Run(tmp_path), 2)["lengths"]
    assert lengths["trained_chosen"] == 2.0
    assert lengths["trained_rejected"] == (2 + 4 + 2 + 2) / 4


def test_without_sampling_there_is_no_sampled_figure(tmp_path: Path) -> None:
    run = Run(tmp_path, SeraConfig(selection_ratio=0.67, bootstrap_ratio=0, candidates=2))
    found = summary(run, 2)
    assert found["spread"].keys() == {"offline"}
    assert "sampled" not in found["lengths"]
    assert found["lengths"]["trained_rejected"] == 3.0
    assert "spread" not in summary(run, 1)
    # Two of three margins are above 0: 4/7 x 3/7 / 7.
    assert found["offline_accuracy"] == pytest.approx(2 / 3)
    assert found["offline_accuracy_error"] == pytest.approx(sqrt(4 / 7 * 3 / 7 / 7))


def test_the_log_says_what_margins_are_in_and_what_got_no_verdict(tmp_path: Path) -> None:
    run = Run(tmp_path, per_token=True)
    found = summary(run, 2)
    said = describe_start(found, run.method.unit)
    assert f"median margin {found['margins']['offline']['0.5']:+.3f} nats per token, " in said
    assert "0 ties)" in said
    found["samples"]["unranked"] = 2
    assert "0 ties, 2 without a verdict)" in describe_start(found, "nats")


def test_a_small_held_out_set_is_never_without_error(tmp_path: Path) -> None:
    """Three of three right: (3 + 2) / (3 + 4) right of 3 + 4, so sqrt(5/7 x 2/7 / 7)."""
    run = Run(tmp_path)
    for t, gain in ((1, 0.0), (2, 1.0)):
        columns = {"chosen_logp": [-5.0 + gain] * 3, "rejected_logp": [-5.0] * 3}
        lengths = {f"{side}_length": [2, 2, 2] for side in ("chosen", "rejected")}
        run.store.write(t, "evaluation", make_table(columns | lengths))
    found = summary(run, 2)["evaluation"]
    assert found["accuracy"] == 1.0
    assert found["accuracy_error"] == pytest.approx(sqrt(5 / 7 * 2 / 7 / 7))
