"""A run directory as arrays: whatever is whole, and a note for everything that is not."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sera_plugin.algorithm.method import DATASET
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.trust import SIDES
from sera_plugin.config.kinds import labeler_kind
from sera_plugin.config.quoting import quoted
from sera_plugin.rundir import checksums
from sera_plugin.rundir.checksums import is_whole
from sera_plugin.rundir.format import (
    FORMAT_VERSION,
    Ending,
    Invalid,
    Keys,
    RunFile,
    Summary,
    TrainerState,
    read_json,
)
from sera_plugin.rundir.store import RunStore
from sera_plugin.rundir.tables import Expected, candidate_places, read_table
from sera_plugin.rundir.tokens import TOKENS, TokenColumn
from sera_plugin.rundir.writing import open_own

Columns = dict[str, npt.NDArray[Any]]
TEXTS = ("prompt", *SIDES)
_TOKENS = [f"{name}_ids" for name in TEXTS]
_TOKENIZER = "tokenizer.json"
#: Missing iterations that are named one by one.
_NAMED = 10


def find_run(path: Path) -> RunStore:
    """The run in `output_dir`, or in the run directory itself; a ValueError if there is none."""
    output_dir = path.parent if path.name == "sera" and (path / "run.json").exists() else path
    store = RunStore(output_dir)
    if store.run_file.exists():
        return store
    what = "no such directory" if not path.is_dir() else f"{store.run_file} does not exist"
    raise ValueError(
        f"{path}: no SeRA run there, {what}. Give the output_dir of a run with `rl: sera`; a run "
        "has begun once its run.json is written."
    )


class Iteration:
    """What is on disk of iteration t = `number`: columns of its tables, empty without.

    `offline` has `selected`, and from t = 2 the `margin` of each pair, which is None before it is
    known. Pairs are kept `by_margin` unless they have a priority. `candidates` are in the order of
    (row, candidate), with `length` in tokens, (n, policies) `logps` in nats, newest policy first,
    whether each was cut (`unfinished`) or is the dataset's (`given`, SPIN), and `reward`: what
    `sera.labeler` ranked by, NaN where it could not.
    """

    def __init__(self, run: Run, store: RunStore, number: int) -> None:
        self.number, self._candidates_file = number, store.table_file(number, "candidates")
        self.offline = _arrays(run.table(number, "offline"))
        run.table(number, "evaluation")  # the summary has all of it that is shown
        self.candidates = _arrays(run.table(number, "candidates"))
        self.bootstrapped = _arrays(run.table(number, "bootstrapped"))
        if self.offline:
            self.offline.setdefault("selected", np.ones(len(self.offline["row"]), dtype=bool))
        self.margin: FloatArray | None = self.offline.get("margin")
        self.by_margin = "priority" not in self.offline
        self.summary = run.json(store.iteration(number) / "summary.json", Summary)
        if self.summary.get("iteration", number) != number:
            run.leave_out(store.iteration(number) / "summary.json", "it is of another iteration")
            self.summary = {}

    def places(self) -> dict[str, npt.NDArray[np.int64]]:
        """By side, where in `candidates` the answer of each bootstrapped pair is."""
        return candidate_places(self.bootstrapped, self.candidates["candidate"].max() + 1)

    def tokens(self) -> TokenColumn:
        """Token ids of the candidates, read anew: most of a run's bytes, and seldom needed."""
        return TokenColumn(pq.read_table(self._candidates_file, columns=["token_ids"])["token_ids"])


def _arrays(columns: Mapping[str, pa.ChunkedArray]) -> Columns:
    found: Columns = {}
    for name, values in columns.items():
        if name == "token_ids":
            found["length"] = TokenColumn(values).lengths
        elif name == "finish_reason":
            found["unfinished"] = np.asarray(pc.equal(values, "length"))
            found["given"] = np.asarray(pc.equal(values, DATASET))
        elif name == "logps":
            flat = values.combine_chunks().flatten().to_numpy()
            found[name] = flat.reshape(len(values), -1 if len(values) else 0)
        else:
            found[name] = values.to_numpy()
    return found


