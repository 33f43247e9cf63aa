"""Damaged files and rows through the host's real loading: named in the user's own terms."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import prepare_rows
from sera_plugin.data.files import while_loading
from sera_plugin.host.config import name_types
from tests.conftest import write_rows
from tests.test_dataset import PLAIN_TEMPLATE, build, spelled

GOOD = {"question": "hi", "good": "hello", "bad": "world"}
TYPE = {"field_prompt": "question", "field_chosen": "good", "field_rejected": "bad"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a config.json; nothing here loads weights."""
    path = tmp_path_factory.mktemp("base")
    build(add_bos=True).save_pretrained(path)
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 400}
    shape |= {"hidden_size": 16, "intermediate_size": 16}
    shape |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    (path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def parsed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A configuration as the host resolves it; the tests here change what is about data."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    path = tmp_path_factory.mktemp("config") / "config.yaml"
    keys = {
        "base_model": str(base),
        "tokenizer_type": "PreTrainedTokenizerFast",
        "plugins": ["sera_plugin.SeraPlugin"],
        "rl": "sera",
        "datasets": [{"path": "pairs.jsonl", "type": TYPE}],
        "output_dir": str(path.parent / "out"),
        "sequence_len": 48,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-5,
        **dict.fromkeys(("bf16", "fp16", "tf32"), False),
    }
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_instance", "_cfg"):  # a process parses one configuration; tests, many
            patch.setattr(PluginManager, name, None)
        cfg = load_cfg(str(path))
    cfg.dataset_num_proc = None  # no process of its own for a few rows
    return cfg


@pytest.fixture
def prepare(parsed: Any, tmp_path: Path) -> Callable[..., Any]:
    """What `axolotl train` does with the data before it loads a model, and the trainer then."""

    def run(sera: Any = None, **keys: Any) -> SimpleNamespace:
        from axolotl.loaders import load_tokenizer
        from axolotl.utils.dict import DictDefault

        from sera_plugin.host.datasets import load_pairs

        cfg = DictDefault({**parsed.to_dict(), **keys})
        cfg.sera = {**parsed.sera, **(sera or {})}
        cfg.dataset_prepared_path = str(tmp_path / "prepared")
        name_types(cfg)
        data = load_pairs(cfg)
        tokenizer = load_tokenizer(cfg)
        rows, ends = {}, [tokenizer.eos_token_id]
        for name, dataset in (("train", data.train_dataset), ("eval", data.eval_dataset)):
            if dataset is not None:
                config = SeraConfig(**cfg.sera)
                rows[name] = prepare_rows(dataset, tokenizer, ends, cfg, config, name)
        columns = data.train_dataset.column_names
        return SimpleNamespace(cfg=cfg, tokenizer=tokenizer, columns=columns, data=data, **rows)

    return run


def file_of(tmp_path: Path, rows: list[Any], name: str = "pairs.jsonl", kind: Any = TYPE) -> Any:
    write_rows(tmp_path / name, rows)
    return {"path": str(tmp_path / name), "ds_type": "json", "split": "train", "type": kind}


def dropped_places(result: Any) -> list[int]:
    return sorted(result.places[row] for rows in result.dropped.values() for row in rows)


def test_rows_are_named_by_their_place_in_the_users_file(prepare: Any, tmp_path: Path) -> None:
    first = [GOOD | {"question": f"hi {i}"} for i in range(3)]
    odd = [None, "", "hello world " * 30, 5, ["a"], {"a": 1}]
    second = [*(GOOD | {"good": value} for value in odd), GOOD | {"bad": "hello"}]
    second += [{"question": "hi", "bad": "world"}, GOOD, GOOD]
    sets = [file_of(tmp_path, first), file_of(tmp_path, second, "more.jsonl")]
    result = prepare(datasets=sets, dataset_num_proc=2).train
    assert (result.total, len(result.rows)) == (13, 5)
    places = {
        why: sorted((result.sources[row], result.places[row]) for row in rows)
        for why, rows in result.dropped.items()
    }
    more = "datasets[1] (more.jsonl)"
    assert places == {
        "field 'good' is null, not text": [(more, 0), (more, 7)],
        "field 'good' is empty": [(more, 1)],
        "longer than sequence_len: 48": [(more, 2)],
        "field 'good' is a number, not text": [(more, 3)],
        "field 'good' is a list, not text": [(more, 4)],
        "field 'good' is an object, not text": [(more, 5)],
        "chosen equals rejected, which prefers nothing": [(more, 6)],
    }
    [(remark, [row])] = result.kept.items()
    assert remark.startswith("repeat an earlier row")
    assert result.sources[row] == more


def test_prepared_rows_are_taken_and_named_until_the_file_is_mended(
    prepare: Any, tmp_path: Path
) -> None:
    sets = [file_of(tmp_path, [GOOD, GOOD | {"question": "hello", "bad": None}])]
    said = "1 row(s): field 'bad' is null, not text (datasets[0] (pairs.jsonl) rows 1)"
    assert prepare(datasets=sets).train.reasons() == [said]
    (tmp_path / "pairs.jsonl").unlink()
    assert prepare(datasets=sets).train.reasons() == [said]
    with pytest.raises(ValueError, match=r"sera.bad_rows: raise, and 1 of the 2 .*rows 1"):
        prepare(datasets=sets, sera={"bad_rows": "raise"})
    file_of(tmp_path, [GOOD, GOOD | {"question": "hello"}])
    os.utime(tmp_path / "pairs.jsonl", (time.time() + 5, time.time() + 5))
    assert len(prepare(datasets=sets).train.rows) == 2


def test_prepared_rows_of_another_guard_rl_or_columns_are_not_shared(
    prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host names prepared data without regard to `rl`; plain DPO would train placeholders."""
    from axolotl.utils.data.shared import generate_dataset_hash_from_config
    from axolotl.utils.dict import DictDefault

    from sera_plugin.host.datasets import prepared_name

    cfg = prepare(datasets=[file_of(tmp_path, [GOOD])]).cfg
    scored = DictDefault({**cfg, "sera": {"score_columns": ["score"]}})
    names = [
        generate_dataset_hash_from_config(cfg, cfg.datasets, "tokenizer"),
        prepared_name(cfg, cfg.datasets, "tokenizer"),
        prepared_name(scored, cfg.datasets, "tokenizer"),
    ]
    monkeypatch.setattr("sera_plugin.host.datasets.GUARD_VERSION", 0)
    names.append(prepared_name(cfg, cfg.datasets, "tokenizer"))
    assert len(set(names)) == 4


def test_deduplication_ignores_where_rows_stand_and_keeps_bad_ones_apart(
    prepare: Any, tmp_path: Path
) -> None:
    other = GOOD | {"question": "hello"}
    rows = [GOOD, other, GOOD, GOOD | {"bad": None}, GOOD | {"bad": None}, GOOD]
    sets = [file_of(tmp_path, rows)]
    result = prepare(datasets=sets, dataset_exact_deduplication=True).train
    assert len(result.rows) == 2
    assert result.kept == {}
    assert dropped_places(result) == [3, 4]
    held_out = file_of(tmp_path, [other, GOOD | {"question": "ab"}], "held-out.jsonl")
    both = prepare(datasets=sets, test_datasets=[held_out], dataset_exact_deduplication=True)
    assert both.data.eval_dataset["sera_row"][:] == [1]


def test_rows_are_merged_shuffled_split_and_counted_as_the_host_does(
    prepare: Any, tmp_path: Path
) -> None:
    from axolotl.utils.data.shared import create_train_validation_split, merge_datasets
    from datasets import load_dataset

    sets = [
        file_of(tmp_path, [GOOD | {"question": f"{name} {i}"} for i in range(9)], f"{name}.jsonl")
        for name in ("hi", "ab")
    ]
    for keys in (
        {"seed": 5, "shuffle_before_merging_datasets": True},
        {"seed": 6, "shuffle_merged_datasets": False},
        {"seed": 7, "val_set_size": 0.25},
    ):
        # The host names prepared data without regard to the order of rows.
        made = prepare(datasets=sets, skip_prepare_dataset=True, **keys)
        raw = [load_dataset("json", data_files=one["path"], split="train") for one in sets]
        expected, held_out = merge_datasets(raw, made.cfg), None
        if keys.get("val_set_size"):
            expected, held_out = create_train_validation_split(expected, made.cfg, 0.25)
            assert made.data.eval_dataset["prompt"][:] == held_out["question"][:]
        assert made.data.train_dataset["prompt"][:] == expected["question"][:]
        assert made.data.total_num_steps == len(expected) * made.cfg.num_epochs


def test_held_out_rows_are_read_as_test_datasets_says(prepare: Any, tmp_path: Path) -> None:
    """The host reads the fields of `datasets` for them (axolotl 0.19)."""
    held_out = [{"prompt": "hi", "chosen": "ab", "rejected": "world"}, {"prompt": "hi"}]
    sets = {
        "datasets": [file_of(tmp_path, [GOOD])],
        "test_datasets": [file_of(tmp_path, held_out, "test.jsonl", {"field_prompt": "prompt"})],
    }
    result = prepare(**sets)
    assert spelled(result.tokenizer, result.eval.chosen_ids[0]) == "ab</s>"
    [reason] = result.eval.reasons()
    assert reason.endswith("(test_datasets[0] (test.jsonl) rows 1)")


def test_long_rows_are_named_dropped_cut_or_refused(prepare: Any, tmp_path: Path) -> None:
    long = "hello world user assistant " * 20
    rows = [GOOD, GOOD | {"good": long}, GOOD | {"question": long}]
    sets = {"datasets": [file_of(tmp_path, rows)]}
    dropped = prepare(**sets, sera={"bad_rows": "raise"}).train
    assert dropped_places(dropped) == [1, 2]
    cut = prepare(**sets, excess_length_strategy="truncate").train
    assert dropped_places(cut) == [2]
    [long_row] = [i for i, row in enumerate(cut.rows) if cut.places[row] == 1]
    assert len(cut.prompt_ids[long_row]) + len(cut.chosen_ids[long_row]) == 48


def test_messages_need_neither_a_type_nor_skip_prepare_dataset(
    prepare: Any, tmp_path: Path
) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": role, "content": "hello"}],
            "rejected": [{"role": "assistant", "content": "world"}],
        }
        for role in ("assistant", "narrator")
    ]
    found = prepare(
        datasets=[file_of(tmp_path, rows, kind=None)],
        chat_template_jinja=PLAIN_TEMPLATE,
        chat_template="jinja",
    )
    assert spelled(found.tokenizer, found.train.chosen_ids[0]) == "hello<|im_end|>"
    [reason] = found.train.reasons()
    assert "the role 'narrator', not assistant (datasets[0] (pairs.jsonl) rows 1)" in reason


LINE = json.dumps(GOOD)
FILES: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", "the file is empty"),
    "blank": (b"\n \n\n", "the file is empty"),
    "cut off": (f'{LINE}\n{{"question": "p", "good": \n{LINE}\n'.encode(), "line 2 is not JSON"),
    "no json": (f"{LINE}\n\nhello\n".encode(), r"line 3 is not JSON .*: 'hello'. Mend"),
    "a bare value": (f"{LINE}\n5\n".encode(), "line 2 is not an object with fields: '5'"),
    "half a surrogate pair": (
        f'{LINE}\n{{"question": "a\\ud800", "good": "b", "bad": "c"}}\n'.encode(),
        "line 2 is not valid Unicode",
    ),
    "missing": (None, "there is no such file or directory here"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_line(name: str, tmp_path: Path) -> None:
    from axolotl.utils.data.shared import load_dataset_with_config
    from axolotl.utils.dict import DictDefault

    content, said = FILES[name]
    entry = DictDefault(file_of(tmp_path, []))
    if content is None:
        entry.path = str(tmp_path / "nowhere.jsonl")
    else:
        (tmp_path / "pairs.jsonl").write_bytes(content)
    with (
        pytest.raises(ValueError, match=rf"^datasets\[1\]\.path: '.*' cannot be loaded: .*{said}"),
        while_loading("datasets[1]", entry.path),
    ):
        load_dataset_with_config(entry, False)


def test_other_damage_is_named_too(prepare: Any, tmp_path: Path) -> None:
    for name, content, said in (
        ("pairs.csv", b"question,good,bad\n", r"path: .*pairs.csv' cannot be .* no rows"),
        ("pairs.parquet", b"PAR1", "path: .* cannot be loaded: Arrow"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"datasets\[0\]\.{said}"):
            prepare(datasets=[{"path": str(tmp_path / name), "type": TYPE}])
    with pytest.raises(ValueError, match=r"datasets\[0\]\.type: 'chat_templat.default' is no"):
        prepare(datasets=[file_of(tmp_path, [GOOD], kind="chat_templat.default")])


def test_text_that_is_json_stays_text_in_a_file_of_mixed_types(
    prepare: Any, tmp_path: Path
) -> None:
    """`Dataset.map` would keep the column's type and read "-" back as 0 (datasets 4)."""
    row = {"prompt": "hi", "chosen": "ab", "rejected": "world"}
    kind = {
        "prompt_format": "{prompt}",
        "chosen_format": "-{chosen}",
        "rejected_format": "[7]{rejected}",
    }
    rows = [row, row | {"chosen": 5}, row | {"rejected": ["x"]}, row | {"chosen": "b"}]
    result = prepare(datasets=[file_of(tmp_path, rows, kind=kind)])
    found = {spelled(result.tokenizer, ids) for ids in result.train.chosen_ids}
    assert found == {"-ab</s>", "-b</s>"}
    assert dropped_places(result.train) == [1, 2]


def test_other_columns_keep_no_datasets_apart(prepare: Any, tmp_path: Path) -> None:
    """The host merges whole rows, and cannot where a column is a number here, an object there."""
    sets = [
        file_of(tmp_path, [GOOD | {"id": 1, "score": 0.5, "bad": bad} for bad in ("a", "b", None)]),
        file_of(tmp_path, [GOOD | {"id": {"a": "x"}}], "more.jsonl"),
    ]
    result = prepare(datasets=sets, sera={"score_columns": ["score"]})
    assert "score" in result.columns
    assert "id" not in result.columns
    assert len(result.train.rows) == 3
    with pytest.raises(ValueError, match=r"sera.score_columns: 'quality' not .* 'id', 'question'"):
        prepare(datasets=sets, sera={"score_columns": ["quality"]})
