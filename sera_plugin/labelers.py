"""The labeler of one run, made from the `sera:` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_plugin.args import SeraConfig
from sera_plugin.journal import Journal
from sera_plugin.judging import Judge
from sera_plugin.judging.api import api_judge
from sera_plugin.labeling import Labeler
from sera_plugin.labeling.conversation import Conversation
from sera_plugin.labeling.implicit import ImplicitReward
from sera_plugin.labeling.judged import Judged
from sera_plugin.labeling.self_judge import SelfJudge
from sera_plugin.labeling.spin import Spin
from sera_plugin.method import Method
from sera_plugin.progress import progress, sampling_progress
from sera_plugin.samplers import Samplers
from sera_plugin.sampling import SamplingSettings


@dataclass
class Labelers:
    """Makes the labeler of each iteration.

    Attributes:
        config: the `sera:` block.
        method: the method's constants.
        samplers: make what a policy samples with, for the one that judges itself.
        tokenizer: the host's.
    """

    config: SeraConfig
    method: Method
    samplers: Samplers
    tokenizer: Any

    def make(self, iteration: int, settings: SamplingSettings, optimizer: Any) -> Labeler:
        """The labeler that the configuration names.

        Args:
            iteration: t, 1-based.
            settings: how the iteration samples.
            optimizer: may wait in host memory while an engine samples.
        """
        scorer, store = self.samplers.scorer, self.samplers.store
        conversation = Conversation(self.tokenizer)

        def judged(judge: Callable[[Journal], Judge]) -> Labeler:
            @contextmanager
            def opened() -> Iterator[Judge]:
                # One for all iterations: what is judged again, in a run that is continued, is here.
                with Journal(store.root / "judgements.jsonl") as journal:
                    yield judge(journal)

            return Judged(
                self.config.labeler,
                opened,
                conversation,
                scorer.ranks,
                lambda total: progress("judging", total, "verdict", scorer.quiet),
            )

        def reward_model(journal: Journal) -> Judge:
            from sera_plugin.judging.reward_model import RewardModelJudge

            assert self.config.reward_model is not None
            return RewardModelJudge(Path(self.config.reward_model), journal)

        def endpoint(journal: Journal) -> Judge:
            assert self.config.judge is not None
            return api_judge(self.config.judge, journal)

        kinds: dict[str, Callable[[], Labeler]] = {
            "implicit": lambda: ImplicitReward(self.method),
            "reward_model": lambda: judged(reward_model),
            "judge": lambda: judged(endpoint),
            "self_judge": lambda: SelfJudge(
                self.samplers.make(iteration, optimizer),
                settings,
                conversation,
                scorer.ranks,
                sampling_progress(scorer.quiet),
            ),
            "spin": Spin,
        }
        return kinds[self.config.labeler]()
