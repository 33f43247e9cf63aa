"""The iterations of one run in order: what happens before, between and after the host's epochs.

Nothing here is private to the host; the plugin calls `open` once, the trainer `begin` and `end`
around every epoch.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import pyarrow as pa

from sera_plugin.algorithm.alarms import alarm_metrics, judge, records
from sera_plugin.algorithm.algorithm import prepare, restore
from sera_plugin.algorithm.method import (
    Iteration,
    Labeler,
    Method,
    Phases,
    SamplingSettings,
    Schedule,
)
from sera_plugin.algorithm.noise import score_again
from sera_plugin.algorithm.pairs import Beside, Pairs
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.summary import metrics, summarize
from sera_plugin.algorithm.trust import score_held_out, score_pairs
from sera_plugin.config.kinds import labeler_kind
from sera_plugin.config.labelers import require_candidates, require_held_out
from sera_plugin.host import run
from sera_plugin.host.base import describe_base, require_same_base
from sera_plugin.host.keeping import Keeping
from sera_plugin.model.losses import FLOAT32_LIMIT, deviation
from sera_plugin.model.parts import whole_shape
from sera_plugin.model.scoring import PolicyScorer
from sera_plugin.rundir import checksums
from sera_plugin.rundir.machines import require_shared
from sera_plugin.rundir.progress import above_bars
from sera_plugin.rundir.store import RunStore
from sera_plugin.rundir.tokens import TokenColumn
from sera_plugin.sampling.offload import waiting
from sera_plugin.sampling.samplers import Choice, Samplers, sampling_progress

#: Below the host's own logger: it shows its own messages and, of others, only warnings.
LOG = logging.getLogger("axolotl.sera")

#: Pairs that tell whether a continued run has the model it began with.
_FEW = 8


@dataclass
class Loop:
    """One run."""

    cfg: Mapping[str, Any]  # the host's, resolved
    described: Mapping[str, Any]  # see `run.describe_run`
    method: Method
    schedule: Schedule  # how long each iteration is; updated as iterations turn out shorter
    dataset: pa.Table  # the offline pairs, and columns to keep beside them
    pairs: Pairs
    held_out: Pairs | None
    more_prompts: pa.Table | None  # those of `sera.prompts`, as in prompts.parquet
    beside_held_out: Beside  # what `score_columns` say of the held-out pairs
    end_ids: tuple[int, ...]  # tokens that end a completion
    store: RunStore
    scorer: PolicyScorer
    tokenizer: Any
    nats: float  # how far log-probabilities may move when nothing has changed (`deviation`)
    log: Callable[[dict[str, float]], None]  # takes figures for the trackers
    log_samples: Callable[[int], None]  # has them show an iteration's samples
    step: int | None = field(default=None, init=False)
    _earlier: bool = field(default=False, init=False)
    _recalled: bool = field(default=False, init=False)
    _summary: dict[str, Any] = field(default_factory=dict, init=False)
    _began: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.samplers = Samplers(
            self.cfg, self.method.config, self.store, self.scorer, self.tokenizer
        )
        #: Steps as planned, which one learning-rate schedule over all iterations spans.
        self.planned_steps = self.schedule.total_steps
        self._output_dir = self.store.root.parent
        self.keeping = Keeping(
            self.method,
            self.store,
            self.scorer,
            self.held_out,
            float(self.described["beta"]),
            self.cfg["early_stopping_patience"],
        )
        self.store.end = len(self.schedule.pairs) + 1

    def open(self, sharded_later: bool = False) -> None:
        """Start the run's record, or continue it; nothing is recorded before all checks are passed.

        Afterwards `step` is the checkpoint to continue from, None to train from the beginning.
        With `sharded_later` the weights are not where they will be used yet: it is then for the
        trainer to call `recall`, before it loads a checkpoint or begins.

        Raises:
            ValueError: if the run cannot be what the configuration says, or not in this directory.
            SamplingFailed, JudgeFailed: if a server cannot serve this run, or a judge has no key.
        """
        directory, planned = self._output_dir, self.schedule
        asked = self.cfg["resume_from_checkpoint"]
        if 0 in self.method.sizes:  # which a later iteration would find
            config = self.method.config
            raise ValueError(
                f"iteration {self.method.sizes.index(0) + 1} would train on nothing: of the "
                f"{self.method.total} usable pairs selection_ratio: {config.selection_ratio} keeps "
                f"none, and bootstrap_ratio: {config.bootstrap_ratio} asks for no sampled one. "
                "Raise one of them, or give more pairs."
            )
        require_held_out(self.method.config, len(self.held_out or ()))
        if self.method.prompts:  # without them it was known from the start
            require_candidates(self.method.config, self.method.pairs_per_prompt)
        require_shared(directory, self.store.ranks)
        self.step = checksums.named_checkpoint(directory, asked) if asked else None
        self.store.lock()
        earlier = self.store.description()
        if earlier is None:
            self._require_empty()
        elif not (asked or self.cfg["auto_resume_from_checkpoints"]):
            raise ValueError(
                f"output_dir: {directory} holds an earlier run. Set another output_dir, "
                "move it away, or continue it with `auto_resume_from_checkpoints: true`."
            )
        else:
            run.require_same_run(earlier, self.described, self.store.root)
        self.store.ranks.on_main(lambda: self._compare_base(earlier))
        self._earlier = earlier is not None
        if not sharded_later:
            self.recall()
        if not asked:
            self.step = checksums.newest_checkpoint(directory)
        if self.step is not None:
            sizes = checksums.recorded_pairs(checksums.checkpoint(directory, self.step))
            self.schedule = replace(planned, pairs=sizes)
        begins, _ = self.schedule.locate(self.step or 0)
        if self._earlier:
            self.store.ranks.on_main(lambda: self._name_damaged_policies(begins))
        sampler = self._choose_sampler(begins)
        self.store.begin(self.described, self.dataset, self.more_prompts)
        LOG.info("%s", run.announce(self.described, self.method, planned, sampler))
        last = -1 if self.step is None else self.step
        self.store.ranks.on_main(lambda: checksums.set_aside(directory, last))

    def _compare_base(self, earlier: Mapping[str, Any] | None) -> None:
        """Rank 0 describes the base model's weights, or compares them with those of `earlier`."""
        base = str(self.cfg["base_model"]), self.cfg["revision_of_model"]
        if earlier is None:
            self.described = {**self.described, "base_weights": describe_base(*base)}
        elif weights := earlier.get("base_weights"):  # earlier versions have not kept it
            require_same_base(weights, *base, self.store.root)

    def _name_damaged_policies(self, iteration: int) -> None:
        """Say it now, of policies that later phases score under: they would stop hours from now."""
        for policy in range(self.method.oldest_policy(iteration), iteration):
            path = self.store.policy(policy + 1)
            problem = checksums.damage(path) if path.exists() else None
            if problem is not None:
                LOG.warning(
                    f"SeRA: {path} is damaged ({problem}). The run stops where it is needed, "
                    "unless it is restored from a copy."
                )

    def _require_empty(self) -> None:
        remains = [*self._output_dir.glob("checkpoint-*"), *self.store.root.glob("iteration-*")]
        if remains:
            names = ", ".join(sorted(path.name for path in remains)[:3])
            raise ValueError(
                f"output_dir: {self._output_dir} holds remains of another training ({names}), but "
                "no record of a SeRA run. Set another output_dir, or move them away."
            )

    def recall(self) -> None:
        """Remember theta_0, once, when the model holds it; raises if the run has another."""
        if self._recalled:
            return
        self._recalled = True
        self.scorer.policies.keep_initial(recorded=self._earlier)
        recorded = self.store.read(1, "offline") if self._earlier else None
        if recorded is None:
            return
        few = Pairs.from_table(self.dataset.slice(0, _FEW))
        for side, logps in score_pairs(few, 0, self.scorer, "check").items():
            before = recorded[f"{side}_logp"].to_numpy()[: len(few)]
            lengths = recorded[f"{side}_length"].to_numpy()[: len(few)]
            if deviation(logps, before, lengths) > self.nats:
                raise ValueError(
                    f"base_model: {self.cfg['base_model']} is not the model that the run in "
                    f"{self.store.root} began with: it gives the first {side} completions a "
                    f"log-probability of {logps.mean():.2f}, and gave them {before.mean():.2f}. "
                    "Restore the model, or set another output_dir to start fresh."
                )

    def _choose_sampler(self, begins: int) -> Choice | None:
        """What samples, and that it and what ranks can; None if no iteration lacks its candidates.

        Those of iterations after the one that the run begins in are made anew.
        """
        if not any(
            self.method.sampled(t) and (t > begins or not self.store.finished(t, "candidates"))
            for t in range(1, len(self.schedule.pairs) + 1)
        ):
            return None
        tables = [one for one in (self.dataset, self.more_prompts) if one is not None]
        lengths = [int(TokenColumn(one["prompt_ids"]).lengths.max()) for one in tables]
        sampler = self.samplers.choose(max(lengths))
        self.store.ranks.on_main(self._labeler().check)
        return sampler

    def _labeler(self, optimizer: Any = None) -> Labeler:
        kind = labeler_kind(self.method.config.labeler).load()
        labeler: Labeler = kind(self.method, self.store, self.tokenizer, self.scorer.quiet)
        model, device = self.scorer.policies.model, self.scorer.budget.device
        labeler.room = partial(waiting, model, device, optimizer, guest="the reward model")
        return labeler

    def begin(
        self, iteration: int, resumed: bool, optimizer: Any
    ) -> tuple[pa.Table | None, dict[str, FloatArray] | None]:
        """Everything before the first step of iteration t (1-based).

        The optimizer may wait in host memory while an engine samples or a reward model ranks.

        Returns:
            D_t, see `algorithm.prepare`, or None where training ends before this iteration; and
            the held-out pairs' chosen and rejected log-probabilities under the reference, None
            without any.
        """
        self.store.discard_after(iteration)
        summary = self.store.summary(iteration)
        # Of another continuation, which went on from here and got to the iteration's end.
        summary.get("seconds", {}).pop("train", None)
        phases = Phases(summary.get("seconds", {}), summary.get("forwarded", {}))
        self.scorer.phases = phases
        policies = self.scorer.policies
        if not resumed:
            policies.keep_current(iteration - 1)
        else:
            policies.current = None
        losses = self.keeping.losses(iteration - 1) if iteration > 1 else {}
        if not resumed and self.keeping.ends(losses):
            self.store.end_before(iteration)
            self.schedule = replace(self.schedule, pairs=self.schedule.pairs[: iteration - 1])
            return None, None
        names, more = {"candidates", "temperature", "top_p", "max_new_tokens"}, self.more_prompts
        settings = SamplingSettings(
            **self.method.config.model_dump(include=names),
            max_length=self.cfg["sequence_len"],
            end_ids=self.end_ids,
            seed=self.method.seed * 1_000 + iteration,
            vocabulary=whole_shape(policies.model.get_input_embeddings().weight)[0],
        )
        it = Iteration(
            t=iteration,
            method=self.method,
            pairs=self.pairs,
            store=self.store,
            scorer=self.scorer,
            sampler=self.samplers.make(iteration, optimizer, self.pairs, self.nats),
            settings=settings,
            labeler=self._labeler(optimizer),
            phases=phases,
            progress=partial(sampling_progress, quiet=self.scorer.quiet),
            held_out=self.held_out,
            more_prompts=None if more is None else TokenColumn(more["prompt_ids"]),
            beside=Beside.of(self.method.config.score_columns, self.dataset, more),
            beside_held_out=self.beside_held_out,
        )
        pairs = prepare(it)
        held_out = None if self.held_out is None else score_held_out(it)
        if not summary:
            restore(it, {0, max(0, iteration - 2)})  # what drift and Jaccard compare with
            summary = summarize(it, score_again(it) if self.nats > FLOAT32_LIMIT else None)
            if losses:
                summary["held_out_loss"] = float(losses[iteration - 1].mean())
        alarms = judge([*filter(None, map(self.store.summary, range(1, iteration))), summary])
        if not resumed:  # the log and the trackers know it
            with above_bars():
                LOG.info("%s", run.describe_start(summary, self.method.unit))
                for alarm in alarms:
                    if alarm.raised:
                        LOG.warning("SeRA alarm %s: %s", alarm.name, alarm.text)
            self.log(metrics(summary) | alarm_metrics(alarms))
            self.log_samples(iteration)
        self._summary = summary
        self.record(alarms=records(alarms))
        begun = [iteration, *self._begun()]
        policies.forget_before(
            *self._oldest_needed(iteration), but=self.keeping.needed(losses, begun)
        )
        self.schedule = self.schedule.with_pairs(iteration, pairs.num_rows)
        policies.current = None  # from the first step on
        self._began = perf_counter()
        return pairs, held_out

    def _oldest_needed(self, iteration: int) -> tuple[int, int]:
        """The oldest policies needed from iteration t on: by this process, and on disk.

        On disk, because a run that is cut off continues from any checkpoint that is still there.
        """
        method = self.method
        oldest = min(iteration - 1, method.oldest_policy(iteration + 1))
        if method.config.keep_policies:
            return oldest, 0
        return oldest, min([oldest, *map(method.oldest_policy, self._begun())])

    def _begun(self) -> list[int]:
        """The iterations that a run would continue in from a checkpoint that is there."""
        steps = checksums.checkpoint_steps(self._output_dir)
        return [self.schedule.locate(step)[0] for step in steps]

    def record(self, **found: Any) -> None:
        """Add to the iteration's summary."""
        self._summary = self._summary | found
        self.store.write_summary(self._summary["iteration"], self._summary)

    def end(self) -> None:
        """Complete the iteration's summary after its last step."""
        phases = self.scorer.phases
        phases.spend("train", perf_counter() - self._began)
        self.record(seconds=dict(phases.seconds))
        self.log({"sera/seconds/train": phases.seconds["train"]})
        with above_bars():
            LOG.info("%s", run.describe_end(self._summary))

    def finish(self) -> None:
        """After all iterations: the model becomes the policy that is kept."""
        with above_bars():
            figures = self.keeping.finish(len(self.schedule.pairs))
        if figures:
            self.log(figures)
