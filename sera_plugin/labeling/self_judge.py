"""The policy judges its own answers in words (self-rewarding language models, Yuan et al. 2024)."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sera_plugin.algorithm.protocols import (
    CandidateSampler,
    FloatArray,
    Ranked,
    SamplingSettings,
    TokenIds,
)
from sera_plugin.labeling.conversation import Conversation
from sera_plugin.labeling.judging.prompts import fill, parse, read_template
from sera_plugin.labeling.ranker import Ranker, first_places
from sera_plugin.rundir.ranks import Ranks
from sera_plugin.sampling.prompts import sampling_progress

if TYPE_CHECKING:
    from sera_plugin.labeling.labelers import Labelers

#: Replies to each question, whose points are averaged, and how they are sampled (section 2.3).
REPLIES, TEMPERATURE, TOP_P = 3, 0.7, 0.9
#: Longest reply in tokens: some reasoning and a score.
_LONGEST = 256


class SelfJudge(Ranker):
    """Rewards are the mean points, 0 to 5, of what the policy says of an answer.

    The sampler samples from theta_{t-1}. `settings` are of the run's sampling; lengths, end tokens
    and seed are taken from it.
    """

    def __init__(
        self,
        sampler: CandidateSampler,
        settings: SamplingSettings,
        conversation: Conversation,
        ranks: Ranks,
        quiet: bool,
    ) -> None:
        super().__init__("self_judge")
        self.sampler, self.conversation = sampler, conversation
        self.ranks, self.quiet = ranks, quiet
        self.settings = replace(
            settings,
            candidates=REPLIES,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            max_new_tokens=_LONGEST,
            seed=settings.seed + 1_000_000_000,  # not the seeds of what is judged
        ).within(sampler.longest)

    @classmethod
    def make(
        cls, run: Labelers, iteration: int, settings: SamplingSettings, optimizer: Any
    ) -> Ranker:
        """See `Ranker.make`."""
        sampler = run.samplers.make(iteration, optimizer)
        return cls(sampler, settings, run.conversation, run.ranks, run.quiet)

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`.

        Samples of a prompt that are equal token for token are judged once. NaN where no reply has
        a score that can be read, and where question and answer leave no room for a reply
        (`too_long`).

        Raises:
            SamplingFailed: if an engine outside this process does not do its work.
        """
        template = read_template("additive")

        def asking(index: int) -> TokenIds:
            texts = {
                "question": self.conversation.question(ranked.prompts[index]),
                "answer": self.conversation.answer(ranked.answers[index]),
            }
            return np.array(self.conversation.prompt(fill(template, texts)), dtype=np.int32)

        total, longest = len(ranked.answers), self.settings.max_length
        numbers = ranked.answers.numbered(ranked.per_prompt).ravel()
        first = first_places(numbers.tolist(), ranked.per_prompt)
        prompts = {index: asking(index) for index in dict.fromkeys(first)}
        # Not `skip`: a sampler refuses a prompt that leaves no room, skipped or not.
        asked = [
            index for index, prompt in prompts.items() if longest is None or len(prompt) < longest
        ]
        chunks = self.sampler.sample([prompts[index] for index in asked], self.settings)
        start = sampling_progress(self.quiet)
        points, counted = np.zeros((2, total))
        said = 0
        with start(len(asked) // self.ranks.world, "self-judge") as advance, closing(chunks):
            for chunk in chunks:
                for row, replies in chunk:
                    for reply in replies:
                        ids = np.array(reply.token_ids, dtype=np.int32)
                        score = parse("additive", self.conversation.answer(ids))
                        said += 1
                        if score is not None:
                            points[asked[row]] += score
                            counted[asked[row]] += 1
                advance(chunk)
        totals = self.ranks.sum(np.concatenate([points, counted, [float(said)]]))
        points, counted = totals[:-1].reshape(2, -1)
        self.report |= {
            "replies": int(totals[-1]),
            "unparsed": int(totals[-1] - counted.sum()),
            "too_long": total - int(np.isin(first, asked).sum()),
            **self.sampler.seconds,  # parts of the phase's, of an engine that started again
        }
        found = np.divide(points, counted, out=np.full(total, np.nan), where=counted > 0)
        return found[first]
