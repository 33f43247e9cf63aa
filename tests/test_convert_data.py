"""`axolotl sera convert`: datasets, templates, and files that are written."""

import errno
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from sera_plugin.cli import sera
from sera_plugin.tools.convert.data import read_rows
from sera_plugin.tools.convert.settings import TEMPLATES
from tests.llama_factory import ALPACA, INFO, SHAREGPT, SIDES, TALK, describe, run, source


def entry(name: str, **keys) -> dict:
    return run(source(dataset=name, **keys))[0]["datasets"][0]


def test_conversations_tell_the_host_their_names(place):
    assert entry("talks") == {
        "path": "data/talks.json", "ds_type": "json", "split": "train",
        "type": "chat_template.default", "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles": {"user": ["human"], "assistant": ["gpt"], "system": ["system"],
                  "tool": ["observation"]},
    }  # fmt: skip
    found = entry("openai")
    assert (found["field_chosen"], found["field_rejected"]) == ("good", "bad")
    assert "message_property_mappings" not in found
    found = entry("plain")
    assert (found["field_messages"], found["path"]) == ("instruction", "data/plain.jsonl")
    # Never more rows than there are.
    assert entry("talks", max_samples=5)["split"] == "train"
    assert entry("talks", max_samples=4)["split"] == "train[:4]"


SAID = ["user: Name a city.", "assistant: Oslo", "user: Another one."]
ASKED = {"prompt": "instruction", "query": "input"}
RULED = {"messages": "conversations", "system": "rules"}
TOLD = [{"from": "system", "value": "Be long."}, *TALK]


@pytest.mark.parametrize(
    ("row", "columns", "messages"),
    [
        (ALPACA | {"input": "In Norway."}, ASKED, ["user: Name a city.\nIn Norway."]),
        (
            ALPACA | {"rules": "Be brief.", "past": [["Hello", "Hi"]]},
            {"prompt": "instruction", "system": "rules", "history": "past"},
            ["system: Be brief.", "user: Hello", "assistant: Hi", "user: Name a city."],
        ),
        # Ends of lines for Python, and half of a surrogate pair.
        (ALPACA | {"input": "\u2028it.\x85"}, ASKED, ["user: Name a city.\n\u2028it.\x85"]),
        (ALPACA | {"input": "\ud800 é"}, ASKED, ["user: Name a city.\n\ud800 é"]),
        (SHAREGPT | {"rules": "Be brief."}, RULED, ["system: Be brief.", *SAID]),
        (SHAREGPT | {"rules": "Be brief.", "conversations": TOLD}, RULED,
         ["system: Be long.", *SAID]),
    ],
)  # fmt: skip
def test_rows_with_more_are_written_as_messages(row, columns, messages, place):
    talks = {"formatting": "sharegpt"} if "messages" in columns else {}
    escaped = "\ud800" in row.get("input", "")
    rows = [json.dumps(one, ensure_ascii=escaped) for one in (row, row | {"chosen": None})]
    describe("more", rows, file_name="more.json", columns={**columns, **SIDES}, **talks)
    written, said = run(source(dataset="more"), Path("sera.yaml"))
    place_of_rows = {"path": "sera.more.jsonl", "ds_type": "json", "split": "train"}
    assert written["datasets"] == [place_of_rows | {"type": "chat_template.default"}]
    lines = Path("sera.more.jsonl").read_text().removesuffix("\n").split("\n")
    first, second = map(json.loads, lines)
    assert [f"{one['role']}: {one['content']}" for one in first["messages"]] == messages
    assert first["chosen"] == {"role": "assistant", "content": "Rome"}
    # What is wrong with a row stays wrong: training names it.
    assert second["chosen"] in (None, {"role": "assistant", "content": None})
    assert "They are in sera.more.jsonl as messages" in " ".join(said.split())


