"""What the plugin does with a configuration, and what it says to one it cannot run with.

Misuse is refused in `register`, before the host validates or loads anything.
"""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import gpu_capabilities
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from pydantic import ValidationError
from transformers import LlamaConfig

from sera_plugin import SeraPlugin
from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.config import restore_entries
from sera_plugin.host.keys import REFUSALS
from sera_plugin.host.refused import ENTRY_MISTAKES, MISTAKES
from tests.conftest import make_config

TRAINER = "sera_plugin.host.trainer.SeraTrainer"


def config(**keys: Any) -> dict[str, Any]:
    """The smallest raw configuration, with the keys a test is about."""
    return {
        "base_model": "base",
        "plugins": ["sera_plugin.SeraPlugin"],
        "rl": "sera",
        "datasets": [{"path": "train.jsonl", "ds_type": "json", "type": "chat_template.default"}],
        **keys,
    }


def register(**keys: Any) -> dict[str, Any]:
    cfg = config(**keys)
    SeraPlugin().register(cfg)
    return cfg


#: Changes of the YAML => what they become; unset keys of the host's `vllm:` stay unset, where it
#: would fill in 0.9 of the GPU and a server on all interfaces.
BECOMES = """
sera: null => {rl: dpo, trainer_cls: sera_plugin.host.trainer.SeraTrainer, num_epochs: 3, seed: 42}
{num_epochs: 1.0, seed: 0, rl_beta: 0.37} => {num_epochs: 1, seed: 0, rl_beta: 0.37}
trl: {} => rl_beta: 0.2
{fsdp_version: 2, fsdp_config: {offload_params: true}}
    => fsdp_config: {offload_params: true, state_dict_type: FULL_STATE_DICT}
fsdp_config: {fsdp_version: "2"}
    => fsdp_config: {fsdp_version: "2", state_dict_type: FULL_STATE_DICT}
vllm: null => vllm: {gpu_memory_utilization: null, host: 127.0.0.1}
{plugins: [axolotl.integrations.lm_eval.LMEvalPlugin], output_dir: o, hub_model_id: me/it}
    => lm_eval_model: o
{plugins: [axolotl.integrations.lm_eval.LMEvalPlugin], output_dir: o, adapter: lora}
    => lm_eval_model: "base,peft=o"
{plugins: [axolotl.integrations.lm_eval.LMEvalPlugin], output_dir: o, lm_eval_model: other}
    => lm_eval_model: other
vllm: {port: 8001} => vllm: {gpu_memory_utilization: null, host: 127.0.0.1, port: 8001}
vllm: {gpu_memory_utilization: 0.4, host: 10.0.0.5}
    => vllm: {gpu_memory_utilization: 0.4, host: 10.0.0.5}
{datasets: [{path: a}, {path: b, type: chatml.intel}], test_datasets: [{path: c, type: null}]}
    => {datasets: [{path: a, type: passthrough.default}, {path: b, type: chatml.intel}],
        test_datasets: [{path: c, type: passthrough.default}]}
"""


def lines(text: str) -> list[str]:
    """One case a line; what is indented goes on with the line above."""
    return re.sub(r"\n +", " ", text.strip()).splitlines()


@pytest.mark.parametrize("case", lines(BECOMES))
def test_rl_sera_becomes_the_hosts_dpo_with_our_trainer(case):
    change, made = map(yaml.safe_load, case.split(" => "))
    assert register(**change).items() >= made.items()


def test_the_first_process_alone_runs_lm_eval_after_training(monkeypatch):
    keys = {"plugins": ["axolotl.integrations.lm_eval.LMEvalPlugin"], "output_dir": "o"}
    assert "lm_eval_post_train" not in register(**keys)
    monkeypatch.setenv("RANK", "1")
    assert register(**keys)["lm_eval_post_train"] is False
    assert "lm_eval_post_train" not in register()


@pytest.mark.parametrize(
    ("keys", "keep"),
    [
        ({"load_best_model_at_end": True}, "best"),
        ({"load_best_model_at_end": False}, "last"),
        ({"early_stopping_patience": 3}, "best"),
        ({"early_stopping_patience": 3, "load_best_model_at_end": True}, "best"),
        ({"load_best_model_at_end": True, "sera": {"keep": "best"}}, "best"),
        ({"early_stopping_patience": 0, "sera": {"keep": "last"}}, "last"),
    ],
)
def test_the_hosts_keys_say_which_policy_is_kept(keys, keep):
    assert register(**keys)["sera"]["keep"] == keep


