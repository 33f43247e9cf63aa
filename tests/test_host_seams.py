"""The host's private seams that `sera_plugin/host` overrides or calls, pinned.

A host upgrade that changes one of these fails here. Look at the new source, adapt ours, then change
the pin.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import axolotl.evaluate
import axolotl.train as host_train
import pytest
from accelerate import Accelerator
from accelerate.utils import fsdp_utils
from axolotl.common import datasets
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.loaders import model as host_model
from axolotl.utils.data import rl
from transformers import Trainer
from trl import DPOTrainer

from sera_plugin.host.refused import HOST_LOSSES
from sera_plugin.host.trainer import SeraTrainer

#: Private methods that are overridden, and what they are given by keyword.
SEAMS = {
    "__init__": "args data_collator processing_class peft_config",
    "_run_epoch": "steps_in_epoch num_update_steps_per_epoch epochs_trained "
    "steps_trained_in_current_epoch",
    "set_initial_training_values": "",
    "_init_training_state": "",
    "_save_checkpoint": "",
    "_load_from_checkpoint": "",
    "create_scheduler": "",
    "_prepare_dataset": "",
    "_precompute_ref_logps": "",
    "compute_loss_context_manager": "",
    "_compute_loss": "",
    "training_step": "",
}


@pytest.mark.parametrize("name", SEAMS)
def test_an_override_takes_what_the_hosts_method_takes(name):
    host, ours = (
        inspect.signature(getattr(one, name)).parameters for one in (AxolotlDPOTrainer, SeraTrainer)
    )
    if name == "__init__":  # the host's own takes anything and passes it on
        host = inspect.signature(DPOTrainer.__init__).parameters
    named = {
        key for key, one in ours.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }
    assert named | set(SEAMS[name].split()) <= host.keys()
    assert named == host.keys() or "kwargs" in ours


#: Source of the host: pieces that it has, in this order, and what of ours relies on that.
SOURCES = {
    "`host/datasets.py` calls the host's public functions as this module does": (
        rl,
        "load_dataset_with_config(\n",
        "load_dpo(_type, cfg, dataset_idx=i)",
        'map_kwargs["remove_columns"] == "__all__"',
        "merge_datasets(split_datasets, cfg)",
        "deduplicate_and_log_datasets(dataset=dataset)",
        "save_preprocessed_dataset(cfg, dataset, dataset_hash, split)",
    ),
    "the steps that the host plans": (datasets, "len(train_dataset) * cfg.num_epochs / cfg.batch"),
    "patches reach what is set up, and a run is opened there": (
        inspect.unwrap(host_train.setup_model_and_trainer),
        "= setup_reference_model(cfg, tokenizer, processor)",
        "post_trainer_create",
        "        trainer,\n        model,\n",
    ),
    "what is trained is what is saved; a run is opened before the host writes into output_dir": (
        inspect.unwrap(host_train.train),
        ") = setup_model_and_trainer(cfg, dataset_meta)",
        "save_initial_configs(",
        "setup_signal_handler(cfg, model)",
        "save_trained_model(cfg, trainer, model)",
    ),
    "theta_0 is remembered once weights are sharded, and before a checkpoint is loaded": (
        Trainer._prepare_for_training,
        "accelerator.prepare(",
        "self._load_from_checkpoint(",
    ),
    "sampling calls `generate` of the outermost model, which then gathers its own weights": (
        Trainer._prepare_for_training,
        'register_fsdp_forward_method(self.model, "generate")',
    ),
    "FSDP is of CUDA devices": (host_model.build_parallelism_config, 'build_device_mesh("cuda")'),
    "accelerate saves a part of a sharded adapter, so we load the checkpoint's": (
        fsdp_utils._get_model_state_dict,
        "return get_peft_model_state_dict(model, adapter_name=model.active_adapter)",
    ),
    "`save_total_limit` is unset while the host saves, and rotation called once all is sealed": (
        Trainer._save_checkpoint,
        "rotate_checkpoints(",
        "save_total_limit=self.args.save_total_limit",
    ),
    "optimizers are kept where we clear them": (Accelerator.__init__, "self._optimizers"),
}


@pytest.mark.parametrize("why", SOURCES)
def test_the_host_does_what_we_rely_on(why):
    where, *pieces = SOURCES[why]
    source = inspect.getsource(where)
    places = [source.index(piece) for piece in pieces]
    assert places == sorted(places)


def test_evaluation_alone_opens_no_run():
    assert "post_trainer_create" not in inspect.getsource(axolotl.evaluate)


def test_every_loss_that_a_configuration_may_name_is_the_hosts():
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert re.findall(r'if loss_type == "(\w+)"', source) == list(HOST_LOSSES)
    # The reason for our own cDPO; if this fails, TRL may have learnt it.
    sigmoid = source.split('loss_type == "sigmoid"')[1].split("elif")[0]
    assert "label_smoothing" not in sigmoid


def test_patches_serve_sera_alone_and_are_made_once():
    """In a process of its own, over host functions that do no work."""
    code = """
import axolotl.train as host
from axolotl.utils.dict import DictDefault
from types import SimpleNamespace
from sera_plugin.host.patches import prepare_host

trainer = SimpleNamespace(model="adapter")
host.setup_model_and_trainer = lambda cfg, meta: (trainer, "base", "tokenizer", None, None)
host.setup_reference_model = lambda cfg, tokenizer, processor: "reference"
prepare_host(DictDefault({}))
ours = host.setup_model_and_trainer, host.setup_reference_model
prepare_host(DictDefault({}))
assert ours == (host.setup_model_and_trainer, host.setup_reference_model)
for cfg, model, reference in (({}, "base", "reference"), ({"sera": {"a": 0}}, "adapter", None)):
    cfg = DictDefault(cfg)
    assert ours[0](cfg, None) == (trainer, model, "tokenizer", None, None)
    assert ours[1](cfg, None, None) == reference
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_first_values_of_the_training_tuple_are_where_we_write_them():
    source = inspect.getsource(Trainer._inner_training_loop)
    names = source.split(") = self.set_initial_training_values")[0].split("(")[-1]
    expected = """
        num_train_epochs num_update_steps_per_epoch num_examples num_train_samples
        total_train_batch_size steps_in_epoch max_steps
    """
    assert [name.strip() for name in names.split(",") if name.strip()] == expected.split()
