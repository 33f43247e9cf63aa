"""An iteration in figures, on three pairs, and its alarms: both sides of every threshold."""

import re
from itertools import combinations
from math import sqrt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sera_plugin.algorithm import alarms
from sera_plugin.algorithm.alarms import alarm_metrics, judge, records
from sera_plugin.algorithm.noise import score_again
from sera_plugin.algorithm.summary import accuracy, summarize
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.run import describe_start
from sera_plugin.model.losses import FLOAT32_LIMIT
from sera_plugin.rundir.store import make_table
from tests.three_pairs import CANDIDATES, CONFIG, FakeScorer, Run


def summary(run: Run, t: int) -> dict:
    run.upto(t)
    return summarize(run.iteration(t))


@pytest.mark.parametrize(
    ("per_token", "offline"),
    [
        # Margins 3, -1 and 1: quartiles 0 and 2; 16 tokens in 6 completions.
        (False, 2 / (16 / 6)),
        # Margins per token 1/2 + 2/2, -1/4 - 0/2 and 2/2 - 1/4: quartiles 1/4 and 9/8.
        (True, 9 / 8 - 1 / 4),
    ],
)
def test_spread_is_in_nats_per_token_and_lengths_are_of_what_is_trained(
    tmp_path, per_token, offline
):
    """Rewards of the candidates are (2, -1), (0, 1) and (6, 0), of two tokens each.

    Kept are rows 0 and 2 (chosen 2, 2 tokens, rejected 2, 4) and two sampled pairs of 2; per token
    the same.
    """
    found = summary(Run(tmp_path, per_token=per_token), 2)
    assert found["spread"] == pytest.approx({"offline": offline, "sampled": 3 / 2})
    assert found["lengths"]["trained_chosen"] == 2.0
    assert found["lengths"]["trained_rejected"] == (2 + 4 + 2 + 2) / 4


def test_equal_candidates_have_no_spread(tmp_path, monkeypatch):
    """Ranges are 3, 1 and 6 nats over 2 tokens; row 1 gives one answer twice, then 2, then 0."""
    for row, spread in ((1, (3 + 6) / 4), (2, 3 / 2), (0, None)):
        monkeypatch.setitem(CANDIDATES, row, CANDIDATES[row][:1] * 2)
        assert summary(Run(tmp_path / str(row)), 2)["spread"]["sampled"] == spread


def test_candidates_that_nobody_ranked_have_no_spread(tmp_path):
    """Row 0 has one that is ranked, row 1 none, so that 6 nats over 2 tokens are left."""
    run = Run(tmp_path)
    run.upto(2)
    candidates = run.iteration(2).table("candidates")
    reward = candidates["reward"].to_numpy().copy()
    reward[[1, 2, 3]] = np.nan
    place = candidates.schema.get_field_index("reward")
    run.iteration(2).keep("candidates", candidates.set_column(place, "reward", pa.array(reward)))
    assert summarize(run.iteration(2))["spread"]["sampled"] == 3


def test_without_sampling_there_is_no_sampled_figure(tmp_path):
    run = Run(tmp_path, CONFIG.model_copy(update={"bootstrap_ratio": 0}))
    found = summary(run, 2)
    assert found["spread"].keys() == {"offline"}
    assert "sampled" not in found["lengths"]
    assert found["lengths"]["trained_rejected"] == 3.0
    assert "spread" not in summary(run, 1)
    # Two of three margins are above 0: 4/7 x 3/7 / 7.
    assert found["offline_accuracy"] == pytest.approx(2 / 3)
    assert found["offline_accuracy_error"] == pytest.approx(sqrt(4 / 7 * 3 / 7 / 7))


def test_the_log_says_what_margins_are_in_and_what_got_no_verdict(tmp_path):
    run = Run(tmp_path, per_token=True)
    found = summary(run, 2)
    said = describe_start(found, run.method.unit)
    assert f"median margin {found['margins']['offline']['0.5']:+.3f} nats per token, " in said
    assert "0 ties)" in said
    found["samples"]["unranked"] = 2
    assert "0 ties, 2 unranked)" in describe_start(found, "nats")


