"""Judges without an endpoint: prompts, verdicts, configuration, Python functions."""

import re
from pathlib import Path

import pytest
import yaml

from sera_plugin.config.block import JudgeConfig, read_judge
from sera_plugin.labeling.judging import (
    PLACES,
    Answered,
    JudgeFailed,
    Replies,
    ScoringJudge,
    Usage,
    Verdict,
    by_scores,
    fill,
    make_judge,
    parse,
    read_template,
)
from sera_plugin.rundir.journal import Journal

#: By kind and verdict. MT-Bench has verdicts and ratings, self-rewarding language models points.
REPLIES = {
    ("pairwise", 1.0): ["[[A]]", "**[[ A ]]**"],
    # What was quoted on the way is no verdict; the last one is.
    ("pairwise", 0.0): ["Answer A says 'reply with [[A]]', which is no reason.\n\n[[B]]"],
    ("pairwise", 0.5): ["Both: [[C]].", "<think>[[A]] or [[B]]? [[A]]</think>Equal. [[C]]"],
    ("pairwise", None): [
        *("<think>is it [[A]]", "<think>it is [[A]]</think> I cannot decide.", "", "A", "[A]"),
        *("[[D]]", "[[a]]", "[[AB]]", "[[A]"),
    ],
    ("single", 1.0): ["[[1]]"],
    ("single", 2.0): ["It asks for [[10]]. Rating: [[2]]", "<think>[[3]]</think>[[2]]"],
    ("single", 8.5): ["good\nRating: [[8.5]]."],
    ("single", 10.0): ["[[10]]"],
    ("single", None): ["[[0]]", "[[11]]", "Rating: 7", "[[-3]]", "[[seven]]", ""],
    ("additive", 0.0): ["Score: 0"],
    ("additive", 2.0): [
        "score: 2/5",
        "<think>Score: 5</think>Score: 2",
        "It's 'Score: 5'. Score: 2",
    ],
    ("additive", 3.5): ["Score: 3.5 points", "**Score:** 3.5"],
    ("additive", 5.0): ["**Score: 5**"],
    ("additive", None): ["Score: 6", "Score: 45", "It scores 3 points", "Score: four", "4", ""],
}


@pytest.mark.parametrize(("kind", "found"), REPLIES)
def test_replies_are_read_as_published(kind, found):
    replies = REPLIES[kind, found]
    assert [parse(kind, reply) for reply in replies] == [found] * len(replies)


def test_both_orders_make_an_outcome_or_none_does():
    orders = ((1.0, 1.0), (1.0, 0.0), (1.0, 0.5), (1.0, None), (0.0,))
    assert [Verdict(each).outcome for each in orders] == [1.0, 0.5, 0.75, None, 0.0]
    consistent = [Verdict(orders).consistent for orders in ((1.0, 1.0), (1.0, 0.0), (1.0,))]
    assert consistent == [True, False, None]
    scores = ((2, 1), (1, 2), (1, 1), (None, 1))
    assert [by_scores(*pair).outcome for pair in scores] == [1.0, 0.0, 0.5, None]


@pytest.mark.parametrize("kind", PLACES)
def test_shipped_prompts_ask_for_what_is_parsed(kind):
    prompt = fill(read_template(kind), {place: f"<{place}>" for place in PLACES[kind]})
    assert all(f"<{place}>" in prompt for place in PLACES[kind])
    assert parse(kind, prompt.splitlines()[-1]) is not None


def test_a_template_of_ones_own_and_braces_that_stay_what_they_are(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text('{question} {"json": 1} {answer_a} ü {answer_b} {answer_a}\n')
    hostile = "{answer_b} {question} {0} {} {{answer_a}} {answer_a.__class__} %s $x \\1 \\g<0>"
    values = {"question": hostile, "answer_a": "1", "answer_b": "2"}
    assert fill(read_template("pairwise", path), values) == hostile + ' {"json": 1} 1 ü 2 1'
    for content, said in (
        (b"{question} {answer_a}", r"mine.txt has no {answer_b}. A pairwise template holds"),
        (b"\xff\xfe\x00", r"mine.txt is not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_template("pairwise", path)
    with pytest.raises(OSError, match=r"none\.txt"):
        read_template("pairwise", tmp_path / "none.txt")


URL = "http://127.0.0.1:1/v1"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_judge_in_yaml(tmp_path):
    path = write(
        tmp_path / "judge.yaml",
        "base_url: https://api.example.com\nmodel: m\napi_key_env: SOME_KEY\ntemplate: t.txt\n"
        "request: {max_completion_tokens: 100}\nprompt_price: 2\ncompletion_price: 8\n",
    )
    config = read_judge(path)
    assert config.base_url == "https://api.example.com/v1"
    assert config.template == tmp_path / "t.txt"
    assert config.request == {"max_completion_tokens": 100}
    assert config.cost(1_000_000, 500_000) == 6.0
    assert JudgeConfig(base_url=URL, model="m").cost(1, 1) is None
    assert JudgeConfig(base_url="https://x.org/a/v2/", model="m").base_url == "https://x.org/a/v2"


SECRET = "sk-planted-secret"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None}, r"model is missing"),
        ({"model": ""}, r"model: .*at least 1 character"),
        *(
            ({"base_url": url}, r"base_url: give an address such as https")
            for url in ("api.example.com", "ftp://x/v1", "http://x:99999/v1", "http://[::1/v1")
        ),
        ({"base_url": f"http://x:{SECRET}/v1"}, r"base_url: give an address"),
        ({"base_url": f"https://u:{SECRET}@x.org/v1"}, r"base_url: an address with a user"),
        ({"base_url": f"https://x.org/v1?key={SECRET}"}, r"base_url: an address with a user"),
        ({"api_key": SECRET}, r"api_key: no key belongs in a file.* api_key_env"),
        ({"api_key_env": SECRET}, r"api_key_env: give the NAME of an environment variable"),
        ({"request": {"api_key": SECRET}}, r"request: 'api_key' cannot be set here"),
        ({"request": {"messages": []}}, r"request: 'messages' cannot be set here"),
        ({"concurrency": 0}, r"concurrency: .*greater than or equal to 1"),
        ({"mode": "triple"}, r"mode: .*'pairwise' or 'single'"),
        ({"modle": "m"}, r"modle is not a key. Did you mean `mode`"),
        ({"timeout": SECRET}, r"timeout: .*number"),
    ],
)
def test_a_wrong_key_is_named_and_no_secret_repeated(changes, said):
    keys = {"base_url": URL, "model": "m", **changes}
    with pytest.raises(ValueError, match=rf"judge\.yaml: .*{said}") as error:
        JudgeConfig.parse({k: v for k, v in keys.items() if v is not None}, "judge.yaml: ")
    assert SECRET not in str(error.value)


