"""The host's private seams that `sera_plugin/host` overrides or calls, pinned.

A host upgrade that changes one of these fails here. Look at the new source, adapt ours, then change
the pin.
"""

import inspect
import re
import subprocess
import sys

import axolotl.train as host_train
import pytest
from accelerate import Accelerator
from accelerate.utils import fsdp_utils
from axolotl.cli import preprocess, train
from axolotl.common import datasets
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.loaders import model as host_model
from axolotl.utils.data import rl
from axolotl.utils.schemas.enums import RLType
from axolotl.utils.schemas.validation import OptimizationValidationMixin
from torch.distributed import distributed_c10d
from transformers import Trainer
from transformers.integrations import integration_utils
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sera_plugin.host.refused import HOST_LOSSES

SEAMS = {
    Trainer._run_epoch: "self model epoch train_dataloader steps_in_epoch "
    "num_update_steps_per_epoch trial ignore_keys_for_eval start_time resume_from_checkpoint "
    "epochs_trained steps_trained_in_current_epoch",
    Trainer.set_initial_training_values: "self args dataloader",
    Trainer._init_training_state: "self max_steps num_update_steps_per_epoch num_train_epochs "
    "resume_from_checkpoint trial",
    Trainer._prepare_input: "self data",
    Trainer._save_checkpoint: "self model trial",
    Trainer._get_output_dir: "self trial",
    rotate_checkpoints: "output_dir save_total_limit best_model_checkpoint use_mtime "
    "checkpoint_prefix",
    AxolotlDPOTrainer.create_scheduler: "self num_training_steps optimizer",
    Trainer._load_from_checkpoint: "self resume_from_checkpoint model",
    Trainer._prepare_for_training: "self max_steps train_dataloader resume_from_checkpoint",
    Trainer._load_optimizer_and_scheduler: "self checkpoint",
    deepspeed_load_checkpoint: "deepspeed_engine checkpoint_path load_module_strict",
    distributed_c10d._get_default_store: "",
    DPOTrainer._prepare_dataset: "self dataset processing_class args dataset_name",
    DPOTrainer._precompute_ref_logps: "self dataset name batch_size",
    Trainer.compute_loss_context_manager: "self",
    DPOTrainer._compute_loss: "self model inputs return_outputs",
    DPOTrainer.__init__: "self model ref_model args data_collator train_dataset eval_dataset "
    "processing_class compute_metrics callbacks optimizers quantization_config peft_config",
    DataCollatorForPreference: "pad_token_id max_length truncation_mode pad_to_multiple_of "
    "return_tensors",
    DPOTrainer.create_model_card: "self model_name dataset_name tags",
    integration_utils.rewrite_logs: "d",
    Trainer.training_step: "self model inputs num_items_in_batch",
    host_train.setup_model_and_trainer: "cfg dataset_meta",
    host_train.setup_reference_model: "cfg tokenizer processor",
    host_model.build_parallelism_config: "cfg",
}


@pytest.mark.parametrize("function", SEAMS, ids=lambda function: function.__qualname__)
def test_signature_is_as_pinned(function):
    assert list(inspect.signature(function).parameters) == SEAMS[function].split()


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
    "preprocess uses what the hook returns": (preprocess, "if plugin_manager.load_datasets(cfg, "),
    "so does train": (train, "dataset_meta = plugin_manager.load_datasets("),
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
    "theta_0 is remembered once weights are sharded, and before a checkpoint is loaded; "
    "`generate` of the outermost model gathers its own weights": (
        Trainer._prepare_for_training,
        "accelerator.prepare(",
        # By now the optimizer is the one that stays; its groups are remembered here.
        "self.create_scheduler(",
        'register_fsdp_forward_method(self.model, "generate")',
        # Under DeepSpeed these two lines are ours, with theta_0 before them.
        "deepspeed_load_checkpoint(",
        "self._load_from_checkpoint(",
        "self._load_optimizer_and_scheduler(",
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
    "our card is the host's, at a checkpoint, at the end and before a push": (
        DPOTrainer._save_checkpoint,
        "self.create_model_card(model_name=model_name)",
        "super()._save_checkpoint(model, trial)",
    ),
    "the host's end of training asks for it or pushes": (
        host_train.create_model_card,
        "trainer.create_model_card(**model_card_kwarg)",
        "trainer.push_to_hub()",
    ),
    "a push writes the card before it uploads": (
        Trainer.push_to_hub,
        "self.create_model_card(model_name=model_name, **kwargs)",
        "upload_folder(",
    ),
    "trackers have what the callbacks of these names hold": (
        integration_utils,
        "self.tb_writer.add_text(",
        "self._wandb.run",
        "self._trackio.context_vars.current_",
        "self._ml_flow.active_run()",
        "self._swanlab.get_run()",
    ),
    "DeepSpeed's engine steps what it was made with, so the optimizer is restarted in place": (
        Accelerator._prepare_deepspeed,
        "engine, optimizer, _, lr_scheduler = ds_initialize(**kwargs)",
    ),
}


@pytest.mark.parametrize("why", SOURCES)
def test_the_host_does_what_we_rely_on(why):
    where, *pieces = SOURCES[why]
    source = inspect.getsource(where)
    places = [source.index(piece) for piece in pieces]
    assert places == sorted(places)


def test_the_host_refuses_quantised_weights_under_fsdp2():
    """If this fails, look whether QLoRA works there by now, and take our refusal away."""
    asked = {"rl": RLType.DPO, "fsdp_version": 2, "load_in_4bit": True}
    with pytest.raises(ValueError, match="FSDP2 does not support load_in_8bit or load_in_4bit"):
        OptimizationValidationMixin.check_fsdp2_base_model_quant_rl(asked)


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
