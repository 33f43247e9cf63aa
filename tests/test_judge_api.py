"""API judges against a server on its good days and its bad ones."""

import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sera_plugin.config.block import JudgeConfig
from sera_plugin.labeling.judging import (
    Answered,
    Comparison,
    JudgeFailed,
    Replies,
    Usage,
    api,
    make_judge,
)
from sera_plugin.labeling.judging.api import RatingJudge
from sera_plugin.rundir.journal import Journal
from sera_plugin.sampling import http
from tests.conftest import fill
from tests.servers import KEY, JudgeServer, judge_server


@pytest.fixture(autouse=True)
def server(monkeypatch) -> Iterator[JudgeServer]:
    """For a client that does not wait long."""
    monkeypatch.setattr(api, "BACKOFF", 0.002)
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    # A proxy would not know this machine.
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://192.0.2.1:9")
    with judge_server() as running:
        yield running


@pytest.fixture
def make(server, tmp_path):
    """A judge with a journal; another call is another process's judge."""
    journals: list[Journal] = []

    def build(url: str = "", **keys: Any) -> Any:
        for journal in journals:
            journal.close()
        journals.append(Journal(tmp_path / "judge.jsonl"))
        settings = {"base_url": url or server.url, "model": "some-model", "timeout": 5, **keys}
        return make_judge(JudgeConfig(**settings), journals[-1])

    return build


PAIRS = [
    Comparison("Which?", "a **", "b *"),
    Comparison("Which?", "a", "b *"),
    Comparison("Which?", "a *", "b *"),
    Comparison("Which?", "the same", "the same"),
    Comparison("Wer? 🙂 \x1b[31m {answer_a}", "", "*" * 3000),
]
OUTCOMES = [1.0, 0.0, 0.5, 0.5, 0.0]
#: Two orders of all that are not the same.
CALLS = 8


def outcomes(judge, pairs=PAIRS) -> list[float | None]:
    found = dict(judge.compare(pairs))
    return [found[index].outcome for index in range(len(pairs))]


def test_pairs_are_compared_in_both_orders(make, server):
    judge = make(concurrency=1)
    assert outcomes(judge) == OUTCOMES
    assert judge.usage == Usage(asked=Replies(CALLS, 100 * CALLS, 10 * CALLS))
    assert {one["path"] for one in server.seen} == {"/v1/chat/completions"}
    bodies = [one["body"] for one in server.seen]
    assert (bodies[0]["model"], bodies[0]["temperature"]) == ("some-model", 0)
    first, second = (body["messages"][0]["content"] for body in bodies[:2])
    assert first.index("a **") < first.index("b *\n")
    assert second.index("b *\n") < second.index("a **")
    server.plan(*[["say", "[[A]]"]] * 2)  # one with a favourite place makes ties that tell
    ((_, verdict),) = make(model="another").compare(PAIRS[:1])
    assert (verdict.outcome, verdict.consistent) == (0.5, False)


def test_done_again_nothing_is_asked(make, server):
    server.plan(["say", "no verdict"])
    outcomes(make())
    server.plan()
    again = make()
    assert outcomes(again) == OUTCOMES
    assert server.calls == 0
    assert again.usage.asked == Replies()
    assert again.usage.cached == Replies(CALLS + 1, 100 * (CALLS + 1), 10 * (CALLS + 1))


def test_another_judge_is_asked_anew_and_prices_and_concurrency_make_none(make, server, tmp_path):
    outcomes(make())
    server.plan()
    outcomes(make(prompt_price=1, completion_price=2, concurrency=3, timeout=9, mode="pairwise"))
    assert server.calls == 0
    (tmp_path / "t.txt").write_text("{question} {answer_a} {answer_b} *")
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    for changes in (
        *({"model": "another"}, {"request": {"temperature": 1}}, {"url": elsewhere}),
        {"template": tmp_path / "t.txt"},
    ):
        judge = make(**changes)
        dict(judge.compare(PAIRS))
        assert judge.usage.cached == Replies()


def test_answers_are_rated(make, server):
    judge = make(mode="single")
    assert isinstance(judge, RatingJudge)
    answers = [Answered("Which?", "*" * stars) for stars in (0, 3, 20)]
    assert sorted(judge.score(answers)) == [(0, 1.0), (1, 4.0), (2, 10.0)]
    twice = [Answered("Which?", "****"), *answers, Answered("Which?", "****")]
    assert sorted(judge.score_all(twice)) == [(0, 5.0), (1, 1.0), (2, 4.0), (3, 10.0), (4, 5.0)]
    assert server.calls == 3 + 1  # what occurs twice is rated once


def test_no_more_requests_at_a_time_than_allowed(make, server):
    server.plan(*[["sleep", 0.05]] * 20)
    list(make(concurrency=3).compare([Comparison("?", f"{n}", "*") for n in range(10)]))
    assert server.most_at_once == 3


