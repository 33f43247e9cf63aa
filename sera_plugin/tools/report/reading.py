"""A run directory as arrays: whatever is whole, and a note for everything that is not."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sera_plugin.algorithm.algorithm import SIDES
from sera_plugin.algorithm.protocols import DATASET
from sera_plugin.algorithm.rewards import FloatArray, implicit_reward, reward_weights
from sera_plugin.config.kinds import LABELERS, is_reference_free
from sera_plugin.rundir import checkpoints
from sera_plugin.rundir.checksums import is_whole
from sera_plugin.rundir.store import FORMAT_VERSION, RunStore, read_json
from sera_plugin.rundir.tokens import TokenColumn

Columns = dict[str, npt.NDArray[Any]]
TEXTS = ("prompt", *SIDES)
_TOKENS = [f"{name}_ids" for name in TEXTS]
_CANDIDATES = ("row", "candidate", "token_ids", "finish_reason", "logps", "reward")
_BOOTSTRAPPED = ("row", "chosen_candidate", "rejected_candidate", "margin", "selected")
_SCORED = ("row", "chosen_length", "rejected_length", "chosen_logp", "rejected_logp")


def find_run(path: Path) -> RunStore:
    """The run in `output_dir`, or in the run directory itself.

    Raises:
        ValueError: if there is none, naming what is missing.
    """
    output_dir = path.parent if path.name == "sera" and (path / "run.json").exists() else path
    store = RunStore(output_dir)
    if store.run_file.exists():
        return store
    what = "no such directory" if not path.is_dir() else f"{store.run_file} does not exist"
    raise ValueError(
        f"{path}: no SeRA run there, {what}. Give the output_dir of a run with `rl: sera`; a run "
        "has begun once its run.json is written."
    )


class Candidates:
    """An iteration's samples, (n,) each, in the order of (row, candidate).

    Attributes:
        row, candidate: which sample of which prompt.
        lengths: tokens of each.
        identity: the same number for the same token ids.
        unfinished: whether sampling was cut off at the longest length.
        from_dataset: whether it was not sampled, but is the dataset's chosen answer (SPIN).
        logps: (n, policies) nats, newest policy first.
        reward: what `sera.labeler` ranked by, NaN where it could not; with `implicit` in nats, per
            token where the run's loss is.
    """

    def __init__(self, path: Path, table: pa.Table) -> None:
        tokens = TokenColumn(table["token_ids"])
        logps = table["logps"].combine_chunks()
        self._path = path
        self.row, self.candidate = table["row"].to_numpy(), table["candidate"].to_numpy()
        self.lengths = tokens.lengths
        # 64 bits: that two of a prompt's answers share one by chance will not happen.
        self.identity = np.fromiter((hash(one.tobytes()) for one in tokens), np.int64, len(tokens))
        self.unfinished = np.asarray(pc.equal(table["finish_reason"], "length"))
        self.from_dataset = np.asarray(pc.equal(table["finish_reason"], DATASET))
        self.logps = logps.flatten().to_numpy().reshape(len(logps), -1 if len(logps) else 0)
        self.reward = table["reward"].to_numpy()

    @cached_property
    def tokens(self) -> TokenColumn:
        """Token ids, read when they are asked for: most of a run's bytes, and seldom needed."""
        return TokenColumn(pq.read_table(self._path, columns=["token_ids"])["token_ids"])


