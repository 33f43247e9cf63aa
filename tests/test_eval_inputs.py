"""What an evaluation reads: prompt sets as published, what is compared, and what models answer."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from sera_plugin.rundir.checksums import seal
from sera_plugin.rundir.store import RunStore, write_json
from sera_plugin.tools.demo.base_model import build_tokenizer, load_model
from sera_plugin.tools.evaluation.answers import NO_ROOM, Decoding, Prompt, Turn, read_prompts
from sera_plugin.tools.evaluation.chat import Chat
from sera_plugin.tools.evaluation.engine import Engine
from sera_plugin.tools.evaluation.models import Model, find_models
from tests.conftest import write_rows
from tests.report_run import make_run


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("row", "turns", "category"),
    [
        ({"dataset": "koala", "instruction": "Why?", "output": "So."}, ["Why?"], "koala"),
        ({"question_id": 1, "category": "generic", "turns": ["Why?"]}, ["Why?"], "generic"),
        ({"text": "Why?", "category": "generic"}, ["Why?"], "generic"),
        ({"idx": 1, "Skill": "Math", "Instruction": "Why?"}, ["Why?"], "Math"),
        ({"prompt": "Why?", "chosen": [{"content": "Why?", "role": "user"}]}, ["Why?"], ""),
        ({"category": "writing", "turns": ["Why?", "Shorter."]}, ["Why?", "Shorter."], "writing"),
        ({"prompt": "Wie? 🙂\u2028{}", "category": 3}, ["Wie? 🙂\u2028{}"], "3"),
        ({"prompt": "Why?", "category": None}, ["Why?"], ""),
        (
            {"question_id": "1", "category": "v0.1", "turns": [{"content": "Why?"}]},
            ["Why?"],
            "v0.1",
        ),
        ({"uid": "1", "category": "hard_prompt", "prompt": "Why?"}, ["Why?"], "hard_prompt"),
        ({"key": 1, "prompt": "Why?", "kwargs": [{"n": 3}]}, ["Why?"], ""),
    ],
    ids=["AlpacaEval", "Vicuna", "older Vicuna", "Evol-Instruct", "UltraFeedback", "MT-Bench",
         "one's own", "no category", "Arena-Hard v0.1", "Arena-Hard v2.0", "IFEval"],
)  # fmt: skip
def test_prompt_sets_are_read_as_published(tmp_path, row, turns, category, form):
    path = tmp_path / f"prompts.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([row] * 2), path)
    elif form == "json":
        text = "\ufeff" + json.dumps([row] * 2, ensure_ascii=False, indent=2)
        path.write_text(text, encoding="utf-8")
    else:
        path.write_text("\n\n".join([json.dumps(row, ensure_ascii=False)] * 2), encoding="utf-8")
    assert read_prompts(path) == [Prompt(tuple(turns), category, number) for number in (0, 1)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"holds no prompts"),
        ("[]", r"holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', r"line 2 is not JSON"),
        ('{"prompt": "a"}\n["a"]', r"line 2 is \['a'\], not an object"),
        ('[{"prompt": "a"}, 3]', r"row 1 is 3, not an object"),
        ("[" * 100_000, r"is not JSON"),
        ('{"question": "a", "id": 1}', r"row 0 has no prompt.*turns, inst.*'question', 'id'"),
        ("{}", r"row 0 has no prompt.*has no fields"),
        ('{"prompt": "a"}\n{"prompt": null}', r"row 1: prompt is None, not text"),
        ('{"instruction": 5}', r"row 0: instruction is 5, not text"),
        ('{"turns": "a"}', r"row 0: turns is 'a', not a list"),
        ('{"turns": []}', r"row 0: turns is \[\], not a list"),
        ('{"turns": ["a", {}]}', r"row 0: turns is {}, not text"),
        ('{"prompt": " \\n\\u200b"}', r"row 0: prompt is empty"),
        ('{"prompt": "\\ud800"}', r"row 0: prompt is not valid Unicode"),
        (b"\xff\xfe", "not UTF-8"),
        (b"no", "not a parquet file"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, content, said):
    path = tmp_path / f"prompts.{'parquet' if 'parquet' in said else 'jsonl'}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=rf"prompts\.\w+.*{said}"):
        read_prompts(path)


def test_a_limit_draws_and_a_larger_one_has_those_of_the_smaller(tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": str(number)} for number in range(50)])
    few, more, other, every = (
        [prompt.row for prompt in read_prompts(tmp_path / "p.jsonl", limit, seed)]
        for limit, seed in ((5, 0), (20, 0), (5, 1), (99, 0))
    )
    assert (len(few), every) == (5, list(range(50)))
    assert set(few) < set(more)
    assert few != other
    assert more == sorted(more) != list(range(20))


def make_model(path: Path, **keys: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(keys))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def make_adapter(path: Path, base: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"base_model_name_or_path": str(base), "r": 4}
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter_model.safetensors").write_bytes(b"adapter")
    return path


@pytest.fixture
def run(tmp_path):
    """A finished run of adapters with three iterations."""
    base = make_model(tmp_path / "base")
    store = make_run(tmp_path / "run", config={"base_model": str(base)})
    for iteration in (1, 2, 3):
        make_adapter(store.policy(iteration), base)
        seal(store.policy(iteration))
    make_adapter(tmp_path / "run", base)
    return tmp_path / "run"


def find(*specs, **keys):
    return find_models(list(map(str, specs)), **keys)


def names(models) -> list[str]:
    return [model.name for model in models]


def test_policies_of_a_run(run):
    first, last = find(run)  # a run alone is compared with what it started from
    assert names([first, last]) == ["run@0", "run"]
    assert (first.adapter, last.adapter) == (run / "sera/iteration-01/policy", run)
    assert first.weights == last.weights == str(run.parent / "base")
    assert first.end_ids == (0,)
    assert names(find(run, iterations=True)) == ["run@0", "run@1", "run@2", "run"]
    models = find(f"{run}@2", run / "sera", f"{run}@1", f"{run}@3")
    assert names(models) == ["run@2", "run", "run@1"]  # theta_3 is the last policy
    assert models[0].adapter == run / "sera/iteration-03/policy"


def test_a_run_of_whole_weights(tmp_path):
    base = make_model(tmp_path / "base")
    store = make_run(tmp_path / "run", config={"base_model": "moved/away"})
    write_json(store.policy(1) / "base_model.json", {"base_model": str(base)})
    make_model(store.policy(3))
    for iteration in (1, 3):
        seal(store.policy(iteration))
    models = find(make_model(tmp_path / "run"), iterations=True)
    assert names(models) == ["run@0", "run@2", "run"]
    assert models[0].weights == str(base)
    with pytest.raises(ValueError, match=r"run@1 is in .*does not exist.*keep_policies: true"):
        find(f"{tmp_path}/run@1", base)


def test_models_adapters_and_answers(run, tmp_path):
    answers = tmp_path / "gpt.json"
    answers.write_text("[]")
    other = make_adapter(tmp_path / "deep/base", tmp_path / "base")
    models = find(answers, tmp_path / "base", other, run / "sera/iteration-02/policy")
    assert names(models) == ["gpt", "base", "base-2", "iteration-02"]
    assert (models[0].answers, models[2].adapter) == (answers, other)
    # Names that read alike have files of their own.
    places = [make_model(tmp_path / name) for name in ("my run", "my_run", "deep/my run")]
    assert names(find(*places)) == ["my run", "my_run-2", "my run-3"]
    assert [one.file for one in find(*places)] == ["my_run", "my_run-2", "my_run-3"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (None, r"base would be compared with itself"),
        ("{}/base", r"compared with itself"),
        ("{}/run@4", r"run@4: the run has the policies 0 to 3"),
        ("{}/nowhere@1", r"nowhere: no SeRA run there"),
        ("{}/none.json", r"there is no file .*none.json"),
        ("{}/empty", r"empty holds no model: neither config.json"),
        ("{}/pickled", r"pickled has no adapter_model.safetensors"),
        ("{}/lost", r"lost stands on no/such-model: .*nothing is downloaded"),
        ("no-such/model", r"no-such/model is neither a directory nor in the local"),
        ("so what", r"'so what' is neither a run, a model directory"),
        ("../x/y/z", r"is neither a run, a model directory"),
    ],
)
def test_what_is_not_there_is_named(run, tmp_path, other, said):
    (tmp_path / "empty").mkdir()
    make_adapter(tmp_path / "lost", Path("no/such-model"))
    make_adapter(tmp_path / "pickled", tmp_path / "base")
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    with pytest.raises(ValueError, match=said):
        find(tmp_path / "base", *([] if other is None else [other.format(tmp_path)]))


def test_a_run_that_has_not_finished_has_its_earlier_policies(run):
    store, last = RunStore(run), run / "adapter_model.safetensors"
    last.rename(run / "kept")
    with pytest.raises(ValueError, match=r"run has not finished: .*or .*run has no weights"):
        find(run)
    (run / "kept").rename(last)
    shutil.rmtree(store.iteration(3))
    assert names(find(run)) == ["run@0", "run"]  # early stopping has ended it
    # Ctrl-C has the host save what is in training; that iteration has no time of training then.
    record = store.summary(2)
    del record["seconds"]["train"]
    store.write_summary(2, record)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"finished: iteration 2 is not.*run@t is its policy"):
            find(run)
        last.unlink(missing_ok=True)
    assert names(find(f"{run}@0", f"{run}@1")) == ["run@0", "run@1"]


def test_a_damaged_policy_and_a_base_model_that_has_moved_are_named(run):
    (run / "sera/iteration-02/policy/adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"run@1 is in .*the checksum of adapter_model"):
        find(run, iterations=True)
    (run.parent / "base").rename(run.parent / "elsewhere")
    with pytest.raises(ValueError, match=r"policy stands on .*base: .*nothing is downloaded"):
        find(run)


def test_a_model_is_another_one_when_its_files_change(run):
    def identities():
        return [model.identity for model in find(run, iterations=True)]

    before = identities()
    assert len(set(before)) == 2  # the fixture's policies are the same; the last is not sealed
    (run / "adapter_model.safetensors").write_bytes(b"longer weights")
    (run / "events.log").write_text("not a part of the model")
    after = identities()
    assert after[:3] == before[:3]
    assert after[3] != before[3]


GREEDY = Decoding(temperature=0.0, top_p=1.0, max_new_tokens=12, seed=0)
PROMPT, FORMAT = "f b d a e c", "<s> <|user|> {prompt} <|assistant|>"


@pytest.fixture
def sample(world, tmp_path):
    """Answers of a model to conversations, by index."""

    def run(conversations, decoding=GREEDY, done=(), path=None, vllm=None, **keys):
        model = Model("m", "m", str(path or world.base), **keys)
        engine = Engine(model, decoding, vllm, tmp_path / "vllm.log")
        return dict(engine([(c,) if isinstance(c, str) else c for c in conversations], done, 0))

    return run


def test_temperature_0_takes_the_likeliest_token(sample, world):
    answer = sample([PROMPT])[0]
    model, tokenizer = load_model(world.base)
    ids = tokenizer(FORMAT.format(prompt=PROMPT), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert answer.text == tokenizer.decode(out, skip_special_tokens=True)
    assert answer.tokens == len(out)


def test_a_model_is_asked_with_the_one_bos_that_training_has(world, tmp_path):
    """The tokenizer adds one; a template may write one too, or none."""
    tokenizer = build_tokenizer()
    adds = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds
    shutil.copy(world.base / "config.json", tmp_path)
    for start in ("<s> ", ""):
        tokenizer.chat_template = start + "<|user|> {{ messages[0]['content'] }} <|assistant|>"
        tokenizer.save_pretrained(tmp_path)
        chat = Chat(Model("m", "m", str(tmp_path)), None)
        asked = chat.prompt(("a b",))
        assert tokenizer.decode(asked) == "<s> <|user|> a b <|assistant|>"
        assert chat.answered("a b", "c")[0].tolist() == asked


def test_a_resumed_sample_is_the_one_it_would_have_been(sample):
    decoding = Decoding(1.0, 1.0, 12, 3)
    conversations = [" ".join(Random(n).sample("abcdefghij", 2 + n % 5)) for n in range(30)]
    whole = sample(conversations, decoding)
    for done in (range(11), range(0, 30, 2), [29]):
        rest = sample(conversations, decoding, done)
        assert rest == {index: one for index, one in whole.items() if index not in set(done)}


def test_a_format_in_place_of_the_template(sample):
    decoding = replace(GREEDY, prompt_format=FORMAT)
    assert sample([PROMPT], decoding) == sample([PROMPT])
    assert sample([PROMPT], replace(GREEDY, prompt_format="{prompt}")) != sample([PROMPT])
    with pytest.raises(ValueError, match="need the chat template of m"):
        sample([("a", "b", "c")], decoding)


def test_a_policy_is_asked_with_the_settings_of_the_template_it_was_trained_with(
    sample, world, tmp_path
):
    base = shutil.copytree(world.base, tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if think %} a{% endif %}")
    expected = sample([PROMPT], replace(GREEDY, prompt_format=FORMAT + " a"))
    assert expected != sample([PROMPT], path=base)
    assert expected == sample([PROMPT], path=base, template_kwargs={"think": True})
    models = [Model("m", "m", str(base), template_kwargs=one) for one in ({}, {"think": True})]
    assert models[0].identity != models[1].identity


def test_a_prompt_that_fills_the_context_is_told_and_one_that_nearly_does_is_answered(sample):
    # The context has 64 tokens; three more stand around a prompt.
    found = sample([" ".join("a" * 61), " ".join("a" * 60), PROMPT, " ".join("b" * 9000)])
    assert [found[n].finish_reason == NO_ROOM for n in range(4)] == [True, False, False, True]
    assert found[1].tokens == 1
    assert found[2] == sample([PROMPT])[0]


def test_an_answer_of_nothing_is_an_empty_one(sample, world, tmp_path):
    """A model whose first token is an end token."""
    model, tokenizer = load_model(world.base)[0], build_tokenizer()
    model.model.norm.weight.data[:] = 0  # all tokens are equally likely, and each is an end
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "silent")
    found = sample([PROMPT], path=tmp_path / "silent", end_ids=tuple(range(len(tokenizer))))
    assert found[0] == Turn("", 1, "stop")


def test_a_missing_template_and_damaged_weights_are_named(sample, world, tmp_path):
    bare, tokenizer = shutil.copytree(world.base, tmp_path / "bare"), build_tokenizer()
    (bare / "chat_template.jinja").unlink()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    with pytest.raises(ValueError, match=r"m \(.*bare\) has no chat template.*--prompt-format"):
        sample([PROMPT], path=bare)
    decoding = replace(GREEDY, prompt_format=FORMAT)
    assert sample([PROMPT], decoding, path=bare) == sample([PROMPT])
    (bare / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"m \(m\) cannot be loaded"):
        sample([PROMPT], decoding, path=bare)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif("SERA_VLLM_PYTHON" not in os.environ, reason="SERA_VLLM_PYTHON is unset")
def test_vllm_gives_the_same_answers(sample, world, model, tmp_path, monkeypatch):
    """At relative paths: the engine is another process, which starts elsewhere."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    base, python = map(os.path.relpath, (world.base, os.environ["SERA_VLLM_PYTHON"]))
    asked = [(PROMPT,), ("c a b", "z y", "x"), ("q r s t",)]
    found = []
    for its in ({}, {"adapter": Path("adapter")}):
        here, there = (sample(asked, path=base, vllm=one, **its) for one in (None, python))
        assert here == there
        found.append(here)
    assert found[0] != found[1]
    assert (tmp_path / "vllm.log").stat().st_size > 0
