"""Algorithm 1 against small fakes of our own protocols."""

from __future__ import annotations

import numpy as np
import pytest

from sera_plugin.args import SeraConfig
from sera_plugin.iteration import Method, Pairs, Phases, prepare_iteration
from sera_plugin.sampling import Candidate, SamplingSettings
from sera_plugin.store import RunStore, make_table

N = 4
SETTINGS = SamplingSettings(2, 1.0, 1.0, 8, None, (0,), seed=1)


class Scorer:
    """log pi_p of a completion: p times its first token, minus its length."""

    def __init__(self):
        self.calls = []

    def __call__(self, policy, prompts, completions, phase):
        self.calls.append((policy, phase))
        return np.array([policy * float(ids[0]) - len(ids) for ids in completions])


class Sampler:
    """Candidates [row + 1] and [row + 5]; stops after `chunks` rows if told to."""

    name = "fake"

    def __init__(self, chunks=N):
        self.rows, self.chunks = [], chunks

    def sample(self, prompts, settings, skip=()):
        for row in (row for row in range(len(prompts)) if row not in skip):
            if len(self.rows) == self.chunks:
                raise KeyboardInterrupt
            self.rows.append(row)
            yield [(row, [Candidate([row + 1, 0], "stop"), Candidate([row + 5, 0], "length")])]


@pytest.fixture
def pairs():
    return Pairs.from_table(
        make_table(
            {
                "prompt_ids": [[7]] * N,
                # Margins at t = 2 (theta_1 against theta_0): chosen minus rejected first token.
                "chosen_ids": [[9, 0], [5, 0], [4, 0], [8, 0]],
                "rejected_ids": [[1, 0], [6, 0], [4, 0], [3, 0]],
            }
        )
    )


def method(**keys):
    reference_free = keys.pop("reference_free", False)
    config = SeraConfig(**({"selection_ratio": 0.5, "bootstrap_ratio": 0.5} | keys))
    return Method(config, reference_free, per_token=reference_free, total=N)


def prepare(iteration, pairs, store, scorer, sampler, **keys):
    args = (method(**keys), pairs, store, scorer, sampler, SETTINGS, Phases())
    return prepare_iteration(iteration, *args)


def test_iteration_one_trains_on_everything_against_theta_zero(pairs, tmp_path):
    scorer = Scorer()
    result = prepare(1, pairs, RunStore(tmp_path), scorer, Sampler())
    assert result.num_rows == N
    assert result["ref_chosen_logps"].to_pylist() == [-2.0] * N
    assert scorer.calls == [(0, "score_offline")]


def test_iteration_two_keeps_the_largest_margins_and_adds_sampled_pairs(pairs, tmp_path):
    store, scorer, sampler = RunStore(tmp_path), Scorer(), Sampler()
    prepare(1, pairs, store, scorer, sampler)
    result = prepare(2, pairs, store, scorer, sampler)
    offline = store.read(2, "offline")
    assert offline["margin"].to_pylist() == [8.0, -1.0, 0.0, 5.0]
    assert offline["selected"].to_pylist() == [True, False, False, True]
    # Every prompt's candidates differ by 4: ties in margin, kept in row order.
    bootstrapped = store.read(2, "bootstrapped")
    assert bootstrapped["margin"].to_pylist() == [4.0] * N
    assert bootstrapped["selected"].to_pylist() == [True, True, False, False]
    assert result.num_rows == 4
    assert result["chosen_ids"].to_pylist() == [[9, 0], [8, 0], [5, 0], [6, 0]]
    assert result["rejected_ids"].to_pylist() == [[1, 0], [3, 0], [1, 0], [2, 0]]
    # The reference is log pi_1: first token minus length.
    assert result["ref_chosen_logps"].to_pylist() == [7.0, 6.0, 3.0, 4.0]
    assert result["ref_rejected_logps"].to_pylist() == [-1.0, 1.0, -1.0, 0.0]


def test_each_policy_scores_the_offline_pairs_once(pairs, tmp_path):
    store, scorer = RunStore(tmp_path), Scorer()
    for iteration in (1, 2, 3):
        prepare(iteration, pairs, store, scorer, Sampler())
    offline = [policy for policy, phase in scorer.calls if phase == "score_offline"]
    candidates = [policy for policy, phase in scorer.calls if phase == "score_candidates"]
    assert offline == [0, 1, 2]
    assert candidates == [1, 0, 2, 1, 0]


def test_the_ensemble_weighs_three_policies(pairs, tmp_path):
    store = RunStore(tmp_path)
    for iteration in (1, 2, 3):
        prepare(iteration, pairs, store, Scorer(), Sampler(), gamma=0.25)
    # theta_p scores p x token: 0.75 (2 - 1) + 0.25 (1 - 0) = 1 per unit of the first token.
    np.testing.assert_allclose(store.column(3, "offline", "margin"), [8.0, -1.0, 0.0, 5.0])


def test_a_reference_free_loss_needs_no_earlier_policy_at_iteration_two(pairs, tmp_path):
    store, scorer = RunStore(tmp_path), Scorer()
    prepare(1, pairs, store, scorer, Sampler(), reference_free=True)
    prepare(2, pairs, store, scorer, Sampler(), reference_free=True)
    assert (0, "score_candidates") not in scorer.calls
    # (9 - 2) / 2 - (1 - 2) / 2 = 4 per token
    assert store.column(2, "offline", "margin")[0] == pytest.approx(4.0)


def test_finished_phases_are_read_back(pairs, tmp_path):
    store, scorer, sampler = RunStore(tmp_path), Scorer(), Sampler()
    prepare(1, pairs, store, scorer, sampler)
    first = prepare(2, pairs, store, scorer, sampler)
    again, silent = Scorer(), Sampler(chunks=0)
    assert prepare(2, pairs, store, again, silent).equals(first)
    assert again.calls == []


def test_interrupted_sampling_never_samples_a_row_twice(pairs, tmp_path):
    store = RunStore(tmp_path)
    prepare(1, pairs, store, Scorer(), Sampler())
    with pytest.raises(KeyboardInterrupt):
        prepare(2, pairs, store, Scorer(), Sampler(chunks=3))
    rest = Sampler()
    prepare(2, pairs, store, Scorer(), rest)
    assert rest.rows == [3]
    assert not store.samples(2).exists()


def test_selection_only_samples_nothing(pairs, tmp_path):
    store, silent = RunStore(tmp_path), Sampler(chunks=0)
    prepare(1, pairs, store, Scorer(), silent, bootstrap_ratio=0)
    assert prepare(2, pairs, store, Scorer(), silent, bootstrap_ratio=0).num_rows == 2
    assert not store.table_file(2, "candidates").exists()


def test_bootstrap_only_keeps_no_offline_pair(pairs, tmp_path):
    store = RunStore(tmp_path)
    keys = {"selection_ratio": 0.0, "bootstrap_ratio": 1.0}
    prepare(1, pairs, store, Scorer(), Sampler(), **keys)
    result = prepare(2, pairs, store, Scorer(), Sampler(), **keys)
    assert result["chosen_ids"].to_pylist() == [[row + 5, 0] for row in range(N)]


def test_a_log_probability_that_is_not_finite_names_the_row(pairs, tmp_path):
    def broken(policy, prompts, completions, phase):
        return np.array([0.0, 0.0, np.nan, 0.0] * 2)

    with pytest.raises(ValueError, match="chosen in row 2 is nan"):
        prepare(1, pairs, RunStore(tmp_path), broken, Sampler())
    assert not RunStore(tmp_path).table_file(1, "offline").exists()
