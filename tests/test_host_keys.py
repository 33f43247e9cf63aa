"""No key is taken that does nothing: each of the host's is honoured, refused or named in a warning.

`host_keys.txt` lists those that are honoured. A host that brings another key fails here, with its
name: read what the host does with it, and put it there or into a table of sera_plugin/host/keys.py.
"""

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import axolotl
import pytest
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.trl import TRLConfig
from axolotl.utils.schemas.vllm import VllmConfig

from sera_plugin.host.keys import ENTRY_OF_MESSAGES, ENTRY_UNUSED, REFUSALS, UNUSED
from sera_plugin.host.refused import ENTRY_MISTAKES, entry_keys
from sera_plugin.host.unused import NEVER
from sera_plugin.tools import paper
from sera_plugin.tools.convert.convert import RULES
from tests.doc_pages import PAGES, ROOT, blocks
from tests.test_plugin_config import config, lines, refusal, register

HOST = Path(next(iter(axolotl.__path__)))
OURS = ROOT / "sera_plugin"
HONOURED = (ROOT / "tests/host_keys.txt").read_text().split()

#: Where a run of `rl: sera` passes through, or another command of the host for what was trained.
READERS = """
cli core/builders/base.py core/builders/rl.py core/trainers/dpo loaders train.py utils/config
utils/callbacks/opentelemetry.py utils/callbacks/dynamic_checkpoint.py utils/data/lock.py
utils/data/shared.py utils/distributed.py utils/train.py utils/trainer.py utils/chat_templates
utils/comet_.py utils/mlflow_.py utils/trackio_.py utils/wandb_.py utils/fp32_norms.py
monkeypatch/lora_kernels.py monkeypatch/attention
"""
#: Lists of all keys there are.
NOT_READERS = {"config_options.py", "keys.py"}
#: What the host itself refuses, or renames when it validates; and `float32`, which is refused
#: beside what contradicts it.
OF_OLD = """
max_packed_sequence_len rope_scaling dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss
rpo_alpha s2_attention flash_attn_rms_norm evaluation_strategy dataset_processes
sequence_parallel_degree xformers_attention sdp_attention flex_attention flash_attention
sage_attention eager_attention float32
"""
#: Put into the environment by what their names begin with.
PREFIXES = ("wandb_", "comet_", "mlflow_", "hf_mlflow_", "trackio_")


def names_in(tables: Any) -> list[str]:
    return [key for keys in tables for key in keys.split(", ")]


def read_in(files: Iterator[Path], *holders: str) -> set[str]:
    """Names that are read of a configuration: `cfg.key`, `cfg["key"]`, `getattr(cfg, "key")`."""

    def holds(node: ast.AST) -> bool:
        return ast.unparse(node).rpartition(".")[2] in holders

    found = set()
    for node in chain.from_iterable(ast.walk(ast.parse(file.read_text())) for file in files):
        match node:
            case ast.Attribute(value, name) if holds(value):
                found.add(name)
            case ast.Subscript(value, ast.Constant(name)) if holds(value):
                found.add(name)
            case ast.Compare(ast.Constant(name), [ast.In() | ast.NotIn()], [value]) if holds(value):
                found.add(name)
            case ast.Call(ast.Attribute(value, "get"), [ast.Constant(name), *_]) if holds(value):
                found.add(name)
            case ast.Call(ast.Name("getattr"), [value, ast.Constant(name), *_]) if holds(value):
                found.add(name)
    return found


def files_in(*places: Path) -> Iterator[Path]:
    found = chain.from_iterable([one] if one.is_file() else one.rglob("*.py") for one in places)
    return (file for file in found if file.name not in NOT_READERS)


def test_each_key_of_the_host_has_one_state():
    assert sorted(HONOURED) == HONOURED
    keys, dead = AxolotlInputConfig.model_fields.keys(), names_in(UNUSED)
    unconditional = [one.keys for one in REFUSALS if not (one.when or one.values)]
    states = [*HONOURED, *dead, *names_in(unconditional)]
    assert set(dead) | set(names_in(unconditional)) == NEVER
    assert sorted(keys - set(states)) == [], "of the host, and in no table"
    assert [key for key in HONOURED if key not in keys] == [], "not of the host"
    assert len(states) == len(set(states))
    nested = {f"vllm.{name}" for name in VllmConfig.model_fields} | {"trl.*"}
    assert {key for key in dead if "." in key} <= nested


