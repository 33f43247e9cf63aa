"""The labelers of one run, made from the `sera:` block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sera_plugin.algorithm.method import Method
from sera_plugin.algorithm.protocols import SamplingSettings
from sera_plugin.config.kinds import LABELERS
from sera_plugin.labeling.conversation import Conversation
from sera_plugin.labeling.ranker import Ranker
from sera_plugin.rundir.checksums import RUN
from sera_plugin.rundir.journal import Journal
from sera_plugin.rundir.ranks import Ranks
from sera_plugin.sampling.samplers import Samplers


@dataclass
class Labelers:
    """Makes the labeler of each iteration, and has what any of them may need.

    `method.config` is the `sera:` block. `samplers` make what a policy samples with, for the one
    that judges itself. The tokenizer is the host's.
    """

    method: Method
    samplers: Samplers
    tokenizer: Any

    @property
    def _kind(self) -> type[Ranker]:
        kind: type[Ranker] = LABELERS[self.method.config.labeler].load()
        return kind

    @property
    def ranks(self) -> Ranks:
        """The run's processes."""
        return self.samplers.scorer.ranks

    @property
    def quiet(self) -> bool:
        """Whether another process shows progress."""
        return self.samplers.scorer.quiet

    @property
    def conversation(self) -> Conversation:
        """Token ids to texts and back."""
        return Conversation(self.tokenizer)

    def journal(self) -> Journal:
        """One for all iterations: what is judged again, in a run that is continued, is here."""
        return Journal(self.samplers.store.root / "judgements.jsonl", RUN)

    def check(self) -> None:
        """Find out now what a phase would find out after hours of sampling; see `Ranker.check`."""
        self._kind.check(self)

    def make(self, iteration: int, settings: SamplingSettings, optimizer: Any) -> Ranker:
        """The labeler that the configuration names, for iteration t (1-based).

        `settings` are how the iteration samples. The optimizer may wait in host memory while an
        engine samples.
        """
        return self._kind.make(self, iteration, settings, optimizer)
