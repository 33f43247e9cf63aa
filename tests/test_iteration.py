"""Algorithm 1 against fakes of the two protocols: a scorer and a candidate sampler.

Three offline pairs. Every token id is a known completion; the scorer looks its log-probability up
by policy, so each number below can be followed on paper.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from sera_plugin.algorithm.algorithm import prepare
from sera_plugin.algorithm.method import Iteration, Method, Pairs, Phases
from sera_plugin.algorithm.protocols import Candidate, SamplingSettings
from sera_plugin.config.kinds import LABELERS
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir.store import RunStore, make_table

# log pi of (prompt token, completion's first token) under theta_0, theta_1, theta_2, in nats.
LOGPS: dict[tuple[int, int], list[float]] = {
    # chosen            rejected
    (1, 11): [-10, -9, -8], (1, 12): [-10, -12, -15],
    (2, 21): [-20, -21, -20], (2, 22): [-20, -20, -21],
    (3, 31): [-30, -28, -29], (3, 32): [-30, -29, -31],
    # candidates
    (1, 13): [-5, -3, -2], (1, 14): [-5, -6, -6],
    (2, 23): [-6, -6, -7], (2, 24): [-6, -5, -3],
    (3, 33): [-7, -1, -9], (3, 34): [-7, -7, -7],
}  # fmt: skip
END = 99
NAMES = ("prompt", "chosen", "rejected")
CANDIDATES = {
    row: [[10 * prompt + 3, END], [10 * prompt + 4, END]] for row, prompt in enumerate((1, 2, 3))
}


class FakeScorer:
    def __init__(self) -> None:
        self.calls: list[tuple[int, str, int]] = []
        self.broken: tuple[int, int] | None = None

    def __call__(self, policy, prompts, completions, phase):
        self.calls.append((policy, phase, len(prompts)))
        keys = [(int(p[0]), int(c[0])) for p, c in zip(prompts, completions, strict=True)]
        return np.asarray([math.nan if k == self.broken else LOGPS[k][policy] for k in keys])


class FakeSampler:
    def __init__(self, fail_after: int | None = None) -> None:
        self.report: dict[str, Any] = {"name": "fake"}
        self.seconds = {"start_engine": 0.5}
        self.fail_after = fail_after
        self.sampled: list[int] = []
        self.calls = 0

    def sample(self, prompts, settings, skip=()):
        self.calls += 1
        # Last row first: the order of chunks is the sampler's own business.
        for row in reversed(range(len(prompts))):
            if row in skip:
                continue
            if len(self.sampled) == self.fail_after:
                raise RuntimeError("the machine was taken away")
            self.sampled.append(row)
            yield [(row, [Candidate(ids, "stop") for ids in CANDIDATES[row]])]


@dataclasses.dataclass
class Run:
    """One run directory with its fakes."""

    directory: Path
    config: SeraConfig = dataclasses.field(
        default_factory=lambda: SeraConfig(selection_ratio=0.67, bootstrap_ratio=0.67, candidates=2)
    )
    reference_free: bool = False
    per_token: bool = False
    scorer: FakeScorer = dataclasses.field(default_factory=FakeScorer)
    sampler: FakeSampler = dataclasses.field(default_factory=FakeSampler)
    phases: Phases = dataclasses.field(default_factory=Phases)

    @property
    def store(self) -> RunStore:
        return RunStore(self.directory)

    @property
    def method(self) -> Method:
        return Method(self.config, self.reference_free, self.per_token, total=3)

    def iteration(self, t: int, labeler: Any = None) -> Iteration:
        columns = {
            "prompt_ids": [[1], [2, 2], [3]],
            "chosen_ids": [[11, END], [21, 0, 0, END], [31, END]],
            "rejected_ids": [[12, END], [22, END], [32, 0, 0, END]],
        }
        return Iteration(
            t,
            self.method,
            Pairs.from_table(make_table(columns)),
            self.store,
            self.scorer,
            self.sampler,
            SamplingSettings(self.config.candidates, 0.7, 0.95, 8, None, (END,), seed=0),
            labeler or LABELERS[self.config.labeler].load()(self.method),
            self.phases,
        )

    def prepare(self, t, labeler=None) -> dict[str, list[Any]]:
        return prepare(self.iteration(t, labeler)).to_pydict()

    def offline(self, iteration) -> dict[str, list[Any]]:
        return self.table(iteration, "offline")

    def table(self, iteration, name) -> dict[str, list[Any]]:
        return self.store.read(iteration, name).to_pydict()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def firsts(columns: dict[str, list[Any]]) -> list[tuple[int, int, int]]:
    """Pairs as the first tokens of prompt, chosen, rejected."""
    return [
        (p[0], c[0], r[0])
        for p, c, r in zip(*(columns[f"{name}_ids"] for name in NAMES), strict=True)
    ]


def assert_reference_is(policy: int, trained: dict[str, list[Any]]) -> None:
    for side in ("chosen", "rejected"):
        expected = [
            LOGPS[prompt[0], ids[0]][policy]
            for prompt, ids in zip(trained["prompt_ids"], trained[f"{side}_ids"], strict=True)
        ]
        assert trained[f"ref_{side}_logps"] == expected


def test_counts_are_rounded_shares_of_n():
    method = Method(SeraConfig(), reference_free=False, per_token=False, total=9)
    assert (method.kept(2), method.sampled(2)) == (6, 3)  # 6.3 and 2.7
    method = Method(SeraConfig(bootstrap_ratio=2.0), False, False, total=9)
    assert method.sampled(2) == 18


def test_iteration_one_trains_on_all_pairs_against_the_initial_policy(run):
    trained = run.prepare(1)
    assert firsts(trained) == [(1, 11, 12), (2, 21, 22), (3, 31, 32)]
    assert trained["chosen_ids"][1] == [21, 0, 0, END]
    assert_reference_is(0, trained)
    assert run.scorer.calls == [(0, "score_offline", 6)]
    assert run.sampler.calls == 0
    offline = run.table(1, "offline")
    assert "margin" not in offline
    assert offline["row"] == [0, 1, 2]
    assert offline["prompt_length"] == [1, 2, 1]
    assert offline["chosen_length"] == [2, 4, 2]
    assert offline["rejected_length"] == [2, 2, 4]
    assert offline["chosen_logp"] == [-10, -20, -30]
    assert offline["rejected_logp"] == [-10, -20, -30]


def test_iteration_two_by_hand(run):
    """r = log pi_1 - log pi_0.

    Offline: (-9 + 10) - (-12 + 10) = 3, (-21 + 20) - 0 = -1, (-28 + 30) - (-29 + 30) = 1;
    round(0.67 * 3) = 2 kept: rows 0 and 2.
    Candidates: row 0: 2, -1, margin 3; row 1: 0, 1, margin 1; row 2: 6, 0, margin 6;
    round(0.67 * 3) = 2 kept: rows 0 and 2.
    """
    run.prepare(1)
    trained = run.prepare(2)
    offline = run.table(2, "offline")
    assert offline["chosen_reward"] == [1, -1, 2]
    assert offline["rejected_reward"] == [-2, 0, 1]
    assert offline["margin"] == [3, -1, 1]
    assert offline["selected"] == [True, False, True]
    assert offline["chosen_logp"] == [-9, -21, -28]

    candidates = run.table(2, "candidates")
    assert candidates["row"] == [0, 0, 1, 1, 2, 2]
    assert candidates["candidate"] == [0, 1] * 3
    assert candidates["token_ids"] == [ids for row in range(3) for ids in CANDIDATES[row]]
    assert candidates["finish_reason"] == ["stop"] * 6
    assert candidates["logps"] == [[-3, -5], [-6, -5], [-6, -6], [-5, -6], [-1, -7], [-7, -7]]
    assert candidates["reward"] == [2, -1, 0, 1, 6, 0]

    bootstrapped = run.table(2, "bootstrapped")
    assert bootstrapped["row"] == [0, 1, 2]
    assert bootstrapped["chosen_candidate"] == [0, 1, 0]
    assert bootstrapped["rejected_candidate"] == [1, 0, 1]
    assert bootstrapped["margin"] == [3, 1, 6]
    assert bootstrapped["selected"] == [True, False, True]

    assert len(trained["prompt_ids"]) == run.method.kept(2) + run.method.sampled(2) == 4
    assert firsts(trained) == [(1, 11, 12), (3, 31, 32), (1, 13, 14), (3, 33, 34)]
    assert_reference_is(1, trained)
    # Offline pairs once, under the current policy only; candidates under both.
    assert run.scorer.calls[1:] == [
        (1, "score_offline", 6),
        (1, "score_candidates", 6),
        (0, "score_candidates", 6),
    ]


def test_iteration_three_has_the_ensemble(run):
    """r = 0.7 (log pi_2 - log pi_1) + 0.3 (log pi_1 - log pi_0).

    Offline, chosen: 0.7 * 1 + 0.3 * 1 = 1, 0.7 * 1 - 0.3 = 0.4, -0.7 + 0.6 = -0.1;
    rejected: -2.1 - 0.6 = -2.7, -0.7, -1.4 + 0.3 = -1.1; margins 3.7, 1.1, 1.0.
    Candidates: row 0: 0.7 + 0.6 = 1.3 and -0.3, margin 1.6; row 1: -0.7 and 1.4 + 0.3 = 1.7,
    margin 2.4; row 2: 0.7 * -8 + 0.3 * 6 = -3.8 and 0, margin 3.8 for the second.
    """
    for iteration in (1, 2):
        run.prepare(iteration)
    run.scorer.calls.clear()
    trained = run.prepare(3)
    assert run.table(3, "offline")["margin"] == pytest.approx([3.7, 1.1, 1.0])
    assert run.table(3, "offline")["selected"] == [True, True, False]
    assert run.table(3, "candidates")["reward"] == pytest.approx([1.3, -0.3, -0.7, 1.7, -3.8, 0])
    assert run.table(3, "candidates")["logps"][4] == [-9, -1, -7]
    assert run.table(3, "bootstrapped")["margin"] == pytest.approx([1.6, 2.4, 3.8])
    assert firsts(trained) == [(1, 11, 12), (2, 21, 22), (2, 24, 23), (3, 34, 33)]
    assert_reference_is(2, trained)
    assert run.scorer.calls == [
        (2, "score_offline", 6),
        (2, "score_candidates", 6),
        (1, "score_candidates", 6),
        (0, "score_candidates", 6),
    ]


def test_per_token_margins_divide_each_side_by_its_own_length(tmp_path):
    """As at t = 2, over lengths 2 | 2, 4 | 2, 2 | 4: 1/2 + 2/2, -1/4 - 0, 2/2 - 1/4."""
    run = Run(tmp_path, per_token=True)
    run.prepare(1)
    run.prepare(2)
    assert run.table(2, "offline")["margin"] == pytest.approx([1.5, -0.25, 0.75])
    # All candidates have two tokens.
    assert run.table(2, "bootstrapped")["margin"] == pytest.approx([1.5, 0.5, 3.0])


def test_simpo_compares_with_no_earlier_policy_at_iteration_two(tmp_path):
    """r = log pi_1 / |y|: -9/2 + 12/2 = 1.5, -21/4 + 20/2 = 4.75, -28/2 + 29/4 = -6.75."""
    run = Run(tmp_path, reference_free=True, per_token=True)
    trained = run.prepare(2)  # no files of iteration 1 exist
    assert {policy for policy, _, _ in run.scorer.calls} == {1}
    assert run.table(2, "offline")["margin"] == pytest.approx([1.5, 4.75, -6.75])
    assert run.table(2, "offline")["selected"] == [True, True, False]
    assert run.table(2, "candidates")["logps"][0] == [-3]
    assert_reference_is(1, trained)


def test_without_bootstrapping_nothing_is_sampled(tmp_path):
    run = Run(tmp_path, SeraConfig(selection_ratio=0.67, bootstrap_ratio=0))
    run.prepare(1)
    trained = run.prepare(2)
    assert firsts(trained) == [(1, 11, 12), (3, 31, 32)]
    assert run.sampler.calls == 0
    assert run.store.read(2, "candidates") is None


def test_without_selection_only_sampled_pairs_are_trained(tmp_path):
    config = SeraConfig(selection_ratio=0, bootstrap_ratio=1, candidates=2)
    run = Run(tmp_path, config)
    run.prepare(1)
    assert firsts(run.prepare(2)) == [(1, 13, 14), (2, 24, 23), (3, 33, 34)]


def test_fewer_pairs_than_asked_for_are_all_used(run, monkeypatch):
    monkeypatch.setitem(CANDIDATES, 0, [[13, END]] * 2)  # a duplicate
    monkeypatch.setitem(CANDIDATES, 2, [[33, END]] * 2)
    run.prepare(1)
    trained = run.prepare(2)
    assert firsts(trained) == [(1, 11, 12), (3, 31, 32), (2, 24, 23)]
    metadata = run.store.read(2, "bootstrapped").schema.metadata
    assert metadata[b"duplicates"] == b"2"
    assert metadata[b"too_few"] == b"2"
    assert metadata[b"ties"] == b"0"


def test_no_sampled_pair_at_all_leaves_the_offline_ones(run, monkeypatch):
    for row in range(3):
        monkeypatch.setitem(CANDIDATES, row, [CANDIDATES[row][0]] * 2)
    run.prepare(1)
    assert firsts(run.prepare(2)) == [(1, 11, 12), (3, 31, 32)]
    assert run.table(2, "bootstrapped")["row"] == []


def test_nothing_left_to_train_on_is_an_error(tmp_path, monkeypatch):
    for row in range(3):
        monkeypatch.setitem(CANDIDATES, row, [CANDIDATES[row][0]] * 2)
    run = Run(tmp_path, SeraConfig(selection_ratio=0, bootstrap_ratio=1, candidates=2))
    run.prepare(1)
    with pytest.raises(ValueError, match=r"nothing is left to train on.*sera\.temperature"):
        run.prepare(2)


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_a_second_call_reads_everything_from_disk(run, iteration):
    for earlier in range(1, iteration):
        run.prepare(earlier)
    first = run.prepare(iteration)
    files = {p: p.read_bytes() for p in run.store.root.rglob("*") if p.is_file()}
    again = Run(run.directory)
    assert again.prepare(iteration) == first
    assert again.scorer.calls == []
    assert again.sampler.calls == 0
    assert {p: p.read_bytes() for p in run.store.root.rglob("*") if p.is_file()} == files


def test_interrupted_sampling_goes_on_where_it_stopped(run):
    run.prepare(1)
    run.sampler = FakeSampler(fail_after=1)
    with pytest.raises(RuntimeError, match="taken away"):
        run.prepare(2)
    assert run.sampler.sampled == [2]
    assert run.store.read(2, "offline") is not None
    assert run.store.read(2, "candidates") is None

    resumed = Run(run.directory)
    trained = resumed.prepare(2)
    assert resumed.sampler.sampled == [1, 0]
    assert [call for call in resumed.scorer.calls if call[1] == "score_offline"] == []
    assert not resumed.store.samples(2).exists()

    whole = Run(run.directory / "whole")
    whole.prepare(1)
    assert whole.prepare(2) == trained


def test_a_crash_before_the_chunks_are_removed_does_no_harm(run, monkeypatch):
    run.prepare(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "remove_samples", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            run.prepare(2)
    resumed = Run(run.directory)
    assert len(resumed.prepare(2)["prompt_ids"]) == 4
    assert resumed.scorer.calls == []
    assert resumed.sampler.calls == 0


@pytest.mark.parametrize(("broken", "side"), [((2, 21), "chosen"), ((2, 22), "rejected")])
def test_nan_of_an_offline_pair_names_row_and_side(run, broken, side):
    run.scorer.broken = broken
    with pytest.raises(ValueError, match=rf"{side} in row 1 is nan \(1 such.*learning_rate"):
        run.prepare(1)
    assert run.store.read(1, "offline") is None


def test_nan_of_a_candidate_names_its_row(run):
    run.prepare(1)
    run.scorer.broken = (3, 34)
    with pytest.raises(ValueError, match="candidate in row 2 is nan"):
        run.prepare(2)
    assert run.store.read(2, "candidates") is None


def test_a_full_disk_stops_the_sampler_and_keeps_what_is_written(run, monkeypatch):
    append = RunStore.append_samples
    closed: list[int] = []
    sample = FakeSampler.sample

    def watched(self, *args, **kwargs):
        try:
            yield from sample(self, *args, **kwargs)
        finally:
            closed.append(len(self.sampled))

    def full(self, iteration, table):
        if self.samples(iteration).exists():
            # The error as pytest keeps it holds every frame: only an explicit close ends one.
            raise OSError(28, "No space left on device")
        append(self, iteration, table)

    run.prepare(1)
    monkeypatch.setattr(FakeSampler, "sample", watched)
    monkeypatch.setattr(RunStore, "append_samples", full)
    with pytest.raises(OSError, match="No space left"):
        run.prepare(2)
    assert closed == [2]
    monkeypatch.setattr(RunStore, "append_samples", append)
    run.prepare(2)
    assert run.sampler.sampled == [2, 1, 1, 0]


def test_sampled_sequences_and_tokens_are_counted(run):
    run.prepare(1)
    run.prepare(2)
    assert run.phases.forwarded["sample"] == {"sequences": 6, "tokens": 12}
    assert run.phases.seconds.keys() == {
        *("score_offline", "select", "sample", "score_candidates", "label"),
        "start_engine",
    }
    assert run.phases.seconds["start_engine"] == 0.5


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Ways in which a file comes back wrong from a disk."""
    random = Random(len(content))
    for length in (0, 1, len(content) // 2, len(content) - 8, len(content) - 1):
        yield f"cut to {length}", content[:length]
    for place in random.sample(range(len(content)), 12):
        flipped = bytearray(content)
        flipped[place] ^= 1 << random.randrange(8)
        yield f"bit flipped in byte {place}", bytes(flipped)
    yield "longer", content + b"\0"
    yield "zeroed", bytes(len(content))


@pytest.mark.parametrize(
    ("iteration", "name"),
    [
        *((2, "offline"), (2, "candidates"), (2, "bootstrapped")),
        # Of earlier iterations only what later rewards and the drift are computed from is read.
        *((1, "offline"), (3, "offline")),
    ],
)
def test_a_damaged_file_is_never_read_and_its_phase_is_done_again(run, iteration, name, caplog):
    last = max(2, iteration)
    trained = [run.prepare(each) for each in range(1, last + 1)][-1]
    path = run.store.table_file(iteration, name)
    whole = path.read_bytes()
    for what, content in damages(whole):
        path.write_bytes(content)
        if iteration < last:  # what is computed from it is not there either
            run.store.table_file(last, name).unlink()
        caplog.clear()
        assert run.prepare(last) == trained, what
        assert path.read_bytes() == whole, what
        assert f"{path.name} is damaged (its checksum differs) and is not used" in caplog.text
    for before in range(1, iteration):
        # Whatever was damaged, the run scores the offline set under no policy twice.
        scored = [call for call in run.scorer.calls if call[:2] == (before - 1, "score_offline")]
        assert len(scored) == 1


def test_rows_of_a_damaged_chunk_are_sampled_again_and_no_others(run):
    run.prepare(1)
    run.sampler.fail_after = 2
    with pytest.raises(RuntimeError, match="taken away"):
        run.prepare(2)
    first, second = sorted(run.store.samples(2).glob("*.parquet"))
    whole = first.read_bytes()
    for what, content in damages(whole):
        first.write_bytes(content)
        found = run.store.read_samples(2)
        assert found is not None
        assert set(found["row"].to_pylist()) == {1}, what
    resumed = Run(run.directory)
    trained = resumed.prepare(2)
    assert resumed.sampler.sampled == [2, 0]
    assert second.name.startswith("000-000001-")
    clean = Run(run.directory / "clean")
    clean.prepare(1)
    assert clean.prepare(2) == trained
