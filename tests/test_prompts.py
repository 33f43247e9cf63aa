"""Prompts without answers: tokens as in a pair, sampled beside the pairs', never scored as one."""

import json
import re
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from axolotl.integrations.base import PluginManager
from axolotl.loaders import load_tokenizer
from axolotl.utils.dict import DictDefault
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sera_plugin.algorithm.method import Method
from sera_plugin.config.labelers import require_candidates
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import prepare_rows
from sera_plugin.data.prompts import prepare_prompts
from sera_plugin.host.config import name_types
from sera_plugin.host.datasets import load_pairs
from sera_plugin.host.plugin import SeraPlugin
from sera_plugin.host.trainer import SeraTrainer
from sera_plugin.host.unused import unused
from sera_plugin.tools.report.page import write_report
from sera_plugin.tools.report.pairs import describe_pair, show_pair
from sera_plugin.tools.report.reading import Run, Texts, find_run
from tests.conftest import table, write_rows

ASKED = "<s> <|user|> {} <|assistant|>"
#: A pair's row, and how its dataset is read.
TEXT = {"prompt": "c a", "chosen": "a c", "rejected": "c c"}
BLOCK = {"prompt_format": ASKED.replace("{}", "{prompt}")}
CHAT = {"type": "chat_template.default", "field_messages": "prompt"}


@pytest.fixture
def prepare(with_template, tmp_path):
    """The prompts that a run with these entries and rows samples, as text; and what is logged."""

    def run(rows, how=None, data=None, held_out=(), name="prompts.jsonl", **keys):
        write_rows(tmp_path / name, rows)
        write_rows(tmp_path / "pairs.jsonl", [TEXT])
        here = {"ds_type": "json", "split": "train"}
        entry = {"path": str(tmp_path / name), **here, **(how or {})}
        dataset = {"path": str(tmp_path / "pairs.jsonl"), **here, **(data or {"type": BLOCK})}
        keys |= {"datasets": [dataset], "dataset_prepared_path": str(tmp_path / "prepared")}
        block = {**with_template.sera, "prompts": [entry], **keys.pop("block", {})}
        keys |= {"dataset_num_proc": None, "sera": block}
        cfg = DictDefault({**with_template.to_dict(), **keys})
        name_types(cfg)
        loaded, tokenizer = load_pairs(cfg), load_tokenizer(cfg)
        ends = [tokenizer.eos_token_id]
        sera = SeraConfig(**cfg.sera)
        rows = prepare_rows(loaded.train_dataset, tokenizer, ends, cfg, sera, "train")
        aside = [np.array(tokenizer(one)["input_ids"], dtype=np.int32) for one in held_out]
        found = prepare_prompts(
            loaded.prompts, tokenizer, ends, cfg, sera, rows.prompt_ids, aside or None
        )
        return sorted(tokenizer.decode(one) for one in found["prompt_ids"].to_pylist())

    return run


def said_of(*texts):
    return sorted(ASKED.format(text) for text in texts)


def turns(*texts):
    return [{"role": "user", "content": text} for text in texts]


def test_a_prompt_has_the_tokens_that_it_would_have_in_a_pair(prepare):
    rows = [{"prompt": "b a"}, {"prompt": "d"}]
    expected = said_of("b a", "d")
    assert prepare(rows) == expected
    # Through the chat template: text is a user's message, messages are what they are.
    assert prepare(rows, data=CHAT) == expected
    assert prepare([{"prompt": turns("b a")}, {"prompt": turns("d")}], data=CHAT) == expected
    assert prepare([{"messages": turns("d")}], data=CHAT) == said_of("d")
    theirs = [{"talk": [{"from": "human", "value": "d"}], "messages": turns("b")}]
    names = {"role": "from", "content": "value"}
    how = CHAT | {"field_messages": "talk", "message_property_mappings": names}
    how |= {"roles": {"user": ["human"], "assistant": ["gpt"]}}
    assert prepare(theirs, how) == said_of("d")
    # Fields of text of its own, and text that is rendered already.
    block = {"type": {"field_prompt": "question", "prompt_format": "<s> <|user|> {prompt}"}}
    assert prepare([{"question": "e", "id": 3}], block) == ["<s> <|user|> e"]
    assert prepare([{"said": "e"}], block | {"field_messages": "said"}) == ["<s> <|user|> e"]
    # Rows that would be pairs, or single answers with a label, give their prompts.
    labelled = [{"prompt": "d", "completion": "x", "label": True}]
    assert prepare(labelled, data=CHAT) == said_of("d")
    assert prepare([TEXT | {"prompt": "e"}]) == said_of("e")
    as_is = {"type": "passthrough.default", "field_messages": "text"}
    assert prepare([{"text": "<s> d", "prompt": "b"}], as_is) == ["<s> d"]


