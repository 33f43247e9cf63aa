"""The labeler of one run, made from the `sera:` block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sera_plugin.args import SeraConfig
from sera_plugin.labeling import Labeler
from sera_plugin.labeling.conversation import Conversation
from sera_plugin.labeling.implicit import ImplicitReward
from sera_plugin.labeling.spin import Spin
from sera_plugin.method import Method
from sera_plugin.samplers import Samplers


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

    def make(self, iteration: int, optimizer: Any) -> Labeler:
        """The labeler that the configuration names.

        Args:
            iteration: t, 1-based.
            optimizer: may wait in host memory while an engine samples.
        """
        return getattr(self, f"_{self.config.labeler}")(iteration, optimizer)

    def _implicit(self, iteration: int, optimizer: Any) -> Labeler:
        return ImplicitReward(self.method)

    def _spin(self, iteration: int, optimizer: Any) -> Labeler:
        return Spin()

    def _reward_model(self, iteration: int, optimizer: Any) -> Labeler:
        from sera_plugin.labeling.reward_model import RewardModel

        scorer = self.samplers.scorer
        assert self.config.reward_model is not None
        return RewardModel(
            self.config.reward_model,
            Conversation(self.tokenizer),
            next(scorer.policies.model.parameters()).device,
            scorer.ranks,
            scorer.quiet,
        )
