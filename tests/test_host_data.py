"""Every way the host prepares preference data ends in the right tokens."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import prepare_rows
from tests.conftest import write_rows

ROWS = [("b a", "a b", "b a"), ("d c e", "c d e", "e d c"), ("f a", "a f", "f f a")]


def conversation(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def prepared(base_config, load, tmp_path, rows, kind, **dataset):
    """The rows as `axolotl train` tokenises them: (columns of token ids, tokenizer)."""
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders import load_tokenizer

    write_rows(tmp_path / "rows.jsonl", rows)
    data = {"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "split": "train", **dataset}
    if kind:
        data["type"] = kind
    cfg = load(base_config | {"datasets": [data], "test_datasets": None, "evals_per_epoch": None})
    cfg.dataset_num_proc = None  # no process of its own for a few rows
    dataset = PluginManager.get_instance().load_datasets(cfg, preprocess=True).train_dataset
    tokenizer = load_tokenizer(cfg)
    config = SeraConfig(**cfg.sera)
    made = prepare_rows(dataset, tokenizer, [tokenizer.eos_token_id], cfg, config, "train")
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {name: [ids.tolist() for ids in getattr(made, name)] for name in names}, tokenizer


def test_chat_template_default(base_config, load, tmp_path):
    rows = [{"messages": p, "chosen": c, "rejected": r} for p, c, r in ROWS]
    # The host searches the answer's text in the whole rendering and finds "a" in the header.
    rows.append({"messages": "b", "chosen": "a", "rejected": "b c"})
    data, tokenizer = prepared(base_config, load, tmp_path, rows, "chat_template.default")
    assert len(data["chosen_ids"]) == 4
    answers = {tokenizer.decode(ids).replace(" ", "") for ids in data["chosen_ids"]}
    assert answers == {"ab</s>", "cde</s>", "af</s>", "a</s>"}
    for index in range(4):
        assert tokenizer.decode(data["prompt_ids"][index]).startswith("<s> <|user|> ")
        assert data["prompt_ids"][index].count(1) == 1
        assert data["chosen_ids"][index].count(2) == data["rejected_ids"][index].count(2) == 1
        assert data["chosen_ids"][index][-1] == 2


@pytest.mark.slow
def test_multi_turn_prompts_bootstrap_the_last_turn(base_config, train, tmp_path):
    turns = [*conversation("b a", "a b"), {"role": "user", "content": "d c"}]
    rows = [{"messages": turns, "chosen": "c d", "rejected": "d c"}] * 3
    base_config["sera"]["bootstrap_ratio"] = 1.0
    write_rows(tmp_path / "rows.jsonl", rows)
    data = {"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "split": "train"}
    base_config |= {"datasets": [{**data, "type": "chat_template.default"}]}
    base_config |= {"test_datasets": None, "evals_per_epoch": None, "num_epochs": 2}
    result = train(base_config)
    prompt = result.training_pairs[2]["prompt_ids"][0].as_py()
    assert result.trainer.processing_class.decode(prompt).replace(" ", "") == (
        "<s><|user|>ba<|assistant|>ab</s><|user|>dc<|assistant|>"
    )


@pytest.mark.parametrize("kind", ["chatml.intel", "llama3.intel"])
def test_fixed_templates_get_one_end_token(base_config, load, tmp_path, kind):
    rows = [{"question": p, "chosen": c, "rejected": r} for p, c, r in ROWS]
    data, _ = prepared(base_config, load, tmp_path, rows, kind)
    assert len(data["chosen_ids"]) == 3
    # This tokenizer knows neither template's end token, so its own eos follows the text.
    assert all(ids[-1] == 2 and ids.count(2) == 1 for ids in data["chosen_ids"])


def test_zephyr(base_config, load, tmp_path):
    answers = [{"answer": text, "rank": rank} for text, rank in (("b a", 1.0), ("a b", 2.0))]
    rows = [{"prompt": "b a", "answers": answers}] * 2
    data, _ = prepared(base_config, load, tmp_path, rows, "zephyr.nectar")
    assert len(data["chosen_ids"]) == 2


def test_passthrough_text(base_config, load, tmp_path):
    rows = [
        {"prompt": f"<s> <|user|> {p} <|assistant|>", "chosen": f" {c}</s>", "rejected": f" {r}"}
        for p, c, r in ROWS
    ]
    data, _ = prepared(base_config, load, tmp_path, rows, "passthrough.default")
    assert data["chosen_ids"][0][-1] == data["rejected_ids"][0][-1] == 2
    assert data["prompt_ids"][0].count(1) == 1


def test_conversations_without_a_type(base_config, load, tmp_path):
    rows = [
        {
            "prompt": conversation(p, c)[:1],
            "chosen": conversation(p, c)[1:],
            "rejected": conversation(p, r)[1:],
        }
        for p, c, r in ROWS
    ]
    base_config["skip_prepare_dataset"] = True
    data, tokenizer = prepared(base_config, load, tmp_path, rows, None)
    # The host shuffles rows.
    prompts = {tokenizer.decode(ids).replace(" ", "") for ids in data["prompt_ids"]}
    assert prompts == {f"<s><|user|>{p.replace(' ', '')}<|assistant|>" for p, _, _ in ROWS}
    answers = {tokenizer.decode(ids).replace(" ", "") for ids in data["chosen_ids"]}
    assert answers == {f"{c.replace(' ', '')}</s>" for _, c, _ in ROWS}


@pytest.mark.slow
def test_merged_datasets_validation_split_and_score_columns(base_config, train, world, tmp_path):
    base_config["datasets"] = [base_config["datasets"][0], dict(base_config["datasets"][0])]
    write_rows(tmp_path / "more.jsonl", world.rows[24:34])
    base_config["datasets"][1]["path"] = str(tmp_path / "more.jsonl")
    base_config["sera"]["score_columns"] = ["score_chosen", "swapped"]
    base_config |= {"test_datasets": None, "val_set_size": 0.1, "num_epochs": 1}
    result = train(base_config)
    data = pq.read_table(result.run / "dataset.parquet")
    assert data.column_names[-2:] == ["score_chosen", "swapped"]
    total = 24 + len(world.rows[24:34])
    assert data.num_rows == total - 4
    assert pq.read_table(result.run / "iteration-01/evaluation.parquet").num_rows == 4
    run = json.loads((result.run / "run.json").read_text())
    assert (run["pairs"], run["evaluation_pairs"]) == (data.num_rows, 4)


@pytest.mark.slow
def test_damaged_rows_are_left_out_and_the_one_that_is_left_is_trained(
    base_config, train, world, tmp_path
):
    rows = [dict(row) for row in world.rows[:6]]
    rows[1]["chosen"] = None
    del rows[2]["rejected"]
    rows[3]["prompt"] = ""
    rows[4]["chosen"] = 5
    rows[5]["rejected"] = rows[5]["chosen"]
    write_rows(tmp_path / "rows.jsonl", rows)
    base_config["datasets"][0]["path"] = str(tmp_path / "rows.jsonl")
    base_config |= {"test_datasets": None, "evals_per_epoch": None, "num_epochs": 1}
    base_config["sera"]["bootstrap_ratio"] = 0
    data = pq.read_table(train(base_config).run / "dataset.parquet").to_pydict()
    assert data["row"] == [0]
    base_config["sera"]["bad_rows"] = "raise"
    base_config["output_dir"] = str(tmp_path / "again")
    with pytest.raises(ValueError, match=r"sera.bad_rows: raise, and 5 of the 6 .*rows\.jsonl"):
        train(base_config)


def test_a_damaged_file_ends_before_a_model_is_loaded(base_config, train, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "b a", "chosen": "a"}\n[1]\n')
    base_config["datasets"][0]["path"] = str(tmp_path / "broken.jsonl")
    said = r"^datasets\[0\]\.path: .*broken.jsonl' .*line 2 is not an object"
    with pytest.raises(ValueError, match=said):
        train(base_config)
