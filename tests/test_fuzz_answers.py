"""What engines and judges may answer, malformed by the thousand: nothing of it is used.

A case is a number, which makes it again: `case(412)`. Each is sent over HTTP by a server of ours
and read by the real client. A good answer with one thing changed must be refused in a sentence, or
be as good as before by the rules that stand here.
"""

import copy
import json
import random
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.config.block import JudgeConfig
from sera_plugin.labeling.judging import JudgeFailed, api
from sera_plugin.labeling.judging.api import PairwiseJudge
from sera_plugin.rundir.journal import Journal
from sera_plugin.sampling.answers import Known
from sera_plugin.sampling.child import SamplingFailed
from sera_plugin.sampling.client import Client
from tests.servers import Handler, serving

CASES = 1250
VOCABULARY, LIMIT, ENDS = 40, 4, (2, 3)
SETTINGS = SamplingSettings(3, 1.0, 1.0, LIMIT, 64, ENDS, seed=0)
PROMPT = [1, 5, 9]
KNOWN = Known(np.array([1, 5]), np.array([9, 2]), -3.0)
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 10**30, -(10**30), float("nan"), float("inf"), "", "x", "7"),
    *("\ud800", "\x00\x1b[2J", "a" * 5000, [], {}, [[]], [None], {"index": 0}, [1, 2], {"a": {}}),
]
SAMPLED = {
    "choices": [
        {"index": 0, "token_ids": [7, 8, 2], "finish_reason": "stop", "prompt_token_ids": PROMPT},
        {"index": 1, "token_ids": [7, 8, 9, 10], "finish_reason": "length"},
        {"index": 2, "token_ids": [3], "finish_reason": "stop"},
    ]
}
SCORED = {
    "choices": [
        {"prompt_logprobs": [None, {"5": {"logprob": -1.0}}, {"9": {"logprob": -1.0, "rank": 3}},
                             {"2": {"logprob": -2.0}, "4": {"logprob": -0.1}}]}
    ]
}  # fmt: skip
MODELS = {"data": [{"id": "base", "root": "/base", "max_model_len": 64}]}
JUDGED = {
    "choices": [{"message": {"role": "assistant", "content": "[[A]]"}}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 2},
}
KINDS: dict[str, Any] = {"sampled": SAMPLED, "scored": SCORED, "models": MODELS, "judged": JUDGED}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested lists and objects, the whole of it first."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def case(number: int) -> tuple[str, bytes, dict[str, str], int]:
    """(what is asked for, the body, headers and status of the answer)."""
    rng = random.Random(number)
    kind = rng.choice(list(KINDS))
    content = copy.deepcopy(KINDS[kind])
    status, headers = 200, {}
    how = rng.choice(["junk", "junk", "junk", "drop", "repeat", "cut", "nested", "bytes", "status"])
    *above, place = rng.choice(places(content)[1:])
    target = content
    for key in above:
        target = target[key]
    if how == "junk":
        target[place] = rng.choice(JUNK)
    elif how == "drop":
        del target[place]
    elif how == "repeat" and isinstance(target, list):
        target.insert(place, copy.deepcopy(target[place]))
    elif how == "repeat":
        target[place] = [target[place]] * rng.randint(1, 3)
    body = json.dumps(content).encode()
    if how == "cut":
        body = body[: rng.randrange(len(body))]
    elif how == "nested":
        body = b"[" * rng.choice([10, 2000, 200_000])
    elif how == "bytes":
        body = rng.randbytes(rng.randrange(200))
    elif how == "status":
        status = rng.choice([204, 301, 400, 404, 418, 500, 503])
        headers = {"Retry-After": rng.choice(["1", "-5", "9" * 400, "x", "Thu, 99 Foo", "\xff"])}
    return kind, body, headers, status