def test_a_small_held_out_set_is_never_without_error(tmp_path):
    """Three of three right: (3 + 2) / (3 + 4) right of 3 + 4, so sqrt(5/7 x 2/7 / 7)."""
    run = Run(tmp_path)
    for t, gain in ((1, 0.0), (2, 1.0)):
        columns = {"chosen_logp": [-5.0 + gain] * 3, "rejected_logp": [-5.0] * 3}
        columns |= {"row": range(3), "chosen_length": [2] * 3, "rejected_length": [2] * 3}
        run.store.write(t, "evaluation", make_table(columns))
    found = summary(run, 2)["evaluation"]
    assert found["accuracy"] == 1.0
    assert found["accuracy_error"] == pytest.approx(sqrt(5 / 7 * 2 / 7 / 7))


class Rounded(FakeScorer):
    """Scored again, answers move by other nats under each policy, by their first token."""

    moved = ({11: 0.5, 21: 0.5, 31: 0.5}, {11: 0.5, 21: 2.0, 31: 0.5, 32: -1.5}, {})

    def __call__(self, policy, prompts, completions, phase):
        found = super().__call__(policy, prompts, completions, phase)
        if phase == "score_again":
            found = found + [self.moved[policy].get(int(ids[0]), 0.0) for ids in completions]
        return found


@pytest.mark.parametrize("per_token", [False, True])
def test_the_noise_of_margins_is_what_they_move_by_when_they_are_scored_again(tmp_path, per_token):
    """Margins 3, -1 and 1 move by 0, 1.5 and 1.5 nats; two are nearer to the cut at 0.

    Per token they are 1.5, -1/4 and 3/4; 1.5 nats are 1.5 / 4 in row 1 and in row 2.
    """
    run = Run(tmp_path, per_token=per_token, scorer=Rounded())
    run.upto(1)
    before = summarize(run.iteration(1), score_again(run.iteration(1)))
    assert before["noise"] == {"chosen": [0.5] * 3, "rejected": [0.0] * 3}
    assert run.scorer.calls[-2:] == [(0, "score_again", 3)] * 2
    run.store.write_summary(1, before)
    run.upto(2)
    found = summarize(run.iteration(2), score_again(run.iteration(2)))
    noise = sqrt((1.5**2 + 1.5**2) / 3) / (4 if per_token else 1)
    assert found["noise"]["margin"] == pytest.approx(noise)
    assert found["noise"]["within"] == pytest.approx(0 if per_token else 2 / 3)
    assert found["rounding"] == pytest.approx(2 * noise / (1 if per_token else 16 / 6))
    said = describe_start(found, run.method.unit)
    assert f"rounding moves a margin by {noise:.2g} {run.method.unit}; " in said
    assert f"{0 if per_token else 67}% of the pairs are nearer to the cut than that" in said
    # An earlier version of the package has not measured theta_0's.
    run.store.write_summary(1, {name: one for name, one in before.items() if name != "noise"})
    assert "rounding" not in summarize(run.iteration(2), found["noise"])


ROOT = Path(__file__).parents[1]
NAMES = [
    "sampled_length", "length_growth", "chosen_length", "drift", "held_out_accuracy",
    "offline_accuracy", "outranking", "coin", "duplicates", "without_pair", "unfinished",
    "constant_rewards", "constant_margins",
]  # fmt: skip


def first() -> dict:
    """Iteration 1: offline answers of 100 and 80 tokens, nothing sampled, no reward yet."""
    lengths = {"prompt": 20.0, "chosen": 100.0, "rejected": 80.0}
    lengths |= {"trained_chosen": 100.0, "trained_rejected": 80.0}
    return {"iteration": 1, "lengths": lengths, "drift": {"chosen": 0.0, "rejected": 0.0}}


def later(iteration: int = 2, **changes) -> dict:
    """An iteration in which all is well; `changes` name a figure as block__key."""
    summary = first() | {
        "iteration": iteration,
        "samples": {"prompts": 100, "sampled": 400, "duplicates": 0, "ties": 0, "too_few": 0}
        | {"unfinished": 0},
        "spread": {"offline": 0.1, "sampled": 0.1},
        "pairs": {"offline": 100},
        "offline_accuracy": 0.7,
        "offline_accuracy_error": 0.0,
        "evaluation": {"pairs": 100, "accuracy": 0.7, "accuracy_error": 0.0, "margin": None},
        "reward": {"pairs": 100, "accuracy": 0.7, "by_chance": 0.0, "followed": True},
        "outranking": 0.0,
    }
    summary["lengths"] |= {"sampled": 100.0, "bootstrapped_chosen": None}
    for path, value in changes.items():
        block, _, key = path.partition("__")
        summary[block] = summary[block] | {key: value} if key else value
    return summary


