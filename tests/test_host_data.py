"""Every way the host prepares preference data ends in the right tokens, or in a named reason."""

import os
import re
import time
from functools import partial
from types import SimpleNamespace

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.shared import (
    create_train_validation_split,
    generate_dataset_hash_from_config,
    merge_datasets,
)
from axolotl.utils.dict import DictDefault
from datasets import load_dataset

from sera_plugin import SeraPlugin
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import prepare_rows
from sera_plugin.host.config import name_types
from sera_plugin.host.datasets import load_pairs, prepared_name
from tests.conftest import make_config, write_rows

GOOD = {"question": "b a", "good": "a b", "bad": "b b"}
TYPE = {"field_prompt": "question", "field_chosen": "good", "field_rejected": "bad"}


@pytest.fixture(scope="module")
def parsed(world, tmp_path_factory):
    """A configuration as the host resolves it; the tests here change what is about data."""
    path = tmp_path_factory.mktemp("parsed") / "config.yaml"
    config = make_config(world.directory, path.parent) | {"chat_template": "tokenizer_default"}
    config |= dict.fromkeys(("test_datasets", "evals_per_epoch"))
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_instance", "_cfg"):  # a process parses one configuration; tests, many
            patch.setattr(PluginManager, name, None)
        return load_cfg(str(path))


@pytest.fixture
def prepare(parsed, tmp_path):
    """What `axolotl train` does with the data before it loads a model, and the trainer then."""

    def run(*datasets, sera=(), **keys):
        keys |= {"datasets": list(datasets), "dataset_prepared_path": str(tmp_path / "prepared")}
        keys |= {"sera": {**parsed.sera, **dict(sera)}}
        # No process of its own for a few rows, neither to transform nor to save them.
        quick = {"dataset_num_proc": None, "skip_prepare_dataset": True}
        cfg = DictDefault(parsed.to_dict() | quick | keys)
        name_types(cfg)
        data, tokenizer = load_pairs(cfg), load_tokenizer(cfg)
        rows, ends = {}, [tokenizer.eos_token_id]
        for name, dataset in (("train", data.train_dataset), ("eval", data.eval_dataset)):
            if dataset is not None:
                config = SeraConfig(**cfg.sera)
                rows[name] = prepare_rows(dataset, tokenizer, ends, cfg, config, name)

        def spelled(name):
            ids = getattr(rows["train"], name)
            return {tokenizer.decode(one).replace(" ", "") for one in ids}

        return SimpleNamespace(cfg=cfg, data=data, spelled=spelled, **rows)

    return run


@pytest.fixture
def file_of(tmp_path):
    """An entry of `datasets:` for some rows."""

    def write(rows, name="pairs.jsonl", kind=TYPE):
        write_rows(tmp_path / name, rows)
        entry = {"path": str(tmp_path / name), "ds_type": "json", "split": "train"}
        return entry | ({"type": kind} if kind else {})

    return write


def places(result):
    """Reason -> (the user's dataset, the place in it) of the rows that were dropped for it."""
    return {
        why: sorted((result.sources[row], result.places[row]) for row in rows)
        for why, rows in result.dropped.items()
    }


def turns(*texts):
    roles = ("user", "assistant") * 2
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


