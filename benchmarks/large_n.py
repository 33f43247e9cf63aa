"""Our own part of a run with many pairs: what is neither the model's nor an engine's work.

A run of three iterations goes through `algorithm.prepare` and `summarize` with a real run
directory; log-probabilities and candidates are simulated. Every run is a process of its own, so
that its peak memory is its own. Time is counted where it is spent: what the simulation takes is
a line of its own and in no other figure.
"""

import resource
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch.distributed as dist

from benchmarks.harness import Setup, in_fresh_process
from sera_plugin.algorithm import algorithm, summary
from sera_plugin.algorithm.method import (
    Candidate,
    Chunk,
    Iteration,
    Method,
    SamplingSettings,
)
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.config.sera import SeraConfig
from sera_plugin.labeling.labelers import ImplicitReward
from sera_plugin.rundir import store
from sera_plugin.rundir.format import FORMAT_VERSION
from sera_plugin.rundir.ranks import Ranks, Shard
from sera_plugin.rundir.store import RunStore
from sera_plugin.rundir.tokens import fingerprint, lengths_of
from sera_plugin.sampling import engine

TITLE = "Many pairs"
#: A million pairs are run once only.
SIZES, ONCE = (10_000, 100_000, 1_000_000), 1_000_000
CONFIG = SeraConfig.model_validate(
    {"selection_ratio": 0.7, "bootstrap_ratio": 0.3, "candidates": 4}
)
#: Mean tokens; lengths are log-normal, which has the long tail of real answers.
PROMPT, COMPLETION, TAIL = 40, 80, 0.7
LONGEST, VOCABULARY, END = 1024, 32_000, 2
#: Share of candidates that repeat their prompt's first one.
REPEATED = 0.05

#: Table line -> the functions whose own time it has (without that of others listed here).
PHASES: dict[str, list[tuple[Any, str]]] = {
    "fingerprint": [],
    "offline scores, rewards, selection": [(algorithm, "score"), (algorithm, "select")],
    "sampling: plan": [(engine, "plan")],
    "sampling: bookkeeping": [(algorithm, "sample")],
    "sampling: append chunks": [(RunStore, "append_samples")],
    "sampling: read chunks": [(algorithm, "all_samples"), (RunStore, "remove_samples")],
    "candidate scores and rewards": [(algorithm, "rank")],
    "pairing": [(algorithm, "pair")],
    "D_t": [(algorithm, "union")],
    "write tables": [(store, "write_table")],
    "read tables": [(RunStore, "read")],
    "summary": [(summary, "summarize")],
}
SIMULATION, WAITING, REST = "(simulation)", "(waiting)", "everything else"