#: Changes of the YAML that the plugin takes as they are.
WORKS = """
sera: {bootstrap_ratio: 2, score_columns: [score]}
{sera: {loss: robust}, dpo_label_smoothing: 0.1}
{sera: {loss: simpo}, simpo_gamma: 0.5, cpo_alpha: 0.1}
dpo_loss_type: [apo_zero]
dpo_label_smoothing: 0.1
{dpo_label_smoothing: 0.0, sera: {loss: ipo}}
{max_steps: null, sample_packing: false, streaming: false}
{load_best_model_at_end: false, save_strategy: epoch}
{context_parallel_size: 1, sequence_parallel_degree: 1}
{float32: true, bf16: false}
{activation_offloading: true, gradient_checkpointing: true}
{activation_offloading: hidden_states, gradient_checkpointing_kwargs: {use_reentrant: true}}
{precompute_ref_log_probs: true, layer_offloading: false}
{fsdp_version: 2, fsdp_config: {state_dict_type: FULL_STATE_DICT}}
"""


@pytest.mark.parametrize("line", lines(WORKS))
def test_what_works_is_left_alone_and_registering_twice_changes_nothing_more(line):
    """The host parses a configuration again in launched and Ray workers."""
    keys = yaml.safe_load(line)
    once = register(**keys)
    assert [key for key in keys if key != "sera" and once[key] != keys[key]] == []
    json.dumps(once["sera"])
    twice = copy.deepcopy(once)
    SeraPlugin().register(twice)
    assert twice == once


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_beta_is_the_losss_own_unless_set(loss):
    smoothing = 0.1 if loss == "robust" else None
    keys: dict[str, Any] = {"sera": {"loss": loss}, "dpo_label_smoothing": smoothing}
    assert register(**keys)["rl_beta"] == LOSSES[loss].beta
    kept = register(**keys, trl={"beta": 0.41})
    assert (kept["trl"], kept.get("rl_beta")) == ({"beta": 0.41}, None)


def test_defaults_are_the_papers_and_a_block_is_frozen_and_read_again_as_it_was_written():
    papers = {"selection_ratio": 0.7, "bootstrap_ratio": 0.3, "gamma": 0.3, "loss": "dpo"}
    papers |= {"candidates": 4, "temperature": 0.7, "top_p": 0.95}
    assert register()["sera"].items() >= papers.items()
    assert [LOSSES[loss].beta for loss in ("dpo", "slic", "ipo")] == [0.2, 0.2, 1.0]
    for keys in ({"bootstrap_ratio": 2, "score_columns": ["a"]}, {"selection": "all"}):
        config = SeraConfig(**keys)
        assert SeraConfig(**config.model_dump(mode="json")) == config
    assert config.selection_ratio == 1
    with pytest.raises(ValidationError, match="frozen"):
        config.gamma = 0.5


@pytest.mark.parametrize(("ratio", "needed"), [(0, 1), (1, 1), (1.1, 2), (2, 2), (2.1, 3), (3, 3)])
def test_a_ratio_needs_so_many_pairs_a_prompt(ratio, needed):
    assert SeraConfig(bootstrap_ratio=ratio, candidates=2 * needed).pairs_per_prompt == needed
    with pytest.raises(ValidationError, match=f"needs {needed} pairs per prompt"):
        SeraConfig(bootstrap_ratio=max(ratio, 0.1), candidates=2 * needed - 1)


