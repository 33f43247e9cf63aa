"""Algorithm 1 on the three pairs of three_pairs.py, where each number can be followed on paper."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from sera_plugin.algorithm.method import Method
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir.store import RunStore, make_table, write_json, write_table
from tests.three_pairs import CANDIDATES, END, Run, assert_reference_is, firsts


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


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
    names = "prompt_length chosen_length rejected_length chosen_logp rejected_logp"
    expected = [[1, 2, 1], [2, 4, 2], [2, 2, 4], [-10, -20, -30], [-10, -20, -30]]
    assert run.columns(1, "offline", names) == expected
    assert run.offline(1).keys() == {"row", *names.split()}


def test_iteration_two_by_hand(run):
    """r = log pi_1 - log pi_0.

    Offline: (-9 + 10) - (-12 + 10) = 3, (-21 + 20) - 0 = -1, (-28 + 30) - (-29 + 30) = 1;
    round(0.67 * 3) = 2 kept: rows 0 and 2.
    Candidates: row 0: 2, -1, margin 3; row 1: 0, 1, margin 1; row 2: 6, 0, margin 6;
    round(0.67 * 3) = 2 kept: rows 0 and 2.
    """
    trained = run.upto(2)
    names = "chosen_reward rejected_reward margin chosen_logp selected"
    expected = [[1, -1, 2], [-2, 0, 1], [3, -1, 1], [-9, -21, -28], [True, False, True]]
    assert run.columns(2, "offline", names) == expected
    samples = [ids for row in range(3) for ids in CANDIDATES[row]]
    logps = [[-3, -5], [-6, -5], [-6, -6], [-5, -6], [-1, -7], [-7, -7]]
    names = "row candidate token_ids finish_reason logps reward"
    expected = [[0, 0, 1, 1, 2, 2], [0, 1] * 3, samples, ["stop"] * 6, logps, [2, -1, 0, 1, 6, 0]]
    assert run.columns(2, "candidates", names) == expected
    names = "row chosen_candidate rejected_candidate margin selected"
    expected = [[0, 1, 2], [0, 1, 0], [1, 0, 1], [3, 1, 6], [True, False, True]]
    assert run.columns(2, "bootstrapped", names) == expected
    assert len(trained["prompt_ids"]) == run.method.kept(2) + run.method.sampled(2) == 4
    assert firsts(trained) == [(1, 11, 12), (3, 31, 32), (1, 13, 14), (3, 33, 34)]
    assert_reference_is(1, trained)
    # Offline pairs once, under the current policy only; candidates under both.
    calls = [(1, "score_offline", 6), *((policy, "score_candidates", 6) for policy in (1, 0))]
    assert run.scorer.calls[1:] == calls
    assert run.phases.forwarded["sample"] == {"sequences": 6, "tokens": 12}
    spent = {"score_offline", "select", "sample", "score_candidates", "label", "start_engine"}
    assert run.phases.seconds.keys() == spent
    assert run.phases.seconds["start_engine"] == 0.5


def test_iteration_three_has_the_ensemble(run):
    """r = 0.7 (log pi_2 - log pi_1) + 0.3 (log pi_1 - log pi_0).

    Offline, chosen: 0.7 * 1 + 0.3 * 1 = 1, 0.7 * 1 - 0.3 = 0.4, -0.7 + 0.6 = -0.1;
    rejected: -2.1 - 0.6 = -2.7, -0.7, -1.4 + 0.3 = -1.1; margins 3.7, 1.1, 1.0.
    Candidates: row 0: 0.7 + 0.6 = 1.3 and -0.3, margin 1.6; row 1: -0.7 and 1.4 + 0.3 = 1.7,
    margin 2.4; row 2: 0.7 * -8 + 0.3 * 6 = -3.8 and 0, margin 3.8 for the second.
    """
    run.sampler.size = 2  # rows 2 and 1 in one chunk, row 0 in another
    trained = run.upto(3)
    assert run.offline(3)["margin"] == pytest.approx([3.7, 1.1, 1.0])
    assert run.offline(3)["selected"] == [True, True, False]
    assert run.table(3, "candidates")["reward"] == pytest.approx([1.3, -0.3, -0.7, 1.7, -3.8, 0])
    assert run.table(3, "candidates")["logps"][4] == [-9, -1, -7]
    assert run.table(3, "bootstrapped")["margin"] == pytest.approx([1.6, 2.4, 3.8])
    assert firsts(trained) == [(1, 11, 12), (2, 21, 22), (2, 24, 23), (3, 34, 33)]
    assert_reference_is(2, trained)
    calls = [(2, "score_offline", 6), *((policy, "score_candidates", 6) for policy in (2, 1, 0))]
    assert run.scorer.calls[4:] == calls


def test_per_token_margins_divide_each_side_by_its_own_length(tmp_path):
    """As at t = 2, over lengths 2 | 2, 4 | 2, 2 | 4: 1/2 + 2/2, -1/4 - 0, 2/2 - 1/4."""
    run = Run(tmp_path, per_token=True)
    run.upto(2)
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


def test_without_bootstrapping_nothing_is_sampled_and_without_selection_nothing_else(tmp_path):
    run = Run(tmp_path / "offline", SeraConfig(selection_ratio=0.67, bootstrap_ratio=0))
    assert firsts(run.upto(2)) == [(1, 11, 12), (3, 31, 32)]
    assert run.sampler.calls == 0
    assert run.store.read(2, "candidates") is None
    config = SeraConfig(selection_ratio=0, bootstrap_ratio=1, candidates=2)
    run = Run(tmp_path / "sampled", config)
    assert firsts(run.upto(2)) == [(1, 13, 14), (2, 24, 23), (3, 33, 34)]


def test_fewer_pairs_than_asked_for_are_all_used_down_to_none(tmp_path, monkeypatch):
    run = Run(tmp_path / "fewer")
    for row in (0, 2):
        monkeypatch.setitem(CANDIDATES, row, [CANDIDATES[row][0]] * 2)  # a duplicate
    assert firsts(run.upto(2)) == [(1, 11, 12), (3, 31, 32), (2, 24, 23)]
    metadata = run.store.read(2, "bootstrapped").schema.metadata
    counts = {b"duplicates": b"2", b"too_few": b"2", b"ties": b"0"}
    assert metadata.items() >= counts.items()
    monkeypatch.setitem(CANDIDATES, 1, [CANDIDATES[1][0]] * 2)
    run = Run(tmp_path / "none")
    assert firsts(run.upto(2)) == [(1, 11, 12), (3, 31, 32)]
    assert run.table(2, "bootstrapped")["row"] == []
    config = SeraConfig(selection_ratio=0, bootstrap_ratio=1, candidates=2, trust="warn")
    run = Run(tmp_path / "nothing", config)
    with pytest.raises(ValueError, match=r"nothing is left to train on.*sera\.temperature"):
        run.upto(2)


def test_a_second_call_reads_everything_from_disk(run):
    for iteration in (1, 2, 3):
        first = run.prepare(iteration)
        files = {p: p.read_bytes() for p in run.store.root.rglob("*") if p.is_file()}
        again = Run(run.directory)
        assert again.prepare(iteration) == first
        assert (again.scorer.calls, again.sampler.calls) == ([], 0)
        assert {p: p.read_bytes() for p in run.store.root.rglob("*") if p.is_file()} == files


def test_interrupted_sampling_goes_on_where_it_stopped(run):
    run.sampler.fail_after = 1
    with pytest.raises(RuntimeError, match="taken away"):
        run.upto(2)
    assert run.sampler.sampled == [2]
    assert run.store.read(2, "offline") is not None
    assert run.store.read(2, "candidates") is None

    resumed = Run(run.directory)
    trained = resumed.prepare(2)
    assert resumed.sampler.sampled == [1, 0]
    assert [call for call in resumed.scorer.calls if call[1] == "score_offline"] == []
    assert not resumed.store.samples(2).exists()
    assert Run(run.directory / "whole").upto(2) == trained


def test_a_crash_before_the_chunks_are_removed_does_no_harm(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "remove_samples", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            run.upto(2)
    resumed = Run(run.directory)
    assert len(resumed.prepare(2)["prompt_ids"]) == 4
    assert (resumed.scorer.calls, resumed.sampler.calls) == ([], 0)


@pytest.mark.parametrize(
    ("broken", "said", "name"),
    [
        ((2, 21), r"chosen in row 1 is nan \(1 such.*learning_rate", "offline"),
        ((2, 22), r"rejected in row 1 is nan \(1 such.*learning_rate", "offline"),
        ((3, 34), "candidate in row 2 is nan", "candidates"),
    ],
)
def test_nan_names_row_and_side(run, broken, said, name):
    run.scorer.broken = broken
    with pytest.raises(ValueError, match=said):
        run.upto(2)
    assert run.store.read(1 if name == "offline" else 2, name) is None


def test_a_full_disk_stops_the_sampler_and_keeps_what_is_written(run, monkeypatch):
    append = RunStore.append_samples

    def full(self, iteration, table):
        if any(self.samples(iteration).iterdir()):
            # The error as pytest keeps it holds every frame: only an explicit close ends one.
            raise OSError(28, "No space left on device")
        append(self, iteration, table)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "append_samples", full)
        with pytest.raises(OSError, match="No space left"):
            run.upto(2)
    assert (run.sampler.sampled, run.sampler.running) == ([2, 1], 0)
    run.prepare(2)
    assert run.sampler.sampled == [2, 1, 1, 0]


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
    trained = run.upto(last)
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
    # Whatever was damaged, the run scores the offline set under no earlier policy twice.
    scored = [policy for policy, phase, _ in run.scorer.calls if phase == "score_offline"]
    assert [scored.count(policy) for policy in range(iteration - 1)] == [1] * (iteration - 1)


def test_rows_of_a_damaged_chunk_are_sampled_again_and_no_others(run):
    run.sampler.fail_after = 2
    with pytest.raises(RuntimeError, match="taken away"):
        run.upto(2)
    first, second = sorted(run.store.samples(2).glob("*.parquet"))
    whole = first.read_bytes()
    for what, content in damages(whole):
        first.write_bytes(content)
        assert [set(chunk["row"].to_pylist()) for chunk in run.store.chunks(2)] == [{1}], what
    resumed = Run(run.directory)
    trained = resumed.prepare(2)
    assert resumed.sampler.sampled == [2, 0]
    assert second.name.startswith("000-000001-")
    assert Run(run.directory / "clean").upto(2) == trained


WRONG_CHUNKS = {
    "three candidates": ({"row": [0] * 3, "candidate": [0, 1, 2]}, "does not have 2 candidates"),
    "one twice": ({"row": [0, 0], "candidate": [1, 1]}, "does not have 2 candidates"),
    "rows of another run": ({"row": [3, 3], "candidate": [0, 1]}, "rows outside 0 to 2"),
    "rows of another chunk": (
        {"row": [1, 1], "candidate": [0, 1], "token_ids": CANDIDATES[0]}, "in another chunk too"
    ),
    "an end within": (
        {"row": [0, 0], "candidate": [0, 1], "token_ids": [[END, END]] * 2}, "does not end as"
    ),
    "an unknown token": (
        {"row": [0, 0], "candidate": [0, 1], "token_ids": [[100, END]] * 2}, "does not know"
    ),
    "a negative token": (
        {"row": [0, 0], "candidate": [0, 1], "token_ids": [[-5, END]] * 2}, "does not know"
    ),
    "other columns": ({"row": [0, 0], "number": [0, 1]}, "its columns are not row, candidate"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CHUNKS)
def test_a_whole_chunk_that_cannot_be_used_is_set_aside_and_made_again(run, caplog, name):
    columns, said = WRONG_CHUNKS[name]
    run.sampler.fail_after = 2
    with pytest.raises(RuntimeError, match="taken away"):
        run.upto(2)
    first, second = sorted(run.store.samples(2).glob("*.parquet"))
    first.unlink()
    count = len(columns["row"])
    table = make_table(
        {"token_ids": [[7, END]] * count, "finish_reason": ["stop"] * count, **columns}
    )
    names = [*list(columns)[:2], "token_ids", "finish_reason"]
    table = table.select(names)
    RunStore(run.directory).append_samples(2, table)
    [added] = set(run.store.samples(2).glob("*.parquet")) - {second}
    added.rename(added.with_name(added.name.replace("000-000001-", "000-000009-")))
    resumed = Run(run.directory)
    trained = resumed.prepare(2)
    assert sorted(resumed.sampler.sampled) == [0, 2]
    [line] = [one for one in caplog.messages if "is set aside and made again" in one]
    assert said in line
    assert Run(run.directory / "clean").upto(2) == trained


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (5, "it does not have the same number of candidates for each row"),
        (4, "it has candidates of 2 rows, and the run 3 prompts"),
    ],
)
def test_a_table_in_which_prompts_lack_candidates_is_made_again(run, caplog, rows, said):
    trained, table = run.upto(2), run.store.read(2, "candidates")
    config = {"num_epochs": 2, "sera": {"candidates": 2}}
    write_json(run.store.run_file, {"format_version": 1, "config": config, "pairs": 3})
    write_table(run.store.table_file(2, "candidates"), table.slice(0, rows))
    run.store.table_file(2, "bootstrapped").unlink()
    assert Run(run.directory).prepare(2) == trained
    assert f"candidates.parquet cannot be used ({said})" in caplog.text
