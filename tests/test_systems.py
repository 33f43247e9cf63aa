"""Every system of the paper's comparison, followed by hand on three pairs.

The world is three_pairs.py's: every token id is a known completion whose log-probability under
theta_0, theta_1, theta_2 stands in its table.
"""

import dataclasses
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from sera_plugin.algorithm.method import Labeler, Method, Ranked, Schedule
from sera_plugin.algorithm.pairs import Beside, Pairs
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.selection import Annotations, select_largest
from sera_plugin.algorithm.summary import noise_found, summarize
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.run import describe_run, require_same_run
from sera_plugin.rundir.store import make_table
from tests.doc_pages import ROOT, blocks
from tests.three_pairs import CANDIDATES, END, PAIRS, Run, assert_reference_is, firsts


@dataclasses.dataclass
class System(Run):
    """One system on the three pairs."""

    annotations: Annotations = dataclasses.field(default_factory=Annotations)
    iterations: int = 3

    @property
    def method(self) -> Method:
        return dataclasses.replace(
            super().method, iterations=self.iterations, seed=7, annotations=self.annotations
        )

    def each(self, t: int) -> list[dict[str, Any]]:
        return [self.prepare(iteration) for iteration in range(1, t + 1)]


@pytest.fixture
def system(tmp_path):
    def make(directory: str = "run", annotations: Annotations | None = None, **block: Any):
        defaults = {"selection_ratio": 0.67, "bootstrap_ratio": 0.0, "candidates": 2}
        config = SeraConfig(**{**defaults, **block})
        return System(tmp_path / directory, config, annotations=annotations or Annotations())

    return make


def kept_rows(run: System, iteration: int) -> list[int]:
    return np.flatnonzero(run.offline(iteration)["selected"]).tolist()


def calls(run: System, phase: str) -> list[int]:
    """The policies that were asked in a phase, each about six completions."""
    found = [call for call in run.scorer.calls if call[1] == phase]
    assert {count for *_, count in found} == {6}
    return [policy for policy, *_ in found]


def test_reference_logp_keeps_what_the_reference_prefers(system):
    """Under theta_1: -9 + 12 = 3, -21 + 20 = -1, -28 + 29 = 1; under theta_2: 7, 1, 2.

    Per token, lengths (2, 2), (4, 2), (2, 4): -9/2 + 12/2 = 1.5, -21/4 + 20/2 = 4.75,
    -28/2 + 29/4 = -6.75.
    """
    run = system(selection="reference_logp")
    trained = run.each(3)
    assert firsts(trained[0]) == [(1, 11, 12), (2, 21, 22), (3, 31, 32)]
    assert run.offline(2)["priority"] == [3, -1, 1]
    assert run.offline(3)["priority"] == [7, 1, 2]
    assert kept_rows(run, 2) == kept_rows(run, 3) == [0, 2]
    assert_reference_is(2, trained[2])
    run = system("mean", selection="reference_logp")
    run.per_token = True
    run.each(2)
    assert run.offline(2)["priority"] == [1.5, 4.75, -6.75]
    assert kept_rows(run, 2) == [0, 1]


def test_score_keeps_the_widest_gaps(system):
    gaps = Annotations(score_gap=np.array([0.5, 4.0, 1.0]))
    run = system(annotations=gaps, selection="score", score_columns=["gap"])
    run.each(2)
    assert kept_rows(run, 2) == [1, 2]
    assert run.offline(2)["margin"] == [3, -1, 1]  # recorded all the same


def test_random_is_another_draw_each_iteration_and_the_same_for_a_seed():
    config = SeraConfig(selection="random", selection_ratio=0.5, bootstrap_ratio=0)

    def draw(seed: int, iteration: int) -> tuple[int, ...]:
        method = Method(config, False, False, total=40, seed=seed)
        priority = method.selection.priority(iteration, None, np.zeros(40))
        return tuple(np.flatnonzero(select_largest(priority, 20)))

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(1, 3), draw(2, 2), draw(2, 3)}) == 4


