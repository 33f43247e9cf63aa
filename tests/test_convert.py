"""`axolotl sera convert`: LLaMA-Factory's DPO YAMLs, as the host and SeRA read them."""

from __future__ import annotations

import errno
import json
import re
import runpy
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sera_plugin.cli import sera
from sera_plugin.config.quoting import plain
from sera_plugin.tools.convert.convert import convert
from sera_plugin.tools.convert.data import read_rows
from sera_plugin.tools.convert.keys import KNOWN, RULE_KEYS
from sera_plugin.tools.convert.names import LEFT_OUT, TEMPLATES

ROOT = Path(__file__).parents[1]

TALK = [
    {"from": "human", "value": "Name a city."},
    {"from": "gpt", "value": "Oslo"},
    {"from": "human", "value": "Another one."},
]
SHAREGPT = {
    "conversations": TALK,
    "chosen": {"from": "gpt", "value": "Rome"},
    "rejected": {"from": "gpt", "value": "Bread"},
}
ALPACA = {"instruction": "Name a city.", "input": "", "chosen": "Rome", "rejected": "Bread"}
OPENAI = {
    "messages": [{"role": "user", "content": "Name a city."}],
    "good": {"role": "assistant", "content": "Rome"},
    "bad": {"role": "assistant", "content": "Bread"},
}
SIDES = {"chosen": "chosen", "rejected": "rejected"}
INFO = {
    "talks": {
        "file_name": "talks.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", **SIDES},
    },
    "plain": {
        "file_name": "plain.jsonl",
        "ranking": True,
        "columns": {"prompt": "instruction", "query": "input", **SIDES},
    },
    "openai": {
        "file_name": "openai.jsonl",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "chosen": "good", "rejected": "bad"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "hub": {"hf_hub_url": "some/pairs", "subset": "en", "ranking": True, "columns": SIDES},
    "answers": {"file_name": "answers.json"},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory as LLaMA-Factory has one: `data/` with its descriptions."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset_info.json").write_text(json.dumps(INFO))
    (data / "talks.json").write_text(json.dumps([SHAREGPT] * 5))
    (data / "plain.jsonl").write_text("".join(json.dumps(ALPACA) + "\n" for _ in range(5)))
    (data / "openai.jsonl").write_text("".join(json.dumps(OPENAI) + "\n" for _ in range(5)))
    return tmp_path


def source(**keys) -> dict:
    return {
        "model_name_or_path": "some/model",
        "stage": "dpo",
        "dataset": "talks",
        "template": "chatml",
        "output_dir": "saves/run",
        **keys,
    }


def describe(name: str, rows: list | None = None, **info) -> None:
    """Make one dataset the only one in `dataset_info.json`, and write its file."""
    info = {"ranking": True, **info}
    Path("data/dataset_info.json").write_text(json.dumps({name: info}))
    if rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path("data", info["file_name"]).write_text("\n".join(lines) + "\n")


def run(keys: dict, **options):
    Path("llama.yaml").write_text(yaml.safe_dump(keys))
    converted = convert(Path("llama.yaml"), **options)
    return yaml.safe_load(converted.text), converted.said


def left_out(said: str) -> dict[str, str]:
    """Key -> why, as the command tells."""
    listed = said.partition("To know:")[0]
    return dict(re.findall(r"^  (\w+): [^\n]*\n((?: {6}[^\n]*\n)+)", listed, re.MULTILINE))


# ------------------------------------------------------------------ what it writes

