"""The trainer: the host's DPO trainer with SeRA's data, loss and loop over iterations.

Here it is put together; `step` has what one micro-batch optimises, `epochs` the one `train()` call.
tests/test_host_seams.py pins the signature of every private seam of the host that is
overridden, so that a host upgrade fails there and not in the middle of somebody's run.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import is_peft_model
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import ProgressCallback, Trainer, set_seed

from sera_plugin.algorithm.method import Method, Schedule
from sera_plugin.algorithm.pairs import Beside, Pairs
from sera_plugin.algorithm.selection import annotate, swap, swapped_rows
from sera_plugin.algorithm.trust import score_pairs
from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.sera import PER_TOKEN_HOST_LOSSES, SeraConfig
from sera_plugin.data.dataset import model_end_ids, prepare_rows
from sera_plugin.data.prompts import prepare_prompts
from sera_plugin.data.rows import LABELLED
from sera_plugin.host.epochs import ID_COLUMNS, EndOfIteration, TrainingBar
from sera_plugin.host.given import deepspeed_config
from sera_plugin.host.loop import Loop
from sera_plugin.host.patches import NO_FSDP
from sera_plugin.host.plugin import SeraPlugin
from sera_plugin.host.run import describe_run
from sera_plugin.host.step import GatedSteps
from sera_plugin.host.trackers import SampleTables
from sera_plugin.model.budget import scoring_budget
from sera_plugin.model.losses import (
    Objective,
    PreferenceLoss,
    rounding_limit,
)
from sera_plugin.model.policies import PolicyHistory, continue_adapter, tidy_adapters
from sera_plugin.model.scoring import PolicyScorer
from sera_plugin.rundir.progress import told
from sera_plugin.rundir.ranks import current_ranks
from sera_plugin.rundir.store import RunStore, make_table

LOG = logging.getLogger("axolotl.sera")


@dataclass
class Collator:
    """TRL's collator, and log pi_{t-1} for the gate, which TRL has no name for."""

    collate: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(examples)
        for name in ("policy_chosen_logps", "policy_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


def preference_loss(cfg: DictDefault, config: SeraConfig) -> PreferenceLoss:
    """The loss that the configuration names, with its constants."""
    beta = cfg.trl.beta if cfg.trl and cfg.trl.beta is not None else cfg.rl_beta
    return PreferenceLoss(
        kind=config.loss,
        beta=float(beta),
        label_smoothing=float(cfg.dpo_label_smoothing or 0.0),
        simpo_gamma=float(cfg.simpo_gamma or 0.0),
        per_token=config.per_token,
    )


class SeraTrainer(GatedSteps):
    """The host's DPO trainer with a dataset, a reference and a length of its own per epoch."""

    tag_names: ClassVar[list[str]] = ["axolotl", "sera", "dpo"]
    #: Writes the model's card into output_dir; the plugin's.
    write_card: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, model: Any, ref_model: Any = None, *, args: Any, **kwargs: Any) -> None:
        self.cfg: DictDefault = PluginManager.get_instance().cfg
        self.config = SeraConfig(**self.cfg.sera)
        # The host's own where `dpo_loss_type` asks for one.
        self.loss = None if self.cfg.dpo_loss_type else preference_loss(self.cfg, self.config)
        self.store = RunStore(args.output_dir, current_ranks())
        if not self.store.ranks.main:
            LOG.setLevel(logging.ERROR)  # rank 0 speaks for all
        self._quiet = bool(args.disable_tqdm) or not self.store.ranks.main
        self._swapped: np.ndarray[Any, Any] | None = None
        self._labelled = 0  # single answers with a label among the rows of the training set
        #: What `score_columns` say of the held-out pairs, which have no other use of it.
        self._aside: pa.Table | None = None
        self._model_end_ids = model_end_ids(model, kwargs["processing_class"])

        # References are columns of the data: no reference model, no forward pass for one.
        args.precompute_ref_log_probs = True
        args.remove_unused_columns = False
        # `Objective` does it. TRL 1.9 would warn that it is disabled, and pads all the same.
        args.padding_free = False
        if self.loss is not None:
            args.loss_type = ["sigmoid"]
        if self.config.restart_optimizer and self.cfg.warmup_steps is None:
            # The host turned the ratio into steps of the whole run; an iteration has its own.
            ratio = self.cfg.warmup_ratio
            args.warmup_steps = 0.03 if ratio is None else float(ratio)
        # The host's padding collator expects the columns of an older TRL; TRL's own pads as well.
        kwargs.pop("data_collator", None)
        args.pad_to_multiple_of = self.cfg.pad_to_multiple_of
        # TRL initialises a new adapter before the host has seeded anything.
        set_seed(args.seed)
        model, continued = continue_adapter(model, self.cfg.lora_model_dir)
        if continued is not None:
            kwargs.pop("peft_config", None)

        super().__init__(model, None, args=args, **kwargs)

        self.data_collator: Any = Collator(self.data_collator)
        self._require_launched()
        if is_peft_model(self.model):
            tidy_adapters(self.model, continued)
        self.add_callback(EndOfIteration(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TrainingBar)
        if self.loss is not None:
            likelihood = LOSSES[self.loss.kind].likelihood
            self._objective = Objective(
                self.loss,
                nll_weight=1.0 if likelihood else float(self.cfg.cpo_alpha or 0.0),
                nll_of_prompts=likelihood,
                router_weight=self.router_aux_loss_coef if self.aux_loss_enabled else None,
                padding_free=bool(self.cfg.dpo_padding_free),
                mean=lambda metrics: self.accelerator.reduce(metrics, reduction="mean"),
            )
        self.loop = self._make_loop()

    def _require_launched(self) -> None:
        """The launcher has set up what the configuration and the number of processes ask for."""
        world = self.store.ranks.world
        if self.is_deepspeed_enabled and not self.cfg.deepspeed:
            raise ValueError(
                "the launcher has turned DeepSpeed on, and the YAML says nothing of it. Name its "
                "configuration in `deepspeed:`, and take it out of the launcher's "
                "(docs/many-gpus.md)."
            )
        if self.cfg.fsdp_config and not self.is_fsdp_enabled:
            raise ValueError(NO_FSDP)
        if self.accelerator.num_processes != world:
            raise ValueError(
                f"{world} processes were started, but the host trains in each of them alone. Use a "
                "launcher that sets up the devices: `axolotl train config.yaml --launcher "
                "accelerate`."
            )

    def _make_loop(self) -> Loop:
        args, ours, table = self.args, self.loss, self.train_dataset.data.table
        host_losses = args.loss_type if ours is None else []
        pairs = Pairs.from_table(table)
        held_out = Pairs.from_table(self.eval_dataset.data.table) if self.eval_dataset else None
        prompts = self._prepare_prompts(pairs, held_out)
        columns = {name: table[name].to_pylist() for name in self.config.score_columns}
        method = Method(
            config=self.config,
            reference_free=ours is not None and ours.reference_free,
            per_token=ours.per_token if ours else not PER_TOKEN_HOST_LOSSES.isdisjoint(host_losses),
            total=len(pairs),
            iterations=int(args.num_train_epochs),
            seed=int(args.seed),
            annotations=annotate(self.config, pairs.prompt_ids, columns, self._swapped),
            prompts=0 if prompts is None else len(prompts),
        )
        schedule = Schedule(
            method.sizes,
            args.train_batch_size * self.store.ranks.world,
            args.gradient_accumulation_steps,
            args.dataloader_drop_last,
        )
        scorer = PolicyScorer(
            PolicyHistory(self.model, self.store, str(self.cfg.base_model), self.processing_class),
            int(self._tokenizer.pad_token_id),
            scoring_budget(self.model, self.accelerator.device, int(self.cfg.sequence_len or 0)),
            self.accelerator.autocast,
            self.store.ranks,
            self._quiet,
        )
        loss, ends = ours.name if ours else " + ".join(host_losses), tuple(self._end_ids)
        return Loop(
            cfg=self.cfg,
            described=describe_run(
                # The host has made a file of a block, under a new name each time.
                {**self.cfg, "deepspeed": deepspeed_config(self.cfg.deepspeed)},
                loss,
                float(args.beta),
                method,
                schedule,
                pairs,
                held_out,
                ends,
                prompts,
                self._labelled,
                Beside.of(self.config.score_columns, table, self._aside, prompts),
            ),
            method=method,
            schedule=schedule,
            dataset=table,
            pairs=pairs,
            held_out=held_out,
            more_prompts=prompts,
            beside_held_out=Beside.of(self.config.score_columns, self._aside),
            end_ids=ends,
            store=self.store,
            scorer=scorer,
            tokenizer=self.processing_class,
            nats=rounding_limit(self.model, args.bf16 or args.fp16),
            # Trainer.log, not TRL's: that would add the last steps' half-filled averages.
            log=lambda figures: Trainer.log(self, figures),
            log_samples=SampleTables(self).log,
        )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        if "prompt_ids" in dataset.column_names:
            return dataset
        rows = told(dataset, f"tokenize {dataset_name} pairs", "pair", self._quiet)
        result = prepare_rows(
            rows, processing_class, self._model_end_ids, self.cfg, self.config, dataset_name
        )
        columns: dict[str, Any] = {"row": np.arange(len(result.rows))}
        columns |= {name: getattr(result, name) for name in ID_COLUMNS}
        if dataset_name == "train":
            self._end_ids = result.end_ids
            self._labelled = sum(dataset[LABELLED][:])
            kept, names = dataset.select(result.rows), self.config.score_columns
            columns |= {name: kept[name][:] for name in names}
            if self.config.label_noise:
                self._swapped = swapped_rows(len(result.rows), self.config.label_noise, args.seed)
                columns = swap(columns, self._swapped)
            # Of types of their own, whatever their names.
            columns |= {name: pa.array(columns[name]) for name in names}
        else:
            kept, has = dataset.select(result.rows), set(dataset.column_names)
            names = tuple(name for name in self.config.score_columns if name in has)
            self._aside = pa.table({name: pa.array(kept[name][:]) for name in names})
        return Dataset(InMemoryTable(make_table(columns)))

    def _prepare_prompts(self, pairs: Pairs, held_out: Pairs | None) -> pa.Table | None:
        """prompts.parquet: those of `sera.prompts` that are in no pair; None without the key."""
        plugins = PluginManager.get_instance().plugins.values()
        found = next(one.prompts for one in plugins if isinstance(one, SeraPlugin))
        if not self.config.prompts:
            return None
        if found is None:
            raise ValueError(
                "sera.prompts is set, and no prompts were loaded: the datasets did not come from "
                "sera_plugin's own loading. Train with `axolotl train`, or remove sera.prompts."
            )
        rows = told(found, "tokenize prompts", "prompt", self._quiet)
        known = pairs.prompt_ids, None if held_out is None else held_out.prompt_ids
        return prepare_prompts(
            rows, self.processing_class, self._model_end_ids, self.cfg, self.config, *known
        )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Dataset:
        """TRL's hook: every iteration has a reference of its own, so nothing is scored here."""
        return dataset

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See TRL. An evaluation before the first iteration refers to the policy as it is."""
        if "ref_chosen_logps" not in self.eval_dataset.column_names:
            assert self.loop.held_out is not None
            scorer = self.loop.scorer
            self.refer_held_out_to(score_pairs(self.loop.held_out, 0, scorer, "score_evaluation"))
        return super().evaluate(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """What SeRA did, in place of TRL's card, which says DPO. The host asks at every checkpoint
        too, where nobody reads it unless it is pushed."""
        if self.is_world_process_zero() and (self.args.push_to_hub or not self.is_in_train):
            self.write_card()