def test_text_is_not_guessed_at(prepare):
    untyped = {"type": None}
    with pytest.raises(ValueError, match=r"sera.prompts\[0\].type: 'prompt' is text.*Set type"):
        prepare([{"prompt": "d"}], data=untyped)
    assert prepare([{"prompt": turns("d")}], data=untyped) == said_of("d")
    with pytest.raises(ValueError, match=r"field_messages: 'prompt' is not in the data. It has 'q"):
        prepare([{"question": "d"}], data=CHAT)
    with pytest.raises(ValueError, match=r"field_messages: 'x' is not in the data"):
        prepare([{"prompt": "d"}], {"type": {"field_prompt": "x"}})
    with pytest.raises(ValueError, match=r"sera.prompts\[0\].path.* the file is empty"):
        prepare([], name="nothing.jsonl")


def test_each_prompt_is_sampled_once_and_none_that_is_held_out(prepare):
    rows = [{"prompt": text} for text in ("b", "d", "b", "c a", "e", "e f")]
    assert prepare(rows, held_out=said_of("e")) == said_of("b", "d", "e f")
    with pytest.raises(ValueError, match=r"0 of 2 prompts .*; 2 are those of pairs. Remove it"):
        prepare([{"prompt": "c a"}] * 2, name="known.jsonl")


def test_prompts_that_cannot_be_used_follow_the_keys_of_pairs(prepare, sera_log):
    rows = [{"prompt": one} for one in ("b", "", None, "a " * 60, "d")]
    assert prepare(rows) == said_of("b", "d")
    for reason in ("is empty", "is null, not text", "longer than sequence_len: 48"):
        assert re.search(rf"{reason} \(sera.prompts\[0\] \(prompts", sera_log.text), reason
    with pytest.raises(ValueError, match=r"sera.bad_rows: raise, and 2 of the 5 prompt rows"):
        prepare(rows, block={"bad_rows": "raise"})
    with pytest.raises(ValueError, match="excess_length_strategy: raise, and 3 of the 5 prompt"):
        prepare(rows, excess_length_strategy="raise")
    with pytest.raises(ValueError, match=r"none of the 2 prompt rows .*Check `sera.prompts`"):
        prepare(rows[1:3], name="bad.jsonl")
    answered = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="the prompt ends with an answer"):
        prepare([{"prompt": answered}], data=CHAT, name="answered.jsonl")
    answered[1]["role"] = "bot"
    named = CHAT | {"roles": {"user": ["user"], "assistant": ["bot"]}}
    with pytest.raises(ValueError, match="the prompt ends with an answer"):
        prepare([{"prompt": answered}], data=named, name="named.jsonl")


def test_a_run_does_not_go_on_without_the_prompts_that_it_names(monkeypatch):
    plugins = PluginManager()
    plugins.plugins = {"sera": SeraPlugin()}
    monkeypatch.setattr(PluginManager, "_instance", plugins)
    trainer = SeraTrainer.__new__(SeraTrainer)
    trainer.config = SeraConfig()
    assert trainer._prepare_prompts(None, None) is None
    trainer.config = SeraConfig(prompts=[{"path": "p"}])
    with pytest.raises(ValueError, match=r"sera.prompts is set, and no prompts were loaded"):
        trainer._prepare_prompts(None, None)


def test_a_key_of_an_entry_that_nobody_reads_is_named():
    entries = [{"path": "p", "colour": 1, "split": "train"}]
    said = list(unused({"sera": {"prompts": entries}}, {}))
    assert len(said) == 1
    assert said[0].startswith("sera.prompts[0].colour is not a key of the host")
    assert not list(unused({"apply_chat_template": True, "fewshot_as_multiturn": True}, {}))