def test_a_dataset_of_the_hub_is_not_looked_at(place):
    columns = {"prompt": "question", "system": "system", **SIDES}
    describe("hub", hf_hub_url="some/pairs", subset="en", columns=columns)
    written, said = run(source(dataset="hub", max_samples=100))
    assert written["datasets"][0] == {
        "path": "some/pairs", "name": "en", "split": "train[:100]",
        "type": "chat_template.default", "field_messages": "question",
    }  # fmt: skip
    assert "hub: its rows were not looked at" in said
    assert "has to have 100 rows" in said


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
        *(({"columns": {**SIDES, one: one}}, f"has {one}; rl: sera trains on text")
          for one in ("images", "videos", "audios")),
    ],
)  # fmt: skip
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
    lines = "\n".join(map(json.dumps, rows))
    texts = {"x.json": json.dumps(rows), "x.jsonl": f"{lines}\n\n", "lines.json": lines}
    for name, text in (texts | {"marked.json": "\ufeff" + json.dumps(rows)}).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
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


#: What LLaMA-Factory renders, by its own description of each template: what stands before all, a
#: turn of the user and one of the assistant.
CHATML = ("", "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n")
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
LLAMA = ("<bos>", "{0}user{1}\n\n{{}}{2}", "{0}assistant{1}\n\n{{}}{2}")
MARKS_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MARKS_4 = ("<|header_start|>", "<|header_end|>", "<|eot|>")
TURN = "<start_of_turn>{}\n{{}}<end_of_turn>\n"
GEMMA = ("<bos>", TURN.format("user"), TURN.format("model"))
RENDERED = {
    **dict.fromkeys(("chatml", "yi", "smollm", "qwen3_nothink"), CHATML),
    "qwen": (f"<|im_start|>system\n{QWEN}<|im_end|>\n", *CHATML[1:]),
    "falcon_h1": ("<bos>", *CHATML[1:]),
    "llama3": [part.format(*MARKS_3) for part in LLAMA],
    "llama4": [part.format(*MARKS_4) for part in LLAMA],
    "phi": ("", "<|user|>\n{}<|end|>\n", "<|assistant|>\n{}<|end|>\n"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), GEMMA),
    "ministral": ("<bos>", "[INST]{}[/INST]", "{}<eos>"),
    "mistral": ("<bos>", "[INST] {}[/INST]", " {}<eos>"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_renders_what_llama_factory_renders(template):
    from axolotl.utils.chat_templates import get_chat_template
    from transformers.utils.chat_template_utils import render_jinja_template

    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "add_generation_prompt": True}
    marks["chat_template"] = get_chat_template(TEMPLATES[template][0])
    said = ("user", "One"), ("assistant", "Two"), ("user", "Three")
    messages = [{"role": role, "content": content} for role, content in said]
    (text,), _ = render_jinja_template([messages], **marks)
    start, user, assistant = RENDERED[template]
    turns = user.format("One") + assistant.format("Two") + user.format("Three")
    assert text == start + turns + assistant.partition("{}")[0].rstrip(" ")


@pytest.mark.parametrize(
    ("template", "said"), [("vicuna", "vicuna has no name in the host"), (None, "not set")]
)
def test_another_template_is_the_models_own_and_said_to_be(template, said, place):
    written, told = run(source(template=template))
    assert written["chat_template"] == "tokenizer_default"
    assert f"template: {said}" in told


def command(*arguments: str, **keys):
    Path("llama.yaml").write_text(yaml.safe_dump(source(**keys)))
    return CliRunner().invoke(sera, ["convert", "llama.yaml", *arguments])


def test_the_yaml_goes_to_standard_output_or_a_new_file_and_the_rest_does_not(place):
    result = command(plot_loss=True)
    assert result.exit_code == 0
    assert yaml.safe_load(result.stdout)["rl"] == "sera"
    assert "plot_loss: true" in result.stderr
    Path("sera.yaml").write_text("mine")
    refused = command("--output=sera.yaml")
    assert refused.exit_code == 2
    assert "sera.yaml is there, and nothing is overwritten" in refused.output
    assert Path("sera.yaml").read_text() == "mine"
    refused = command(stage="sft")
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_rows_stay_only_where_the_yaml_could_be_written_too(place, monkeypatch):
    describe("odd", [ALPACA | {"input": "in"}], **INFO["plain"] | {"file_name": "odd.jsonl"})
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.suffix == ".yaml":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        failed = command("--output=sera.yaml", dataset="odd")
    assert failed.exit_code == 1
    assert "then start the same command again" in failed.stderr
    assert not list(place.glob("sera*"))
    assert command("--output=sera.yaml", dataset="odd").exit_code == 0
    assert {path.name for path in place.glob("sera*")} == {"sera.yaml", "sera.odd.jsonl"}
