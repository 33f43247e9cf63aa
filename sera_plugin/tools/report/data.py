"""A run as arrays. What is missing or damaged is None, and named in the run's notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from sera_plugin.algorithm.rewards import (
    FloatArray,
    implicit_reward,
    reward_weights,
)
from sera_plugin.config.kinds import LABELERS, is_reference_free
from sera_plugin.rundir.tokens import TokenColumn

Columns = dict[str, npt.NDArray[Any]]
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Candidates:
    """An iteration's samples, (n,) each, in the order of (row, candidate).

    Attributes:
        path: candidates.parquet, from which their token ids are read when they are asked for: most
            of a run's bytes, and most of what is said of it does not need them.
        row, candidate: which sample of which prompt.
        lengths: tokens of each.
        identity: the same number for the same token ids.
        unfinished: whether sampling was cut off at the longest length.
        from_dataset: whether it was not sampled, but is the dataset's chosen answer (SPIN).
        logps: (n, policies) nats, newest policy first.
        reward: what `sera.labeler` ranked by, NaN where it could not; with `implicit` in nats, per
            token where the run's loss is.
    """

    path: Path
    row: npt.NDArray[np.int64]
    candidate: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    identity: npt.NDArray[np.int64]
    unfinished: npt.NDArray[np.bool_]
    from_dataset: npt.NDArray[np.bool_]
    logps: FloatArray
    reward: FloatArray

    @cached_property
    def tokens(self) -> TokenColumn:
        """Their token ids.

        Raises:
            OSError: if the file has gone since it was read.
        """
        return TokenColumn(pq.read_table(self.path, columns=["token_ids"])["token_ids"])

    def index(self, rows: npt.ArrayLike, candidates: npt.ArrayLike) -> npt.NDArray[np.intp]:
        """Where in these arrays the samples `candidates` of the prompts `rows` are."""
        width = int(self.candidate.max(initial=0)) + 1
        key = self.row * width + self.candidate
        return np.searchsorted(key, np.asarray(rows) * width + np.asarray(candidates))


@dataclass(frozen=True)
class Iteration:
    """What is on disk of iteration t. A table that is missing or damaged is None.

    Attributes:
        number: t, 1-based.
        offline: columns of offline.parquet, (N,) each; `margin` from t = 2, `selected` from then on
            and wherever not all pairs are kept.
        evaluation: columns of evaluation.parquet.
        candidates, bootstrapped: samples, and columns of bootstrapped.parquet.
        summary: summary.json, empty without.
    """

    number: int
    offline: Columns | None
    evaluation: Columns | None
    candidates: Candidates | None
    bootstrapped: Columns | None
    summary: dict[str, Any]

    @property
    def margin(self) -> FloatArray | None:
        """(N,) margins of the offline pairs, None before they are known."""
        return None if self.offline is None else self.offline.get("margin")

    @property
    def selected(self) -> npt.NDArray[np.bool_] | None:
        """(N,) which offline pairs are kept."""
        if self.offline is None:
            return None
        return self.offline.get("selected", np.ones(len(self.offline["row"]), dtype=bool))

    @cached_property
    def sampled(self) -> dict[str, npt.NDArray[np.intp]]:
        """By side, where in `candidates` the answer of each bootstrapped pair is."""
        assert self.candidates is not None
        assert self.bootstrapped is not None
        return {
            side: self.candidates.index(
                self.bootstrapped["row"], self.bootstrapped[f"{side}_candidate"]
            )
            for side in SIDES
        }

    @property
    def trained(self) -> bool:
        return "train" in self.summary.get("seconds", {})


@dataclass(frozen=True)
class Run:
    """A run, as far as it can be read.

    Attributes:
        root: the run directory, `{output_dir}/sera`.
        description: run.json, empty if it is damaged.
        tokens: `prompt_ids`, `chosen_ids`, `rejected_ids` of the offline pairs, or None.
        scores: the columns of `sera.score_columns`, as the dataset had them.
        iterations: those that have begun, in order.
        history: the host's log (`log_history` of the newest checkpoint), empty without.
        state: `finished`, `going on`, or `stopped`.
        notes: one sentence for everything that is missing or damaged.
    """

    root: Path
    description: Mapping[str, Any]
    tokens: Mapping[str, TokenColumn] | None
    scores: Mapping[str, list[Any]]
    iterations: tuple[Iteration, ...]
    history: list[dict[str, Any]]
    state: str
    notes: tuple[str, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The `sera:` block."""
        return (self.description.get("config") or {}).get("sera") or {}

    @property
    def labeler(self) -> str:
        """Who ranked the samples, as in `sera.labeler`."""
        return str(self.settings.get("labeler", "implicit"))

    @property
    def implicit(self) -> bool:
        """Whether samples were ranked by their implicit reward."""
        return LABELERS[self.labeler].implicit

    @property
    def swapped(self) -> npt.NDArray[np.bool_] | None:
        """(N,) which labels were swapped on purpose; None where none were, or it is not known."""
        tables = [one.offline for one in self.iterations if one.offline is not None]
        return tables[0].get("swapped") if tables else None

    @property
    def total(self) -> int | None:
        """N, the number of offline pairs."""
        if "pairs" in self.description:
            return int(self.description["pairs"])
        sizes = [len(t.offline["row"]) for t in self.iterations if t.offline is not None]
        return sizes[0] if sizes else None

    @property
    def unit(self) -> str:
        """What rewards and margins are measured in."""
        per_token = self.description.get("per_token")
        return "nats per token" if per_token else "nats" if per_token is False else "unknown unit"

    def iteration(self, number: int) -> Iteration:
        """Iteration t.

        Raises:
            ValueError: if it has not begun, naming those that have.
        """
        for one in self.iterations:
            if one.number == number:
                return one
        begun = ", ".join(str(one.number) for one in self.iterations) or "none"
        raise ValueError(f"iteration {number} is not in {self.root} (begun: {begun})")

    def reward(
        self, iteration: int, side: str, table: str = "offline", gamma: float | None = None
    ) -> FloatArray | None:
        """Iteration t's implicit reward of pairs, from the recorded log-probabilities.

        Args:
            iteration: t, at least 2.
            side: `chosen` or `rejected`.
            table: `offline` or `evaluation`.
            gamma: of the ensemble; the run's own unless given.

        Returns:
            (n,) rewards, or None where a table or a setting it needs cannot be read.
        """
        tables = {one.number: getattr(one, table) for one in self.iterations}
        if not self.settings or "per_token" not in self.description:
            return None
        weights = reward_weights(
            iteration,
            self.settings["gamma"] if gamma is None else gamma,
            is_reference_free(self.description["loss"]),
        )
        needed = [tables.get(iteration - back) for back in range(len(weights))]
        if any(one is None for one in needed):
            return None
        logps = [one[f"{side}_logp"] for one in needed if one is not None]
        lengths = needed[0][f"{side}_length"]  # type: ignore[index]
        return implicit_reward(logps, weights, lengths if self.description["per_token"] else None)
