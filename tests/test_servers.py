"""Several running servers share a phase's prompts; one may be slow, wrong, or gone."""

from contextlib import ExitStack
from threading import Event, Lock

import numpy as np
import pytest

from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.run import require_same_run
from sera_plugin.sampling import client, engine, servers
from sera_plugin.sampling.answers import Known
from sera_plugin.sampling.child import SamplingFailed
from tests import servers as small
from tests.servers import vllm_server
from tests.test_credentials import described
from tests.test_sampling import server_at

HOW = SamplingSettings(2, 1.0, 1.0, 4, 48, (2,), seed=3)
PROMPTS = [np.arange(1, 3 + row % 7, dtype=np.int32) for row in range(30)]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def started(world, monkeypatch):
    """Starts servers, each with its behaviour."""
    monkeypatch.setattr(client, "BACKOFF", 0.0)
    monkeypatch.setattr(servers, "RETRIES", 1)
    with ExitStack() as stack:
        yield lambda **its: stack.enter_context(vllm_server(world.base, **its))


@pytest.fixture
def sampler(world):
    return lambda *servers: server_at(
        *(getattr(one, "url", one) for one in servers), base=world.base
    )


def collect(sampler) -> list:
    chunks = sampler.sample(PROMPTS, HOW)
    found = [(row, [one.token_ids for one in found]) for chunk in chunks for row, found in chunk]
    return sorted(found)


def test_a_server_takes_the_next_prompt_when_it_has_a_place_free(started, sampler, monkeypatch):
    monkeypatch.setattr(engine, "IN_FLIGHT", 2)
    seen, all_else = [], Event()

    def quick(request):
        seen.append(request)
        if len(seen) == len(PROMPTS) - 2:
            all_else.set()
        return small.choices(request)

    def slow(request):
        assert all_else.wait(60)
        return small.choices(request)

    servers = [started(choices=staticmethod(one)) for one in (slow, quick)]
    both = sampler(*servers)
    assert collect(both) == collect(sampler(servers[1]))
    assert both.report["servers"] == {servers[0].url: 2, servers[1].url: 28}


@pytest.mark.parametrize(
    "end", ["gone", "broken", "begun anew", pytest.param("hung", marks=pytest.mark.nightly)]
)
def test_what_a_lost_server_has_not_answered_others_do(started, sampler, monkeypatch, caplog, end):
    monkeypatch.setattr(engine, "IN_FLIGHT", 4)
    monkeypatch.setattr(engine, "CHUNK_PROMPTS", 1)
    monkeypatch.setattr(servers, "PATIENCE", 5.0 if end == "hung" else 60.0)
    lock, over, asked = Lock(), Event(), []

    def choices(request):
        with lock:
            asked.append(request["seed"])
            if len(asked) == 5:
                ends = {"gone": {"drops": 10**9}, "hung": {}}
                status = {"fail": "/v1/completions", "failure": 404 if "anew" in end else 500}
                for name, value in ends.get(end, status).items():
                    setattr(dying.its, name, value)
        if end == "hung" and len(asked) >= 5:
            over.wait()
        return small.choices(request)

    dying, other = started(choices=staticmethod(choices)), started()
    both = sampler(dying, other)
    try:
        assert collect(both) == collect(sampler(other))  # each row once, and the same tokens
    finally:
        over.set()
    assert f"goes on with 1 other server(s), because the vLLM server at {dying.url} " in caplog.text
    assert sum(both.report["servers"].values()) == len(PROMPTS)
    assert both.report["servers"][dying.url] >= 1


def test_the_last_server_that_is_lost_ends_the_phase(started, sampler):
    both = [started(fail="/v1/completions"), started(fail="/v1/completions")]
    with pytest.raises(SamplingFailed, match=r"refused /v1/completions \(500\)"):
        collect(sampler(*both))


def test_a_wrong_answer_stops_the_phase_and_names_the_server(started, sampler):
    outside = {"token_ids": [99, 2], "finish_reason": "stop"}
    wrong = started(choices=staticmethod(lambda _: [outside | {"index": i} for i in range(2)]))
    with pytest.raises(SamplingFailed, match=rf"{wrong.url} answers the prompt of row \d+ wrongly"):
        collect(sampler(started(), wrong))


def test_a_server_with_another_policy_stops_the_phase(started, sampler, caplog):
    """The stand-in finds -1 nat for each token."""

    def choices(request):
        scored = small.choices(request)[0]["prompt_logprobs"][1:]
        other = [{token: {"logprob": -2.0} for token in place} for place in scored]
        return [{"prompt_logprobs": [None, *other]}]

    right, wrong = started(), started(choices=staticmethod(choices))
    both = sampler(right, wrong)
    both.known = lambda longest: [Known(np.array([1, 5]), np.array([7, 8, 9, 2]), -4.0)]
    both.tolerance = 0.1
    with pytest.raises(SamplingFailed, match=f"{wrong.url} serves another policy"):
        collect(both)
    # Both are told to unload the adapter, which the stand-in refuses.
    assert [f"{one.url} kept sera-" in caplog.text for one in (right, wrong)] == [True] * 2
    wrong.its.choices = staticmethod(small.choices)
    collect(both)
    assert both.report["nats_per_root_token"] == 0


def test_a_server_that_is_not_there_is_told_before_training_and_later_left_out(
    started, sampler, caplog
):
    one = started()
    with pytest.raises(SamplingFailed, match=f"{NOBODY} does not answer.*set THE KEY to where"):
        sampler(one, NOBODY).check(48)
    both = sampler(NOBODY, one)
    assert collect(both) == collect(sampler(one))
    assert both.report["servers"] == {NOBODY: 0, one.url: 30}
    assert both.report["version"] == "1 None"
    assert f"goes on with 1 other server(s), because the vLLM server at {NOBODY}" in caplog.text
    nobody = NOBODY.replace("9", "1")
    with pytest.raises(SamplingFailed, match=f"(?s){NOBODY} does not .*{nobody} does not answer"):
        collect(sampler(NOBODY, nobody))


def test_the_least_context_of_all_servers_counts(started, sampler, monkeypatch):
    assert sampler(started(), started()).check(48) == small.CONTEXT
    monkeypatch.setattr(small, "CONTEXT", 40)
    with pytest.raises(SamplingFailed, match=r"context of 40 tokens"):
        sampler(started(), started()).check(48)


def test_addresses_are_read_as_they_are_asked():
    config = SeraConfig(servers=("https://a/gpu1/v1/", "http://B:8000"))
    assert config.servers == ("https://a/gpu1", "http://B:8000")
    assert config.sampler == SeraConfig(sampler="auto", servers=("http://a",)).sampler
    assert config.sampler == "vllm-server"
    assert SeraConfig(servers=()).sampler == "auto"


def test_a_run_may_go_on_with_other_servers(tmp_path):
    before, now = (described({"sera": {"servers": [url]}}) for url in ("http://a", "http://b"))
    assert before != now
    require_same_run(before, now, tmp_path)