#: Changes of the YAML => what the message contains: key, value, remedy. TRL 1.9 reads label
#: smoothing in some of its losses only; not in `sigmoid`.
MISUSE = """
rl: ipo => rl: ipo | Set `rl: sera` | remove the plugin
rl: null => rl: null | Set `rl: sera`
{rl: dpo, sera: {gamma: 0.5}} => `sera:` block | rl: dpo | Set `rl: sera`
sera: 0.7 => sera: 0.7 | indent
sera: {selecton_ratio: 0.5} => sera.selecton_ratio | Did you mean `selection_ratio`
sera: {xyz: 1} => sera.xyz | Known keys: selection_ratio
sera: {gamma: 1.5} => sera.gamma: 1.5 | less than or equal to 1
sera: {push_to_hub: mine} => sera.push_to_hub | 'mine' is no repository | user/name
{sera: {push_to_hub: user/mine}, hub_model_id: user/mine}
    => hub_model_id: user/mine | sera.push_to_hub | Keep one of them
sera: {prompts: [{path: p}], labeler: spin} => prompts has no effect: labeler: spin | Remove prompts
sera: {prompts: {path: p}, bootstrap_ratio: 0} => prompts | bootstrap_ratio: 0.0 ranks no samples
sera: {labeler: function} => labeler: function with function unset | function: checks.py:score
sera: {labeler: function, function: checks.py} => sera.function | 'checks.py' names no function
sera: {labeler: function, function: {call: 'a.py:f', timout: 1}} => timout | `timeout`
sera: {labeler: [function, implicit], function: 'a.py:f'} => sera.labeler | begins with implicit
sera: {labeler: [implicit, function], function: 'a.py:f', bootstrap_ratio: 0}
    => labeler: implicit + function | samples none | to 0.3
sera: {labeler: [implicit, function]} => with function unset. Set function | checks.py:score
sera: {labeler: functon, function: 'a.py:f'}
    => sera.labeler: 'functon' is no labeler | one of implicit | Did you mean function?
sera: {labeler: [implicit, 7]} => sera.labeler: 7 is no labeler
sera: {prompts: p.jsonl} => sera.prompts: 'p.jsonl' is no entry | `- path: p.jsonl`
sera: {labeler: [implicit, spin]} => sera.labeler | some of reward_model, judge, function
sera: {labeler: [implicit, function], function: 'a.py:f', reward: paper}
    => reward: paper | Set reward: fitted
sera: {labeler: [implicit, judge], judge: {base_url: 'http://x/v1', model: m}}
    => judge.mode: pairwise | mode: single
sera: {prompts: [{path: q}, p.jsonl]} => sera.prompts: 'p.jsonl' is no entry | `- path: p.jsonl`
sera: {labeler: [implicit, function], function: 'a.py:f', held_out: 0} => none are held out | Set
sera: {score_columns: margin} => sera.score_columns: 'margin' is no list | Write [margin].
sera: {prompts: [3]} => sera.prompts.0: 3 | dictionary
sera: {prompts: [{path: p, field_mesages: x}]} => sera.prompts[0].field_mesages | `field_messages`
sera: {prompts: [{split: train}]} => sera.prompts[0].path: null | name a file
sera: {candidates: 1} => candidates: 1 | Raise candidates to 2
sera: {length_control: .inf} => sera.length_control | finite number
sera: {loss: kto} => sera.loss: 'kto' | 'kto_pair'
selection_ratio: 0.5 => `selection_ratio` | `sera: {selection_ratio: ...}`
{dpo_padding_free: true, attn_implementation: sdpa} => dpo_padding_free: true | flash_attention_2
{dpo_use_liger_kernel: true, dpo_loss_type: [sigmoid]} => dpo_use_liger_kernel: true | sera.loss
sera_selecton_ratio: 0.5 => `sera_selecton_ratio` | sera: {selection_ratio
sera-gamma: 0.5 => `sera-gamma` | sera: {gamma
sera_xyz: 0.5 => `sera_xyz` | `sera:` block
serra: {gamma: 0.5} => `serra` | Did you mean `sera`
SeRA: {gamma: 0.5} => `SeRA` | Did you mean `sera`
bootstrp_ratio: 0.5 => `bootstrp_ratio` | sera: {bootstrap_ratio
num_epochs: 2.5 => num_epochs: 2.5 | set num_epochs to 1, 2, 3
trl: {beta: 0} => trl.beta: 0 | above 0
{activation_offloading: legacy, gradient_checkpointing: true}
    => activation_offloading: legacy | activation_offloading: true
gradient_checkpointing: offload_disk
    => gradient_checkpointing: offload_disk | activation_offloading: true
{activation_offloading: hidden_states, gradient_checkpointing: true}
    => activation_offloading: hidden_states | activation_offloading: true
precompute_ref_log_probs: false => precompute_ref_log_probs: false | Remove
context_parallel_size: 2 => context_parallel_size: 2 | remove
sequence_parallel_degree: 2 => sequence_parallel_degree: 2 | remove
float32: true => float32: true | Set bf16: false and fp16: false
fsdp: [full_shard] => fsdp_config: null | fsdp_version: 2
optimizer: polora => optimizer: polora keeps | sera.restart_optimizer: false
optimizer: galore_adamw_layerwise => optimizer: galore_adamw_layerwise keeps
deepspeed: nowhere.json => deepspeed: nowhere.json is neither a file | fetch deepspeed_configs
deepspeed: [1] => deepspeed: [1] is neither a file
deepspeed: {zero_optimization: {stage: 0}} => no zero_optimization.stage of 1, 2 or 3
deepspeed: {bf16: {enabled: true}} => no zero_optimization.stage of 1, 2 or 3
deepspeed: {zero_optimization: {stage: 1}, optimizer: {type: Adam}} => an optimizer or a scheduler
deepspeed: {zero_optimization: {stage: 1}, scheduler: {type: WarmupLR}}
    => an optimizer or a scheduler | set optimizer, learning_rate and lr_scheduler
deepspeed: {zero_optimization: {stage: 3}} => stage3_gather_16bit_weights_on_model_save to true
deepspeed: {zero_optimization: {stage: 2, offload_optimizer: {device: nvme}}} => on a disk
deepspeed: {zero_optimization: {stage: 1, zero_hpz_partition_size: 4}} => ZeRO++
deepspeed: {zero_optimization: {stage: 1}, tensor_parallel: {autotp_size: 2}} => shares layers out
fsdp_config: {offload_params: true} => fsdp_version: null | version: 2
fsdp_config: {fsdp_version: 1} => fsdp_version: 1 does | Set fsdp_version: 2
{fsdp_version: 2, fsdp_config: {state_dict_type: SHARDED_STATE_DICT}}
    => fsdp_config.state_dict_type: SHARDED_STATE_DICT | FULL_STATE_DICT
{fsdp_version: 2, fsdp_config: {offload_params: true}, load_in_4bit: true}
    => load_in_4bit: true | Remove load_in_4bit
save_strategy: best => save_strategy: best | save_strategy: epoch
{load_best_model_at_end: true, sera: {keep: last}}
    => load_best_model_at_end: true contradicts sera.keep: last | Remove one
{load_best_model_at_end: false, sera: {keep: best}}
    => load_best_model_at_end: false contradicts sera.keep: best
{early_stopping_patience: 3, sera: {keep: last}}
    => early_stopping_patience: 3 | sera.keep: last | Set sera.keep: best
{early_stopping_patience: 3, load_best_model_at_end: false}
    => early_stopping_patience: 3 | load_best_model_at_end: false | Set sera.keep: best
sera: {bootstrap_ratio: 3, candidates: 4}
    => bootstrap_ratio: 3.0 needs 3 pairs | candidates: 4 | candidates to 6 or lower | ratio to 2
sera: {selection_ratio: 0, bootstrap_ratio: 0}
    => selection_ratio: 0 | bootstrap_ratio: 0 | Raise one
{dpo_loss_type: [ipo], sera: {loss: slic}} => dpo_loss_type: ['ipo'] | sera.loss: slic | Keep
sera: {loss: robust} => sera.loss: robust | dpo_label_smoothing | 0.1
dpo_label_smoothing: 0.5 => dpo_label_smoothing: 0.5 | from 0 to below 0.5
{dpo_label_smoothing: 0.1, sera: {loss: ipo}}
    => dpo_label_smoothing: 0.1 | sera.loss: ipo | Remove
{dpo_label_smoothing: 0.1, dpo_loss_type: [sigmoid]} => dpo_label_smoothing: 0.1 | dpo_loss_type
{cpo_alpha: 0.5, sera: {loss: ipo}} => cpo_alpha: 0.5 | sera.loss: simpo
vllm: {gpu_memory_utilisation: 0.5}
    => vllm.gpu_memory_utilisation | Did you mean `gpu_memory_utilization`
trl: {beta: strong} => trl.beta: strong is not a number
trainer_cls: a.b => trainer_cls: a.b | remove trainer_cls
sera: {sampler: vllm-server} => sera.sampler: vllm-server | needs an adapter | adapter: lora
sera: {servers: ["http://a:1"]} => sera.sampler: vllm-server | needs an adapter
{adapter: lora, vllm: {port: 8000}, sera: {servers: ["http://a:1"]}}
    => vllm.port: 8000 | sera.servers. Remove vllm.port
{adapter: lora, vllm: {host: b}, sera: {servers: ["http://a:1"]}} => vllm.host: b | list all
sera: {sampler: vllm, servers: ["http://a:1"]}
    => servers: ('http://a:1',) | sampler: vllm. | Remove servers, or set sampler to vllm-server
sera: {servers: ["http://a:1", "a:1"]} => sera.servers | such as http://127.0.0.1:8000
sera: {servers: ["http://A:80/v1", "http://a/"]} => sera.servers: 'http://a/' | twice | Remove
sera: {servers: ["https://me:hidden@a"]} => sera.servers | VLLM_API_KEY
sera: {servers: "http://me:hidden@a"} => sera.servers: 'http://***@a' is no list
{val_set_size: 0.1, sera: {held_out: 20}} => sera.held_out: 20.0 | val_set_size | Keep one
sera: {gamma: true} => sera.gamma: True is not a number
dpo_loss_type: [sigmoyd] => dpo_loss_type: ['sigmoyd'] | sigmoid, hinge | dpo_loss_type: [sigmoid]
dpo_loss_type: ipo => dpo_loss_type: ipo | list
vllm: [port] => vllm: ['port'] | indent
trl: beta => trl: 'beta' | indent
num_epochs: 1000000000000000000000000000000 => num_epochs: 1000 | set num_epochs
datasets: null => datasets: null is not a list | path: pairs.jsonl
datasets: [] => datasets: [] | path: pairs.jsonl
datasets: {path: a} => datasets: {'path': 'a'} is not a list | path: pairs.jsonl
datasets: [a.jsonl] => datasets[0]: 'a.jsonl' | `path:`
datasets: [{path: a}, {type: x}] => datasets[1].path: null | name a file
datasets: [{path: a, tpye: x}] => datasets[0].tpye | Did you mean `type`
datasets: [{path: a, type: {field_choosen: x}}]
    => datasets[0].type.field_choosen | Did you mean `field_chosen`
datasets: [{path: a, type: {field_chosen: 5}}] => datasets[0].type.field_chosen: 5 | Quote it
test_datasets: [{path: a, type: 5}] => test_datasets[0].type: 5 | chat_template.default
datasets: [{path: a, name: [x, y]}] => datasets[0].name: ['x', 'y'] | an entry of its own
datasets: [{path: a, shards: 10}] => datasets[0].shards: 10 | split: train[:10%]
datasets: [{path: a, drop_system_message: true}] => datasets[0].drop_system_message: true | leave
datasets: [{path: a, field_thinking: thought}]
    => datasets[0].field_thinking: thought | message_property_mappings
dpo_use_weighting: true => dpo_use_weighting: true | dpo_loss_type
dpo_loss_weights: [0.5] => dpo_loss_weights: [0.5] | dpo_loss_type
sera: {ipo_reduction: sum} => sera.ipo_reduction: sum | loss: dpo | or set loss to ipo
sera: {selection: all, selection_ratio: 0.5} => selection_ratio: 0.5 | Remove selection_ratio
sera: {selection: score} => selection: score | none is named | score_columns: [score_chosen
sera: {labeler: spin, bootstrap_ratio: 2.0} => bootstrap_ratio: 2.0 | Set bootstrap_ratio to 1
sera: {labeler: spin, bootstrap_ratio: 0} => labeler: spin | samples none | to 0.3
sera: {labeler: reward_model} => labeler: reward_model | reward_model unset | Set both
sera: {reward_model: here} => labeler: implicit | reward_model set | or neither
sera: {length_control: true} => sera.length_control: True is not a number
sera: {length_control: some} => sera.length_control | 'some'
sera: {length_control: 0.1, labeler: spin} => length_control: 0.1 | labeler: spin | Remove
sera: {offline_length_control: auto, selection: random}
    => offline_length_control: auto has no effect | selection: random | selection to irm
sera: {reference: initial, loss: orpo} => reference: initial | loss: orpo | Remove reference
sera: {score_columns: [a, row]} => score_columns: 'row' is what the pairs | Rename
sera: {score_columns: [chosen_ids, sera_row]} => score_columns: 'chosen_ids', 'sera_row' is what
chat_template_jinja: no-such.jinja => chat_template_jinja: no-such.jinja is neither a file
datasets: [{path: a, chat_template_jinja: no-such.jinja}] => [0].chat_template_jinja: no
datasets: [{path: a, roles: [user]}] => datasets[0].roles: ['user'] is not a block
datasets: [{path: a, message_property_mappings: role}] => message_property_mappings: role is not a
"""
CASES = lines(MISUSE)


