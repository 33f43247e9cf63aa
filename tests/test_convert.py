"""`axolotl sera convert`: LLaMA-Factory's DPO YAMLs, as the host and SeRA read them."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sera_plugin.config.quoting import plain
from sera_plugin.tools.convert.convert import KNOWN, RULE_KEYS
from sera_plugin.tools.convert.settings import LEFT_OUT
from tests.llama_factory import ALPACA, run, source


def left_out(said: str) -> dict[str, str]:
    """Key -> why, as the command tells."""
    listed = said.partition("To know:")[0]
    return dict(re.findall(r"^  (\w+): [^\n]*\n((?: {6}[^\n]*\n)+)", listed, re.MULTILINE))


# Whole YAMLs of our own in the manner of LLaMA-Factory's examples, and keys that they become.
YAMLS = {
    "lora": (
        """
{stage: dpo, pref_beta: 0.3, finetuning_type: lora, lora_rank: 4, lora_target: "q_proj,v_proj"}
{dataset: "talks,plain,openai", template: chatml, cutoff_len: 64, max_samples: 4}
{output_dir: saves/lora, report_to: none, overwrite_output_dir: true, bf16: false}
{per_device_train_batch_size: 2, ddp_timeout: 180000000, resume_from_checkpoint: null}
{learning_rate: 5e-6, num_train_epochs: 3.0, lr_scheduler_type: cosine, warmup_ratio: 0.1}
""",
        """
{adapter: lora, lora_r: 4, lora_alpha: 8, lora_target_modules: [q_proj, v_proj]}
{rl_beta: 0.3, num_epochs: 3, micro_batch_size: 2, ddp_timeout: 180000000}
{learning_rate: 5.0e-6, lr_scheduler: cosine, warmup_ratio: 0.1, sequence_len: 64}
""",
    ),
    "qlora with held-out pairs": (
        """
{stage: dpo, finetuning_type: lora, quantization_bit: 4, quantization_type: fp4}
{lora_rank: 16, lora_alpha: 32, lora_dropout: 0.05, lora_target: all}
{additional_target: embed_tokens, use_rslora: true, pref_beta: 0.1, dpo_label_smoothing: 0.1}
{dataset: talks, template: chatml, cutoff_len: 64, val_size: 0.2, eval_strategy: steps}
{eval_steps: 50, per_device_eval_batch_size: 2, output_dir: saves/qlora, save_strategy: epoch}
{optim: paged_adamw_8bit, learning_rate: 1.0e-5, num_train_epochs: 1, report_to: tensorboard}
bf16: false
""",
        """
{adapter: qlora, load_in_4bit: true, lora_alpha: 32, lora_dropout: 0.05}
bnb_config_kwargs: {bnb_4bit_quant_type: fp4, bnb_4bit_use_double_quant: true}
{lora_target_linear: true, lora_modules_to_save: [embed_tokens], peft_use_rslora: true}
{dpo_label_smoothing: 0.1, val_set_size: 0.2, eval_strategy: steps, eval_steps: 50}
{eval_batch_size: 2, save_strategy: epoch, optimizer: paged_adamw_8bit, use_tensorboard: true}
{num_epochs: 1, micro_batch_size: 8, warmup_steps: 0}
""",
    ),
    "full with simpo": (
        """
{stage: dpo, finetuning_type: full, pref_loss: simpo, pref_beta: 2.5, simpo_gamma: 1.0}
{pref_ftx: 0.1, dataset: plain, eval_dataset: talks, eval_strategy: epoch, template: chatml}
{cutoff_len: 64, output_dir: saves/full, disable_gradient_checkpointing: true}
{flash_attn: sdpa, warmup_steps: 10, num_train_epochs: 2.5, weight_decay: 0.01}
{max_grad_norm: 0.5, bf16: false}
""",
        """
{adapter: null, rl_beta: 2.5, simpo_gamma: 1.0, cpo_alpha: 0.1, gradient_checkpointing: false}
{attn_implementation: sdpa, warmup_steps: 10, num_epochs: 3, weight_decay: 0.01}
{max_grad_norm: 0.5, learning_rate: 5.0e-5, lr_scheduler: linear}
""",
    ),
    "some layers with the likelihood beside": (
        """
{stage: dpo, finetuning_type: freeze, freeze_trainable_layers: 1}
{freeze_trainable_modules: mlp, freeze_extra_modules: norm, pref_loss: ipo, pref_ftx: 0.2}
{dataset: openai, template: chatml, output_dir: saves/freeze, bf16: false}
""",
        """