def test_the_key_and_the_fields_of_the_request_are_sent_as_they_are(
    make, server, tmp_path, monkeypatch
):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine 127.0.0.1 login me password not-yours\n")
    monkeypatch.setenv("HOME", str(home))
    outcomes(make(api_key_env="JUDGE_TEST_KEY"), PAIRS[:1])
    outcomes(make(), PAIRS[1:2])
    keys = [one["key"] for one in server.seen]
    assert keys == [f"Bearer {KEY}"] * 2 + [None] * 2
    outcomes(make(request={"max_completion_tokens": 5, "seed": 1, "top_p": None}), PAIRS[2:3])
    body = server.seen[-1]["body"]
    assert body.keys() == {"max_completion_tokens", "seed", "model", "messages"}


def test_a_reply_without_a_verdict_or_of_nothing_is_asked_again(make, server):
    server.plan(["say", "Hm."], ["raw", '{"choices": [{"message": {"content": null}}]}'])
    judge = make(concurrency=1)
    assert outcomes(judge, PAIRS[:1]) == [1.0]
    assert (judge.usage.malformed, judge.usage.unparsed) == (2, 0)
    assert judge.usage.asked == Replies(4, 300, 30)
    conversation = server.seen[2]["body"]["messages"]
    assert [one["role"] for one in conversation] == ["user", "assistant"] * 2 + ["user"]
    assert conversation[1]["content"] == "Hm."
    assert "[[A]], [[B]] or [[C]]" in conversation[-1]["content"]

    server.plan(*[["say", "I will not say."]] * 3)
    judge = make(concurrency=1)  # after three such replies there is no verdict, and no tie
    for counted in ((3, 1), (6, 2)):
        assert outcomes(judge, PAIRS[1:3]) == [None, 0.5]
        assert (judge.usage.malformed, judge.usage.unparsed) == counted
    assert server.calls == 3 + 1 + 2


TROUBLE = {
    "too many requests": ["status", 429],
    "a date to come back at": ["status", 429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}],
    "no date at all": ["status", 429, {"Retry-After": "soon"}],
    "error of the server": ["status", 500],
    "overloaded": ["status", 529],
    "no JSON": ["raw", "<html>"],
    "no choices": ["raw", '{"choices": []}'],
    "other JSON": ["raw", "[1, 2]"],
    "a depth without end": ["raw", "[" * 100_000],
    "more tokens than there are": [
        "raw",
        '{"choices": [{"message": {"content": "[[A]]"}}], "usage": {"prompt_tokens": 1e30}}',
    ],
    "a truth for a number of tokens": [
        "raw",
        '{"choices": [{"message": {"content": "[[A]]"}}], "usage": {"prompt_tokens": true}}',
    ],
    "another role": ["raw", '{"choices": [{"message": {"role": "user", "content": "[[A]]"}}]}'],
    "another choice": ["raw", '{"choices": [{"message": {"content": "[[A]]"}, "index": 1}]}'],
    "two choices": ["raw", '{"choices": [%s, %s]}' % (('{"message": {"content": "[[A]]"}}',) * 2)],
    "two contents": ["raw", '{"choices": [{"message": {"content": "B", "content": "[[A]]"}}]}'],
    "a date that is none": ["status", 429, {"Retry-After": "Thu, 01 Jan 99999999999 00:00:00"}],
    "no text": ["raw", '{"choices": [{"message": {"content": 7}}]}'],
    "cut off half-way": "drop",
    "hangs up": "hang up",
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_is_waited_for_until_it_stays_and_what_was_judged_is_kept(make, server, trouble):
    server.plan(*[TROUBLE[trouble]] * 3, "fine", "fine", *[TROUBLE[trouble]] * 50)
    judge = make(concurrency=1)
    with pytest.raises(JudgeFailed, match=r"did not answer in 7 tries.*What was judged is kept"):
        outcomes(judge)
    assert (judge.usage.retries, judge.usage.malformed) == (3, 0)
    assert server.calls == 3 + 2 + 7
    server.plan()
    judge = make()
    assert outcomes(judge) == OUTCOMES
    assert judge.usage.cached.count == 2
    assert server.calls == CALLS - 2


def test_waits_double_unless_the_endpoint_says_how_long(make, server, monkeypatch):
    monkeypatch.setattr(api, "BACKOFF", 1.0)
    judge = make()
    again, told = ["status", 500], ["status", 503, {"Retry-After": "17"}]
    server.plan(again, again, told, again)
    waited: list[float] = []
    judge._stop = SimpleNamespace(wait=waited.append)  # never set
    judge._ask([{"role": "user", "content": "?"}])
    assert judge.usage.retries == 4
    assert waited.pop(2) == 17
    assert waited == pytest.approx([1, 2, 8], rel=0.25)