def refusal(**keys: Any) -> str:
    """What is said; the configuration is left as it was."""
    cfg = config(**copy.deepcopy(keys))
    with pytest.raises(ValueError, match=r".") as error:
        SeraPlugin().register(cfg)
    assert cfg == config(**keys)
    return str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_misuse_names_key_value_and_remedy(case):
    change, said = case.split(" => ")
    message = refusal(**yaml.safe_load(change))
    assert [part for part in said.split(" | ") if part not in message] == [], message


def test_every_line_of_the_tables_is_tried():
    messages = [refusal(**yaml.safe_load(case.split(" => ")[0])) for case in CASES]
    # tests/test_host_keys.py tries what is refused whatever its value.
    conditional = [line for line in REFUSALS if line.when or line.values]
    for line in [*MISTAKES, *ENTRY_MISTAKES, *conditional]:
        start = line.remedy.partition("{")[0]
        assert any(start in message for message in messages), line


def test_every_problem_of_the_block_is_named_at_once_and_a_resolved_block_is_read_too():
    message = refusal(sera={"gamma": -1, "top_p": 2})
    assert re.search(r"sera\.gamma.*; sera\.top_p", message)
    assert "https://errors.pydantic" not in message
    assert "sera: 'x' is not a block" in refusal(rl="dpo", trainer_cls=TRAINER, sera="x")


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """A complete configuration; the base model is a config.json, nothing here loads weights."""
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "base")
    return make_config(tmp_path, tmp_path)