def test_pairs_of_a_prompt_are_counted_over_all_prompts():
    config = SeraConfig(bootstrap_ratio=3, candidates=4, prompts=[{"path": "x"}])
    needed = partial(Method, config, False, False, 10)
    assert [needed(prompts=more).pairs_per_prompt for more in (0, 4, 5, 20, 50)] == [3, 3, 2, 1, 1]
    with pytest.raises(ValueError, match="needs 3 pairs per prompt, but candidates: 4 gives at mo"):
        require_candidates(config, 3)


def test_a_run_samples_prompts_without_answers(base_config, train, world, tmp_path):
    """They are sampled, ranked, paired and trained with the pairs', and are no pairs."""
    fresh = [{"prompt": one} for one in ("b a d", "d c b a", "e")]
    given = [json.loads(line)["prompt"] for line in (world.directory / "train.jsonl").open()]
    write_rows(tmp_path / "prompts.jsonl", [*fresh, {"prompt": given[0]}])
    entry = {"path": str(tmp_path / "prompts.jsonl"), "ds_type": "json", "split": "train"}
    # More pairs than the prompts of the offline pairs could give.
    base_config["sera"] |= {"prompts": entry, "bootstrap_ratio": 2.2, "candidates": 4}
    base_config |= {"num_epochs": 2, "use_tensorboard": True}
    result = train(base_config)
    (events,) = (result.output / "runs").glob("*/events*")
    board = EventAccumulator(str(events.parent)).Reload()
    assert "sera/samples/iteration_2/text_summary" in board.Tags()["tensors"]
    run = json.loads((result.run / "run.json").read_text())
    assert (run["pairs"], run["prompts"]) == (24, 3)
    more = pq.read_table(result.run / "prompts.parquet").to_pydict()
    assert more["row"] == [24, 25, 26]
    decode = result.trainer.processing_class.decode
    texts = {decode(one) for one in more["prompt_ids"]}
    assert texts == {ASKED.format(one["prompt"]) for one in fresh}
    candidates, pairs = (table(result.run, 2, name) for name in ("candidates", "bootstrapped"))
    assert candidates["row"] == [row for row in range(27) for _ in range(4)]
    assert len(table(result.run, 2, "offline")["row"]) == 24
    assert 24 <= max(pairs["row"]) < 27
    # What is trained of them has their prompts, and the log-probabilities of their candidates.
    trained, kept = result.training_pairs[2].to_pydict(), 17
    chosen = [place for place, is_kept in enumerate(pairs["selected"]) if is_kept]
    prompts = pq.read_table(result.run / "dataset.parquet")["prompt_ids"].to_pylist()
    prompts += more["prompt_ids"]
    assert len(trained["prompt_ids"]) == kept + len(chosen)
    for place, pair in enumerate(chosen, start=kept):
        row = pairs["row"][pair]
        assert trained["prompt_ids"][place] == prompts[row]
        for side in ("chosen", "rejected"):
            at = 4 * row + pairs[f"{side}_candidate"][pair]
            assert trained[f"{side}_ids"][place] == candidates["token_ids"][at]
            assert trained[f"ref_{side}_logps"][place] == candidates["logps"][at][0]

    read = Run(find_run(result.output))
    assert read.notes == []
    shown = show_pair(describe_pair(read, 25, Texts(read)), Texts(read))
    assert "iteration 2, candidate 3: reward" in shown
    assert "chosen (" not in shown
    assert "more prompts" in write_report(result.output).read_text()
    (result.run / "prompts.parquet").unlink()
    assert Run(find_run(result.output)).notes == [
        "sera/prompts.parquet is missing: there are no texts to show"
    ]
    # The same command makes the table again; other prompts are another run.
    base_config["auto_resume_from_checkpoints"] = True
    train(base_config)
    assert pq.read_table(result.run / "prompts.parquet").to_pydict() == more
    write_rows(tmp_path / "prompts.jsonl", [*fresh[:2], {"prompt": "f"}])
    with pytest.raises(ValueError, match=r"the token ids of the prompts without answers \(sera.pr"):
        train(base_config)
    base_config["sera"]["prompts"] = None
    with pytest.raises(ValueError, match=r"bootstrap_ratio: 2\.2 needs 3 pairs per prompt"):
        train(base_config)
