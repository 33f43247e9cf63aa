"""Judges and a policy that judges itself, on answers made by hand."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from sera_plugin.algorithm.fit import Reward
from sera_plugin.algorithm.method import Candidate, Method, Ranked, SamplingSettings
from sera_plugin.algorithm.selection import pair_candidates
from sera_plugin.config.kinds import LABELERS
from sera_plugin.config.sera import SeraConfig
from sera_plugin.labeling.judging import Answered, Judge, JudgeFailed, ScoringJudge, by_scores
from sera_plugin.labeling.labelers import Conversation, Judged
from sera_plugin.rundir.store import RunStore, make_table
from sera_plugin.rundir.tokens import TokenColumn
from sera_plugin.sampling.engine import room
from tests.three_pairs import END


class Words:
    """A tokenizer of single words without a chat template."""

    chat_template = None
    bos_token = None
    all_special_tokens = ("<end>",)

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        words = [f"w{token}" for token in ids if token != END]
        return " ".join(words if skip_special_tokens else [*words, *["<end>"] * (END in ids)])

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text.split())}


def ranked(*answers: list[int], per_prompt: int, sampler: Any = None, how: Any = None) -> Ranked:
    table = make_table({"token_ids": answers, "prompt_ids": [[1]] * len(answers)})
    return Ranked(
        2, per_prompt, TokenColumn(table["prompt_ids"]), TokenColumn(table["token_ids"]),
        [np.zeros(len(answers))], sampler, how,
    )  # fmt: skip


class PrefersHigher(Judge):
    """Compares answers by their number; has nothing to say about w9."""

    met: tuple[tuple[str, str], ...] = ()

    def compare(self, comparisons):
        for index, one in enumerate(comparisons):
            self.met += ((one.first, one.second),)
            known = "w9" not in (one.first, one.second)
            yield index, by_scores(*((one.first, one.second) if known else (None, None)))


@pytest.fixture
def make(tmp_path):
    """The labeler of a run with some `sera:` block, as a run makes it."""

    def make_labeler(tokenizer: Any, **block: Any) -> Any:
        config = SeraConfig(bootstrap_ratio=1, **block)
        kind = LABELERS[config.labeler].load()
        return kind(Method(config, False, False, total=3), RunStore(tmp_path), tokenizer)

    return make_labeler


@pytest.fixture
def judged(make, monkeypatch):
    def judged_by(judge):
        monkeypatch.setattr(Judged, "judge", lambda self, journal: judge)
        return make(Words(), labeler="reward_model", reward_model="m")

    return judged_by


def test_a_judge_that_compares_gives_shares_of_wins(judged):
    """w3 wins 2 of 2, w2 1 of 2, w1 0 of 2, and a repeat as the first; w9 gets no verdict."""
    judge = PrefersHigher("by number", {})
    labeler = judged(judge)
    found = labeler.rewards(
        ranked([1, END], [3, END], [2, END], [3], [1], [2], [9], [9], per_prompt=4)
    )
    np.testing.assert_array_equal(found, [0, 1, 0.5, 1, 0, 1, np.nan, np.nan])
    assert judge.met[:3] == (("w1", "w3"), ("w1", "w2"), ("w3", "w2"))
    assert len(judge.met) == 3 + 3
    assert labeler.report["judge"] == "by number"


def test_answers_that_read_the_same_are_no_failure_of_the_judge(judged):
    """Nobody is asked about the first prompt; in the second w1 loses, however often it is there."""
    judge = PrefersHigher("by number", {})
    found = judged(judge).rewards(
        ranked([9, END], [9, END], [9], [1, END], [1, END], [2, END], per_prompt=3)
    )
    np.testing.assert_array_equal(found, [0.5, 0.5, 0.5, 0, 0, 1])
    assert judge.met == (("w1", "w2"),)
    pairs = pair_candidates([[0, 0, 1], [0, 0, 1]], found.reshape(2, 3))
    assert (pairs.unranked, pairs.ties, pairs.duplicates) == (0, 1, 2)
    assert (pairs.prompt, pairs.chosen, pairs.rejected) == ([1], [2], [0])


def test_a_judge_that_scores_is_asked_once_for_equal_answers(judged):
    class Scores(ScoringJudge):
        """By number; has nothing to say about w9."""

        asked: tuple[Answered, ...] = ()

        def score(self, answers):
            self.asked += tuple(answers)
            for index, one in reversed(list(enumerate(answers))):
                yield index, None if one.answer == "w9" else float(one.answer[1:])

    judge = Scores("by number", {})
    found = judged(judge).rewards(ranked([3, END], [1], [3], [9], [3], [9, END], per_prompt=3))
    np.testing.assert_array_equal(found, [3, 1, 3, np.nan, 3, np.nan])
    assert [one.answer for one in judge.asked] == ["w3", "w1", "w9"]


class Replies:
    """Samples what it is told to, and like any sampler refuses a prompt that leaves no room."""

    seconds = {"start_engine": 50.0, "stop_engine": 2.0}  # noqa: RUF012

    def __init__(self, replies: list[str], longest: int | None = None) -> None:
        self.replies, self.longest = replies, longest

    def sample(self, prompts, settings, skip=()):
        self.settings = settings
        self.rooms = [room(row, prompt, settings) for row, prompt in enumerate(prompts)]
        for row, letters in enumerate(self.replies):
            yield [(row, [Candidate([ord(one)], "stop") for one in letters])]


SAID = {"a": "Score: 4", "b": "It is fine. Score: 1", "c": "no idea", "d": "Score: 9"}


class Letters(Words):
    bos_token_id = None
    added_tokens_decoder: ClassVar = {}

    def decode(self, ids, skip_special_tokens=False):
        return SAID.get(chr(ids[0]), f"answer {ids[0]}")

    def __call__(self, text, **options):
        return {"input_ids": [1] * (90 if "answer 2" in text else 5)}


NAN = np.nan
#: Answers to prompts of three, what is sampled for those that are asked about, the ends of
#: `sequence_len` and of the engine's own context, rewards, and how many leave no room to judge.
SELF_JUDGED = {
    "the mean of what it says": ([1, 3, 4], ["abb", "ccc", "dab"], (64, None), [2, NAN, 2.5], 0),
    "no room": ([1, 2, 3], ["aaa", "bbb"], (90, None), [4, NAN, 1], 1),
    "no room in the engine": ([1, 2, 3], ["aaa", "bbb"], (None, 90), [4, NAN, 1], 1),
    "the engine ends first": ([1, 2, 3], ["aaa", "bbb"], (4096, 64), [4, NAN, 1], 1),
    "the engine ends last": ([1, 2, 3], ["aaa", "bbb"], (64, 4096), [4, NAN, 1], 1),
    "any room": ([1, 2, 3], ["aaa", "bbb", "aaa"], (None, 91), [4, 1, 4], 0),
    "equal answers to a prompt are judged once": (
        [1, 3, 1, 3, 1, 1], ["aaa", "bbb", "aab", "ccc"], (64, None), [4, 1, 4, 3, NAN, NAN], 0,
    ),
    "and have no room together": ([2, 1, 2], ["aaa"], (64, None), [NAN, 4, NAN], 2),
}  # fmt: skip


@pytest.mark.parametrize("case", SELF_JUDGED)
def test_a_policy_judges_itself(make, case):
    answers, replies, (max_length, longest), rewards, too_long = SELF_JUDGED[case]
    sampler = Replies(replies, longest)
    how = SamplingSettings(4, 1.0, 1.0, 12, max_length, (END,), seed=5)
    labeler = make(Letters(), labeler="self_judge")
    given = ranked(*([one] for one in answers), per_prompt=3, sampler=sampler, how=how)
    np.testing.assert_array_equal(labeler.rewards(given), rewards)
    assert labeler.report == {
        "name": "self_judge", "replies": 3 * len(replies), "too_long": too_long,
        "unparsed": sum(letter in "cd" for reply in replies for letter in reply),
        "start_engine": 50.0, "stop_engine": 2.0,
    }  # fmt: skip
    assert sampler.settings.candidates == 3
    if case == "any room":
        assert sampler.rooms == [86, 1, 86]


class ChatWords(Words):
    """A tokenizer whose text is in its ids, with a chat template."""

    chat_template = "some"
    bos_token = "<s>"
    all_special_tokens = ("<s>", "<|user|>", "<|assistant|>", "<end>")
    one = "<|user|>\nWhat is\n it?<end>\n<|assistant|>\n"
    several = "<|user|>\nHi<end>\n<|assistant|>\nYes?<end>\n<|user|>\nWhy?<end>\n<|assistant|>\n"
    texts = ("<s>" + one, one, several, "plain text", one + "<think>\n\n</think>\n\n")

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<s><|user|>\n{messages[0]['content']}<end>\n<|assistant|>\n"

    def decode(self, ids, skip_special_tokens=False):
        text = self.texts[int(ids[0])]
        for token in self.all_special_tokens if skip_special_tokens else ():
            text = text.replace(token, "")
        return text


def test_a_judge_reads_the_question_and_not_the_template_around_it():
    conversation = Conversation(ChatWords())
    assert [conversation.question(np.array([text])) for text in range(5)] == [
        "What is\n it?", "What is\n it?", "Hi\n\nYes?\n\nWhy?", "plain text", "What is\n it?",
    ]  # fmt: skip


def test_what_will_rank_is_looked_for_before_anything_is_sampled(make, tmp_path, monkeypatch):
    model = make(None, labeler="reward_model", reward_model=str(tmp_path))
    with pytest.raises(ValueError, match=r"sera.reward_model: .* has no config\.json"):
        model.check()
    (tmp_path / "config.json").write_text("{}")
    model.check()
    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": "SERA_TEST_KEY"}
    labeler = make(None, labeler="judge", judge=judge)
    with pytest.raises(JudgeFailed, match="environment variable that is not set"):
        labeler.check()
    monkeypatch.setenv("SERA_TEST_KEY", "k")
    labeler.check()
    make(None).check()
    assert not list(tmp_path.rglob("judgements.jsonl"))


@pytest.mark.parametrize("name", ["implicit", "spin"])
def test_whoever_reads_no_text_asks_nothing_of_a_chat_template(make, name):
    """Some templates refuse a lone question; that is a matter of labelers that read."""

    class Refusing(Words):
        chat_template = "some"

        def apply_chat_template(self, *args, **kwargs):
            raise ValueError("a system message is needed")

    labeler = make(Refusing(), labeler=name)
    given = ranked([3], [4], per_prompt=2)
    given = replace(given, logps=[np.zeros(2)] * 2, reward=Reward((1.0, -1.0)))
    assert labeler.rewards(given).shape == (2,)
    assert labeler.report == {"name": name}