def test_all_is_iterative_dpo(system):
    run = system(selection="all", selection_ratio=1.0)
    for policy, table in enumerate(run.each(3)):
        assert len(firsts(table)) == 3
        assert_reference_is(policy, table)
    assert run.method.sizes == (3, 3, 3)


def test_curriculum_trains_on_each_prompts_next_easiest_pair(system):
    """Rows 0 and 2 have the same prompt; row 2's gap is wider, so it comes first.

    What is not kept has had its turn or is to have it, which says nothing of a swapped label.
    """
    swapped = np.array([False, True, False])
    annotations = Annotations(np.array([1.0, 3.0, 2.0]), np.array([0, 1, 0]), swapped)
    block = {"selection": "curriculum", "score_columns": ["gap"], "selection_ratio": 1}
    run = system(annotations=annotations, label_noise=0.33, **block)
    with pytest.raises(ValueError, match="none has more than 2"):
        _ = run.method.sizes
    run.iterations = 2
    assert run.method.sizes == (2, 1)
    trained = run.each(2)
    assert firsts(trained[0]) == [(2, 21, 22), (3, 31, 32)]
    assert firsts(trained[1]) == [(1, 11, 12)]
    assert_reference_is(1, trained[1])
    for iteration in (1, 2):
        assert run.offline(iteration)["swapped"] == swapped.tolist()
        assert "label_noise" not in summarize(run.iteration(iteration))


def test_the_initial_policy_as_reference(system):
    run = system(reference="initial", bootstrap_ratio=0.67)
    for trained, logp in zip(run.each(3), [-10, -9, -8], strict=True):
        assert_reference_is(0, trained)
        # What the gate compares with is the policy itself.
        policy = dict(zip(firsts(trained), trained["policy_chosen_logps"], strict=True))
        assert policy[1, 11, 12] == logp
    assert run.method.oldest_policy(3) == 0
    # No policy scores the same pairs twice for it: theta_0 has scored them in iteration 1.
    assert calls(run, "score_offline") == [0, 1, 2]


def test_an_initial_reference_is_scored_once_more_where_no_reward_needs_it(system):
    run = system(reference="initial", labeler="spin", bootstrap_ratio=1.0)
    for trained in run.each(3):
        assert_reference_is(0, trained)
    table = run.table(3, "candidates")
    assert table["logps"][:2] == [[-2], [-6]]  # theta_2 of 13 and 14
    assert table["reference_logp"][:2] == [-5, -5]  # theta_0


class ByToken(Labeler):
    """Prefers what a table says, by an answer's first token."""

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.seen: list[Ranked] = []

    def rewards(self, ranked: Ranked) -> FloatArray:
        self.seen.append(ranked)
        return np.array([REWARDS[int(answer[0])] for answer in ranked.answers])


REWARDS = {13: 0.0, 14: 1.0, 23: 5.0, 24: np.nan, 33: 4.0, 34: 2.0}


def test_a_labeler_of_its_own_decides_and_needs_the_current_policy_alone(system):
    """Row 0: 14 over 13 by 1; row 1: one sample has no reward; row 2: 33 over 34 by 2."""
    run = system(labeler="reward_model", reward_model="m", bootstrap_ratio=1.0)
    labeler = ByToken(run.method)
    run.each(1)
    trained = run.prepare(2, labeler)
    assert firsts(trained)[-2:] == [(1, 14, 13), (3, 33, 34)]
    table = run.table(2, "candidates")
    assert table["logps"] == [[-3], [-6], [-6], [-5], [-1], [-7]]  # theta_1 alone
    assert calls(run, "score_candidates") == [1]
    assert run.table(2, "bootstrapped")["margin"] == [1, 2]
    assert labeler.seen[0].per_prompt == 2


SPIN = {"labeler": "spin", "selection_ratio": 0.0, "bootstrap_ratio": 1.0}


