"""`sera.keep`: which policy training leaves, and when no better one is to be expected."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sera_plugin.algorithm.best import best_policy, held_out_losses
from sera_plugin.algorithm.method import Method, Phases
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.trust import score_columns, score_pairs
from sera_plugin.model.scoring import PolicyScorer
from sera_plugin.rundir.checksums import damage
from sera_plugin.rundir.store import RunStore, make_table

LOG = logging.getLogger("axolotl.sera")

#: Iterations in a row without a better policy after which training ends.
PATIENCE = 2


@dataclass
class Keeping:
    """Judges policies by the held-out pairs; without any, or with `keep: last`, none."""

    method: Method
    store: RunStore
    scorer: PolicyScorer
    held_out: Pairs | None
    beta: float  # the loss's
    patience: int | None  # the host's `early_stopping_patience`; 0 never ends training early

    @property
    def judges(self) -> bool:
        return self.method.config.keep == "best" and self.held_out is not None

    def losses(self, last: int) -> dict[int, FloatArray]:
        """`held_out_losses` of theta_0 to theta_last; scores those that have none on disk yet.

        Left out is one that cannot be scored any more: of a full fine-tune, with its table damaged
        and its weights removed, because it was not the best.
        """
        tables = {}
        for policy in range(last + 1) if self.judges else ():
            table = self.store.read(policy + 1, "evaluation")
            there = policy in (0, last) or damage(self.store.policy(policy + 1)) is None
            if table is None and there:
                table = self._score(policy)
            if table is not None:
                tables[policy] = table
        kind = self.method.per_token, self.method.reference_free
        return {p: held_out_losses(tables[0], each, self.beta, *kind) for p, each in tables.items()}

    def _score(self, policy: int) -> Any:
        pairs = self.held_out
        assert pairs is not None
        with self.scorer.phases.timed("score_evaluation"):
            logps = score_pairs(pairs, policy, self.scorer, "score_evaluation")
        table = make_table({"row": np.arange(len(pairs)), **score_columns(pairs, logps)})
        self.store.write(policy + 1, "evaluation", table)
        return table

    def ends(self, losses: Mapping[int, FloatArray]) -> bool:
        """Whether so many iterations in a row have brought no better policy that training ends."""
        patience = PATIENCE if self.patience is None else self.patience
        if patience <= 0 or not losses or max(losses) - best_policy(losses) < patience:
            return False
        LOG.info(
            f"SeRA: training ends after iteration {max(losses)}: on the held-out pairs every "
            f"policy after theta_{best_policy(losses)} is clearly worse than an earlier one"
        )
        return True

    def needed(self, losses: Mapping[int, FloatArray], iterations: Collection[int]) -> set[int]:
        """The best policies that there were when any of these iterations began."""
        earlier = [{p: each for p, each in losses.items() if p < t} for t in iterations]
        return {best_policy(each) for each in earlier if any(each)}

    def finish(self, last: int) -> dict[str, float]:
        """Make the model, which is theta_last, the policy that the host is to save.

        theta_last stays loadable in `last/policy`, and why is in `last/summary.json`. Returns
        figures for the trackers.
        """
        policies = self.scorer.policies
        if not self.judges:
            self.store.discard_after(last)  # what an earlier end, with another `keep`, has left
            return {}
        policies.current = last
        before = self.store.summary(last + 1)
        phases = Phases(before.get("seconds", {}), before.get("forwarded", {}))
        self.scorer.phases = phases
        losses = self.losses(last)
        kept = best_policy(losses)
        means = {policy: float(each.mean()) for policy, each in losses.items()}
        if kept != last:
            policies.keep_current(last)
            policies.become(kept)
        ending = {
            "policies": last,
            "kept": kept,
            "held_out_losses": [means.get(policy) for policy in range(last + 1)],
            "seconds": phases.seconds,
            "forwarded": phases.forwarded,
        }
        self.store.write_summary(last + 1, ending)
        return {"sera/held_out/loss": means[last], "sera/kept": float(kept)}