def only(name: str, *summaries: dict) -> alarms.Alarm:
    (found,) = [alarm for alarm in judge(summaries) if alarm.name == name]
    return found


def raised(*summaries: dict) -> list[str]:
    return [record["name"] for record in records(judge(summaries))]


def test_a_healthy_run_raises_nothing_and_every_alarm_is_judged():
    judged = judge([first(), later(2), later(3)])
    assert [alarm.name for alarm in judged] == NAMES
    assert records(judged) == []
    assert alarm_metrics(judged) == {f"sera/alarm/{name}": 0.0 for name in NAMES}


@pytest.mark.parametrize(
    ("name", "figure", "fine", "bad", "threshold"),
    [
        ("sampled_length", "lengths__sampled", 150.0, 150.1, 1.5),  # of 100 tokens
        # (120 / 76.8) / (100 / 80) = 1.5625 / 1.25
        ("chosen_length", "lengths__trained_rejected", 76.8, 76.7, 1.25),
        ("drift", "drift__chosen", -50.0, -50.1, 0.5),  # nats over 100 tokens
        ("drift", "drift__chosen", 50.0, 51.0, 0.5),
        ("duplicates", "samples__duplicates", 200, 201, 0.5),  # of 400
        ("without_pair", "samples__too_few", 25, 26, 0.25),  # of 100
        ("unfinished", "samples__unfinished", 100, 101, 0.25),  # of 400
        ("constant_rewards", "spread__sampled", 0.001, 0.00099, 0.001),
        ("constant_margins", "spread__offline", 0.001, 0.00099, 0.001),
    ],
)
def test_a_figure_at_its_threshold_is_fine_and_a_little_beyond_it_is_not(
    name, figure, fine, bad, threshold
):
    usual = {"lengths__trained_chosen": 120.0, "lengths__trained_rejected": 96.0}
    fine, bad = ((first(), later(**usual | {figure: value})) for value in (fine, bad))
    assert raised(*fine) == []
    assert only(name, *fine).figure == pytest.approx(threshold)
    assert raised(*bad) == [name]
    assert only(name, *bad).threshold == threshold


def test_growth_is_against_the_first_iteration_that_sampled():
    # 80 -> 100 tokens is 1.25 times; the offline answers have 100.
    grown = [first(), later(2, lengths__sampled=80.0), later(3, lengths__sampled=90.0)]
    assert raised(*grown, later(4, lengths__sampled=100.0)) == []
    beyond = [*grown, later(4, lengths__sampled=100.1)]
    assert raised(*beyond) == ["length_growth"]
    text = only("length_growth", *beyond).text
    assert "from 80.0 tokens in iteration 2 to 100.1, 1.25 times" in text
    assert "length_growth" not in alarm_metrics(judge(grown[:2]))


def test_drift_counts_only_for_chosen():
    assert raised(first(), later(drift__rejected=-400.0)) == []
    text = only("drift", first(), later(drift__chosen=-51.0, drift__rejected=-80.0)).text
    assert "-0.510 nats per token" in text
    assert "-1.000 on the rejected" in text