@pytest.mark.parametrize("block", [None, {"max_model_len": 512}])
def test_the_host_accepts_what_the_plugin_made_and_it_can_be_registered_again(block, tiny, load):
    """A Ray worker gets the validated configuration, with all of the host's defaults in it."""
    cfg = load({**tiny, "sera": {"loss": "simpo"}, "simpo_gamma": 0.5, "vllm": block})
    assert (cfg.rl, cfg.trainer_cls, cfg.num_epochs, cfg.rl_beta) == ("dpo", TRAINER, 3, 2.0)
    assert (cfg.sera["loss"], cfg.sera["candidates"]) == ("simpo", 4)
    found = {key: value for key, value in cfg.vllm.items() if value is not None}
    assert found.keys() & {"gpu_memory_utilization", "enforce_eager"} == set()
    assert found["host"] == "127.0.0.1"
    assert found.get("max_model_len") == (block or {}).get("max_model_len")

    def travelling() -> str:  # a tuple is a list there
        return json.dumps(cfg.to_dict(), default=str, sort_keys=True)

    before = travelling()
    SeraPlugin().register(cfg)
    # Set to nothing, or the host would fill it in when it validates again.
    assert cfg["vllm"].pop("gpu_memory_utilization", 0.9) is None
    assert travelling() == before


