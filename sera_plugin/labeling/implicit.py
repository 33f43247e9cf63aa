"""The implicit reward: SeRA's own ranking (paper Eq. 7, Algorithm 1, line 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sera_plugin.algorithm.method import Method
from sera_plugin.algorithm.protocols import FloatArray, Ranked, SamplingSettings
from sera_plugin.labeling.ranker import Ranker

if TYPE_CHECKING:
    from sera_plugin.labeling.labelers import Labelers


class ImplicitReward(Ranker):
    """r_t, from the log-probabilities of theta_{t-1} and the policies before it."""

    def __init__(self, method: Method) -> None:
        super().__init__("implicit")
        self.method = method

    @classmethod
    def make(
        cls, run: Labelers, iteration: int, settings: SamplingSettings, optimizer: Any
    ) -> Ranker:
        """See `Ranker.make`."""
        return cls(run.method)

    def rewards(self, ranked: Ranked) -> FloatArray:
        """See `Labeler.rewards`: (n,) nats, per token where the loss is."""
        return self.method.reward(ranked.logps, ranked.iteration, ranked.answers.lengths)