def test_an_endpoint_that_asks_for_hours_is_not_waited_for_and_one_that_hangs_asked_again(
    make, server
):
    server.plan(["status", 429, {"Retry-After": "7200"}], ["sleep", 3.0])
    with pytest.raises(JudgeFailed, match=r"asks to come back in 7200 seconds"):
        outcomes(make(concurrency=1))
    judge = make(concurrency=1, timeout=0.3)
    assert outcomes(judge, PAIRS[:1]) == [1.0]
    assert judge.usage.retries == 1


def test_a_reply_has_bounds_of_time_and_length(make, server, monkeypatch):
    for model, *headers in (["one"], ["two", "headers"]):
        server.plan(["drip", 0.1, 60, *headers])
        judge = make(concurrency=1, model=model, timeout=0.5)  # no silence is as long as that
        assert outcomes(judge, PAIRS[:1]) == [1.0]
        assert judge.usage.retries == 1
    monkeypatch.setattr(http, "LARGEST", 1000)
    server.plan(["say", "[[A]]" + " " * 1000])
    judge = make(concurrency=1, model="another")
    assert outcomes(judge, PAIRS[:1]) == [1.0]
    assert judge.usage.retries == 1


def test_a_server_that_dies_in_the_middle(make, server):
    judging = make(concurrency=1).compare(PAIRS)
    assert next(judging)[0] == 0
    server.server_close()
    said = rf"{server.url}/v1 did not .* connection failed.*Look after the endpoint"
    with pytest.raises(JudgeFailed, match=said):
        list(judging)


def test_threads_that_wait_to_try_again_stop_when_another_gives_up(make, server):
    """One is turned away for good while seven are told to wait for minutes."""
    slow = ["status", 429, {"Retry-After": "200"}]
    server.plan(*[slow] * 7, ["sleep", 0.3], *[["status", 404]] * 2)
    began = time.monotonic()
    with pytest.raises(JudgeFailed, match="Check base_url and model"):
        outcomes(make(), [Comparison("?", f"{n}", "*") for n in range(8)])
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("status", "key", "said"),
    [
        (401, "JUDGE_TEST_KEY", "Set the environment variable that api_key_env names"),
        (403, None, "Give the name of the environment variable"),
        (404, None, "it answered 404: no, None. Check base_url and model"),
        (307, None, "it answered 307"),
        (204, None, "it answered 204"),
    ],
)
def test_a_wrong_request_is_not_made_again(make, server, status, key, said):
    headers = {"Location": "/v1/chat/completions"}
    server.plan(*[["status", status, headers]] * 20)
    with pytest.raises(JudgeFailed, match=said):
        outcomes(make(concurrency=1, api_key_env=key))
    assert server.calls == 1


def test_one_refused_request_is_a_missing_verdict_and_an_endpoint_that_refuses_all_not_asked_on(
    make, server
):
    server.plan("fine", "fine", ["status", 400])
    judge = make(concurrency=1)
    assert outcomes(judge) == [1.0, None, *OUTCOMES[2:]]
    assert (judge.usage.refused, judge.usage.unparsed) == (1, 0)
    server.plan(*[["status", 400]] * 100)
    pairs = [Comparison("?", f"{n}", "*") for n in range(40)]
    with pytest.raises(JudgeFailed, match=r"refused all of the first 10 .*it answered 400: no"):
        outcomes(make(concurrency=1), pairs)
    assert server.calls == 10
    with pytest.raises(JudgeFailed, match="refused all of the first 2 requests"):
        outcomes(make(), pairs[:1])


def test_a_key_that_is_not_there(make, monkeypatch):
    for key, said in ((" ", "an environment variable that is not set"), ("kéy", "printable ASCII")):
        monkeypatch.setenv("JUDGE_TEST_KEY", key)
        with pytest.raises(JudgeFailed, match=said) as error:
            make(api_key_env="JUDGE_TEST_KEY")
        assert "kéy" not in str(error.value)


@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_the_key_is_in_no_file_and_no_error_though_an_endpoint_sends_it_back(
    make, server, tmp_path, status
):
    judge = make(concurrency=1, api_key_env="JUDGE_TEST_KEY")
    outcomes(judge, PAIRS[:1])
    server.plan(*[["status", status]] * 20)
    with pytest.raises(JudgeFailed) as error:
        outcomes(judge)
    assert f"{status}: no, Bearer ***" in str(error.value)
    assert error.value.__suppress_context__ or not error.value.__context__
    kept = (tmp_path / "judge.jsonl").read_text()
    assert "some-model" in kept
    assert "planted" not in f"{error.value} {kept} {judge.description!r}"


def test_a_full_disk_stops_the_judging(server, small_disk):
    config = JudgeConfig(base_url=server.url, model="m")
    judge = make_judge(config, Journal(small_disk / "judge.jsonl"))
    fill(small_disk)
    with pytest.raises(OSError, match=r"takes no more files.*start the same command again"):
        outcomes(judge)
    os.unlink(small_disk / "filler")
    assert outcomes(judge) == OUTCOMES