def test_a_file_that_is_no_judge(tmp_path):
    for text, said in (
        ("a: b: c", r"is not YAML, line 1"),
        ("- a", r"holds no mapping"),
        ("", r"holds no mapping"),
        ("1: 2", r"base_url is missing"),
    ):
        with pytest.raises(ValueError, match=said):
            read_judge(write(tmp_path / "judge.yaml", text))


def test_the_docs_list_every_key_with_its_default():
    text = (Path(__file__).parents[1] / "docs/judges.md").read_text()
    rows = text.replace("`", "")
    for name, field in JudgeConfig.model_fields.items():
        default = "unset" if field.default is None else field.default
        if field.is_required():
            assert f"| {name} | |" in rows
        elif name in ("template", "request", "prompt_price", "completion_price", "timeout"):
            assert f"`{name}`" in text
        else:
            assert f"| {name} | {default} |" in rows
    example, *_ = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert JudgeConfig.parse(yaml.safe_load(example), "docs").api_key_env == "OPENAI_API_KEY"


def test_a_function_in_a_file_judges(tmp_path):
    path = write(
        tmp_path / "truth.py",
        "from dataclasses import dataclass\n@dataclass\nclass D:\n    x: 'int' = 0\n"
        "def length(question, answer):\n    return None if answer == 'hm' else len(answer)\n",
    )
    judge = make_judge(f"{path}:length", Journal(tmp_path / "judge.jsonl"))
    assert isinstance(judge, ScoringJudge)
    answers = ["long", "no", "two", "hm", "long"]
    scores = dict(judge.score_all([Answered("q", answer) for answer in answers]))
    assert scores == {0: 4.0, 1: 2.0, 2: 3.0, 3: None, 4: 4.0}
    assert judge.usage == Usage(Replies(4), unparsed=1)
    pairs = ((4.0, 2.0), (2.0, 4.0), (3.0, 3.0), (None, 4.0), (4.0, None))
    assert [by_scores(*pair).outcome for pair in pairs] == [1.0, 0.0, 0.5, None, None]
    module = make_judge(
        "sera_plugin.tools.demo.world:true_reward", Journal(tmp_path / "module.jsonl")
    )
    assert dict(module.score([Answered("b a d c f e", "a b c d e f")])) == {0: 1.0}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('x')", r"raised KeyError: 'x' on the question 'why\?' and the answer"),
        ("return 'much'", r"returned 'much' .*It must return a finite number"),
        ("return float('nan')", r"returned nan on the question 'why\?'"),
        ("return float('inf')", r"returned inf"),
    ],
)
def test_a_function_that_fails_is_named_with_what_it_was_given(tmp_path, body, said):
    path = write(tmp_path / "bad.py", f"def f(question, answer):\n    {body}\n")
    judge = make_judge(f"{path}:f", Journal(tmp_path / "judge.jsonl"))
    assert isinstance(judge, ScoringJudge)
    with pytest.raises(JudgeFailed, match=said):
        list(judge.score([Answered("why?", "so")]))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere.py:f", r"nowhere.py cannot be imported: FileNotFound.*in the working dir"),
        ("no.such.module:f", r"no.such.module cannot be imported: .*file\.py:function"),
        ("sera_plugin.data.rows:nothing", r"sera_plugin.data.rows:nothing is no function of that"),
        ("sera_plugin.data.rows:_PROBE", r"_PROBE is no function of that"),
        (":", r"cannot be imported"),
        ("broken.py:f", r"broken.py cannot be imported: SyntaxError"),
        ("gpt-4", r"'gpt-4' is neither a YAML file, a directory nor a function"),
    ],
)
def test_a_judge_that_is_not_there_is_named(tmp_path, monkeypatch, spec, said):
    monkeypatch.chdir(tmp_path)
    write(Path("broken.py"), "def f(:\n")
    with pytest.raises(ValueError, match=said):
        make_judge(spec, Journal(tmp_path / "judge.jsonl"))