def test_evaluating_the_base_model_is_refused(tiny, tmp_path):
    """The host's command loads no trained model: it would compare the first one with itself."""
    from axolotl.cli.evaluate import do_cli

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny), encoding="utf-8")
    with pytest.raises(ValueError, match=r"axolotl evaluate .*Use `axolotl sera eval"):
        do_cli(str(tmp_path / "config.yaml"))
    register()


def test_configuration_files_and_method_load_no_heavy_library():
    names = "cli config.sera tools.demo rundir.store labeling.judging.api algorithm.algorithm"
    modules = ", ".join(f"sera_plugin.{name}" for name in names.split())
    code = (
        f"import sys, {modules}\n"
        "print(sorted({'torch', 'trl', 'transformers', 'axolotl', 'vllm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.decode().strip() == "[]"


def test_a_worker_of_ray_gets_the_datasets_as_they_were_written(base_config, load):
    """The host's driver validates them, and hands them to workers that validate them again."""
    written = {"field_prompt": "prompt", "field_chosen": "chosen"}  # which validation empties
    base_config["datasets"][0]["type"] = written
    handed = DictDefault(load(base_config | {"use_ray": True}).to_dict())
    plugin = SeraPlugin()
    plugin.register(handed)
    again = validate_config(handed, *gpu_capabilities())
    assert (again.rl, again.trainer_cls) == ("dpo", TRAINER)
    restore_entries(again, plugin._entries)
    assert again.datasets[0].type.to_dict() == written
    assert "sera_entries" not in again