def good(kind: str, body: bytes) -> bool:
    """Whether a body is what was asked for, by rules of its own."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if kind == "sampled":
        return good_samples(content)
    try:
        if kind == "models":
            return isinstance(content["data"], list) and all(
                type(one["id"]) is str
                and type(one.get("root")) in (str, type(None))
                and (one.get("max_model_len") is None or one["max_model_len"] == 64)
                for one in content["data"]
            )
        if kind == "judged":
            [choice] = content["choices"]
            said = choice["message"].get("content")
            if choice["message"].get("role", "assistant") != "assistant":
                return False
            usage = {} if content.get("usage") is None else content["usage"]
            counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
            numbers = [one for one in counts if one is not None]
            fine = all(type(one) is int and 0 <= one <= 10**9 for one in numbers)
            return (said is None or type(said) is str) and fine
        found = content["choices"][0]["prompt_logprobs"]
        logps = [found[2]["9"]["logprob"], found[3]["2"]["logprob"]]  # the others are not used
        finite = all(type(one) in (int, float) and -1e6 <= one <= 0.001 for one in logps)
        shaped = all(one is None or isinstance(one, dict) for one in found)
        return len(found) == 4 and finite and shaped
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return False


def good_samples(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("choices"), list):
        return False
    seen = set()
    for one in content["choices"]:
        if not isinstance(one, dict) or type(one.get("index")) is not int:
            return False
        ids, why = one.get("token_ids"), one.get("finish_reason")
        if not isinstance(ids, list) or not 1 <= len(ids) <= LIMIT or why not in ("stop", "length"):
            return False
        if any(type(token) is not int or not 0 <= token < VOCABULARY for token in ids):
            return False
        ends = [token in ENDS for token in ids]
        if any(ends[:-1]) or ends[-1] != (why == "stop"):
            return False
        if one.get("prompt_token_ids") not in (None, PROMPT):
            return False
        seen.add(one["index"])
    return seen == {0, 1, 2} and len(content["choices"]) == 3


class Refused(str):
    """The sentence in which an answer was refused."""


class Saying(Handler):
    """Answers anything with what its class was told to."""

    said: tuple[bytes, dict[str, str], int] = (b"", {}, 200)

    def do_POST(self) -> None:
        self.asked()
        body, headers, status = type(self).said
        self.answer(status, body, **headers)

    do_GET = do_POST


def judge_at(url: str, directory: Path, **keys: Any) -> PairwiseJudge:
    settings = {"base_url": f"{url}/v1", "model": "m", "timeout": 5, **keys}
    return PairwiseJudge(JudgeConfig(**settings), Journal(directory / "journal"))


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """What comes of a case: what was read, or `Refused` with the sentence."""
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(server := ThreadingHTTPServer(("127.0.0.1", 0), Saying)),
    ):
        patch.setattr(api, "RETRIES", 0)
        url = f"http://127.0.0.1:{server.server_port}"
        client = Client(url, "key", 0, 5.0)
        judge = judge_at(url, tmp_path_factory.mktemp("judge"))
        request = {"prompt": PROMPT, "max_tokens": LIMIT}
        questions = [{"role": "user", "content": "?"}]
        asked = {
            "sampled": lambda: client.candidates(0, request, SETTINGS, VOCABULARY),
            "scored": lambda: client.logp("m", KNOWN),
            "models": client.models,
            "judged": lambda: judge._ask(questions),
        }

        def run(number: int) -> Any:
            kind, *said = case(number)
            Saying.said = tuple(said)
            try:
                return asked[kind]()
            except (SamplingFailed, JudgeFailed, api._Refused) as refusal:
                return Refused(str(refusal))

        yield run


def test_malformed_answers_are_refused_in_words_and_none_is_used(ask):
    refused = 0
    for number in range(CASES):
        kind, body, _, status = case(number)
        found, usable = ask(number), status == 200 and good(kind, body)
        assert isinstance(found, Refused) != usable, (number, found)
        if not usable:
            refused += 1
            assert found.isprintable(), number
            assert 20 < len(found) < 1500, number
    assert refused > CASES / 2
