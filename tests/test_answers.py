"""What an engine answers is checked before anything is stored, and so is the policy it serves."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from sera_plugin.algorithm.method import Candidate, SamplingSettings
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.rundir.store import RunStore, make_table
from sera_plugin.sampling.answers import read_candidates
from sera_plugin.sampling.child import SamplingFailed
from sera_plugin.sampling.engine import sampling_fields
from sera_plugin.sampling.samplers import Choice
from tests import servers
from tests.servers import vllm_server
from tests.test_sampling import SETTINGS, made, server_at

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
    "a very large one": ([CUT | {"token_ids": [3, 10**4000]}, STOPPED], "3 to 1000"),
    "aborted": ([CUT | {"finish_reason": "abort"}, STOPPED], "is 'abort': input should be 'st"),
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
    with pytest.raises(ValueError, match=words) as refusal:
        read_candidates(choices, SETTINGS, 4, 16)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("many", [[1] * 99, [CUT | {"token_ids": ["3"] * 99}]])
def test_of_many_faults_one_is_looked_for(many):
    """A million of them would take gigabytes."""
    with pytest.raises(ValueError, match=r"choices\.0.* is '?[13]") as refusal:
        read_candidates(many, SETTINGS, 4, 16)
    assert refusal.value.__context__.error_count() == 1


def test_nothing_of_a_servers_wrong_answer_is_handed_on(world):
    """Its tokens, 5 to 34 and the end token 2, are no tokens of a smaller vocabulary."""
    how = SamplingSettings(2, 1.0, 1.0, 4, 48, (2,), seed=3)
    prompts = [np.array([1, 5], dtype=np.int32)]
    with vllm_server(world.base) as server:
        sampler = server_at(server.url, base=world.base)
        assert len(list(sampler.sample(prompts, how))) == 1
        sampler.vocabulary = 5
        wrong = sampler.sample(prompts, how)
        with pytest.raises(SamplingFailed, match=r"prompt of row 0 wrongly.*vocabulary has 5"):
            next(wrong)


def test_an_engine_that_serves_another_policy_is_found_before_anything_is_sampled(world, tmp_path):
    """The server's tokens have the log-probability -1 each, prompts and answers alike."""

    def choices(request):
        if "prompt_logprobs" in request:
            asked.append(len(request["prompt"]))
        return servers.choices(request)

    asked: list[int] = []
    ids = [[1, 5, 6]] * 3
    columns = {"prompt_ids": ids, "chosen_ids": [[7] * n for n in (4, 9, 99)], "rejected_ids": ids}
    pairs = Pairs.from_table(make_table(columns))
    how = SamplingSettings(2, 1.0, 1.0, 4, 48, (2,), seed=3)
    prompts = [np.arange(1, 12, dtype=np.int32)]
    store = RunStore(tmp_path)
    lengths = {"row": range(3), "chosen_length": [4, 9, 99], "rejected_length": [3] * 3}
    lengths |= dict.fromkeys(("chosen_reward", "rejected_reward", "margin"), [0.0] * 3)
    lengths |= {"prompt_length": [3] * 3, "selected": [True] * 3}
    with vllm_server(world.base, choices=staticmethod(choices)) as server:
        for logp, passes in ((-9.0, True), (-9.5, True), (-10.0, False), (8.0, False)):
            scores = {"chosen_logp": [-4.0, logp, 0.0], "rejected_logp": [0.0] * 3}
            store.write(2, "offline", make_table({**lengths, **scores}))
            cfg = {"base_model": str(world.base), "vllm": {"port": server.port}}
            samplers = made(cfg, tmp_path, sampler="vllm-server")
            samplers.choice, samplers.tokenizer = Choice("vllm-server", ""), server.tokenizer
            samplers.scorer.policies.model = SimpleNamespace(
                get_input_embeddings=lambda: SimpleNamespace(weight=np.zeros((40, 2)))
            )
            sampler = samplers.make(2, None, pairs, 0.01)
            if passes:
                assert len(list(sampler.sample(prompts, how))) == 1
                found = abs(logp + 9) / 3 / math.sqrt(2)
                assert sampler.report["nats_per_root_token"] == pytest.approx(found, abs=1e-6)
            else:
                with pytest.raises(SamplingFailed, match=r"serves another policy.*on 2 answers"):
                    next(sampler.sample(prompts, how))
    # Only pairs that the engine's context holds are asked for.
    assert set(asked) == {7, 12}
