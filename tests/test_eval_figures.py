"""Answers that are kept, what a judge says of them, and the figures that are made of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sera_plugin.labeling.judging import ScoringJudge, Usage, Verdict
from sera_plugin.rundir.journal import Journal
from sera_plugin.tools.evaluation.answers import NO_ROOM, Answer, Decoding, Turn, given, sampled
from sera_plugin.tools.evaluation.models import Model
from sera_plugin.tools.evaluation.prompts import Prompt
from sera_plugin.tools.evaluation.results import Evaluation, Judged, figures, page, shown
from sera_plugin.tools.evaluation.run import judge_all
from tests.test_eval_inputs import make_model

# ------------------------------------------------------------------ answers

DECODING = Decoding(0.7, 0.95, 8, 0)


class Engine:
    """Answers with the prompt in capitals; may stop after so many answers."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.loaded = 0
        self.left = stop_after

    def __call__(self):
        self.loaded += 1
        return self.sample

    def sample(self, conversations, done, seed):
        for index, conversation in enumerate(conversations):
            if index in done:
                continue
            if self.left == 0:
                raise RuntimeError("stopped")
            self.left = None if self.left is None else self.left - 1
            self.asked.append(conversation)
            reason = NO_ROOM if "huge" in conversation[-1] else "stop"
            yield index, Turn("" if reason == NO_ROOM else conversation[-1].upper(), 2, reason)


@pytest.fixture
def answer(tmp_path):
    base = make_model(tmp_path / "base")

    def run(prompts, engine, decoding=DECODING):
        with Journal(tmp_path / "answers.jsonl") as journal:
            return sampled(Model("m", "m", str(base)), prompts, decoding, journal, engine)

    return run


def prompts_of(*texts: str | tuple[str, ...]) -> list[Prompt]:
    turns = [(text,) if isinstance(text, str) else text for text in texts]
    return [Prompt(each, "", row) for row, each in enumerate(turns)]


def texts_of(answers) -> list[str | None]:
    return [one and one.text for one in answers]


def test_sampling_that_stopped_goes_on_and_nothing_is_sampled_again(answer):
    prompts = prompts_of("a", "b", "ü🙂", "d")
    with pytest.raises(RuntimeError, match="stopped"):
        answer(prompts, Engine(stop_after=2))
    rest, again = Engine(), Engine()
    for engine in (rest, again):
        assert texts_of(answer(prompts, engine)) == ["A", "B", "Ü🙂", "D"]
    assert rest.asked == [("ü🙂",), ("d",)]
    assert again.loaded == 0


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.8},
        {"top_p": 0.9},
        {"max_new_tokens": 9},
        {"seed": 1},
        {"prompt_format": "{prompt}!"},
    ],
)
def test_other_settings_are_other_answers(answer, change):
    answer(prompts_of("a"), Engine())
    engine = Engine()
    answer(prompts_of("a"), engine, replace(DECODING, **change))
    assert engine.loaded == 1


def test_a_prompt_that_occurs_again_is_answered_again(answer):
    engine = Engine()
    answer(prompts_of("a", "a", "a"), engine)
    assert len(engine.asked) == 3
    more = Engine()
    answer(prompts_of("a", "b", "a", "a", "a"), more)
    assert more.asked == [("b",), ("a",)]


def test_turns_are_asked_with_the_answers_before_them(answer):
    engine = Engine()
    prompts = prompts_of(("a", "b", "c"), "d", ("e", "f"))
    three, two = "[Turn 1]\nA\n\n[Turn 2]\nB\n\n[Turn 3]\nC", "[Turn 1]\nE\n\n[Turn 2]\nF"
    assert texts_of(answer(prompts, engine)) == [three, "D", two]
    assert engine.loaded == 1
    assert engine.asked[3:] == [("a", "A", "b"), ("e", "E", "f"), ("a", "A", "b", "B", "c")]
    assert prompts[2].question == "[Turn 1]\ne\n\n[Turn 2]\nf"


def test_a_prompt_without_room_has_no_answer_and_is_not_tried_again(answer):
    prompts = prompts_of("a", "huge", ("b", "huge", "c"))
    assert texts_of(answer(prompts, Engine())) == ["A", None, None]
    again = Engine()
    assert texts_of(answer(prompts, again)) == ["A", None, None]
    assert again.loaded == 0


def test_answers_from_a_file(tmp_path):
    path = tmp_path / "a.json"
    rows = [("b ", "B"), ("a", "A1"), ("a", " A2\n"), ("x", "X")]
    path.write_text(json.dumps([{"instruction": i, "output": o} for i, o in rows]))
    found = given(path, prompts_of("a", "c", "b", "a", "a"))
    assert texts_of(found) == ["A1", None, "B", "A2", "A2"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"instruction": "a"}], r"row 0: output is None, not text"),
        ([{"instruction": "a", "output": "A"}, {"output": "A"}], r"row 1: instruction is None"),
        ([{"instruction": "z", "output": "A"}], r"no row answers any of these prompts"),
    ],
)
def test_a_file_of_answers_that_is_wrong(tmp_path, rows, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=said):
        given(path, prompts_of("a"))


# ------------------------------------------------------------------ verdicts and figures