# Whole YAMLs of our own in the manner of LLaMA-Factory's examples, and keys that they become.
YAMLS = {
    "lora": (
        """
trust_remote_code: true
{stage: dpo, do_train: true, pref_beta: 0.3, pref_loss: sigmoid}
{finetuning_type: lora, lora_rank: 4, lora_target: "q_proj,v_proj"}
{dataset: "talks,plain,openai", template: chatml, cutoff_len: 64, max_samples: 4}
{overwrite_cache: true, preprocessing_num_workers: 1}
{output_dir: saves/lora, logging_steps: 10, save_steps: 500, plot_loss: true, report_to: none}
{overwrite_output_dir: true, per_device_train_batch_size: 2, gradient_accumulation_steps: 4}
{learning_rate: 5e-6, num_train_epochs: 3.0, lr_scheduler_type: cosine, warmup_ratio: 0.1}
{bf16: false, ddp_timeout: 180000000, resume_from_checkpoint: null}
""",
        """
{adapter: lora, lora_r: 4, lora_alpha: 8, lora_target_modules: [q_proj, v_proj]}
{rl_beta: 0.3, num_epochs: 3, micro_batch_size: 2, gradient_accumulation_steps: 4}
{learning_rate: 5.0e-6, lr_scheduler: cosine, warmup_ratio: 0.1, sequence_len: 64}
{ddp_timeout: 180000000}
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
def test_what_it_writes_is_read_by_the_host(name, place, world, load):
    given, expected = map(keys_of, YAMLS[name])
    written, _ = run(given | {"model_name_or_path": str(world.base)})
    cfg = load(written)
    assert (cfg.rl, cfg.trainer_cls) == ("dpo", "sera_plugin.host.trainer.SeraTrainer")
    assert cfg.sera["loss"] == ("simpo" if "simpo" in name else "dpo")
    for key, value in expected.items():
        found = cfg.get(key)
        assert (list(found) if isinstance(found, tuple | list) else found) == value, key
    # The host drops keys that it does not know.
    assert set(written) - set(cfg.keys()) == set()


@pytest.mark.slow
def test_the_host_trains_on_every_kind_of_dataset_and_on_some_layers(place, world, train):
    """Sharegpt, alpaca and openai rows, max_samples, and a model of which a part is trained."""
    # Words that the model's tokenizer knows.
    text = json.dumps([SHAREGPT, ALPACA, OPENAI])
    for word, known in (("Rome", "a b"), ("Bread", "b a"), ("Oslo", "c")):
        text = text.replace(word, known)
    talk, alone, openai = json.loads(text)
    more = alone | {"instruction": "a", "input": "b c"}
    (place / "data/talks.json").write_text(json.dumps([talk] * 5))
    (place / "data/plain.jsonl").write_text(f"{json.dumps(alone)}\n{json.dumps(more)}\n")
    (place / "data/openai.jsonl").write_text((json.dumps(openai) + "\n") * 5)
    keys = {
        "model_name_or_path": str(world.base),
        "dataset": "talks,plain,openai",
        "max_samples": 4,
        "finetuning_type": "freeze",
        "freeze_trainable_layers": 1,
        "num_train_epochs": 1,
        "cutoff_len": 64,
        "learning_rate": 1e-3,
    }
    converted, _ = write(source(**keys))
    done = train(converted)
    assert done.training_pairs[1].num_rows == 4 + 2 + 4
    before, after = load_file(world.base / "model.safetensors"), done.model.state_dict()
    moved = {name for name, weights in before.items() if not torch.equal(weights, after[name])}
    assert {name.partition(".layers.")[2].partition(".")[0] for name in moved} == {"1"}


def write(keys: dict):
    """The YAML as a file, and what is written beside it."""
    Path("llama.yaml").write_text(yaml.safe_dump(keys))
    converted = convert(Path("llama.yaml"), Path("sera.yaml"))
    converted.write(Path("sera.yaml"))
    return yaml.safe_load(Path("sera.yaml").read_text()), converted.said


def test_defaults_are_those_of_llama_factory(place):
    written, said = run(source())
    expected = {
        "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True,
        "rl_beta": 0.1, "sequence_len": 2048, "num_epochs": 3, "micro_batch_size": 8,
        "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "lr_scheduler": "linear",
        "warmup_steps": 0, "optimizer": "adamw_torch", "seed": 42, "bf16": False, "fp16": False,
        "gradient_checkpointing": True, "logging_steps": 500, "save_steps": 500,
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected
    assert "learning_rate 5e-05" in " ".join(said.split())


# ------------------------------------------------------------------ what it says


def test_every_key_becomes_something_or_is_said_to_become_nothing(place):
    """With a value for each key that LLaMA-Factory has, as far as the table knows."""
    values = {"model_name_or_path": "some/model", "stage": "dpo", "dataset": "talks"}
    numbers = {"val_size": 0.1, "num_train_epochs": 2, "quantization_bit": 4, "max_samples": 3}
    switches = {"create_new_adapter": False, "lr_scheduler_kwargs": {"min_lr": 1e-7}}
    texts = {"finetuning_type": "lora", "pref_loss": "simpo", "flash_attn": "fa2"}
    chosen = values | numbers | switches | texts | {"dataset_dir": "data", "eval_strategy": "steps"}
    chosen |= {"quantization_method": "bnb", "dpo_label_smoothing": 0, "eval_dataset": None}
    lost = [name.replace("*", "thing") for names, _ in LEFT_OUT for name in names.split()]
    given = {name: chosen.get(name, True if name in SWITCHES else 1) for name in RULE_KEYS}
    written, said = run(given | dict.fromkeys(lost, 1))
    assert set(lost) <= set(left_out(said))
    assert "Unknown" not in said
    assert written["lora_r"] == 1


SWITCHES = {
    "use_fast_tokenizer", "use_rslora", "use_dora", "double_quantization", "bf16", "fp16",
    "pure_bf16", "tf32", "disable_gradient_checkpointing", "use_reentrant_gc", "torch_compile",
    "dataloader_pin_memory", "overwrite_output_dir",
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora_rnak": 3}, "Did you mean lora_rank?"),
        ({"my_own_key": 3}, "Not a key that this knows."),
        ({"deepspeed": "ds3.json"}, "FSDP2, not with DeepSpeed"),
        ({"val_size": 100}, "Set val_set_size to 100 divided by their number."),
        ({"eval_strategy": "steps", "eval_steps": 5}, "no pairs are held out."),
        ({"simpo_gamma": 0.5}, "it has no effect beside the other keys."),
        ({"finetuning_type": "full", "lora_rank": 3}, "it has no effect beside the other keys."),
        ({"report_to": "swanlab"}, "swanlab is not switched on by a key of this name."),
        ({"load_best_model_at_end": True}, "the host has it for supervised fine-tuning only"),
        ({"metric_for_best_model": "eval_loss"}, "`axolotl sera eval` compares them"),
        ({"greater_is_better": False}, "the host has it for supervised fine-tuning only"),
        ({"early_stopping_steps": 2}, "the host has it for supervised fine-tuning only"),
        ({"save_strategy": "best"}, "the host has `best` for supervised fine-tuning only"),
        ({"trust_remote_code": True}, "it would run code of the model's repository."),
    ],
)
def test_what_becomes_nothing_is_named_with_the_reason(keys, said, place):
    written, told = run(source(**keys))
    (name, *_) = [key for key in left_out(told) if key in keys]
    assert said in " ".join(left_out(told)[name].split())
    assert not set(keys) & set(written) - {"eval_strategy"}


def test_secrets_and_odd_values_are_not_shown(place):
    _, said = run(source(hf_hub_token="hf_geheim", swanlab_api_key="geheim", mine="a\x1b[2Jb"))
    assert "geheim" not in said
    assert "\x1b" not in said
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
        ({"dataset_dir": "elsewhere"}, "dataset_dir: 'elsewhere' has no dataset_info.json"),
    ],
)
def test_what_has_nothing_like_it_is_refused(keys, said, place):
    given = {key: value for key, value in source(**keys).items() if value is not None}
    Path("llama.yaml").write_text(yaml.safe_dump(given))
    result = CliRunner().invoke(sera, ["convert", "llama.yaml", "--output", "sera.yaml"])
    assert result.exit_code == 2
    assert said in result.output
    assert not Path("sera.yaml").exists()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 99), st.floats(), st.text(max_size=5),
    st.sampled_from(["dpo", "lora", "full", "sigmoid", "simpo", "ipo", "steps", "5e-6", "all"]),
    st.lists(st.integers(0, 9), max_size=2), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text"])
def test_what_is_no_yaml_of_keys_is_refused(text, place):
    Path("llama.yaml").write_text(text)
    assert CliRunner().invoke(sera, ["convert", "llama.yaml"]).exit_code == 2


# ------------------------------------------------------------------ data


def entry(name: str, **keys) -> dict:
    return run(source(dataset=name, **keys))[0]["datasets"][0]


def test_conversations_tell_the_host_their_names(place):
    assert entry("talks") == {
        "path": "data/talks.json",
        "ds_type": "json",
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles": {
            "user": ["human"],
            "assistant": ["gpt"],
            "system": ["system"],
            "tool": ["observation"],
        },
    }
    found = entry("openai")
    assert (found["field_chosen"], found["field_rejected"]) == ("good", "bad")
    assert "message_property_mappings" not in found
    found = entry("plain")
    assert (found["field_messages"], found["path"]) == ("instruction", "data/plain.jsonl")


@pytest.mark.parametrize(
    ("row", "columns", "messages"),
    [
        (
            ALPACA | {"input": "In Norway."},
            {"prompt": "instruction", "query": "input"},
            [{"role": "user", "content": "Name a city.\nIn Norway."}],
        ),
        (
            ALPACA | {"rules": "Be brief.", "past": [["Hello", "Hi"]]},
            {"prompt": "instruction", "system": "rules", "history": "past"},
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "Name a city."},
            ],
        ),
    ],
)
def test_instructions_with_more_are_written_as_messages(row, columns, messages, place):
    rows = [row, row | {"chosen": None}]
    describe("more", rows, file_name="more.json", columns={**columns, **SIDES})
    written, said = write(source(dataset="more"))
    assert written["datasets"] == [
        {
            "path": "sera.more.jsonl",
            "ds_type": "json",
            "split": "train",
            "type": "chat_template.default",
        }
    ]
    first, second = map(json.loads, Path("sera.more.jsonl").read_text().splitlines())
    assert first["messages"] == messages
    assert first["chosen"] == {"role": "assistant", "content": "Rome"}
    # What is wrong with a row stays wrong: training names it.
    assert second["chosen"] == {"role": "assistant", "content": None}
    assert "They are in sera.more.jsonl as messages" in " ".join(said.split())


@pytest.mark.parametrize("text", ["Name\u2028it.\x85", "\ud800 é"])
def test_a_text_may_hold_ends_of_lines_for_python_and_half_a_surrogate_pair(text, place):
    line = json.dumps(ALPACA | {"input": text}, ensure_ascii="\ud800" in text)
    describe("odd", [line], **INFO["plain"] | {"file_name": "odd.jsonl"})
    write(source(dataset="odd"))
    found = json.loads(Path("sera.odd.jsonl").read_text())
    assert found["messages"][-1]["content"] == f"{ALPACA['instruction']}\n{text}"


def test_a_system_column_beside_conversations_is_written_as_a_message(place):
    rows = [
        SHAREGPT | {"rules": "Be brief."},
        SHAREGPT | {"conversations": [{"from": "system", "value": "Be long."}, *TALK]},
    ]
    columns = {**INFO["talks"]["columns"], "system": "rules"}
    describe("talks", rows, **INFO["talks"] | {"columns": columns})
    write(source())
    found = [json.loads(line) for line in Path("sera.talks.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in found] == ["Be brief.", "Be long."]
    assert [one["role"] for one in found[0]["messages"]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert found[0]["rejected"] == {"role": "assistant", "content": "Bread"}


def test_a_dataset_of_the_hub_is_not_looked_at(place):
    columns = {"prompt": "question", "system": "system", **SIDES}
    describe("hub", hf_hub_url="some/pairs", subset="en", columns=columns)
    written, said = run(source(dataset="hub", max_samples=100))
    assert written["datasets"][0] == {
        "path": "some/pairs",
        "name": "en",
        "split": "train[:100]",
        "type": "chat_template.default",
        "field_messages": "question",
    }
    assert "hub: its rows were not looked at" in said
    assert "has to have 100 rows" in said


def test_max_samples_never_asks_for_more_rows_than_there_are(place):
    assert entry("talks", max_samples=5)["split"] == "train"
    assert entry("talks", max_samples=4)["split"] == "train[:4]"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"folder": "part"}, "Put the files' names into `data_files`"),
        ({"num_samples": 3}, "To take the first N rows write `split: train[:N]`"),
        ({"columns": {"tools": "tools"}}, "Descriptions of tools do not come into the prompts"),
    ],
)
def test_what_a_description_loses_is_said(change, said, place):
    columns = INFO["talks"]["columns"] | change.get("columns", {})
    describe("talks", **INFO["talks"] | change | {"columns": columns})
    assert said in " ".join(run(source())[1].split())


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"script_url": "x"}, "comes from 'ranking', 'columns', 'script_url'"),
        ({"file_name": "x.txt"}, "is not a json, jsonl, csv, parquet, arrow file"),
        ({"file_name": "talks.json", "columns": 3}, "has columns that are not blocks"),
        ({"file_name": "talks.json", "columns": {}}, "names no columns chosen and rejected"),
        ({"file_name": "talks.json"}, "names no column of prompts"),
        *(
            (
                INFO["talks"] | {"columns": {**SIDES, one: one}},
                f"has {one}; rl: sera trains on text",
            )
            for one in ("images", "videos", "audios")
        ),
    ],
)
def test_a_description_that_cannot_be_followed_is_refused(info, said, place):
    describe("talks", **{"columns": SIDES} | info)
    with pytest.raises(ValueError, match=re.escape(said)):
        run(source())


def test_files_of_every_kind_are_read(tmp_path):
    rows = [{"a": "1"}, {"a": "2"}]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "x.parquet")
    pa_csv.write_csv(table.select(["a"]), tmp_path / "x.csv")
    with pa_ipc.new_stream(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "marked.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    for path in tmp_path.iterdir():
        assert [str(row["a"]) for row in read_rows(path)] == ["1", "2"], path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"conversations": ', "it is not JSON"),
        (b'{"conversations": []}\n\n{"conversations": ', "line 3 is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"\xff", "it is not UTF-8 text"),
    ],
)
def test_a_damaged_file_is_named(content, said, place):
    (place / "data/talks.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"'data/talks.json' holds no rows: {said}"):
        run(source())


# ------------------------------------------------------------------ templates

#: What LLaMA-Factory renders of one conversation, by its own description of the template.
MESSAGES = [
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "Two"},
    {"role": "user", "content": "Three"},
]
CHATML = (
    "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n"
    "<|im_start|>user\nThree<|im_end|>\n<|im_start|>assistant\n"
)
GEMMA = (
    "<bos><start_of_turn>user\nOne<end_of_turn>\n<start_of_turn>model\nTwo<end_of_turn>\n"
    "<start_of_turn>user\nThree<end_of_turn>\n<start_of_turn>model\n"
)
RENDERED = {
    **dict.fromkeys(("chatml", "yi", "smollm", "qwen3_nothink"), CHATML),
    "qwen": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\n" + CHATML,
    "llama3": "<bos><|start_header_id|>user<|end_header_id|>\n\nOne<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nTwo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nThree<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi": "<|user|>\nOne<|end|>\n<|assistant|>\nTwo<|end|>\n<|user|>\nThree<|end|>\n"
    "<|assistant|>\n",
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), GEMMA),
    "llama4": "<bos><|header_start|>user<|header_end|>\n\nOne<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\nTwo<|eot|>"
    "<|header_start|>user<|header_end|>\n\nThree<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n",
    "falcon_h1": "<bos>" + CHATML,
    "ministral": "<bos>[INST]One[/INST]Two<eos>[INST]Three[/INST]",
    "mistral": "<bos>[INST] One[/INST] Two<eos>[INST] Three[/INST]",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_renders_what_llama_factory_renders(template):
    from axolotl.utils.chat_templates import get_chat_template
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template(
        [MESSAGES],
        chat_template=get_chat_template(TEMPLATES[template][0]),
        add_generation_prompt=True,
        bos_token="<bos>",
        eos_token="<eos>",
    )
    assert text == RENDERED[template]


def test_another_template_is_the_models_own_and_said_to_be(place):
    written, said = run(source(template="vicuna"))
    assert written["chat_template"] == "tokenizer_default"
    assert "template: vicuna has no name in the host" in said
    written, said = run({k: v for k, v in source().items() if k != "template"})
    assert written["chat_template"] == "tokenizer_default"
    assert "template: not set" in said


# ------------------------------------------------------------------ the command


def test_the_yaml_goes_to_standard_output_and_the_rest_does_not(place):
    Path("llama.yaml").write_text(yaml.safe_dump(source(plot_loss=True)))
    result = CliRunner().invoke(sera, ["convert", "llama.yaml"])
    assert result.exit_code == 0
    assert yaml.safe_load(result.stdout)["rl"] == "sera"
    assert "plot_loss: true" in result.stderr
    assert not list(place.glob("*.jsonl"))


def test_nothing_is_overwritten(place):
    Path("llama.yaml").write_text(yaml.safe_dump(source()))
    command = ["convert", "llama.yaml", "--output", "sera.yaml"]
    assert CliRunner().invoke(sera, command).exit_code == 0
    before = Path("sera.yaml").read_text()
    again = CliRunner().invoke(sera, command)
    assert again.exit_code == 2
    assert "sera.yaml is there, and nothing is overwritten" in again.output
    assert Path("sera.yaml").read_text() == before
    assert not list(place.glob(".*.partial"))


def test_rows_stay_only_where_the_yaml_could_be_written_too(place, monkeypatch):
    describe("odd", [ALPACA | {"input": "in"}], **INFO["plain"] | {"file_name": "odd.jsonl"})
    Path("llama.yaml").write_text(yaml.safe_dump(source(dataset="odd")))
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.suffix == ".yaml":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    command = ["convert", "llama.yaml", "--output", "sera.yaml"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        failed = CliRunner().invoke(sera, command)
    assert failed.exit_code == 1
    assert "then start the same command again" in failed.stderr
    assert not list(place.glob("sera*"))
    assert CliRunner().invoke(sera, command).exit_code == 0
    assert {path.name for path in place.glob("sera*")} == {"sera.yaml", "sera.odd.jsonl"}


def test_the_table_in_the_docs_is_the_codes(place):
    page = (ROOT / "docs/llama-factory.md").read_text()
    generated = runpy.run_path(str(ROOT / "docs/generate.py"))["convert_tables"]()
    for table in generated:
        assert table in page, "run `make docs`"
