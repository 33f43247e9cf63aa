"""Answers that are kept, what a judge says of them, and the figures that are made of it."""

import json
import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from sera_plugin.labeling.judging import ScoringJudge, Usage, Verdict
from sera_plugin.rundir.journal import Journal
from sera_plugin.tools.evaluation.answers import (
    NO_ROOM,
    Answer,
    Decoding,
    Prompt,
    Turn,
    given,
    sampled,
)
from sera_plugin.tools.evaluation.models import Model
from sera_plugin.tools.evaluation.results import Entry, Evaluation, figures, page, shown
from sera_plugin.tools.evaluation.run import judge_all
from tests.test_eval_inputs import make_model

DECODING = Decoding(0.7, 0.95, 8, 0)


class Engine:
    """In place of a model: answers with the prompt in capitals; may stop after `left` answers."""

    def __init__(self, left: int | None = None) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.loaded, self.left = 0, left

    def __call__(self, model=None, *_):
        self.loaded += 1
        return partial(self.sample, model)

    def answer(self, model, said: str, number: int) -> str:
        return said.upper()

    def sample(self, model, conversations, done, seed):
        for index in sorted(set(range(len(conversations))).difference(done)):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.asked.append(conversations[index])
            text = self.answer(model, conversations[index][-1], index + seed)
            full = "HUGE" in text
            yield (
                index,
                Turn("" if full else text, len(text.split()) + 1, NO_ROOM if full else "stop"),
            )


@pytest.fixture
def answer(tmp_path):
    base = make_model(tmp_path / "base")

    def run(prompts, engine, decoding=DECODING):
        with Journal(tmp_path / "answers.jsonl") as journal:
            return texts_of(sampled(Model("m", "m", str(base)), prompts, decoding, journal, engine))

    return run


def prompts_of(*texts: str | tuple[str, ...]) -> list[Prompt]:
    turns = [(text,) if isinstance(text, str) else text for text in texts]
    return [Prompt(each, "", row) for row, each in enumerate(turns)]


def texts_of(answers) -> list[str | None]:
    return [one and one.text for one in answers]


def test_sampling_that_stopped_goes_on_and_nothing_is_sampled_again(answer):
    prompts = prompts_of("a", "b", "ü🙂", "d")
    with pytest.raises(KeyboardInterrupt):
        answer(prompts, Engine(left=2))
    rest, again = Engine(), Engine()
    for engine in (rest, again):
        assert answer(prompts, engine) == ["A", "B", "Ü🙂", "D"]
    assert rest.asked == [("ü🙂",), ("d",)]
    assert again.loaded == 0


def test_other_settings_are_other_answers(answer):
    changes = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 9, "seed": 1}
    decodings = [replace(DECODING, **{key: value}) for key, value in changes.items()]
    for decoding in (DECODING, *decodings, replace(DECODING, prompt_format="{prompt}!")):
        for loaded in (1, 0):
            engine = Engine()
            answer(prompts_of("a"), engine, decoding)
            assert engine.loaded == loaded


def test_a_prompt_that_occurs_again_is_answered_again(answer):
    engine, more = Engine(), Engine()
    answer(prompts_of("a", "a", "a"), engine)
    assert len(engine.asked) == 3
    answer(prompts_of("a", "b", "a", "a", "a"), more)
    assert more.asked == [("b",), ("a",)]


def test_turns_are_asked_with_the_answers_before_them(answer):
    engine = Engine()
    prompts = prompts_of(("a", "b", "c"), "d", ("e", "f"))
    three, two = "[Turn 1]\nA\n\n[Turn 2]\nB\n\n[Turn 3]\nC", "[Turn 1]\nE\n\n[Turn 2]\nF"
    assert answer(prompts, engine) == [three, "D", two]
    assert engine.loaded == 1
    assert engine.asked[3:] == [("a", "A", "b"), ("e", "E", "f"), ("a", "A", "b", "B", "c")]
    assert prompts[2].question == "[Turn 1]\ne\n\n[Turn 2]\nf"


def test_a_prompt_without_room_has_no_answer_and_is_not_tried_again(answer):
    prompts, again = prompts_of("a", "huge", ("b", "huge", "c")), Engine()
    for engine in (Engine(), again):
        assert answer(prompts, engine) == ["A", None, None]
    assert again.loaded == 0


def test_answers_from_a_file(tmp_path):
    path = tmp_path / "a.json"
    rows = [("b ", "B"), ("a", "A1"), ("a", " A2\n"), ("x", "X")]
    path.write_text(json.dumps([{"instruction": i, "output": o} for i, o in rows]))
    assert texts_of(given(path, prompts_of(*"acbaa"))) == ["A1", None, "B", "A2", "A2"]


def test_answers_of_several_turns_are_as_long_as_what_was_said(tmp_path):
    path = tmp_path / "base.jsonl"
    path.write_text(json.dumps({"question_id": 7, "choices": [{"turns": ["A", " BC\n"]}]}))
    found = given(path, [Prompt(("a", "b"), "", 0, {"question_id": 7})])
    assert texts_of(found) == ["[Turn 1]\nA\n\n[Turn 2]\nBC"]
    assert [answer.chars for answer in found] == [3]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"instruction": "a"}], r"row 0: output is None, not text"),
        ([{"instruction": "a", "output": "A"}, {"output": "A"}], r"row 1: instruction is None"),
        ([{"uid": "u", "messages": [{"content": "A"}]}], r"row 0: output is None, not text"),
        ([{"question_id": 1, "choices": []}], r"row 0: output is None, not text"),
    ],
)
def test_a_file_of_answers_that_is_wrong(tmp_path, rows, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=said):
        given(path, prompts_of("a"))


