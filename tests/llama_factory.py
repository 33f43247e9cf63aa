"""A user's files for LLaMA-Factory: rows, their descriptions, and a YAML that trains on them."""

import json
from pathlib import Path

import yaml

from sera_plugin.tools.convert.convert import convert

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
TALKS = {"ranking": True, "formatting": "sharegpt"}
TAGS = {"role_tag": "role", "content_tag": "content"}
TAGS |= {f"{role}_tag": role for role in ("user", "assistant", "system")}
GOOD = {"messages": "messages", "chosen": "good", "rejected": "bad"}
INFO = {
    "talks": TALKS | {"file_name": "talks.json", "columns": {"messages": "conversations", **SIDES}},
    "plain": {"file_name": "plain.jsonl", "ranking": True,
              "columns": {"prompt": "instruction", "query": "input", **SIDES}},
    "openai": TALKS | {"file_name": "openai.jsonl", "columns": GOOD, "tags": TAGS},
    "answers": {"file_name": "answers.json"},
}  # fmt: skip


def lay_out(data: Path) -> None:
    """What LLaMA-Factory has in `data/`: rows, and their descriptions."""
    data.mkdir()
    (data / "dataset_info.json").write_text(json.dumps(INFO))
    (data / "talks.json").write_text(json.dumps([SHAREGPT] * 5))
    for name, row in (("plain", ALPACA), ("openai", OPENAI)):
        (data / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 5)


def source(**keys) -> dict:
    where = {"model_name_or_path": "some/model", "output_dir": "saves/run"}
    return where | {"stage": "dpo", "dataset": "talks", "template": "chatml"} | keys


def describe(name: str, rows: list | None = None, **info) -> None:
    """Make one dataset the only one in `dataset_info.json`, and write its file."""
    info = {"ranking": True, **info}
    Path("data/dataset_info.json").write_text(json.dumps({name: info}))
    if rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path("data", info["file_name"]).write_text("\n".join(lines) + "\n")


def run(keys: dict, output: Path | None = None):
    """What a YAML becomes, and what is said; written into a file if one is named."""
    Path("llama.yaml").write_text(yaml.safe_dump(keys))
    converted = convert(Path("llama.yaml"), output)
    if output is not None:
        converted.write(output)
    return yaml.safe_load(converted.text), converted.said