@pytest.mark.parametrize(
    ("earlier", "fine", "bad", "threshold", "text"),
    [
        # By more than three points without any error.
        ([(0.75, 0.0)], (0.7201, 0.0), (0.7199, 0.0), 0.03, "iteration 2 75.0%"),
        # Below the best earlier iteration.
        ([(0.8, 0.0), (0.78, 0.0)], (0.7701, 0.0), (0.76, 0.0), 0.03, "iteration 2 80.0%"),
        # Errors of 0.03 and 0.04 add up to 0.05, and two of these are 0.1.
        ([(0.8, 0.03)], (0.7001, 0.04), (0.6999, 0.04), 0.1, "a fall of 10.0%"),
        # Worse than a coin, whose error on 100 pairs is 0.05, needs no earlier iteration.
        ([], (0.4001, 0.0), (0.3999, 0.0), 0.1, "a coin 50.0%"),
    ],
)
@pytest.mark.parametrize("held_out", [True, False])
def test_accuracy_falls_beyond_chance(earlier, fine, bad, threshold, text, held_out):
    def run(*figures) -> list[dict]:
        found = [first()]
        prefix = "evaluation__" if held_out else "offline_"
        for t, (share, error) in enumerate(figures, 2):
            one = {f"{prefix}accuracy": share, f"{prefix}accuracy_error": error}
            found.append(later(t, **one))
        return found

    kind = "held-out" if held_out else "offline"
    name = f"{kind.replace('-', '_')}_accuracy"
    assert raised(*run(*earlier, fine)) == []
    assert raised(*run(*earlier, bad)) == [name]
    alarm = only(name, *run(*earlier, bad))
    assert alarm.threshold == pytest.approx(threshold)
    assert alarm.figure == pytest.approx(max([0.5, *(one for one, _ in earlier)]) - bad[0])
    assert f"{bad[0]:.1%} of 100 {kind} pairs as labelled" in alarm.text
    assert text in alarm.text


def test_what_has_no_figures_is_not_judged():
    # Iteration 1 has lengths and a drift of nothing.
    assert [alarm.name for alarm in judge([first()])] == ["chosen_length", "drift"]
    assert raised(first()) == []
    # bootstrap_ratio: 0 and no held-out set.
    alone = later(spread={"offline": 0.1})
    for key in ("samples", "evaluation", "reward", "outranking", "offline_accuracy_error"):
        del alone[key]
    del alone["lengths"]["sampled"]
    names = ["chosen_length", "drift", "constant_margins"]
    assert [alarm.name for alarm in judge([first(), alone])] == names
    # Equal candidates say nothing about the reward.
    judged = alarm_metrics(judge([first(), later(spread__sampled=None)]))
    assert "sera/alarm/constant_rewards" not in judged
    assert "sera/alarm/constant_margins" in judged
    # A reward that nothing is ranked by need not be better than a coin.
    unused = later(reward={"pairs": 100, "accuracy": 0.5, "by_chance": 0.5})
    assert "coin" not in [alarm.name for alarm in judge([first(), unused])]
    assert raised(first(), later(reward=unused["reward"] | {"followed": False})) == ["coin"]
    # An earlier accuracy without its error is left out.
    old = later(2, evaluation={"pairs": 100, "accuracy": 0.9})
    assert raised(first(), old, later(3)) == []


def test_records_are_what_summary_json_keeps():
    (record,) = records(judge([first(), later(samples__unfinished=300)]))
    assert record.pop("text").startswith("75% of 400 candidates were cut before their end: raise")
    assert record == {"name": "unfinished", "figure": 0.75, "threshold": 0.25}


def test_every_text_is_one_sentence_that_names_a_key_of_the_yaml():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    samples = {"prompts": 4, "sampled": 16, "duplicates": 15, "too_few": 4, "unfinished": 16}
    keys = {"lengths__sampled": 900.0, "lengths__trained_chosen": 900.0, "drift__chosen": -900.0}
    keys |= {"evaluation__accuracy": 0.0, "offline_accuracy": 0.0, "samples": samples}
    keys |= {"reward__by_chance": 0.9, "outranking": 9.0}
    bad = later(3, spread={"offline": 0.0, "sampled": 0.0}, **keys)
    judged = judge([first(), later(2), bad])
    # Of margins that are rounding the signs say nothing.
    silent = ("held_out_accuracy", "offline_accuracy")
    assert raised(first(), later(2), bad) == [name for name in NAMES if name not in silent]
    assert not any("Raise learning_rate, or" in alarm.text for alarm in judged)
    for alarm in judged:
        assert re.fullmatch(r".+\.", alarm.text)
        ours = re.findall(r"\bsera\.(\w+)", alarm.text)
        host = re.findall(r"\b(?:learning_rate|rl_beta|num_epochs|sequence_len)\b", alarm.text)
        assert ours or host
        assert set(ours) <= SeraConfig.model_fields.keys()
        assert set(host) <= AxolotlInputConfig.model_fields.keys()


