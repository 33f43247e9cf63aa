"""The parts of an evaluation: prompt sets, what is compared, answers that are kept, figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sera_plugin.checksums import seal
from sera_plugin.evaluation.answers import NO_ROOM, Answer, Decoding, Turn, given, sampled
from sera_plugin.evaluation.models import Model, find_models
from sera_plugin.evaluation.page import page
from sera_plugin.evaluation.prompts import Prompt, duplicates, read_prompts
from sera_plugin.evaluation.results import Evaluation, figures, shown
from sera_plugin.evaluation.verdicts import Judged, judge_all
from sera_plugin.journal import Journal
from sera_plugin.judging import Answered, Comparison, ScoringJudge, Usage, Verdict
from sera_plugin.store import write_json
from tests.conftest import fill, write_rows
from tests.report_run import make_run

# ------------------------------------------------------------------ prompts

PUBLISHED = {
    "AlpacaEval": (
        [{"dataset": "koala", "instruction": "Why?", "output": "So.", "generator": "x"}],
        [Prompt(("Why?",), "koala", 0)],
    ),
    "MT-Bench": (
        [{"question_id": 81, "category": "writing", "turns": ["Why?", "Shorter."]}],
        [Prompt(("Why?", "Shorter."), "writing", 0)],
    ),
    "Vicuna": (
        [{"question_id": 1, "category": "generic", "turns": ["Why?"]}],
        [Prompt(("Why?",), "generic", 0)],
    ),
    "Vicuna, the older table": (
        [{"question_id": 1, "text": "Why?", "category": "generic"}],
        [Prompt(("Why?",), "generic", 0)],
    ),
    "Evol-Instruct": (
        [{"idx": 1, "Skill": "Math", "Difficulty": 1, "Instruction": "Why?"}],
        [Prompt(("Why?",), "Math", 0)],
    ),
    "UltraFeedback": (
        [
            {
                "prompt": "Why?",
                "prompt_id": "ab",
                "chosen": [{"content": "Why?", "role": "user"}],
                "messages": [{"content": "Why?", "role": "user"}],
                "score_chosen": 8.0,
            }
        ],
        [Prompt(("Why?",), "", 0)],
    ),
    "one's own": (
        [{"prompt": "Wie? 🙂\u2028{}", "category": 3}, {"prompt": "Why?", "category": None}],
        [Prompt(("Wie? 🙂\u2028{}",), "3", 0), Prompt(("Why?",), "", 1)],
    ),
}


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_prompt_sets_are_read_as_published(tmp_path, name, form):
    rows, prompts = PUBLISHED[name]
    path = tmp_path / f"prompts.{form}"
    if form == "parquet":
        if name == "one's own":
            rows, prompts = rows[:1], prompts[:1]
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "json":
        path.write_text("\ufeff" + json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n\n".join(lines), encoding="utf-8")
    assert read_prompts(path) == prompts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"holds no prompts"),
        ("\n \n", r"holds no prompts"),
        ("[]", r"holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', r"line 2 is no JSON"),
        ('{"prompt": "a"}\n["a"]', r"line 2 is \['a'\], not an object"),
        ('[{"prompt": "a"}, 3]', r"row 1 is 3, not an object"),
        ("[" * 100_000, r"is no JSON"),
        (
            '{"question": "a", "id": 1}',
            r"row 0 has no prompt.*turns, instruction.*'question', 'id'",
        ),
        ("{}", r"row 0 has no prompt.*has no fields"),
        ('{"prompt": "a"}\n{"prompt": null}', r"row 1: prompt is None, not text"),
        ('{"instruction": 5}', r"row 0: instruction is 5, not text"),
        ('{"turns": "a"}', r"row 0: turns is 'a', not a list"),
        ('{"turns": []}', r"row 0: turns is \[\], not a list"),
        ('{"turns": ["a", {}]}', r"row 0: turns is {}, not text"),
        ('{"prompt": " \\n\\u200b"}', r"row 0: prompt is empty"),
        ('{"prompt": "\\ud800"}', r"row 0: prompt is not valid Unicode"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, content, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"prompts\.jsonl.*{said}"):
        read_prompts(path)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="no parquet file"):
        read_prompts(tmp_path / "a.parquet")
    with pytest.raises(OSError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_a_limit_draws_and_a_larger_one_has_those_of_the_smaller(tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": str(number)} for number in range(50)])
    few, more, other = (
        [prompt.row for prompt in read_prompts(tmp_path / "p.jsonl", limit, seed)]
        for limit, seed in ((5, 0), (20, 0), (5, 1))
    )
    assert len(few) == 5
    assert set(few) < set(more)
    assert few != other
    assert more == sorted(more) != list(range(20))
    assert len(read_prompts(tmp_path / "p.jsonl", 99)) == 50


def test_duplicates_are_counted():
    prompts = [Prompt((text,), "", row) for row, text in enumerate("aabaa")]
    assert duplicates(prompts) == 3


# ------------------------------------------------------------------ what is compared


def make_model(path: Path, **keys: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(keys))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def make_adapter(path: Path, base: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "r": 4})
    )
    (path / "adapter_model.safetensors").write_bytes(b"adapter")
    return path


@pytest.fixture
def run(tmp_path):
    """A finished run of adapters with three iterations."""
    base = make_model(tmp_path / "base")
    store = make_run(tmp_path / "run", config={"base_model": str(base)})
    for iteration in (1, 2, 3):
        make_adapter(store.policy(iteration), base)
        seal(store.policy(iteration))
    make_adapter(tmp_path / "run", base)
    return tmp_path / "run"


def names(models) -> list[str]:
    return [model.name for model in models]


def test_a_run_alone_is_compared_with_what_it_started_from(run):
    first, last = find_models([str(run)])
    assert names([first, last]) == ["run@0", "run"]
    assert first.adapter == run / "sera/iteration-01/policy"
    assert last.adapter == run
    assert first.weights == last.weights == str(run.parent / "base")
    assert first.end_ids == (0,)


def test_policies_of_a_run(run):
    assert names(find_models([str(run)], iterations=True)) == ["run@0", "run@1", "run@2", "run"]
    models = find_models([f"{run}@2", str(run / "sera"), f"{run}@1", f"{run}@3"])
    assert names(models) == ["run@2", "run", "run@1"]  # theta_3 is the last policy
    assert models[0].adapter == run / "sera/iteration-03/policy"


def test_a_run_of_whole_weights(tmp_path):
    base = make_model(tmp_path / "base")
    store = make_run(tmp_path / "run", config={"base_model": "moved/away"})
    write_json(store.policy(1) / "base_model.json", {"base_model": str(base)})
    seal(store.policy(1))
    make_model(store.policy(3))
    seal(store.policy(3))
    make_model(tmp_path / "run")
    models = find_models([str(tmp_path / "run")], iterations=True)
    assert names(models) == ["run@0", "run@2", "run"]
    assert models[0].weights == str(base)
    with pytest.raises(ValueError, match=r"run@1 is in .*does not exist.*keep_policies: true"):
        find_models([f"{tmp_path}/run@1", str(base)])


def test_models_adapters_and_answers(run, tmp_path):
    base = tmp_path / "base"
    answers = tmp_path / "gpt.json"
    answers.write_text("[]")
    other = make_adapter(tmp_path / "deep/base", base)
    models = find_models(
        [str(answers), str(base), str(other), str(run / "sera/iteration-02/policy")]
    )
    assert names(models) == ["gpt", "base", "base-2", "iteration-02"]
    assert models[0].answers == answers
    assert models[2].adapter == other


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (["{}/base"], r"base would be compared with itself"),
        (["{}/base", "{}/base"], r"compared with itself"),
        (["{}/base", "{}/run@4"], r"run@4: the run has the policies 0 to 3"),
        (["{}/base", "{}/nowhere@1"], r"nowhere: no SeRA run there"),
        (["{}/base", "{}/none.json"], r"there is no file .*none.json"),
        (["{}/base", "{}/empty"], r"empty holds no model: neither config.json"),
        (["{}/base", "{}/pickled"], r"pickled has no adapter_model.safetensors"),
        (["{}/base", "{}/lost"], r"lost stands on no/such-model: .*nothing is downloaded"),
        (
            ["{}/base", "no-such/model"],
            r"no-such/model is neither a directory nor in the local hub",
        ),
        (["{}/base", "so what"], r"'so what' is no run, no directory"),
        (["{}/base", "../x/y/z"], r"is no run, no directory"),
    ],
)
def test_what_is_not_there_is_named(run, tmp_path, specs, said):
    (tmp_path / "empty").mkdir()
    make_adapter(tmp_path / "lost", Path("no/such-model"))
    make_adapter(tmp_path / "pickled", tmp_path / "base")
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    with pytest.raises(ValueError, match=said):
        find_models([spec.format(tmp_path) for spec in specs])


def test_a_run_that_goes_on_has_its_earlier_policies(run):
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has not finished; .*run@t is its policy"):
        find_models([str(run)])
    assert names(find_models([f"{run}@0", f"{run}@2"])) == ["run@0", "run@2"]


def test_a_damaged_policy_is_named(run):
    (run / "sera/iteration-02/policy/adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"run@1 is in .*the checksum of adapter_model"):
        find_models([str(run)], iterations=True)


def test_a_model_is_another_one_when_its_files_change(run):
    def identities():
        return [model.identity for model in find_models([str(run)], iterations=True)]

    before = identities()
    assert len(set(before)) == 2  # the fixture's policies are the same; the last is not sealed
    (run / "adapter_model.safetensors").write_bytes(b"longer weights")
    (run / "events.log").write_text("not a part of the model")
    after = identities()
    assert after[:3] == before[:3]
    assert after[3] != before[3]


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


def test_answers_are_sampled_once(answer):
    prompts, engine = prompts_of("a", "b", "ü🙂"), Engine()
    assert texts_of(answer(prompts, engine)) == ["A", "B", "Ü🙂"]
    again = Engine()
    assert texts_of(answer(prompts, again)) == ["A", "B", "Ü🙂"]
    assert again.loaded == 0


def test_sampling_that_stopped_goes_on(answer):
    prompts = prompts_of("a", "b", "c", "d")
    with pytest.raises(RuntimeError, match="stopped"):
        answer(prompts, Engine(stop_after=2))
    rest = Engine()
    assert texts_of(answer(prompts, rest)) == ["A", "B", "C", "D"]
    assert rest.asked == [("c",), ("d",)]


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(0.8, 0.95, 8, 0),
        Decoding(0.7, 0.9, 8, 0),
        Decoding(0.7, 0.95, 9, 0),
        Decoding(0.7, 0.95, 8, 1),
        Decoding(0.7, 0.95, 8, 0, "{prompt}!"),
    ],
    ids=["temperature", "top_p", "max_new_tokens", "seed", "prompt_format"],
)
def test_other_settings_are_other_answers(answer, decoding):
    answer(prompts_of("a"), Engine())
    engine = Engine()
    answer(prompts_of("a"), engine, decoding)
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
    assert texts_of(answer(prompts, engine)) == [
        "[Turn 1]\nA\n\n[Turn 2]\nB\n\n[Turn 3]\nC",
        "D",
        "[Turn 1]\nE\n\n[Turn 2]\nF",
    ]
    assert engine.loaded == 1
    assert engine.asked[3:] == [("a", "A", "b"), ("e", "E", "f"), ("a", "A", "b", "B", "c")]
    assert prompts[2].question == "[Turn 1]\ne\n\n[Turn 2]\nf"


def test_a_prompt_without_room_has_no_answer_and_is_not_tried_again(answer):
    prompts = prompts_of("a", "huge", ("b", "huge", "c"))
    assert texts_of(answer(prompts, Engine())) == ["A", None, None]
    again = Engine()
    assert texts_of(answer(prompts, again)) == ["A", None, None]
    assert again.loaded == 0


def test_a_full_disk_stops_the_sampling_and_nothing_is_lost(small_disk):
    model = Model("m", "m", str(make_model(small_disk / "base")))
    prompts = prompts_of("a" * 9000, "b" * 9000, "c")
    with Journal(small_disk / "answers.jsonl") as journal:
        sampled(model, prompts[:1], DECODING, journal, Engine())
        fill(small_disk)
        with pytest.raises(OSError, match=r"takes no more files.*start the same command again"):
            sampled(model, prompts, DECODING, journal, Engine())
    (small_disk / "filler").unlink()
    rest = Engine()
    with Journal(small_disk / "answers.jsonl") as journal:
        sampled(model, prompts, DECODING, journal, rest)
    assert ("a" * 9000,) not in rest.asked


def test_answers_from_a_file(tmp_path):
    path = tmp_path / "a.json"
    rows = [("b ", "B"), ("a", "A1"), ("a", " A2\n"), ("x", "X")]
    path.write_text(json.dumps([{"instruction": i, "output": o} for i, o in rows]))
    assert texts_of(given(path, prompts_of("a", "c", "b", "a", "a"))) == [
        "A1",
        None,
        "B",
        "A2",
        "A2",
    ]


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
    prompts = prompts_of("p", "q", "r", "s")
    answers = [said("aa", "aa", None, "a"), said("a", "aaa", "a", "?"), said("aa", None, "", "aa")]
    base, one, two = judge_all(Longest(), prompts, answers)
    nan = float("nan")
    assert base.scores == pytest.approx([2, 2, nan, 1], nan_ok=True)
    assert one.outcomes == pytest.approx([0, 1, nan, nan], nan_ok=True)
    assert two.outcomes == pytest.approx([0.5, nan, nan, 1], nan_ok=True)
    assert one.inconsistent is None


def test_every_model_is_judged_against_the_first_in_pairs():
    prompts = prompts_of("p", "q", "r", "s")
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
    assert note.startswith("<i>: 1 of 20 prompts have no answer")


def test_a_terminal_shows_figures_and_obeys_nothing(evaluation):
    text = shown(figures(evaluation))
    assert "\x1b" not in text
    assert "\u202e" not in text
    line = next(line for line in text.splitlines() if line.startswith("new"))
    assert "37.5%" in line
    assert "5/5/10" in line


def test_a_page_shows_answers_and_runs_nothing(evaluation):
    html = page(evaluation, figures(evaluation))
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count("<script>") == 1  # the page's own
    for hidden in ("\x1b", "\u202e", "<b>", "<i>"):
        assert hidden not in html
    assert "new loses" in html
    assert "new wins" in html
    assert "{{ 7*7 }}" in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html)


def test_an_evaluation_without_verdicts_is_shown_too(evaluation):
    nothing = Judged([None] * 20, np.full(20, np.nan))
    empty = Evaluation(
        evaluation.path,
        evaluation.prompts,
        evaluation.models,
        DECODING,
        evaluation.answers,
        Longest(),
        [nothing] * 3,
    )
    unjudged = Evaluation(
        evaluation.path, evaluation.prompts, evaluation.models, DECODING, evaluation.answers
    )
    for found in (empty, unjudged):
        result = figures(found)
        assert "new" in shown(result)
        assert "new" in page(found, result)
    assert np.isnan(figures(empty)["models"][1]["win_rate"]["rate"])


def test_comparisons_are_of_texts():
    """What a judge is given is what a reader reads."""
    prompt = Prompt(("a", "b"), "", 0)
    answer = Answer((Turn("A", 1, "stop"), Turn("B", 1, "stop")))
    seen = []

    class Spy(First):
        def compare(self, comparisons):
            seen.extend(comparisons)
            return super().compare(comparisons)

    judge_all(Spy(), [prompt], [[answer], [answer]])
    assert seen == [Comparison(prompt.question, answer.text, answer.text)]
    assert Answered(prompt.question, answer.text).question == "[Turn 1]\na\n\n[Turn 2]\nb"