class Run:
    """A run, as far as it can be read; a ValueError if this version does not read its format.

    Attributes:
        description, config, settings: run.json, its configuration and that one's `sera:` block,
            empty if it is damaged.
        tokens: `prompt`, `chosen`, `rejected` of the offline pairs; empty if they cannot be read.
        prompts: of every row that is sampled, those of `sera.prompts` after the pairs'.
        scores: the columns of `sera.score_columns`, as the dataset had them.
        iterations, begun: those that have begun, in order, and by their number.
        with_margins: the newest of them whose offline pairs have margins, if any.
        swapped: (N,) which labels were swapped on purpose; None where none were, or it is unknown.
        total, unit: N, the number of offline pairs; what rewards and margins are measured in.
        ending: last/summary.json; empty before the end of training and with `keep: last`.
        history: `log_history` of the newest checkpoint, empty without.
        state: `finished`, `going on`, or `stopped`.
        notes: one sentence for everything that is missing or damaged.
    """

    def __init__(self, store: RunStore) -> None:
        self._store, self.root = store, store.root
        self.notes: list[str] = []
        self._check_version()
        self.description = self.json(store.run_file, RunFile)
        self.config: dict[str, Any] = self.description.get("config", {})
        self.settings: dict[str, Any] = self.config.get("sera", {})
        self.labeler: str | list[str] = self.settings.get("labeler", "implicit")
        self._expected = Expected.of(self.description)
        self.total = self._expected.pairs
        columns = self._columns(store.dataset_file, "dataset", beside=True)
        if not store.dataset_file.exists():
            self._note(store.dataset_file, "is missing: there are no texts to show")
        self.tokens = {name: TokenColumn(columns[f"{name}_ids"]) for name in TEXTS if columns}
        self.prompts = self.tokens.get("prompt", TokenColumn(pa.array([], TOKENS)))
        if self._expected.prompts and self.tokens:
            more = self._columns(store.prompts_file, "prompts")
            if not store.prompts_file.exists():
                self._note(store.prompts_file, "is missing: there are no texts to show")
            if more:
                self.prompts = self.prompts.joined(TokenColumn(more["prompt_ids"]))
        self.scores = {n: values for n, values in columns.items() if n not in ("row", *_TOKENS)}
        names = [path.name for path in store.root.glob("iteration-*")]
        numbers = sorted(int(n[10:]) for n in names if re.fullmatch(r"iteration-[0-9]{2,5}", n))
        self.begun = {number: Iteration(self, store, number) for number in numbers}
        self.iterations = list(self.begun.values())
        self.ending = self.json(store.last / "summary.json", Ending)
        margins = [one for one in self.iterations if one.margin is not None]
        self.with_margins = margins[-1] if margins else None
        offline = next((one.offline for one in self.iterations if one.offline), {})
        self.swapped: npt.NDArray[np.bool_] | None = offline.get("swapped")
        units = {True: "nats per token", False: "nats", None: "unknown unit"}
        self.unit = units[self.description.get("per_token")]
        self._name_what_is_missing()
        self.history = self._read_history()
        self.state = self._read_state()

    def _note(self, path: Path, what: str) -> None:
        self.notes.append(f"{path.relative_to(self.root.parent)} {what}")

    def _whole(self, path: Path) -> bool:
        whole = is_whole(path)
        if not whole and path.exists():
            self._note(path, "is damaged (its checksum differs) and left out")
        return whole

    def leave_out(self, path: Path, why: str) -> None:
        """Note that a file is not used."""
        self._note(path, f"is left out: {why}")

    def json(self, path: Path, kind: type[Keys]) -> dict[str, Any]:
        """A JSON file, empty where it is missing, damaged or of another kind, which is noted."""
        if self._whole(path):
            try:
                return read_json(path, kind, self.root.parent)
            except (Invalid, OSError) as error:
                self.leave_out(path, str(error))
        return {}

    def table(self, number: int, name: str) -> dict[str, pa.ChunkedArray]:
        """A table of an iteration, empty where it cannot be used, which is noted."""
        return self._columns(self._store.table_file(number, name), name, iteration=number)

    def _columns(self, path: Path, name: str, **how: Any) -> dict[str, pa.ChunkedArray]:
        if not self._whole(path):
            return {}
        try:
            table = read_table(path, name, self._expected, root=self.root.parent, **how)
        except (Invalid, OSError) as error:
            self.leave_out(path, str(error))
            return {}
        found = {name: table[name] for name in table.column_names}
        if name in ("dataset", "offline", "candidates"):  # which have all rows, in order
            rows = found["row"][-1].as_py() + 1
            each = len(table) // rows if name == "candidates" else self._expected.candidates
            self.total = total = rows - self._expected.prompts * (name == "candidates")
            self._expected = self._expected._replace(pairs=total, candidates=each)
        return found

    def _check_version(self) -> None:
        """ValueError for a run that another version has made, which is no damage."""
        with suppress(Invalid, OSError):
            version = read_json(self._store.run_file, root=self.root.parent).get("format_version")
            if version not in (None, FORMAT_VERSION):
                raise ValueError(
                    f"{self._store.run_file} has format version {quoted(version)}; this "
                    f"sera_plugin reads {FORMAT_VERSION}. Use the version that made the run."
                )

    def _name_what_is_missing(self) -> None:
        """A file that others were made from must have been there; one at the end is not due yet."""
        first = labeler_kind(self.labeler).first_iteration(self.settings.get("selection_ratio", 1))
        newest = max(self.begun, default=0)
        for number, one in self.begun.items():
            past = bool(one.summary) or number < newest
            paired = past or bool(one.bootstrapped)
            sampled = self.settings.get("bootstrap_ratio", 0) > 0 and number >= first
            # A reward that was not trusted has asked for no samples.
            sampled &= one.summary.get("pairs", {}).get("bootstrapped_wanted") != 0
            due = {
                "offline.parquet": paired or one.candidates,
                "candidates.parquet": sampled and paired,
                "bootstrapped.parquet": sampled and past,
                "evaluation.parquet": self.description.get("evaluation_pairs") and past,
                "summary.json": number < newest,
            }
            for path in (self._store.iteration(number) / name for name in due if due[name]):
                if not path.exists():
                    self._note(path, "is missing")
        missing = sorted(set(range(1, newest)) - set(self.begun))
        for number in missing[:_NAMED]:
            self._note(self._store.iteration(number), "is missing")
        if len(missing) > _NAMED:
            self.notes.append(f"{len(missing) - _NAMED} more iterations are missing")

    def _read_history(self) -> list[dict[str, Any]]:
        """The host's log in the newest checkpoint that has a whole one."""
        for step in sorted(checksums.checkpoint_steps(self.root.parent), reverse=True):
            path = checksums.checkpoint(self.root.parent, step) / "trainer_state.json"
            if found := self.json(path, TrainerState):
                return list(found["log_history"])
            self._note(path, "is not whole: the training curves are of an older checkpoint, if any")
        return []

    def _read_state(self) -> str:
        planned = int(self.ending.get("policies") or self.config.get("num_epochs") or 0)
        trained = self.iterations and "train" in self.iterations[-1].summary.get("seconds", {})
        if planned and len(self.iterations) >= planned and trained:
            return "finished"
        # Without a lock file, or on a file system without locks, nobody is known to be at work.
        with suppress(OSError, ValueError):
            handle = open_own(self.root / "lock", os.O_RDONLY)
            try:  # a run holds an exclusive lock; a shared one is let go at once
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return "going on"
            finally:
                os.close(handle)
        return "stopped"