def test_the_page_has_the_same_thresholds():
    rows = re.findall(r"^\| `(\w+)` \|([^\n]+)", (ROOT / "docs/alarms.md").read_text(), re.M)
    assert [name for name, _ in rows] == NAMES
    shown = {name: [float(n) for n in re.findall(r"[<>] ([\d.]+)", row)] for name, row in rows}
    expected = {alarm.name: [alarm.threshold] for alarm in judge([first(), later(2), later(3)])}
    for name in ("held_out_accuracy", "offline_accuracy"):
        expected[name].append(alarms.STANDARD_ERRORS)
    assert shown == expected


def test_a_judge_that_says_nothing_is_not_taken_for_samples_that_are_alike():
    alike, silent = later(samples__too_few=50), later(samples__too_few=50)
    silent["samples"]["unranked"] = 200
    alike, silent = (only("without_pair", first(), one) for one in (alike, silent))
    assert silent.figure == alike.figure
    assert "raise sera.temperature" in alike.text
    assert "labeler" not in alike.text
    assert "200 candidates have none" in silent.text


def advice(text: str) -> list[tuple[str, str]]:
    """Which keys of the YAML a text would turn, and which way."""
    found, way = [], None
    for word in re.findall(r"sera\.\w+|\w+|[:;.]", text.lower()):
        if word in ("raise", "lower"):
            way = word
        elif word in (".", ":", ";", "set"):
            way = None
        elif way and word.startswith(("sera.", "learning_rate", "rl_beta", "sequence_len")):
            found.append((way, word))
    return found


def test_no_alarm_advises_the_opposite_of_another():
    still = {"spread": {"offline": 0.0005, "sampled": 0.1}}
    assert "Raise learning_rate" in only("constant_margins", first(), later(**still)).text
    moved = later(**still, drift__chosen=-51.0, offline_accuracy=0.2)
    assert raised(first(), moved) == ["drift", "constant_margins"]
    text = only("constant_margins", first(), moved).text
    assert "moved far before: stop at an earlier iteration" in text
    assert "learning_rate" not in text
    # Every two of them at once, and which way their texts would turn each key.
    bad = {"lengths__sampled": 200.0, "lengths__trained_chosen": 200.0, "drift__chosen": -60.0}
    bad |= {"evaluation__accuracy": 0.2, "offline_accuracy": 0.2, "reward__by_chance": 0.5}
    bad |= {"outranking": 2.0, "samples__duplicates": 300, "samples__too_few": 50}
    bad |= {"samples__unfinished": 300, "spread": {"offline": 0.1, "sampled": 0.0}}
    bad |= {"spread__offline": 0.0}
    seen = set()
    for one, other in combinations(bad, 2):
        changes = {one: bad[one], other: bad[other]}
        summaries = first(), later(2, lengths__sampled=50.0), later(3, **changes)
        found = [alarm for alarm in judge(summaries) if alarm.raised]
        seen |= {alarm.name for alarm in found}
        turned = [turn for alarm in found for turn in advice(alarm.text)]
        ways = {key: {way for way, name in turned if name == key} for _, key in turned}
        assert all(len(way) == 1 for way in ways.values()), (one, other, ways)
    assert seen == set(NAMES)


def test_rounding_is_what_was_measured_where_that_is_more():
    for rounding, spread, name in (
        (0.004, 0.0039, ["constant_margins"]),
        (0.004, 0.004, []),
        (1e-5, 0.0009, ["constant_margins"]),
        (1e-5, 0.001, []),
    ):
        one = later(rounding=rounding, spread={"offline": spread, "sampled": 0.1})
        assert raised(first(), one) == name


def test_a_tie_is_neither_right_nor_wrong():
    assert accuracy("a", np.array([1.0, -1.0, 0.0, 0.0]))["a"] == 0.5
    assert accuracy("a", np.zeros(3))["a"] == 0.5
    assert accuracy("a", np.array([2.0, 0.0]))["a"] == 0.75


def test_rounding_is_what_the_gate_calls_rounding():
    # Of an answer of 100 tokens: rounding grows with their square root.
    rounding = FLOAT32_LIMIT * sqrt(100) / 100
    assert alarms.THRESHOLDS["constant_rewards"] == pytest.approx(rounding)
