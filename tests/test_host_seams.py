"""The host's private seams that `sera_plugin/host` overrides or calls, pinned.

A host upgrade that changes one of these fails here. Look at the new source, adapt ours, then change
the pin.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import axolotl.train as host_train
import pytest
from accelerate import Accelerator
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.loaders import model as host_model
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


RUN_EPOCH = (
    "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial "
    "ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained "
    "steps_trained_in_current_epoch"
)
INIT = (
    "self model ref_model args data_collator train_dataset eval_dataset processing_class "
    "compute_metrics callbacks optimizers quantization_config peft_config"
)
SEAMS = {
    Trainer._run_epoch: RUN_EPOCH,
    Trainer.set_initial_training_values: "self args dataloader",
    Trainer._init_training_state: "self max_steps num_update_steps_per_epoch num_train_epochs "
    "resume_from_checkpoint trial",
    Trainer._save_checkpoint: "self model trial",
    rotate_checkpoints: "output_dir save_total_limit best_model_checkpoint use_mtime "
    "checkpoint_prefix",
    AxolotlDPOTrainer.create_scheduler: "self num_training_steps optimizer",
    Trainer._load_from_checkpoint: "self resume_from_checkpoint model",
    Trainer.create_optimizer: "self model",
    DPOTrainer._prepare_dataset: "self dataset processing_class args dataset_name",
    DPOTrainer._precompute_ref_logps: "self dataset name batch_size",
    Trainer.compute_loss_context_manager: "self",
    DPOTrainer._compute_loss: "self model inputs return_outputs",
    DPOTrainer.__init__: INIT,
    DataCollatorForPreference: "pad_token_id max_length truncation_mode pad_to_multiple_of "
    "return_tensors",
    Accelerator.prepare_optimizer: "self optimizer device_placement",
    Trainer.training_step: "self model inputs num_items_in_batch",
    host_train.setup_model_and_trainer: "cfg dataset_meta",
    host_train.setup_reference_model: "cfg tokenizer processor",
    host_model.build_parallelism_config: "cfg",
}


@pytest.mark.parametrize("function", SEAMS, ids=lambda function: function.__qualname__)
def test_signature_is_as_pinned(function):
    assert parameters(function) == SEAMS[function].split()


def test_the_host_prepares_data_in_the_order_that_ours_follows():
    """`host/datasets.py` calls the host's public functions as these two do."""
    from axolotl.cli import preprocess, train
    from axolotl.common import datasets
    from axolotl.utils.data import rl

    source = inspect.getsource(rl)
    steps = [
        "load_dataset_with_config(\n",
        "load_dpo(_type, cfg, dataset_idx=i)",
        'map_kwargs["remove_columns"] == "__all__"',
        "merge_datasets(split_datasets, cfg)",
        "deduplicate_and_log_datasets(dataset=dataset)",
        "save_preprocessed_dataset(cfg, dataset, dataset_hash, split)",
    ]
    places = [source.index(step) for step in steps]
    assert places == sorted(places)
    steps = "len(train_dataset) * cfg.num_epochs / cfg.batch_size"
    assert steps in inspect.getsource(datasets)
    # Both commands use what the hook returns.
    assert "if plugin_manager.load_datasets(cfg, preprocess=True):" in inspect.getsource(preprocess)
    assert "dataset_meta = plugin_manager.load_datasets(" in inspect.getsource(train)


def test_every_loss_that_a_configuration_may_name_is_the_hosts():
    from sera_plugin.host.refused import HOST_LOSSES

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert re.findall(r'if loss_type == "(\w+)"', source) == list(HOST_LOSSES)


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


def test_the_host_sets_up_what_it_saves_where_patches_reach_it():
    source = inspect.getsource(inspect.unwrap(host_train.setup_model_and_trainer))
    assert "= setup_reference_model(cfg, tokenizer, processor)" in source
    assert source.count("        trainer,\n        model,\n") == 1
    train = inspect.getsource(inspect.unwrap(host_train.train))
    assert ") = setup_model_and_trainer(cfg, dataset_meta)" in train
    for call in ("setup_signal_handler(cfg, model)", "save_trained_model(cfg, trainer, model)"):
        assert call in train


def test_the_host_shards_as_sharded_runs_rely_on():
    prepare = inspect.getsource(Trainer._prepare_for_training)
    # theta_0 is remembered once the weights are sharded, and before a checkpoint is loaded.
    assert prepare.index("accelerator.prepare(") < prepare.index("self._load_from_checkpoint(")
    # Sampling calls `generate` of the outermost model, which then gathers its own weights.
    assert 'register_fsdp_forward_method(self.model, "generate")' in prepare
    mesh = inspect.getsource(host_model.build_parallelism_config)
    assert 'build_device_mesh("cuda")' in mesh


def test_accelerate_still_saves_a_part_of_a_sharded_adapter():
    """The reason to load the adapter from the checkpoint ourselves."""
    from accelerate.utils import fsdp_utils

    source = inspect.getsource(fsdp_utils._get_model_state_dict)
    assert "return get_peft_model_state_dict(model, adapter_name=model.active_adapter)" in source


def test_first_values_of_the_training_tuple_are_where_we_write_them():
    source = inspect.getsource(Trainer._inner_training_loop)
    names = source.split(") = self.set_initial_training_values")[0].split("(")[-1]
    assert [name.strip() for name in names.split(",") if name.strip()] == [
        "num_train_epochs",
        "num_update_steps_per_epoch",
        "num_examples",
        "num_train_samples",
        "total_train_batch_size",
        "steps_in_epoch",
        "max_steps",
    ]


def test_the_host_removes_old_checkpoints_where_we_hold_it_back():
    """`save_total_limit` is unset while the host saves, and rotation called once all is sealed."""
    source = inspect.getsource(Trainer._save_checkpoint)
    assert source.count("rotate_checkpoints(") == 1
    assert "save_total_limit=self.args.save_total_limit" in source


def test_the_host_tells_training_from_evaluation_where_a_run_is_opened():
    """`post_trainer_create` comes before the host writes into output_dir, and never in evaluate."""
    import axolotl.evaluate

    assert "post_trainer_create" not in inspect.getsource(axolotl.evaluate)
    assert "post_trainer_create" in inspect.getsource(host_train.setup_model_and_trainer)
    order = inspect.getsource(host_train.train)
    assert order.index("setup_model_and_trainer(") < order.index("save_initial_configs(")


def test_trl_still_ignores_label_smoothing_in_its_sigmoid_loss():
    """The reason for our own cDPO; if this fails, TRL may have learnt it."""
    source = inspect.getsource(DPOTrainer._compute_loss)
    sigmoid = source.split('loss_type == "sigmoid"')[1].split("elif")[0]
    assert "label_smoothing" not in sigmoid


def test_optimizers_are_kept_where_we_clear_them():
    assert "self._optimizers" in inspect.getsource(Accelerator.__init__)
