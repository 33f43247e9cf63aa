"""The iterations of one run in order: what happens before, between and after the host's epochs.

Nothing here is private to the host; the trainer calls `open` once, and `begin` and `end` around
every epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sera_plugin.alarms import alarm_metrics, judge, records
from sera_plugin.iteration import (
    Method,
    Pairs,
    Phases,
    prepare_iteration,
    score_held_out,
)
from sera_plugin.rewards import FloatArray
from sera_plugin.run import announce, describe_run, require_same_run
from sera_plugin.samplers import Samplers
from sera_plugin.sampling import SamplingSettings
from sera_plugin.schedule import Schedule
from sera_plugin.scoring import PolicyScorer, sampling_progress
from sera_plugin.store import RunStore, read_json
from sera_plugin.summary import describe_end, describe_start, metrics, summarize

#: Below the host's own logger: it shows its own messages and, of others, only warnings.
LOG = logging.getLogger("axolotl.sera")


@dataclass(frozen=True)
class Prepared:
    """What an iteration trains on and is evaluated against.

    Attributes:
        pairs: D_t, see `prepare_iteration`.
        held_out: log pi_{t-1} of the held-out pairs' chosen and rejected, None without any.
    """

    pairs: pa.Table
    held_out: dict[str, FloatArray] | None


@dataclass
class Loop:
    """One run.

    Attributes:
        cfg: the host's resolved configuration.
        method: the method's constants.
        schedule: how long each iteration is; updated as iterations turn out shorter.
        pairs, held_out: the data.
        end_ids: token ids that end a completion.
        seed: the host's.
        store: the run directory.
        scorer: scores under any policy; owns the model's policies.
        samplers: makes the sampler of an iteration.
        log: takes figures for the trackers.
    """

    cfg: Mapping[str, Any]
    method: Method
    schedule: Schedule
    pairs: Pairs
    held_out: Pairs | None
    end_ids: tuple[int, ...]
    seed: int
    store: RunStore
    scorer: PolicyScorer
    samplers: Samplers
    log: Callable[[dict[str, float]], None]

    def open(
        self, loss: str, beta: float, columns: Mapping[str, Any], dataset: pa.Table, resuming: bool
    ) -> None:
        """Start the run's record, or continue it.

        Args:
            loss, beta: what is optimised.
            columns: the dataset's own columns to keep beside its token ids.
            dataset: the offline pairs.
            resuming: whether the configuration allows to continue an earlier run.

        Raises:
            ValueError: if the directory holds another run, or the sampler that the configuration
                names cannot run.
            SamplingFailed: if a server is named and cannot serve this run.
        """
        for iteration in range(2, len(self.schedule.pairs) + 1):
            done = self.store.summary(iteration).get("pairs", {}).get("trained")
            if done is not None:
                self.schedule = self.schedule.with_pairs(iteration, done)
        description = describe_run(
            self.cfg,
            loss,
            beta,
            self.method,
            self.pairs,
            len(self.held_out) if self.held_out else 0,
            self.end_ids,
            self.seed,
        )
        if self.store.run_file.exists():
            if not resuming:
                raise ValueError(
                    f"{self.store.root} holds an earlier run. Set another output_dir, remove that "
                    "directory, or continue it with `auto_resume_from_checkpoints: true`."
                )
            require_same_run(read_json(self.store.run_file), description)
        sampler = None
        if self.method.bootstrapped and len(self.schedule.pairs) > 1:
            sampler = self.samplers.choose()
        if not self.store.run_file.exists():
            for name, values in columns.items():
                dataset = dataset.append_column(name, values)
            self.store.begin(description, dataset)
        LOG.info("%s", announce(description, self.method, self.schedule, self.store, sampler))

    def begin(self, iteration: int, resumed: bool, optimizer: Any) -> Prepared:
        """Everything before the first step of iteration t.

        Args:
            iteration: t, 1-based.
            resumed: whether training continues in the middle of it.
            optimizer: may wait in host memory while an engine samples.
        """
        self.store.discard_after(iteration)
        earlier = self.store.summary(iteration)
        phases = Phases(earlier.get("seconds", {}), earlier.get("forwarded", {}))
        self.scorer.phases = phases
        policies = self.scorer.policies
        if resumed:
            policies.current = None
        else:
            policies.keep_current(iteration - 1)
        config = self.method.config
        pairs = prepare_iteration(
            iteration,
            self.method,
            self.pairs,
            self.store,
            self.scorer,
            self.samplers.make(iteration, optimizer),
            SamplingSettings(
                candidates=config.candidates,
                temperature=config.temperature,
                top_p=config.top_p,
                max_new_tokens=config.max_new_tokens,
                max_length=self.cfg["sequence_len"],
                end_ids=self.end_ids,
                seed=self.seed * 1_000 + iteration,
            ),
            phases,
            sampling_progress(self.scorer.quiet),
        )
        held_out = None
        if self.held_out is not None:
            held_out = score_held_out(iteration, self.held_out, self.store, self.scorer, phases)
        if not earlier:
            summary = summarize(iteration, self.method, self.store, phases)
            alarms = judge([*map(self.store.summary, range(1, iteration)), summary])
            self.store.write_summary(iteration, summary | {"alarms": records(alarms)})
            LOG.info("%s", describe_start(summary))
            for alarm in alarms:
                if alarm.raised:
                    LOG.warning("SeRA alarm %s: %s", alarm.name, alarm.text)
            self.log(metrics(summary) | alarm_metrics(alarms))
        # Iteration t + 1 compares theta_t with as many policies as its reward weighs.
        oldest = min(iteration - 1, iteration + 1 - len(self.method.weights(iteration + 1)))
        policies.forget_before(oldest, on_disk=not config.keep_policies)
        self.schedule = self.schedule.with_pairs(iteration, pairs.num_rows)
        return Prepared(pairs, held_out)

    def end(self, iteration: int, step_zero: Mapping[str, float] | None) -> None:
        """Complete the iteration's summary after its last step."""
        summary = self.store.summary(iteration)
        summary["seconds"] = dict(self.scorer.phases.seconds)
        if step_zero is not None:
            summary["step_zero"] = dict(step_zero)
        self.store.write_summary(iteration, summary)
        self.log({"sera/seconds/train": summary["seconds"]["train"]})
        LOG.info("%s", describe_end(summary))