adapter: null
unfrozen_parameters: ["[a-z_.]+.(1).mlp", "[a-z0-9_.]*norm"]
{dpo_loss_type: [ipo, sft], dpo_loss_weights: [1.0, 0.2], rl_beta: 0.1}
gradient_checkpointing_kwargs: {use_reentrant: false}
""",
    ),
}


def keys_of(text: str) -> dict:
    """Several keys may stand in a line, in braces."""
    lines = filter(None, text.splitlines())
    return {key: value for line in lines for key, value in yaml.safe_load(line).items()}


@pytest.mark.parametrize("name", YAMLS)
def test_what_it_writes_is_read_by_the_host(name, place, world, load, sera_log):
    given, expected = map(keys_of, YAMLS[name])
    written, _ = run(given | {"model_name_or_path": str(world.base)})
    cfg = load(written)
    assert [one for one in sera_log.messages if "no effect" in one or "not a key" in one] == []
    assert (cfg.rl, cfg.trainer_cls) == ("dpo", "sera_plugin.host.trainer.SeraTrainer")
    assert cfg.sera["loss"] == ("simpo" if "simpo" in name else "dpo")
    for key, value in expected.items():
        found = cfg.get(key)
        assert (list(found) if isinstance(found, tuple | list) else found) == value, key
    # The host drops keys that it does not know.
    assert set(written) - set(cfg.keys()) == set()


@pytest.mark.nightly
def test_the_host_trains_on_every_kind_of_dataset_and_on_some_layers(place, world, train):
    """Sharegpt, alpaca and openai rows, max_samples, and a model of which a part is trained."""
    for path in (place / "data").glob("*.json*"):  # words that the model's tokenizer knows
        text = path.read_text().replace("Rome", "a b").replace("Bread", "b a").replace("Oslo", "c")
        path.write_text(text)
    with (place / "data/plain.jsonl").open("a") as file:
        file.write(json.dumps(ALPACA | {"instruction": "a", "input": "b c"}))
    keys = {"dataset": "talks,plain,openai", "max_samples": 4, "cutoff_len": 64}
    keys |= {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "num_train_epochs": 1}
    keys |= {"model_name_or_path": str(world.base), "learning_rate": 1e-3}
    written, _ = run(source(**keys), Path("sera.yaml"))
    done = train(written | {"sera": written["sera"] | {"held_out": 0}})
    assert done.training_pairs[1].num_rows == 3 * 4
    before, after = load_file(world.base / "model.safetensors"), done.model.state_dict()
    moved = {name for name, weights in before.items() if not torch.equal(weights, after[name])}
    assert {name.partition(".layers.")[2].partition(".")[0] for name in moved} == {"1"}


def test_defaults_are_those_of_llama_factory(place):
    written, said = run(source())
    assert written.items() >= {
        "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True,
        "rl_beta": 0.1, "sequence_len": 2048, "num_epochs": 3, "micro_batch_size": 8,
        "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "lr_scheduler": "linear",
        "warmup_steps": 0, "optimizer": "adamw_torch", "seed": 42, "bf16": False, "fp16": False,
        "gradient_checkpointing": True, "logging_steps": 500, "save_steps": 500,
    }.items()  # fmt: skip
    assert "learning_rate 5e-05" in " ".join(said.split())


def test_keys_that_become_nothing_are_told_with_the_reason(place):
    """All that are in the table; that no other disappears is tried below."""
    lost = [name.replace("*", "thing") for names in LEFT_OUT for name in names.split()]
    _, said = run(source(**dict.fromkeys(lost, 1)))
    assert set(lost) == set(left_out(said))
    assert "Unknown" not in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora_rnak": 3}, "Did you mean lora_rank?"),
        ({"my_own_key": 3}, "Not a key that this knows."),
        ({"val_size": 100}, "Set val_set_size to 100 divided by their number."),
        ({"eval_strategy": "steps", "eval_steps": 5}, "no pairs are held out."),
        ({"simpo_gamma": 0.5}, "it has no effect beside the other keys."),
        ({"finetuning_type": "full", "lora_rank": 3}, "it has no effect beside the other keys."),
        ({"report_to": "swanlab"}, "swanlab is not switched on by a key of this name."),
        ({"greater_is_better": False}, "the host has it for supervised fine-tuning only"),
        ({"save_strategy": "best"}, "the host has `best` for supervised fine-tuning only"),
        ({"trust_remote_code": True}, "it would run code of the model's repository."),
    ],
)
def test_what_becomes_nothing_is_named_with_the_reason(keys, said, place):
    written, told = run(source(**keys))
    name = next(key for key in left_out(told) if key in keys)
    assert said in " ".join(left_out(told)[name].split())
    assert not set(keys) & set(written) - {"eval_strategy"}


def test_secrets_and_odd_values_are_not_shown(place):
    _, said = run(source(hf_hub_token="hf_geheim", swanlab_api_key="geheim", mine="a\x1b[2Jb"))
    assert "geheim" not in said
    assert r"a\x1b[2Jb" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_name_or_path": None}, "model_name_or_path is not set"),
        ({"stage": "sft"}, "stage: 'sft' trains no preference pairs"),
        ({"pref_loss": "bco"}, "pref_loss: 'bco' is not a loss that rl: sera has"),
        ({"pref_loss": "orpo", "pref_ftx": 0.1}, "has nothing like it with pref_loss: orpo"),
        ({"finetuning_type": "oft"}, "finetuning_type: 'oft' has nothing like it"),
        ({"quantization_bit": 2}, "quantization_bit: 2"),
        ({"quantization_bit": 4, "finetuning_type": "full"}, "needs finetuning_type: lora"),
        ({"adapter_name_or_path": "a,b"}, "Merge them first"),
        ({"finetuning_type": "freeze"}, "Download the model"),
        ({"pref_ftx": 0.1, "dpo_label_smoothing": 0.1}, "the host has no loss of both"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is not a number"),
        ({"lora_rank": 2.5}, "lora_rank: 2.5 is not a whole number"),
        ({"bf16": "perhaps"}, "bf16: 'perhaps' is neither true nor false"),
        ({"num_train_epochs": 0}, "num_train_epochs: 0 trains nothing"),
        ({"flash_attn": "fa9"}, "flash_attn: 'fa9' is none of"),
        ({"dataset": None}, "dataset is not set"),
        ({"dataset": "nothing"}, "dataset: 'nothing' is not in data/dataset_info.json"),
        ({"dataset": "answers"}, "'answers' has no `ranking: true`"),
        ({"dataset_dir": "ONLINE"}, "dataset_dir: 'ONLINE' has no dataset_info.json"),
    ],
)
def test_what_has_nothing_like_it_is_refused(keys, said, place):
    with pytest.raises(ValueError, match=re.escape(said)):
        run(source(**keys), Path("sera.yaml"))
    assert not Path("sera.yaml").exists()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 99), st.floats(), st.text(max_size=5),
    st.sampled_from(["dpo", "lora", "full", "sigmoid", "simpo", "ipo", "steps", "5e-6", "all"]),
    st.lists(st.integers(0, 9), max_size=2), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.dictionaries(st.sampled_from(sorted(KNOWN)) | st.text(max_size=9), VALUES))
def test_whatever_a_yaml_holds_is_converted_told_or_refused(keys, place):
    """No value ends in anything but a refusal, and no key disappears."""
    read = source(**keys | {"dataset_dir": "data", "dataset": "talks", "stage": "dpo"})
    try:
        _, said = run(read)
    except ValueError:
        return
    for name in {name for name, value in read.items() if value is not None} - RULE_KEYS:
        assert f"  {plain(name)}: " in said