class Clock:
    """Seconds and processor seconds by name; time is that of the innermost name only.

    `calls` are of what is watched, by name.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.processor: defaultdict[str, float] = defaultdict(float)
        self._names: list[str] = []
        self._since = 0.0, 0.0

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        self._turn()
        self._names.append(name)
        try:
            yield
        finally:
            self._turn()
            self._names.pop()

    @property
    def name(self) -> str:
        """What is going on."""
        return self._names[-1]

    def _turn(self) -> None:
        now = perf_counter(), process_time()
        if self._names:
            self.seconds[self._names[-1]] += now[0] - self._since[0]
            self.processor[self._names[-1]] += now[1] - self._since[1]
        self._since = now

    def watch(self, name: str, owner: Any, attribute: str) -> None:
        original: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            with self.running(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)


@dataclass(frozen=True)
class CountingRanks(Ranks):
    """Ranks that count bytes of sums, and time that one waits for another, by what goes on.

    Of `world` ranks two are played, which are the group: 0, and 1 with what is sampled by others.
    """

    clock: Clock = field(default_factory=Clock)
    summed: Counter[str] = field(default_factory=Counter)

    def barrier(self) -> None:
        with self.clock.running(WAITING):
            super().barrier()

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        self.summed[self.clock.name] += values.nbytes
        with self.clock.running(WAITING):
            return super().sum(values)


class SimulatedScorer:
    """Around one nat a token; each policy moves every sequence a little."""

    def __init__(self, ranks: CountingRanks) -> None:
        self.ranks, self.clock = ranks, ranks.clock

    def __call__(
        self, policy: int, prompts: Sequence[Any], completions: Any, phase: str
    ) -> npt.NDArray[np.float64]:
        with self.clock.running(SIMULATION):
            lengths = lengths_of(completions)
            random = np.random.default_rng([policy, len(prompts)])
            scores = np.sqrt(lengths) * random.standard_normal(len(lengths)) - lengths
            scores *= self.ranks.main
        return self.ranks.sum(scores)


class SimulatedSampler:
    """Candidates as an engine gives them: Python lists, longest prompts first."""

    def __init__(self, ranks: CountingRanks) -> None:
        self.ranks, self.clock = ranks, ranks.clock
        self.report: dict[str, Any] = {"name": "simulated"}
        self.seconds: dict[str, float] = {}
        self.longest: int | None = None

    def sample(
        self, prompts: Any, settings: SamplingSettings, skip: Collection[int] = ()
    ) -> Generator[Chunk, None, None]:
        rows, _ = engine.plan(prompts, settings, skip, Shard(0, self.ranks.world))
        with self.clock.running(SIMULATION):
            if not self.ranks.main:
                others = np.isin(np.arange(len(prompts)), [*rows, *skip], invert=True)
                rows = np.flatnonzero(others).tolist()
        for first in range(0, len(rows), engine.CHUNK_PROMPTS):
            with self.clock.running(SIMULATION):
                some = rows[first : first + engine.CHUNK_PROMPTS]
                random = np.random.default_rng([settings.seed, some[0]])
                chunk = self._chunk(random, some, settings.candidates)
            yield chunk

    def _chunk(self, random: np.random.Generator, rows: list[int], count: int) -> Chunk:
        lengths = draw_lengths(random, len(rows) * count, COMPLETION)
        tokens, ends = draw_tokens(random, lengths)
        flat, repeats = tokens.tolist(), random.random(len(lengths)) < REPEATED
        lists = [flat[first:last] for first, last in pairwise([0, *ends.tolist()])]
        found = [
            Candidate(lists[place - place % count] if again else lists[place], "stop")
            for place, again in enumerate(repeats.tolist())
        ]
        return [(row, found[at * count : (at + 1) * count]) for at, row in enumerate(rows)]


def draw_lengths(random: np.random.Generator, count: int, mean: float) -> npt.NDArray[np.int64]:
    raw = random.lognormal(np.log(mean) - TAIL**2 / 2, TAIL, count)
    return np.clip(np.rint(raw), 2, LONGEST).astype(np.int64)


def draw_tokens(
    random: np.random.Generator, lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Tokens of all lists, common ones more often, and where each list ends."""
    ends = np.cumsum(lengths)
    tokens = (VOCABULARY * random.random(ends[-1], dtype=np.float32) ** 3).astype(np.int32)
    tokens[ends - 1] = END
    return tokens, ends


def simulated_pairs(count: int) -> pa.Table:
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {"row": np.arange(count)}
    for name, mean in (("prompt", PROMPT), ("chosen", COMPLETION), ("rejected", COMPLETION)):
        tokens, ends = draw_tokens(random, draw_lengths(random, count, mean))
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        columns[f"{name}_ids"] = pa.ListArray.from_arrays(offsets, tokens)
    return pa.table(columns)