NAN = float("nan")


class Longest(ScoringJudge):
    """Scores by length; has no opinion on "?"."""

    def __init__(self) -> None:
        super().__init__("longest <b>", {"function": "longest"})

    def score(self, answers):
        for index, one in enumerate(answers):
            yield index, None if one.answer == "?" else float(len(one.answer))


class First:
    """Prefers the first answer it is shown, whichever it is, but knows what is good."""

    name, usage = "first", Usage()
    description: dict[str, Any] = {}  # noqa: RUF012

    def compare(self, comparisons):
        verdicts = {"good": (1.0, 1.0), "bad": (0.0, None)}
        for index, one in enumerate(comparisons):
            yield index, Verdict(verdicts.get(one.first, (1.0, 0.0)))


def entry(name: str, *texts: str | None) -> Entry:
    """What a model has said."""
    answers = [None if text is None else Answer((Turn(text, 3, "stop"),)) for text in texts]
    return Entry(Model(name, f"outputs/{name}"), answers, [None] * len(texts))


def judged(judge, *answers):
    entries = [entry("m", *texts) for texts in answers]
    judge_all(judge, prompts_of(*"pqrs"), entries)
    return entries


def test_every_model_is_judged_against_the_first():
    texts = ("aa", "aa", None, "a"), ("a", "aaa", "a", "?"), ("aa", None, "", "aa")
    base, one, two = judged(Longest(), *texts)
    assert base.scores == pytest.approx([2, 2, NAN, 1], nan_ok=True)
    assert one.outcomes == pytest.approx([0, 1, NAN, NAN], nan_ok=True)
    assert two.outcomes == pytest.approx([0.5, NAN, NAN, 1], nan_ok=True)
    base, one = judged(First(), ("x", "x", "x", None), ("good", "y", "bad", "good"))
    assert not base.scores.size
    assert one.outcomes == pytest.approx([1, 0.5, NAN, NAN], nan_ok=True)


HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e ]]> {{ 7*7 }} {% raw %} \"'&"


@pytest.fixture
def evaluation(tmp_path) -> Evaluation:
    """20 prompts in two categories, with everything hostile that a text can be."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("x")
    prompts = [Prompt((f"{HOSTILE} {n}",), HOSTILE if n % 2 else "math", n) for n in range(20)]
    new = ["a" * (n % 4) + HOSTILE * (n % 4 > 2) for n in range(20)]
    entries = [entry("base", *["aa"] * 20), entry("new", *new), entry("<i>", None, *["aa"] * 19)]
    judge_all(Longest(), prompts, entries)
    return Evaluation(path, prompts, DECODING, entries, Longest())


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
    assert [one["missing"] for one in same["categories"].values()] == [1, 0]
    assert "win_rate" not in base
    assert (base["score"], new["inconsistent"]) == ({"mean": 2.0, "error": 0.0}, None)
    assert new["answers"]["empty"] == 5
    assert (same["win_rate"]["rate"], same["win_rate"]["missing"]) == (0.5, 1)
    assert found["judge"]["name"] == "longest <b>"
    # One in twenty is no reason for a warning.
    (remark,) = found["remarks"]
    assert remark.startswith("<i>: no answer to 1 of 20 prompts")
    assert not found["notes"]


def test_verdicts_that_turn_and_lengths_beside_the_baselines(evaluation):
    """Always one character longer than the baseline: length explains no win, on long prompts."""
    base, new = (entry(str(more), *["a" * (n + more) for n in range(20)]) for more in (1, 2))
    new.verdicts = [Verdict((float(n > 7), float(n > 5))) for n in range(20)]
    found = figures(replace(evaluation, entries=[base, new]))["models"][1]
    assert found["length_controlled"] == pytest.approx(0.65, abs=1e-3)
    assert found["inconsistent"] == 2 / 20


def test_page_and_terminal_show_figures_and_answers_and_obey_nothing(evaluation):
    found = figures(evaluation)
    html, text = page(evaluation, found), shown(found)
    line = next(line for line in text.splitlines() if line.startswith("new"))
    assert "37.5%" in line
    assert "5/5/10" in line
    assert not {"\x1b", "\u202e"} & {*text, *html}
    assert html.count("<script>") == 1  # the page's own
    for part in ("&lt;script&gt;alert(1)", "new loses", "new wins", "{{ 7*7 }}"):
        assert part in html
    for part in ("<script>alert", "<b>", "<i>"):
        assert part not in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html)


def test_an_evaluation_without_verdicts_is_shown_too(evaluation):
    none = [replace(e, verdicts=[None] * 20, scores=np.full(20, NAN)) for e in evaluation.entries]
    empty = replace(evaluation, entries=none)
    for found in (empty, replace(empty, judge=None)):
        result = figures(found)
        assert "new" in shown(result)
        assert "new" in page(found, result)
    assert np.isnan(figures(empty)["models"][1]["win_rate"]["rate"])