@dataclass(frozen=True)
class Iteration:
    """What is on disk of iteration t = `number`: columns of its tables, None without.

    `offline` has `margin` from t = 2, `selected` from then on and wherever not all pairs are kept.
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
        samples, pairs = self.candidates, self.bootstrapped
        assert samples is not None
        assert pairs is not None
        width = int(samples.candidate.max(initial=0)) + 1
        keys = samples.row * width + samples.candidate
        return {
            side: np.searchsorted(keys, pairs["row"] * width + pairs[f"{side}_candidate"])
            for side in SIDES
        }


class Run:
    """A run, as far as it can be read.

    Attributes:
        description, settings: run.json and its `sera:` block, empty if it is damaged.
        tokens: `prompt`, `chosen`, `rejected` of the offline pairs; empty if they cannot be read.
        scores: the columns of `sera.score_columns`, as the dataset had them.
        iterations: those that have begun, in order.
        history: `log_history` of the newest checkpoint, empty without.
        state: `finished`, `going on`, or `stopped`.
        notes: one sentence for everything that is missing or damaged.

    Raises:
        ValueError: if it has a format that this version does not read.
    """

    def __init__(self, store: RunStore) -> None:
        self._store, self.root = store, store.root
        self.notes: list[str] = []
        self.description = self._json(store.run_file)
        version = self.description.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{store.run_file} has format version {version!a}; this sera_plugin reads "
                f"{FORMAT_VERSION}. Use the version that made the run."
            )
        self.config: dict[str, Any] = self.description.get("config") or {}
        self.settings: dict[str, Any] = self.config.get("sera") or {}
        self.labeler = str(self.settings.get("labeler", "implicit"))
        dataset = self._table(store.dataset_file, _TOKENS)
        if dataset is None and not store.dataset_file.exists():
            self._note(store.dataset_file, "is missing: there are no texts to show")
        columns = {} if dataset is None else {n: dataset[n] for n in dataset.column_names}
        self.tokens = {n: TokenColumn(columns[f"{n}_ids"]) for n in TEXTS if columns}
        self.scores: dict[str, list[Any]] = {
            name: values.to_pylist()
            for name, values in columns.items()
            if name not in ("row", *_TOKENS)
        }
        self.iterations = [
            self._read_iteration(int(path.name.removeprefix("iteration-")))
            for path in sorted(store.root.glob("iteration-*"), key=lambda one: (len(one.name), one))
            if re.fullmatch(r"iteration-[0-9]{2,6}", path.name) and path.is_dir()
        ]
        self._name_what_is_missing()
        self.history = self._read_history()
        self.state = self._read_state()

    @property
    def swapped(self) -> npt.NDArray[np.bool_] | None:
        """(N,) which labels were swapped on purpose; None where none were, or it is not known."""
        tables = [one.offline for one in self.iterations if one.offline is not None]
        return tables[0].get("swapped") if tables else None

    @property
    def total(self) -> int | None:
        """N, the number of offline pairs."""
        sizes = [len(one.offline["row"]) for one in self.iterations if one.offline is not None]
        return self.description.get("pairs", sizes[0] if sizes else None)

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

    def implicit_margin(
        self, iteration: int, table: str = "offline", gamma: float | None = None
    ) -> FloatArray | None:
        """(n,) margins of `offline` or `evaluation`, from the recorded log-probabilities.

        With the run's own gamma unless one is given; None where what it needs cannot be read.
        """
        if not self.settings or "per_token" not in self.description:
            return None
        weights = reward_weights(
            iteration,
            self.settings["gamma"] if gamma is None else gamma,
            is_reference_free(self.description["loss"]),
        )
        found = {one.number: getattr(one, table) for one in self.iterations}
        needed = [found.get(iteration - back) for back in range(len(weights))]
        tables = [one for one in needed if one is not None]
        if len(tables) < len(needed):
            return None
        chosen, rejected = (
            implicit_reward(
                [one[f"{side}_logp"] for one in tables],
                weights,
                tables[0][f"{side}_length"] if self.description["per_token"] else None,
            )
            for side in SIDES
        )
        return chosen - rejected

    def _note(self, path: Path, what: str) -> None:
        self.notes.append(f"{path.relative_to(self.root.parent)} {what}")

    def _whole(self, path: Path) -> bool:
        whole = is_whole(path)
        if not whole and path.exists():
            self._note(path, "is damaged (its checksum differs) and left out")
        return whole

    def _json(self, path: Path) -> dict[str, Any]:
        return read_json(path) if self._whole(path) else {}

    def _table(self, path: Path, needed: Sequence[str]) -> pa.Table | None:
        if not self._whole(path):
            return None
        table = pq.read_table(path)
        missing = [name for name in needed if name not in table.column_names]
        if missing:
            self._note(path, f"has no column {', '.join(missing)} and is left out")
        return None if missing else table

    def _read_iteration(self, number: int) -> Iteration:
        def columns(name: str, *needed: str) -> Columns | None:
            table = self._table(self._store.table_file(number, name), needed)
            if table is None:
                return None
            return {one: table[one].to_numpy(zero_copy_only=False) for one in table.column_names}

        path = self._store.table_file(number, "candidates")
        samples = self._table(path, _CANDIDATES)
        return Iteration(
            number,
            columns("offline", *_SCORED, *(("margin", "selected") if number > 1 else ())),
            columns("evaluation", *_SCORED),
            None if samples is None else Candidates(path, samples),
            columns("bootstrapped", *_BOOTSTRAPPED),
            self._json(self._store.iteration(number) / "summary.json"),
        )

    def _name_what_is_missing(self) -> None:
        """A file that others were made from must have been there; one at the end is not due yet."""
        first = LABELERS[self.labeler].first_iteration(self.settings.get("selection_ratio", 1))
        newest = max((one.number for one in self.iterations), default=0)
        for one in self.iterations:
            past = bool(one.summary) or one.number < newest
            paired = past or one.bootstrapped is not None
            sampled = self.settings.get("bootstrap_ratio", 0) > 0 and one.number >= first
            due = {
                "offline.parquet": paired or one.candidates is not None,
                "candidates.parquet": sampled and paired,
                "bootstrapped.parquet": sampled and past,
                "evaluation.parquet": self.description.get("evaluation_pairs") and past,
                "summary.json": one.number < newest,
            }
            for name, expected in due.items():
                path = self._store.iteration(one.number) / name
                if expected and not path.exists():
                    self._note(path, "is missing")
        for number in sorted(set(range(1, newest)) - {one.number for one in self.iterations}):
            self._note(self._store.iteration(number), "is missing")

    def _read_history(self) -> list[dict[str, Any]]:
        """The host's log in the newest checkpoint that has a whole one."""
        for step in sorted(checkpoints.steps(self.root.parent), reverse=True):
            path = checkpoints.checkpoint(self.root.parent, step) / "trainer_state.json"
            if is_whole(path):
                return list(read_json(path)["log_history"])
            self._note(path, "is not whole: the training curves are of an older checkpoint, if any")
        return []

    def _read_state(self) -> str:
        planned = int(self.config.get("num_epochs") or 0)
        trained = self.iterations and "train" in self.iterations[-1].summary.get("seconds", {})
        if planned and len(self.iterations) >= planned and trained:
            return "finished"
        try:
            # A run holds an exclusive lock; a shared one is let go at once.
            with (self.root / "lock").open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "going on"
        except OSError:
            pass  # there is no lock file, or the file system has no locks
        return "stopped"