@pytest.mark.parametrize(("reference", "scored"), [("previous", [0, 1]), ("initial", [0, 1, 0])])
def test_spin_puts_the_datasets_answer_before_a_sample_from_the_first_iteration_on(
    system, reference, scored
):
    """No policy scores the dataset's answers again: each has with the offline pairs."""
    run = system(**SPIN, reference=reference)
    assert run.config.first_iteration == 1
    assert run.method.sizes == (3, 3, 3)
    for policy, trained in enumerate(run.each(2)):
        assert firsts(trained) == [(1, 11, 14), (2, 21, 24), (3, 31, 34)]
        assert_reference_is(0 if reference == "initial" else policy, trained)
        table, offline = run.table(policy + 1, "candidates"), run.offline(policy + 1)
        assert not any(offline["selected"])
        assert table["finish_reason"] == ["stop", "stop", "dataset"] * 3
        assert table["token_ids"][2] == [11, END]
        assert [logp for (logp,) in table["logps"][2::3]] == offline["chosen_logp"]
    if reference == "initial":
        assert table["reference_logp"][2::3] == run.offline(1)["chosen_logp"]
    assert calls(run, "score_candidates") == scored


def test_spin_beside_offline_pairs_begins_with_selection(system):
    run = system(**SPIN | {"selection_ratio": 0.67})
    assert run.method.sizes == (3, 5, 5)
    assert len(firsts(run.prepare(1))) == 3


@pytest.mark.parametrize("repeated", [0, 1])
def test_a_sample_that_is_the_datasets_answer_stands_for_it(system, monkeypatch, repeated):
    """Row 0 has it and 13 or 14 beside it, row 1 has it twice and no pair, row 2 has it never."""
    other = CANDIDATES[0][1 - repeated]
    samples = [other, other]
    samples[repeated] = [11, END]
    monkeypatch.setitem(CANDIDATES, 0, samples)
    monkeypatch.setitem(CANDIDATES, 1, [[21, 0, 0, END]] * 2)
    run = system(**SPIN)
    assert firsts(run.prepare(1)) == [(1, 11, other[0]), (3, 31, 34)]
    assert run.store.read(1, "bootstrapped").schema.metadata[b"ties"] == b"0"


def test_a_fixed_alpha_is_taken_off_every_token(system):
    """Margins 3, -1, 1 of pairs longer by 0, 2, -2: less 1.5 each, 3, -4, 4.

    All samples have two tokens, so nothing changes for them.
    """
    run = system(offline_length_control=1.5, bootstrap_ratio=1.0, length_control=2.0)
    run.each(2)
    assert run.offline(2)["margin"] == [3, -1, 1]
    assert run.offline(2)["priority"] == [3, -4, 4]
    assert kept_rows(run, 2) == [0, 2]
    table = run.store.read(2, "bootstrapped")
    assert float(table.schema.metadata[b"alpha"]) == 2.0
    assert table["margin"].to_pylist() == [3, 1, 6]


def test_dice_is_what_its_yaml_says():
    """Its reward is log pi_{t-1} - log pi_{t-2} in every round; half of its pairs are sampled."""
    (yaml_block,) = (b for b in blocks(ROOT / "docs/systems.md", "yaml") if "gamma: 0" in b.text)
    keys = yaml.safe_load(yaml_block.text)
    config = SeraConfig(**keys["sera"])
    method = Method(config, False, False, total=40, iterations=keys["num_epochs"])
    assert (config.reward, config.length_control, config.candidates) == ("paper", "auto", 16)
    assert method.sizes == (40, 40, 40)
    for t in (2, 3):
        assert method.reward_policies(t) == (t - 1, t - 2)
        assert method.paper_weights(t) == (1, -1)
        assert (method.reference(t), method.kept(t), method.sampled(t)) == (t - 1, 20, 20)
        with_margins, without = (
            method.selection.priority(t, margin, np.zeros(40)) for margin in (np.arange(40.0), None)
        )
        assert with_margins.tolist() == without.tolist()