def one_run(count: int, directory: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Three iterations in this process: seconds by phase, memory and disk in bytes.

    As rank 0 or 1 of `world` (a multiple of eight, which a machine has), both played at one time.
    """
    clock = Clock()
    ranks = CountingRanks(clock=clock)
    if world > 1:
        directory.mkdir(parents=True, exist_ok=True)
        place = f"file://{directory.absolute()}/meeting"
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
        ranks = CountingRanks(rank, (8,) * (world // 8), dist.group.WORLD, clock)
    dataset = simulated_pairs(count)
    pairs = Pairs.from_table(dataset)
    run, method = RunStore(directory, ranks), Method(CONFIG, False, False, count)
    for name, functions in PHASES.items():
        for owner, attribute in functions:
            clock.watch(name, owner, attribute)

    def prepare(iteration: int) -> int:
        it = Iteration(
            iteration,
            method,
            pairs,
            run,
            SimulatedScorer(ranks),
            SimulatedSampler(ranks),
            SamplingSettings(CONFIG.candidates, 0.7, 0.95, LONGEST, None, (END,), iteration),
            ImplicitReward(method),
        )
        trained = algorithm.prepare(it)
        summary.summarize(it)
        return trained.num_rows

    before = forget_peak()
    with clock.running(REST):
        with clock.running("fingerprint"):
            identity = fingerprint([pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids])
        about = {"format_version": FORMAT_VERSION, "pairs": count, "dataset_fingerprint": identity}
        about["config"] = {"num_epochs": 3, "sera": {"candidates": CONFIG.candidates}}
        run.begin(about, dataset)
        trained = [prepare(iteration) for iteration in (1, 2, 3)]
    peak, chunks = resident_peak(), clock.calls["sampling: append chunks"]
    seconds, processor = dict(clock.seconds), dict(clock.processor)
    summed = dict(ranks.summed)
    with clock.running(REST):
        prepare(3)
    return {
        "seconds": seconds,
        "processor": processor,
        "again": sum(clock.seconds.values()) - sum(seconds.values()),
        "trained": trained,
        "chunks": chunks,
        "summed": summed,
        "data": dataset.nbytes,
        "before": before,
        "peak": peak,
        "disk": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
    }


def forget_peak() -> int:
    """Resident bytes now, from where on the peak counts (Linux; else what it was before)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_peak()


def resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(setup: Setup) -> dict[str, Any]:
    """Runs by number of pairs, each in a process of its own, what `one_run` returned."""
    sizes = (setup.pairs,) if setup.pairs else SIZES
    runs: dict[str, list[dict[str, Any]]] = {str(count): [] for count in sizes}
    for number in range(setup.rounds):
        for count in sizes:
            if number and count >= ONCE:
                continue
            directory = setup.directory / "many"
            runs[str(count)].append(in_fresh_process(setup, one_run, count, directory))
            shutil.rmtree(directory)
            seconds = sum(runs[str(count)][-1]["seconds"].values())
            print(f"round {number + 1}/{setup.rounds}: {count} pairs: {seconds:.1f} s", flush=True)
    return {
        "candidates": CONFIG.candidates,
        "mean_tokens": {"prompt": PROMPT, "completion": COMPLETION, "longest": LONGEST},
        "chunk_prompts": engine.CHUNK_PROMPTS,
        "runs": runs,
    }


def own(run: dict[str, Any], what: str = "seconds") -> float:
    """What is ours of all that was spent."""
    return sum(spent for name, spent in run[what].items() if name not in (SIMULATION, WAITING))


def table(result: dict[str, Any]) -> str:
    """Markdown: medians by phase and size."""
    tokens = result["mean_tokens"]
    sizes = [int(size) for size in result["runs"]]

    def median(size: int, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, result["runs"][str(size)]))

    def line(name: str, digits: int, value: Callable[[int, dict[str, Any]], float]) -> str:
        cells = (f"{median(size, partial(value, size)):,.{digits}f}" for size in sizes)
        return f"| {name} | {' | '.join(cells)} |"

    lines = [
        "Three iterations, "
        f"R = {result['candidates']}; simulated prompts of {tokens['prompt']} and completions of "
        f"{tokens['completion']} tokens on average (log-normal, at most {tokens['longest']}); "
        f"chunks of {result['chunk_prompts']} prompts. Medians over the runs that the first line "
        "counts.",
        "",
        f"| pairs | {' | '.join(f'{size:,}' for size in sizes)} |",
        f"|---|{'---:|' * len(sizes)}",
        f"| runs | {' | '.join(str(len(result['runs'][str(size)])) for size in sizes)} |",
    ]
    for name in (*PHASES, REST):
        lines.append(line(f"{name}, s", 2, lambda size, run, n=name: run["seconds"].get(n, 0.0)))
    lines += [
        line("**all of these, s**", 1, lambda size, run: own(run)),
        line("**per pair, µs**", 1, lambda size, run: own(run) / size * 1e6),
        line("processor time of all these, s", 1, lambda size, run: own(run, "processor")),
        line(
            "processor time per pair, µs",
            1,
            lambda size, run: own(run, "processor") / size * 1e6,
        ),
        line("iteration 3 again from its files, s", 2, lambda size, run: run["again"]),
        line("simulation (in no other figure), s", 1, lambda size, run: run["seconds"][SIMULATION]),
        line("the pairs themselves, MiB", 0, lambda size, run: run["data"] / 2**20),
        line("memory before the run, MiB", 0, lambda size, run: run["before"] / 2**20),
        line("peak memory, MiB", 0, lambda size, run: run["peak"] / 2**20),
        line(
            "peak above before, per pair, bytes",
            0,
            lambda size, run: (run["peak"] - run["before"]) / size,
        ),
        line("run directory, MiB", 0, lambda size, run: run["disk"] / 2**20),
    ]
    return "\n".join(lines)
