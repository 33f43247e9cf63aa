"""Whatever an engine answers is checked before any of it is stored."""

from __future__ import annotations

import numpy as np
import pytest

from sera_plugin.algorithm.method import Candidate, SamplingSettings
from sera_plugin.sampling.child import SamplingFailed
from sera_plugin.sampling.client import read_candidates, sampling_fields
from sera_plugin.sampling.vllm import VllmServerSampler
from tests.vllm_server import vllm_server

SETTINGS = SamplingSettings(2, 0.7, 0.95, 8, 16, (9, 7), seed=5)
STOPPED = {"index": 1, "token_ids": [3, 9], "finish_reason": "stop"}
CUT = {"index": 0, "token_ids": [3, 4, 5], "finish_reason": "length"}

WRONG = {
    "no list": (None, "choices is None"),
    "no objects": (["text"], "choices.0 is 'text'"),
    "one missing": ([CUT], r"2 choices .* index \[0\]"),
    "one too many": ([CUT, STOPPED, STOPPED | {"index": 2}], r"index \[0, 1, 2\]"),
    "one twice": ([CUT, STOPPED | {"index": 0}], r"index \[0, 0\]"),
    "no index": ([CUT, {**STOPPED, "index": None}], "choices.1.index is None"),
    "no ids": ([CUT, {**STOPPED, "token_ids": None}], "choices.1.token_ids is None"),
    "text for ids": ([CUT, {**STOPPED, "token_ids": ["3", "9"]}], "ids.0 is '3'"),
    "truth for ids": ([CUT, {**STOPPED, "token_ids": [True, 9]}], "ids.0 is True"),
    "no token": ([CUT | {"token_ids": []}, STOPPED], "1 to 4 tokens .* 0 came back"),
    "too long": ([CUT | {"token_ids": [3] * 5}, STOPPED], "1 to 4 tokens .* 5 came back"),
    "outside": ([CUT | {"token_ids": [3, 16]}, STOPPED], "3 to 16, .* has 16 tokens"),
    "negative": ([CUT | {"token_ids": [-1, 3]}, STOPPED], "-1 to 3"),
    "aborted": (
        [CUT | {"finish_reason": "abort"}, STOPPED],
        "is 'abort': input should be 'stop'",
    ),
    "unfinished": ([CUT | {"finish_reason": None}, STOPPED], "finish_reason is None"),
    "stopped by nothing": ([CUT, STOPPED | {"token_ids": [3, 4]}], r"end tokens at \[\]"),
    "went on": ([CUT, STOPPED | {"token_ids": [7, 9]}], r"end tokens at \[0, 1\]"),
    "cut at its end": ([CUT | {"token_ids": [3, 9]}, STOPPED], r"'length' has end tokens at \[1\]"),
}


def test_a_request_has_every_end_token_and_what_is_asked_for():
    asked = {"n": 2, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0}
    ends = {"ignore_eos": True, "stop_token_ids": [9, 7]}
    assert sampling_fields(SETTINGS).items() >= (asked | ends).items()


def test_choices_come_back_in_the_order_of_their_index():
    found = read_candidates([STOPPED, CUT], SETTINGS, 4, 16)
    assert found == [Candidate([3, 4, 5], "length"), Candidate([3, 9], "stop")]


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_refused_and_said(case):
    choices, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        read_candidates(choices, SETTINGS, 4, 16)


def test_nothing_of_a_servers_wrong_answer_is_handed_on(world, tmp_path):
    """Its tokens, 5 to 34 and the end token 2, are no tokens of a smaller vocabulary."""
    how = SamplingSettings(2, 1.0, 1.0, 4, 48, (2,), seed=3)
    prompts = [np.array([1, 5], dtype=np.int32)]
    with vllm_server(world.base) as server:
        arguments = ("127.0.0.1", server.port, str(world.base), tmp_path, server.tokenizer)
        assert len(list(VllmServerSampler(*arguments, 35).sample(prompts, how))) == 1
        wrong = VllmServerSampler(*arguments, 5).sample(prompts, how)
        with pytest.raises(SamplingFailed, match=r"prompt of row 0 wrongly.*vocabulary has 5"):
            next(wrong)