def test_noise_is_recorded_per_row_and_counted_where_pairs_are_told_apart(system):
    some, none = np.array([False, True, False]), np.zeros(3, dtype=bool)
    run = system(annotations=Annotations(swapped=some), label_noise=0.33)
    run.each(2)
    assert run.offline(1)["swapped"] == run.offline(2)["swapped"] == some.tolist()
    found = {"swapped": 1, "swapped_dropped": 1, "precision": 1.0, "recall": 1.0}
    assert summarize(run.iteration(2))["label_noise"] == found
    assert noise_found("irm", some, none) is noise_found("irm", some, ~none) is None
    assert noise_found("irm", None, some) is None
    # None was swapped: there is no recall.
    found = {"swapped": 0, "swapped_dropped": 0, "precision": 0.0, "recall": None}
    assert noise_found("irm", none, some) == found


def described(gap: float | None = None, row: str = "", **block: Any) -> dict[str, Any]:
    config = SeraConfig(**{"bootstrap_ratio": 0, **block})
    annotations = Annotations(score_gap=None if gap is None else np.array([gap]))
    method = Method(config, False, False, total=1, annotations=annotations)
    pairs = Pairs.from_table(make_table({name: [[1]] for name in PAIRS}))
    cfg = {"sera": config.model_dump(mode="json")}
    about = Beside.of(config.score_columns, pa.table({"gap": ["a", row]}))
    schedule, ends = Schedule((1,), 1, 1), (END,)
    return describe_run(cfg, "dpo", 0.1, method, schedule, pairs, None, ends, columns=about)


def test_a_function_that_has_changed_since_the_run_began_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    runs = []
    for text in ("one", "one", "two"):
        (tmp_path / "a.py").write_text(text)
        runs.append(described(**CALLED))
        require_same_run(runs[0], runs[-1], Path("run"))
        assert ("the file of sera.function has changed" in caplog.text) == (text == "two")


def test_whatever_a_run_is_known_by_makes_it_another_one():
    one = described()
    told = {"format_version", "versions", "config", "evaluation_pairs", "local_datasets"}
    for key in one.keys() - told:
        with pytest.raises(ValueError, match="cannot be continued"):
            require_same_run(one, one | {key: "other"}, Path("run"))


SCORE = {"selection": "score", "score_columns": ["gap"]}
JUDGE = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
SLOWER = JUDGE | {"timeout": 900, "concurrency": 1, "api_key_env": "K", "prompt_price": 1}
CALLED = {"labeler": "function", "function": "a.py:f", "score_columns": ["gap"]}
CALLED |= {"bootstrap_ratio": 1}
ONLINE = {"labeler": "judge", "bootstrap_ratio": 1, "judge": JUDGE}


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ({}, {"score_columns": ["gap"]}, None),  # kept for reading alone
        (SCORE | {"gap": 1.0}, SCORE | {"gap": 1.0}, None),
        (SCORE | {"gap": 1.0}, SCORE | {"gap": 2.0}, "the scores that select"),
        (SCORE | {"gap": 1.0}, SCORE | {"gap": 1.0, "row": "b"}, None),
        (CALLED, CALLED, None),
        (CALLED | {"row": "a"}, CALLED | {"row": "b"}, r"what a function may take .*prompts\)\. R"),
        (
            CALLED,
            CALLED | {"score_columns": []},
            r"began: sera\.score_columns: \['gap'\] -> \[\]; what a function may[^:]*\. Restore",
        ),
        (ONLINE, ONLINE | {"judge": SLOWER}, None),
        (ONLINE, ONLINE | {"judge": JUDGE | {"model": "n"}}, r"sera\.judge\.model: 'm' -> 'n'"),
    ],
)
def test_what_makes_another_run_is_named_and_the_rest_may_change(before, after, changed):
    with pytest.raises(ValueError, match=changed) if changed else nullcontext():
        require_same_run(described(**before), described(**after), Path("run"))