def test_what_is_honoured_is_read_where_a_run_passes():
    rooms = [OURS / room for room in ("host", "data", "sampling")]
    files = files_in(*(HOST / name for name in READERS.split()), *rooms)
    read = read_in(files, "cfg", "parsed_cfg", "source")
    # It goes through lists of names.
    builder = (HOST / "core/builders/base.py").read_text()
    read |= {key for key in HONOURED if f'"{key}"' in builder}
    unread = {key for key in HONOURED if key not in read and not key.startswith(PREFIXES)}
    assert unread == set(OF_OLD.split())


def test_each_key_of_a_dataset_has_one_state():
    never = [one.keys for one in ENTRY_MISTAKES if one.when is None]
    dead = names_in([*ENTRY_UNUSED, *never])
    assert set(names_in([ENTRY_OF_MESSAGES])) <= set(entry_keys()) - set(dead)
    assert len(dead) == len(set(dead))
    assert set(dead) <= set(entry_keys())
    strategies = HOST / "prompt_strategies/dpo"
    files = [HOST / "utils/data/shared.py", strategies, HOST / "utils/schemas/utils.py"]
    read = read_in(
        files_in(
            *files,
            HOST / "utils/chat_templates",
            OURS / "host/datasets.py",
            OURS / "host/reading.py",
        ),
        "dataset_config",
        "entry",
        "ds_cfg",
        "data",
    )
    assert {key for key in entry_keys() if key not in dead} <= read


@pytest.fixture
def said(sera_log):
    """The warnings about a configuration."""

    def said(**keys: Any) -> list[str]:
        sera_log.clear()
        register(**keys)
        return list(sera_log.messages)

    return said


def nested(key: str, value: Any) -> dict[str, Any]:
    block, _, inner = key.partition(".")
    return {block: {inner: value} if inner else value}


UNCONDITIONAL = [one for one in REFUSALS if not (one.when or one.values)]


@pytest.mark.parametrize("line", UNCONDITIONAL, ids=lambda line: line.keys.split(",")[0])
def test_what_never_works_is_refused_unless_it_is_off(line):
    for key in line.keys.split(", "):
        remedy = line.remedy.format(key=key)
        assert refusal(**{key: "x"}) == f"{key}: x does not work here: {remedy}."
        for off in (None, False, 0, []):
            register(**{key: off})


@pytest.mark.parametrize("keys", UNUSED, ids=lambda keys: keys.split(",")[0])
def test_what_has_no_effect_is_named_unless_it_is_off_or_a_default(keys, said):
    fields, why = AxolotlInputConfig.model_fields, UNUSED[keys]
    for key in keys.replace("trl.*", "trl.max_completion_length").split(", "):
        assert said(**nested(key, "x")) == [f"SeRA: {key} has no effect: {why}. Remove it."]
        field = fields.get(key)
        default = field.get_default(call_default_factory=True) if field else None
        for off in (None, False, 0, default):
            assert said(**nested(key, off)) == []


def test_all_keys_of_one_kind_are_named_at_once(said):
    grpo = {name: "x" for name in TRLConfig.model_fields if name != "beta"}
    (warning,) = said(trl=grpo | {"beta": 0.3})
    assert warning.startswith(", ".join(f"trl.{name}" for name in grpo).join(("SeRA: ", " have")))
    (warning,) = said(liger_fused_linear_cross_entropy=True, cut_cross_entropy=True)
    assert "liger_fused_linear_cross_entropy, cut_cross_entropy have no effect: " in warning