class Texts:
    """Turns a run's token ids into text, with the tokenizer it was trained with if that is here.

    `tokenizer` may be None; `source` says where it is from, or why there is none. Nothing is
    downloaded or run: `tokenizers` reads `tokenizer.json`, which is data.
    """

    def __init__(self, run: Run) -> None:
        from tokenizers import Tokenizer

        base = run.config.get("base_model")
        self.tokenizer: Any = None
        self.source = (
            f"no {_TOKENIZER} in the run's policies, its output_dir, or for base_model "
            f"{quoted(base)} on this machine"
        )
        places = [run.root.parent / _TOKENIZER]
        if base:
            places += [Path(base) / _TOKENIZER, cached_file(base, _TOKENIZER) or Path()]
        policies = [policy / _TOKENIZER for policy in sorted(run.root.glob("iteration-*/policy"))]
        for path in [*filter(is_whole, policies), *filter(Path.is_file, places)]:
            with suppress(Exception):  # the library raises it for whatever it cannot read
                self.tokenizer, self.source = Tokenizer.from_file(str(path)), str(path)
                break
        self._end_ids = frozenset(run.description.get("end_ids", ()))
        self._added = frozenset(self.tokenizer.encode("").ids if self.tokenizer else ())

    def exact(self, ids: Sequence[int]) -> str:
        """Every token, special ones included; the ids themselves without a tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode([int(one) for one in ids], skip_special_tokens=False))

    def prompt(self, ids: Sequence[int]) -> str:
        """The prompt without the token that tokenising it again puts in front."""
        return self.exact(ids[1:] if len(ids) and int(ids[0]) in self._added else ids)

    def completion(self, ids: Sequence[int]) -> str:
        """The completion without its end token, which trainers add themselves."""
        return self.exact(ids[:-1] if len(ids) and int(ids[-1]) in self._end_ids else ids)


def cached_file(model: str, name: str) -> Path | None:
    """A file of a hub model in the local cache, None where it is not there; asks no server."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # a path is not a name on the hub
        found = try_to_load_from_cache(model, name)
        return Path(found) if isinstance(found, str) else None
    return None
