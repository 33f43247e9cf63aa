"""Exchanges with servers that do not end, or lead elsewhere."""

import json
from collections.abc import Iterator
from contextlib import suppress
from http.server import ThreadingHTTPServer
from threading import Event

import pytest
import requests

from sera_plugin.labeling.judging import JudgeFailed, api
from sera_plugin.sampling import client, http
from sera_plugin.sampling.child import SamplingFailed
from sera_plugin.sampling.client import Client
from tests.servers import Handler, serving
from tests.test_fuzz_answers import judge_at

GZIP = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08\0\0\0\0\0\0\3"
#: What a server sends first, and then again and again.
ENDLESS = {
    "one header": (b"HTTP/1.1 200 OK\r\n", b"X", 0.02),
    "other replies first": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
    "what is nothing when decompressed": (GZIP, b"\0\0\0\xff\xff" * 4000, 0.02),
    "the body of a redirect": (b"HTTP/1.1 302 Found\r\nLocation: /a\r\n\r\n", b"x", 0.02),
    "a large one": (b"HTTP/1.1 302 Found\r\nLocation: /a\r\n\r\n", b"x" * 2**20, 0.0),
    "the body of an error": (b"HTTP/1.1 503 Busy\r\n\r\n", b"x", 0.02),
}


class Said(Handler):
    """Sends `first`, and `again` until it is told to stop; `seen` are the requests."""

    first, again, pause = b"", b"", 0.0
    seen: list[str]
    stop: Event

    def do_POST(self) -> None:
        self.seen.append(self.path)
        self.asked()
        with suppress(OSError):
            self.wfile.write(self.first)
            while self.again and not self.stop.wait(self.pause):
                self.wfile.write(self.again)

    do_GET = do_POST


@pytest.fixture
def said(monkeypatch) -> Iterator[tuple[str, type[Said]]]:
    """Where a server is, and what it says."""
    monkeypatch.setattr(api, "RETRIES", 0)
    monkeypatch.setattr(client, "BACKOFF", 0.0)
    its = type("Its", (Said,), {"seen": [], "stop": Event()})
    with serving(server := ThreadingHTTPServer(("127.0.0.1", 0), its)):
        yield f"http://127.0.0.1:{server.server_port}", its
        its.stop.set()


@pytest.mark.parametrize("case", ENDLESS)
def test_no_server_holds_a_client_or_a_judge_for_ever(said, tmp_path, case):
    url, its = said
    its.first, its.again, its.pause = ENDLESS[case]
    with pytest.raises(SamplingFailed, match=r"does not answer /health after .*tr(y|ies): the"):
        Client(url, "", 1, 0.3).send("/health")
    with pytest.raises(JudgeFailed, match=r"the connection failed: the.*Look after"):
        judge_at(url, tmp_path, timeout=0.3)._ask([{"role": "user", "content": "?"}])
    # What has taken all its time is not asked again; what is too long may be so sooner.
    tries = {"what is nothing when decompressed": (2,), "a large one": (1, 2)}.get(case, (1,))
    assert its.seen.pop() == "/v1/chat/completions"
    assert its.seen in [["/health"] * number for number in tries]


def test_an_engine_that_nobody_watches_yet_is_waited_for_with_patience(said, monkeypatch):
    url, its = said
    its.first, its.again, its.pause = ENDLESS["one header"]
    monkeypatch.setattr(client, "PATIENCE", 0.3)
    with pytest.raises(SamplingFailed, match=r"no reply after 0\.3 seconds"):
        Client(url, "", 0, None).version()


@pytest.mark.parametrize("place", [b"/a", b"http://[::1", b"http://\xff\xfe:9/", b"http://*.x/"])
def test_a_redirect_is_named_and_not_followed(said, place):
    url, its = said
    its.first = b"HTTP/1.1 302 Found\r\nLocation: " + place + b"\r\n\r\n"
    with pytest.raises(SamplingFailed, match=r"refused /a \(302\): a redirect, which is not"):
        Client(url, "", 1, 5.0).ask("b", "/a")
    assert its.seen == ["/a"]


@pytest.mark.parametrize(("status", "tries"), [(429, 3), (503, 3), (500, 1), (404, 1)])
def test_an_overloaded_server_is_asked_again_and_its_last_words_are_shown(said, status, tries):
    url, its = said
    its.first = b"HTTP/1.1 %d No\r\nRetry-After: 9999\r\n\r\nsorry" % status
    with pytest.raises(SamplingFailed, match=rf"refused /a \({status}\): sorry"):
        Client(url, "", 2, 5.0).ask("b", "/a")
    assert its.seen == ["/a"] * tries


def test_an_answer_that_says_two_things_is_none():
    with pytest.raises(ValueError, match="a key stands twice"):
        http.Reply(200, {}, b'{"a": [{"b": 1, "b": 2}]}').json()


@pytest.mark.parametrize("part", ["=a:a", "a:", "eyJ", "/hook", 'key="', "x "])
def test_a_long_error_is_cut_before_credentials_are_looked_for_in_it(part):
    body = json.dumps({"error": {"message": part * 10**6}}).encode()
    assert 1 < len(http.Reply(400, {}, body).words("")) <= 400


def test_a_call_that_does_not_return_is_left():
    never = Event()
    with pytest.raises(requests.Timeout, match=r"no reply after 0\.05 seconds"):
        http.within(0.05, never.wait)
    with pytest.raises(ZeroDivisionError):
        http.within(60, lambda: 1 / 0)
    assert http.within(60, lambda: "said") == "said"