#: Changes of the YAML => all that is said of them, by what each warning has.
SAID = """
num_epochs: 1 => num_epochs: 1 ends before iteration 2 | are selected and sampled. Set num_epochs
{num_epochs: 1, sera: {bootstrap_ratio: 0}} => pairs are selected. Set num_epochs to 2 or more.
{num_epochs: 1, sera: {selection_ratio: 1}} => pairs are sampled. Set num_epochs to 2 or more.
{num_epochs: 1, sera: {selection_ratio: 1, bootstrap_ratio: 0}} =>
{num_epochs: 1, sera: {selection_ratio: 0, bootstrap_ratio: 1, labeler: spin}} =>
num_epochs: 2 =>
micro_batch_sise: 2 => `micro_batch_size`
learning_rat: 1.0e-5 => `learning_rate`
beta: 0.3 => beta is not a key of the host or of a plugin | Did you mean `rl_beta`
gradient_checkpoint: true => `gradient_checkpointing`
their_key: {a: 1} => their_key is not a key of the host or of a plugin | Remove it.
{their_key: 1, other: 2} => their_key is not a key && other is not a key
liger_rope: true => liger_rope is not a key
their_key: null =>
{model_type: LlamaForCausalLM, model_revision: main, debug: true, shard: false} =>
trl: {bta: 0.3} => trl.bta is not a key | Did you mean `beta`
peft: {loftq_config: {loftq_bit: 4}} => peft.loftq_config.loftq_bit is | Did you mean `loftq_bits`
{fsdp_version: 2, fsdp_config: {fsdp_offload_params: true, version: 2, reshard: true}}
    => fsdp_config.reshard is not
lr_scheduler: cosine_with_restarts
lr_scheduler_kwargs: {num_cycles: 2} =>
datasets: [{path: a, roles_to_train: [assistant], train_on_eos: turn}]
    => datasets[0].roles_to_train, datasets[0].train_on_eos have no effect | Remove them.
{datasets: [{path: a}], test_datasets: [{path: a, type: chatml.intel, mine: 1}]}
    => test_datasets[0].mine is not a key
datasets: [{path: a, type: my_strategy.load, roles_to_train: [x], mine: 1}] =>
datasets: [{path: a, roles_to_train: null, train_on_eos: null}] =>
datasets: [{path: setup.cfg, data_files: x}, {path: tests, data_files: x}]
    => datasets[0].data_files has no effect: `path` is a file itself
datasets: [{path: a, field_tools: x}]
    => datasets[0].field_tools has no effect: only `type: chat_template.default`
datasets: [{path: a, type: {field_chosen: good}, field_chosen: good}] => field_chosen has
datasets: [{path: a, type: chat_template.default, field_tools: x, field_messages: y}] =>
datasets: [{path: a, type: chat_template.argilla_chat, field_chosen: x, field_messages: y}]
    => datasets[0].field_messages has no effect: with `type: chat_template.argilla_chat`
"""


@pytest.mark.parametrize("case", lines(SAID))
def test_what_does_nothing_is_said(case, said):
    change, _, parts = case.partition(" =>")
    warnings, expected = said(**yaml.safe_load(change)), parts.strip().split(" && ")
    assert len(warnings) == (len(expected) if parts else 0)
    for warning, one in zip(warnings, expected, strict=False):
        assert [part for part in one.split(" | ") if part not in warning] == [], warning


def test_keys_of_the_plugins_that_are_listed_are_known(said, monkeypatch):
    liger = "axolotl.integrations.liger.LigerPlugin"
    monkeypatch.setattr(PluginManager, "_instance", None)
    for name in ("sera_plugin.SeraPlugin", liger):
        PluginManager.get_instance().register(name)
    assert said(plugins=["sera_plugin.SeraPlugin", liger], liger_rope=True) == []
    # The host keeps the plugins of a configuration before this one.
    assert len(said(liger_rope=True)) == 1


def test_no_key_of_the_host_is_mistaken_for_a_misspelling(said):
    unset = {key: None for key in AxolotlInputConfig.model_fields if key not in config()}
    assert said(**unset) == []


def test_what_a_dpo_yaml_leaves_behind_is_not_worth_a_word_where_it_is_off(said):
    off = {key: False for key in NEVER if "." not in key}
    assert said(**off, rl_beta=0.1, chat_template="chatml", val_set_size=0.05) == []


def test_no_yaml_that_is_shipped_or_shown_has_a_key_that_does_nothing(said, monkeypatch, tmp_path):
    texts = [path.read_text() for path in ROOT.glob("**/example_yamls/*.yaml")]
    shown = [block.text for page in PAGES for block in blocks(page, "yaml")]
    texts += [paper.yaml_text("ultrafeedback", "mistral-7b", name) for name in paper.SYSTEMS]
    assert len(texts) > 20
    for text in texts + [text for text in shown if "\nrl: sera" in text]:
        keys = yaml.safe_load(text)
        keys["output_dir"] = str(tmp_path)
        monkeypatch.setattr(PluginManager, "_instance", None)
        for name in keys.get("plugins", ()):
            PluginManager.get_instance().register(name)
        assert said(**{"datasets": config()["datasets"], **keys}) == [], text
    known = {*AxolotlInputConfig.model_fields, "sera"}
    for text in shown:
        content = yaml.safe_load(text)
        assert not (content.keys() & known and content.keys() & NEVER), text


def test_nothing_is_converted_into_a_key_that_does_nothing():
    """Of whole YAMLs, tests/test_convert.py says so too."""
    written = {key for rule in filter(None, RULES) for key in re.findall(r"`([\w.]+)", rule.to)}
    assert "learning_rate" in written
    assert written & NEVER == set()