class Longest(ScoringJudge):
    """Scores by length; has no opinion on "?"."""

    def __init__(self) -> None:
        super().__init__("longest <b>", {"function": "longest"})

    def score(self, answers):
        for index, one in enumerate(answers):
            yield index, None if one.answer == "?" else float(len(one.answer))


class First:
    """Prefers the first answer it is shown, whichever it is, but knows what is good."""

    name = "first"
    description: dict[str, Any] = {}  # noqa: RUF012
    usage = Usage()

    def compare(self, comparisons):
        for index, one in enumerate(comparisons):
            if "good" in one.first:
                yield index, Verdict((1.0, 1.0))
            elif "bad" in one.first:
                yield index, Verdict((0.0, None))
            else:
                yield index, Verdict((1.0, 0.0))


def said(*texts: str | None) -> list[Answer | None]:
    return [None if text is None else Answer((Turn(text, 3, "stop"),)) for text in texts]


def test_every_model_is_judged_against_the_first_by_scores():
    prompts = prompts_of(*"pqrs")
    answers = [said("aa", "aa", None, "a"), said("a", "aaa", "a", "?"), said("aa", None, "", "aa")]
    base, one, two = judge_all(Longest(), prompts, answers)
    nan = float("nan")
    assert base.scores == pytest.approx([2, 2, nan, 1], nan_ok=True)
    assert one.outcomes == pytest.approx([0, 1, nan, nan], nan_ok=True)
    assert two.outcomes == pytest.approx([0.5, nan, nan, 1], nan_ok=True)
    assert one.inconsistent is None


def test_every_model_is_judged_against_the_first_in_pairs():
    prompts = prompts_of(*"pqrs")
    answers = [said("x", "x", "x", None), said("good", "y", "bad", "good")]
    base, one = judge_all(First(), prompts, answers)
    assert base.scores is None
    assert one.outcomes == pytest.approx([1, 0.5, float("nan"), float("nan")], nan_ok=True)
    assert one.inconsistent == 0.5


HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e ]]> {{ 7*7 }} {% raw %} \"'&"


@pytest.fixture
def evaluation(tmp_path) -> Evaluation:
    """20 prompts in two categories, with everything hostile that a text can be."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("x")
    prompts = [Prompt((f"{HOSTILE} {n}",), HOSTILE if n % 2 else "math", n) for n in range(20)]
    models = [Model(name, f"outputs/{name}") for name in ("base", "new", "<i>")]
    answers = [
        said(*["aa"] * 20),
        said(*["a" * (n % 4) + HOSTILE * (n % 4 > 2) for n in range(20)]),
        said(None, *["aa"] * 19),
    ]
    judged = judge_all(Longest(), prompts, answers)
    return Evaluation(path, prompts, models, DECODING, answers, Longest(), judged)


def test_figures_of_an_evaluation(evaluation):
    found = figures(evaluation)
    base, new, same = found["models"]
    # Lengths 0, 1, 2 and more against 2: lost, lost, tied, won.
    rate = new["win_rate"]
    assert (rate["rate"], rate["wins"], rate["ties"], rate["losses"]) == (0.375, 5, 5, 10)
    assert rate["low"] < 0.375 < rate["high"]
    assert 0 < new["length_controlled"] < 1
    assert list(new["categories"]) == ["math", HOSTILE]
    assert new["categories"]["math"]["rate"] == 0.25  # 0 and 2 characters
    assert "win_rate" not in base
    assert base["score"] == {"mean": 2.0, "error": 0.0}
    assert new["answers"]["empty"] == 5
    assert (same["win_rate"]["rate"], same["win_rate"]["missing"]) == (0.5, 1)
    assert found["judge"]["name"] == "longest <b>"
    (note,) = found["notes"]
    assert note.startswith("<i>: no answer to 1 of 20 prompts")


def test_length_is_counted_from_the_baselines(evaluation):
    """Always one character longer than the baseline: length explains no win, on long prompts."""
    answers = [said(*["a" * (n + more) for n in range(20)]) for more in (1, 2)]
    judged = [Judged([None] * 20), Judged([Verdict((float(n > 7),)) for n in range(20)])]
    models = evaluation.models[:2]
    found = figures(replace(evaluation, models=models, answers=answers, judged=judged))
    assert found["models"][1]["length_controlled"] == pytest.approx(0.6, abs=1e-3)


def test_page_and_terminal_show_figures_and_answers_and_obey_nothing(evaluation):
    found = figures(evaluation)
    html, text = page(evaluation, found), shown(found)
    line = next(line for line in text.splitlines() if line.startswith("new"))
    assert "37.5%" in line
    assert "5/5/10" in line
    assert not {"\x1b", "\u202e"} & {*text, *html}
    assert "<script>alert" not in html
    assert html.count("<script>") == 1  # the page's own
    for part in ("&lt;script&gt;alert(1)", "new loses", "new wins", "{{ 7*7 }}"):
        assert part in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html)


def test_an_evaluation_without_verdicts_is_shown_too(evaluation):
    empty = replace(evaluation, judged=[Judged([None] * 20, np.full(20, np.nan))] * 3)
    for found in (empty, replace(evaluation, judge=None, judged=())):
        result = figures(found)
        assert "new" in shown(result)
        assert "new" in page(found, result)
    assert np.isnan(figures(empty)["models"][1]["win_rate"]["rate"])
