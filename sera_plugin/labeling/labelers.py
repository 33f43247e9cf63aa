"""The labeler of one run, made from the `sera:` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_plugin.algorithm.method import Method
from sera_plugin.algorithm.protocols import Labeler, SamplingSettings
from sera_plugin.config.quoting import quoted
from sera_plugin.labeling.conversation import Conversation
from sera_plugin.labeling.implicit import ImplicitReward
from sera_plugin.labeling.judged import Judged
from sera_plugin.labeling.judging import Judge
from sera_plugin.labeling.judging.api import api_judge
from sera_plugin.labeling.self_judge import SelfJudge
from sera_plugin.labeling.spin import Spin
from sera_plugin.rundir.checksums import RUN
from sera_plugin.rundir.journal import Journal
from sera_plugin.rundir.progress import progress
from sera_plugin.sampling.progress import sampling_progress
from sera_plugin.sampling.samplers import Samplers


@dataclass
class Labelers:
    """Makes the labeler of each iteration.

    Attributes:
        method: the method's constants; `method.config` is the `sera:` block.
        samplers: make what a policy samples with, for the one that judges itself.
        tokenizer: the host's.
    """

    method: Method
    samplers: Samplers
    tokenizer: Any

    def check(self) -> None:
        """Find out now what a phase would find out after hours of sampling.

        Raises:
            ValueError: if the reward model is not there, or the judge's template cannot be used.
            OSError: if that template cannot be read.
            JudgeFailed: if the environment variable with the judge's key is not there.
        """
        config = self.method.config
        if (
            config.reward_model is not None
            and not Path(config.reward_model, "config.json").exists()
        ):
            raise ValueError(
                f"sera.reward_model: {quoted(config.reward_model, 200)} has no config.json. Name "
                "the directory of a sequence classification model; relative paths start in the "
                "working directory, and nothing is downloaded."
            )
        if config.judge is not None:
            api_judge(config.judge, self._journal())

    def _journal(self) -> Journal:
        """One for all iterations: what is judged again, in a run that is continued, is here."""
        return Journal(self.samplers.store.root / "judgements.jsonl", RUN)

    def make(self, iteration: int, settings: SamplingSettings, optimizer: Any) -> Labeler:
        """The labeler that the configuration names.

        Args:
            iteration: t, 1-based.
            settings: how the iteration samples.
            optimizer: may wait in host memory while an engine samples.
        """
        config, scorer = self.method.config, self.samplers.scorer

        def judged(judge: Callable[[Journal], Judge]) -> Labeler:
            @contextmanager
            def opened() -> Iterator[Judge]:
                with self._journal() as journal:
                    yield judge(journal)

            return Judged(
                config.labeler,
                opened,
                Conversation(self.tokenizer),
                scorer.ranks,
                lambda total: progress("judging", total, "verdict", scorer.quiet),
            )

        def reward_model(journal: Journal) -> Judge:
            from sera_plugin.labeling.judging.reward_model import RewardModelJudge

            assert config.reward_model is not None
            return RewardModelJudge(Path(config.reward_model), journal)

        def endpoint(journal: Journal) -> Judge:
            assert config.judge is not None
            return api_judge(config.judge, journal)

        kinds: dict[str, Callable[[], Labeler]] = {
            "implicit": lambda: ImplicitReward(self.method),
            "reward_model": lambda: judged(reward_model),
            "judge": lambda: judged(endpoint),
            "self_judge": lambda: SelfJudge(
                self.samplers.make(iteration, optimizer),
                settings,
                Conversation(self.tokenizer),
                scorer.ranks,
                sampling_progress(scorer.quiet),
            ),
            "spin": Spin,
        }
        return kinds[config.labeler]()