TALK = {"prompt": turns("b a"), "chosen": turns("", "a b")[1:], "rejected": turns("", "b a")[1:]}
ASKED = "<s><|user|>ba<|assistant|>"
KINDS = {
    # The host searches the answer's text in the whole rendering and finds "a" in the header.
    "chat_template.default": ({"messages": "b a", "chosen": "a", "rejected": "b"}, ASKED, "a</s>"),
    # This tokenizer does not know the template's end token, so its own eos follows the text.
    "chatml.intel": ({"question": "b", "chosen": "a b", "rejected": "b a"}, None, None),
    "": (TALK, ASKED, "ab</s>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_strategies_of_the_host(prepare, file_of, kind):
    row, prompt, chosen = KINDS[kind]
    found = prepare(file_of([row], kind=kind))
    assert len(found.train.rows) == 1
    if prompt is not None:
        assert (found.spelled("prompt_ids"), found.spelled("chosen_ids")) == ({prompt}, {chosen})
    for ids in (found.train.chosen_ids[0], found.train.rejected_ids[0]):
        assert ids[-1] == 2
        assert 2 not in ids[:-1]


def test_rows_are_named_by_their_place_in_the_users_file(prepare, file_of):
    first = [GOOD | {"question": f"c {one}"} for one in "abc"]
    second = [GOOD | {"good": value} for value in (None, "a b " * 30, 5, GOOD["bad"])]
    second += [{"question": "b", "bad": "a"}, GOOD, GOOD]
    found = prepare(file_of(first), file_of(second, "more.jsonl"), dataset_num_proc=2).train
    assert (found.total, len(found.rows)) == (10, 5)
    more = "datasets[1] (more.jsonl)"
    assert places(found) == {
        "field 'good' is null, not text": [(more, 0), (more, 4)],
        "longer than sequence_len: 48": [(more, 1)],
        "field 'good' is a number, not text": [(more, 2)],
        "chosen equals rejected, which prefers nothing": [(more, 3)],
    }
    [(remark, [row])] = found.kept.items()
    assert remark.startswith("repeat an earlier row")
    assert found.sources[row] == more


def test_prepared_rows_are_taken_and_named_until_the_file_is_mended(prepare, file_of):
    entry = file_of([GOOD, GOOD | {"question": "c", "bad": None}])
    train = partial(prepare, entry, skip_prepare_dataset=False)
    said = "1 row(s): field 'bad' is null, not text (datasets[0] (pairs.jsonl) rows 1)"
    assert train().train.reasons() == [said]
    os.unlink(entry["path"])
    assert train().train.reasons() == [said]
    with pytest.raises(ValueError, match=r"sera.bad_rows: raise, and 1 of the 2 .*rows 1"):
        train(sera={"bad_rows": "raise"})
    file_of([GOOD, GOOD | {"question": "c"}])
    os.utime(entry["path"], (time.time() + 5, time.time() + 5))
    assert len(train().train.rows) == 2


def test_prepared_rows_of_another_guard_rl_or_columns_are_not_shared(prepare, file_of, monkeypatch):
    """The host names prepared data without regard to `rl`; plain DPO would train placeholders."""
    cfg = prepare(file_of([GOOD])).cfg
    scored = DictDefault({**cfg, "sera": {"score_columns": ["score"]}})
    names = [
        generate_dataset_hash_from_config(cfg, cfg.datasets, "tokenizer"),
        prepared_name(cfg, cfg.datasets, "tokenizer"),
        prepared_name(scored, cfg.datasets, "tokenizer"),
    ]
    monkeypatch.setattr("sera_plugin.host.datasets.GUARD_VERSION", 0)
    names.append(prepared_name(cfg, cfg.datasets, "tokenizer"))
    assert len(set(names)) == 4


def test_deduplication_ignores_where_rows_stand_and_keeps_bad_ones_apart(prepare, file_of):
    other = GOOD | {"question": "c"}
    rows = file_of([GOOD, other, GOOD, GOOD | {"bad": None}, GOOD | {"bad": None}, GOOD])
    held_out = file_of([other, GOOD | {"question": "d"}], "held-out.jsonl")
    found = prepare(rows, test_datasets=[held_out], dataset_exact_deduplication=True)
    assert len(found.train.rows) == 2
    assert found.train.kept == {}
    assert [[place for _, place in dropped] for dropped in places(found.train).values()] == [[3, 4]]
    assert found.data.eval_dataset["sera_row"][:] == [1]


def test_rows_are_merged_shuffled_split_and_counted_as_the_host_does(prepare, file_of):
    letters = "abcdefghi"
    sets = [
        file_of([GOOD | {"question": f"{name} {one}"} for one in letters], f"{name}.jsonl")
        for name in "xy"
    ]
    for keys in (
        {"seed": 5, "shuffle_before_merging_datasets": True},
        {"seed": 6, "shuffle_merged_datasets": False},
        {"seed": 7, "val_set_size": 0.25},
    ):
        made = prepare(*sets, **keys)
        raw = [load_dataset("json", data_files=one["path"], split="train") for one in sets]
        expected, held_out = merge_datasets(raw, made.cfg), None
        if keys.get("val_set_size"):
            expected, held_out = create_train_validation_split(expected, made.cfg, 0.25)
            assert made.data.eval_dataset["prompt"][:] == held_out["question"][:]
        assert made.data.train_dataset["prompt"][:] == expected["question"][:]
        steps = len(expected) * made.cfg.num_epochs / made.cfg.batch_size
        assert made.data.total_num_steps == -(-steps // 1)


def test_held_out_rows_are_read_as_test_datasets_says(prepare, file_of):
    """The host reads the fields of `datasets` for them (axolotl 0.19)."""
    rows = [{"prompt": "b", "chosen": "a b", "rejected": "b a"}, {"prompt": "b"}]
    held_out = file_of(rows, "test.jsonl", {"field_prompt": "prompt"})
    found = prepare(file_of([GOOD]), test_datasets=[held_out])
    assert found.data.eval_dataset["chosen"][0] in ("a b", "-")
    assert len(found.eval.rows) == 1
    [reason] = found.eval.reasons()
    assert reason.endswith("(test_datasets[0] (test.jsonl) rows 1)")


def test_text_that_is_json_stays_text_in_a_file_of_mixed_types(prepare, file_of):
    """`Dataset.map` would keep the column's type and read "-" back as 0 (datasets 4)."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    kind = {"chosen_format": "-{chosen}", "rejected_format": "[7] {rejected}"}
    rows = [row, row | {"chosen": 5}, row | {"rejected": ["x"]}, row | {"chosen": "d"}]
    found = prepare(file_of(rows, kind=kind))
    assert sorted(found.data.train_dataset["chosen"][:]) == ["-", "-", "-b", "-d"]
    assert [place for [(_, place)] in places(found.train).values()] == [1, 2]


def test_a_dataset_has_a_template_of_its_own(prepare, file_of):
    template = "{% for m in messages %}a{{ m.content }}{% endfor %}"
    found = prepare(file_of([TALK], kind=None) | {"chat_template_jinja": template})
    assert found.data.train_dataset["chosen"][:] == ["aa b"]


#: Entry, beside other keys, for text (t) or messages (m) => what is said of it.
UNREAD = """
t {} {chat_template_kwargs: {thinking: true}} => chat_template_kwargs.thinking for datasets[0]
m {} {chat_template_kwargs: {thinking: true}} => no effect has chat_template_kwargs.thinking
m {} {chat_template_kwargs: {add_generation_prompt: true}} =>
t {chat_template: chatml} {} => no effect has datasets[0].chat_template: its rows are text already
m {chat_template: chatml} {} =>
"""


@pytest.mark.parametrize("case", UNREAD.split("\n")[1:-1])
def test_settings_of_templates_that_do_nothing_are_named(case, prepare, file_of, sera_log):
    given, _, said = case.partition(" =>")
    kind, entry, keys = re.fullmatch(r"(.) ({.*?}) ({.*})", given).groups()
    text = {"prompt": "b", "chosen": "a b", "rejected": "b a"}
    dataset = file_of([text if kind == "t" else TALK], kind=None)
    prepare(dataset | yaml.safe_load(entry), **yaml.safe_load(keys))
    warnings = [one for one in sera_log.messages if "no effect" in one]
    assert len(warnings) == bool(said)
    assert all(said.strip() in one for one in warnings)


def test_a_column_of_tools_that_is_not_there_is_named(prepare, file_of):
    dataset = file_of([{"messages": "b a", "chosen": "a", "rejected": "b"}])
    dataset |= {"type": "chat_template.default", "field_tools": "functionz"}
    with pytest.raises(ValueError, match=r"field_tools: 'functionz' is not .*'chosen'"):
        prepare(dataset)


def test_other_columns_keep_no_datasets_apart(prepare, file_of):
    """The host merges whole rows, and cannot where a column is a number here, an object there."""
    first = file_of([GOOD | {"id": 1, "score": 0.5, "bad": bad} for bad in ("a", "b", None)])
    sets = [first, file_of([GOOD | {"id": {"a": "x"}}], "more.jsonl")]
    found = prepare(*sets, sera={"score_columns": ["score"]})
    assert "score" in found.data.train_dataset.column_names
    assert "id" not in found.data.train_dataset.column_names
    assert len(found.train.rows) == 3
    with pytest.raises(ValueError, match=r"sera.score_columns: 'quality' not .* 'id', 'question'"):
        prepare(*sets, sera={"score_columns": ["quality"]})


@pytest.mark.parametrize(
    ("name", "content", "kind", "said"),
    [
        ("pairs.csv", b"question,good,bad\n", TYPE, r"path: .*pairs.csv' cannot be .* no rows"),
        ("pairs.parquet", b"PAR1", TYPE, "path: .* cannot be loaded: Arrow"),
        ("pairs.jsonl", b"", "chat_templat.default", "type: 'chat_templat.default' is no"),
        ("pairs.jsonl", b'{"question": "b a"}\n[1]\n', TYPE, "path: .*line 2 is not an object"),
    ],
)
def test_what_cannot_be_loaded_is_named(prepare, tmp_path, name, content, kind, said):
    write_rows(tmp_path / name, [GOOD])
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"datasets\[0\]\.{said}"):
        prepare({"path": str(tmp_path / name), "type": kind})


def test_what_would_fail_after_the_model_is_loaded_fails_with_the_data(prepare, file_of, parsed):
    """In `axolotl preprocess` too, which loads none."""
    wrong = file_of([{"q": "b a", "good": "a b", "bad": "b b"}] * 3)
    with pytest.raises(ValueError, match=r"none of the 3 train rows can be used .*'question'"):
        prepare(wrong)
    bad = [GOOD, GOOD | {"good": None}]
    with pytest.raises(ValueError, match=r"sera.bad_rows: raise, and 1 of the 2 train rows"):
        prepare(file_of(bad), sera={"bad_rows": "raise"})
    cfg = DictDefault(parsed.to_dict() | {"sera": {**parsed.sera, "sampler": "vllm"}})
    cfg.is_preprocess = True
    with pytest.raises(ValueError, match=r"sera.sampler: vllm, but vLLM is not installed in"):
        SeraPlugin().load_datasets(cfg, preprocess=True)
