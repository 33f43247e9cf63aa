"""Who can rank: the implicit reward, the dataset (SPIN), a judge, the policy in words."""

import re
from collections.abc import Hashable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sera_plugin.algorithm.fit import judged
from sera_plugin.algorithm.method import DATASET, Labeler, Ranked, TokenIds
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.config.quoting import quoted
from sera_plugin.data.dataset import RowTokenizer
from sera_plugin.labeling.judging import (
    Answered,
    Comparison,
    Judge,
    ScoringJudge,
    fill,
    make_judge,
    parse,
    read_template,
)
from sera_plugin.rundir.journal import Journal
from sera_plugin.rundir.progress import progress
from sera_plugin.rundir.store import make_table
from sera_plugin.rundir.tokens import IntArray, TokenColumn
from sera_plugin.rundir.writing import RUN
from sera_plugin.sampling.samplers import sampling_progress

#: How a policy judges itself (section 2.3): replies to each question, whose points are averaged,
#: how they are sampled, and the longest in tokens: some reasoning and a score.
SELF_JUDGED: Any = {"candidates": 3, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 256}
_PLACE = "SERA-PLUGIN-USER-TEXT"


class ImplicitReward(Labeler):
    """SeRA's own ranking (paper Eq. 7, Algorithm 1, line 7).

    r_t, from the log-probabilities of theta_{t-1} and the policies before it.
    """

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`: (n,) nats, per token where the loss is."""
        assert ranked.reward is not None
        return ranked.reward(ranked.logps, ranked.answers.lengths, self.method.per_token)


class Spin(Labeler):
    """The dataset's chosen answer is a candidate too, and better than every sample.

    It is the last one of its prompt. Samples that repeat it token for token are as good as it is,
    all others equal to each other: the last of those is the rejected one, and a prompt without any
    gives no pair (SPIN, Chen et al. 2024).
    """

    def complete(self, samples: pa.Table, chosen: TokenColumn) -> pa.Table:
        """See `Labeler.complete`: one more per prompt, with `finish_reason` `dataset`."""
        last = np.full(len(chosen), len(samples) // len(chosen))
        row = np.concatenate([samples["row"].to_numpy(), np.arange(len(chosen))])
        candidate = np.concatenate([samples["candidate"].to_numpy(), last])
        order = np.lexsort((candidate, row))
        reasons = [*samples["finish_reason"].to_pylist(), *[DATASET] * len(chosen)]
        return make_table(
            {
                "row": row[order],
                "candidate": candidate[order],
                "token_ids": TokenColumn(samples["token_ids"]).joined(chosen).take(order),
                "finish_reason": pa.array(reasons).take(order),
            }
        ).replace_schema_metadata(samples.schema.metadata)

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`: 1 for the chosen answer, 0 for any other."""
        answers = ranked.answers.numbered(ranked.per_prompt)
        return (answers == answers[:, -1:]).ravel().astype(np.float64)


class Judged(Labeler):
    """A judge ranks: a reward model (the paper's OAIF row, Guo et al. 2024), an endpoint, or code.

    A judge that gives numbers gives rewards. One that compares meets every two different candidates
    of a prompt, and a candidate's reward is its share of wins, a tie counting half. Candidates that
    read the same have one reward; where all of a prompt's do, that is a half. Rank 0 asks, and what
    the judge says is kept in a journal: one for all iterations of a run.
    """

    #: As `sera.labeler` names it; None for the one that the configuration has.
    name: str | None = None

    def judge(self, journal: Journal) -> Judge:
        """The judge that the configuration names."""
        config = self.method.config
        name = self.name or str(config.labeler)
        try:
            return make_judge(getattr(config, name), journal, self.room, config.score_columns)
        except ValueError as error:
            raise ValueError(f"sera.{name}: {error}") from error

    def check(self) -> None:
        """See `Labeler.check`."""
        config = self.method.config
        directory = config.reward_model
        if directory is None or (self.name or config.labeler) != "reward_model":
            self.judge(self._journal())
        elif not Path(directory, "config.json").exists():
            raise ValueError(
                f"sera.reward_model: {quoted(directory, 200)} has no config.json. Name the "
                "directory of a sequence classification model; relative paths start in the "
                "working directory, and nothing is downloaded."
            )

    def _journal(self) -> Journal:
        return Journal(self.store.root / "judgements.jsonl", RUN)

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`; JudgeFailed if the judge stops answering."""
        found = np.zeros(len(ranked.answers))
        if self.store.ranks.main:
            conversation = Conversation(self.tokenizer)
            questions = list(map(conversation.question, ranked.prompts))
            answers = list(map(conversation.answer, ranked.answers))
            with self._journal() as journal:
                judge = self.judge(journal)
                if isinstance(judge, ScoringJudge):
                    found = self._scores(judge, questions, answers, ranked)
                else:
                    found = self._wins(judge, questions, answers, ranked.per_prompt)
                self.report |= {"judge": judge.name, "usage": asdict(judge.usage)}
        # NaN would spread to every rank's sum all the same.
        return np.asarray(self.store.ranks.sum(found))

    def _scores(
        self, judge: ScoringJudge, questions: list[str], answers: list[str], ranked: Ranked
    ) -> FloatArray:
        found, places = np.full(len(answers), np.nan), range(len(answers))
        about = [ranked.about(place) if judge.reads_rows else "" for place in places]
        asked = list(map(Answered, questions, answers, about, map(ranked.named, places)))
        with progress("judging", len(answers), "verdict", self.quiet) as advance:
            for index, score in judge.score_all(asked):
                found[index] = np.nan if score is None else score
                advance(1)
        return found

    def _wins(
        self, judge: Judge, questions: list[str], answers: list[str], per_prompt: int
    ) -> FloatArray:
        first = _first_places(answers, per_prompt)
        pairs = [
            pair
            for begin in range(0, len(answers), per_prompt)
            for pair in combinations(dict.fromkeys(first[begin : begin + per_prompt]), 2)
        ]
        met = [Comparison(questions[one], answers[one], answers[other]) for one, other in pairs]
        won, known = np.zeros((2, len(answers)))
        with progress("judging", len(met), "verdict", self.quiet) as advance:
            for index, verdict in judge.compare(met):
                if verdict.outcome is not None:
                    one, other = pairs[index]
                    won[one] += verdict.outcome
                    won[other] += 1 - verdict.outcome
                    known[[one, other]] += 1
                advance(1)
        unmet = set(first).difference(place for pair in pairs for place in pair)
        found = np.full(len(answers), np.nan)
        found[list(unmet)] = 0.5
        return np.divide(won, known, out=found, where=known > 0)[first]


class Mixed(Labeler):
    """The implicit reward, and scores of others as further features of the fit.

    The labels of held-out pairs weigh them (`algorithm.fit`), so a score counts by what it explains
    of labels beside the policies' log-probabilities. An answer without a score counts as the mean
    of its prompt's others, and a held-out pair with one as if both answers had the same.
    """

    def _others(self) -> list[Judged]:
        names = self.method.config.labelers[1:]
        found = [Judged(self.method, self.store, self.tokenizer, self.quiet) for _ in names]
        for one, name in zip(found, names, strict=True):
            one.name, one.room, one.report = name, self.room, {"name": name}
        return found

    def check(self) -> None:
        """See `Labeler.check`."""
        for one in self._others():
            one.check()

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`: (n,) log-odds. The `report` has the weights."""
        assert ranked.labelled is not None
        pairs, beside = ranked.labelled.pairs, ranked.labelled.beside
        total, more = len(ranked.answers), len(pairs)

        def about(place: int) -> str:
            return ranked.about(place) if place < total else beside.about((place - total) % more)

        def named(place: int) -> str:
            held_out = f"held-out row {(place - total) % more}"
            return ranked.named(place) if place < total else held_out

        every = replace(
            ranked,
            prompts=ranked.prompts.joined(pairs.prompt_ids).joined(pairs.prompt_ids),
            answers=ranked.answers.joined(pairs.chosen_ids).joined(pairs.rejected_ids),
            about=about,
            named=named,
        )
        others = self._others()
        scores = np.stack([one.rewards(every) for one in others], axis=1)
        chosen, rejected = scores[total:].reshape(2, more, len(others))
        differences = np.hstack([ranked.labelled.differences, np.nan_to_num(chosen - rejected)])
        names = self.method.config.labelers[1:]
        reward = judged(self.method.paper_weights(ranked.iteration), differences, True, names)
        self.report |= {
            "reward": reward.record(self.method.reward_policies(ranked.iteration)),
            "unscored": dict(zip(names, np.isnan(scores).sum(axis=0).tolist(), strict=True)),
            "judges": {one.name: one.report for one in others},
        }
        by_prompt = scores[:total].reshape(-1, ranked.per_prompt, len(others))
        known = np.ma.masked_invalid(by_prompt)
        filled = known - known.mean(axis=1, keepdims=True)
        own = reward(ranked.logps, ranked.answers.lengths, self.method.per_token)
        found: FloatArray = own + filled.filled(0).reshape(total, -1) @ np.asarray(reward.scores)
        return found


class SelfJudge(Labeler):
    """The policy judges its own answers in words (self-rewarding models, Yuan et al. 2024).

    Rewards are the mean points, 0 to 5, of what it says of an answer. It replies as it sampled, but
    for `SELF_JUDGED`.
    """

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`.

        Samples of a prompt that are equal token for token are judged once. NaN where no reply has
        a score that can be read, and where question and answer leave no room for a reply
        (`too_long`).
        """
        sampler, ranks = ranked.sampler, self.store.ranks
        settings = replace(
            ranked.settings,
            seed=ranked.settings.seed + 1_000_000_000,  # not the seeds of what is judged
            **SELF_JUDGED,
        ).within(sampler.longest)
        template, conversation = read_template("additive"), Conversation(self.tokenizer)
        tokenizer = RowTokenizer(self.tokenizer, ranked.settings.end_ids)

        def asking(index: int) -> TokenIds:
            texts = {
                "question": conversation.question(ranked.prompts[index]),
                "answer": conversation.answer(ranked.answers[index]),
            }
            text = conversation.asked(fill(template, texts))
            return np.array(tokenizer.prompt(text), dtype=np.int32)

        total, longest = len(ranked.answers), settings.max_length
        numbers = ranked.answers.numbered(ranked.per_prompt).ravel()
        first = _first_places(numbers.tolist(), ranked.per_prompt)
        prompts = {index: asking(index) for index in dict.fromkeys(first)}
        # Not `skip`: a sampler refuses a prompt that leaves no room, skipped or not.
        asked = [
            index for index, prompt in prompts.items() if longest is None or len(prompt) < longest
        ]
        chunks = sampler.sample([prompts[index] for index in asked], settings)
        points, counted, said = np.zeros((3, total))
        bar = sampling_progress(len(asked) // ranks.world, "self-judge", self.quiet)
        with bar as advance, closing(chunks):
            for chunk in chunks:
                for row, replies in chunk:
                    texts = (conversation.answer(np.array(one.token_ids)) for one in replies)
                    scores = [parse("additive", text) for text in texts]
                    known = [score for score in scores if score is not None]
                    points[asked[row]] = sum(known)
                    counted[asked[row]], said[asked[row]] = len(known), len(scores)
                advance(chunk)
        points, counted, said = ranks.sum(np.stack([points, counted, said]).ravel()).reshape(3, -1)
        self.report |= {
            "replies": int(said.sum()),
            "unparsed": int(said.sum() - counted.sum()),
            "too_long": total - int(np.isin(first, asked).sum()),
            **sampler.seconds,  # parts of the phase's, of an engine that started again
        }
        found = np.divide(points, counted, out=np.full(total, np.nan), where=counted > 0)
        return found[first]


def _first_places(answers: Sequence[Hashable], per_prompt: int) -> list[int]:
    """(n,) where each answer occurs first among those to its prompt: all are asked about once.

    `answers` are (n,) things that are equal where two answers are, `per_prompt` of them in a row.
    """
    places: dict[Hashable, int] = {}
    return [
        places.setdefault((index // per_prompt, one), index) for index, one in enumerate(answers)
    ]


#: A thought that a template opens before an answer, by `chat_template_kwargs` one way or another.
_OPENED = re.compile(r"\s*(<think>\s*(</think>)?\s*)?$")


class Conversation:
    """Token ids back to text, without the chat template (if there is one) around it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = [token for token in tokenizer.all_special_tokens if token]
        #: What the chat template puts before and after a single question.
        self._around: tuple[str, str] | None = None
        if getattr(tokenizer, "chat_template", None):
            before, found, behind = self._templated(_PLACE).partition(_PLACE)
            around = (self._without_bos(before), _OPENED.sub("", behind))
            self._around = around if found else None

    def _templated(self, question: str) -> str:
        turns = [{"role": "user", "content": question}]
        template = self.tokenizer.apply_chat_template
        return str(template(turns, tokenize=False, add_generation_prompt=True))

    def _without_bos(self, text: str) -> str:
        return text.removeprefix(self.tokenizer.bos_token or "")

    def question(self, prompt_ids: IntArray) -> str:
        """What the user said: one question as it was, or a longer conversation as the policy sees
        it, special tokens left out."""
        text = self._without_bos(self.tokenizer.decode(prompt_ids, skip_special_tokens=False))
        if self._around is not None:
            before, behind = self._around
            text = _OPENED.sub("", text)
            if text.startswith(before) and text.endswith(behind):
                inner = text[len(before) : len(text) - len(behind)]
                if not any(token in inner for token in self._special):
                    return inner
        return self.answer(prompt_ids)

    def answer(self, token_ids: IntArray) -> str:
        """An answer's text."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()

    def asked(self, question: str) -> str:
        """A question as the policy is asked it, ready for its answer."""
        return question if self._around is None else self._templated(question)
