"""Single answers with a label (KTO's rows): paired within a prompt, the rest named."""

import pyarrow as pa
import pytest
from axolotl.loaders import load_tokenizer
from axolotl.utils.dict import DictDefault

from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import prepare_rows
from sera_plugin.data.rows import LABELLED, PROBLEM
from sera_plugin.data.text import TEXTS
from sera_plugin.data.unpaired import ALONE, pair_up
from sera_plugin.host.config import name_types, restore_entries
from sera_plugin.host.datasets import load_pairs
from tests.conftest import write_rows


def rows(*given):
    """Rows from "prompt answer +" or "prompt answer -"."""
    split = [one.split() for one in given]
    return [{"prompt": p, "completion": c, "label": sign == "+"} for p, c, sign in split]


def test_the_ith_good_answer_meets_the_ith_bad_one():
    given = rows("x a -", "x b +", "y c +", "x d -", "x e +", "x f +", "y g +", "z h -")
    found = pair_up(pa.Table.from_pylist(given), "completion", "label")
    # b with a, e with d; f, both of y and the one of z are alone.
    assert found.rows.tolist() == [1, 4, 2, 5, 6, 7]
    assert found.rejected.tolist() == [0, 3, -1, -1, -1, -1]
    assert found.problems == ["", "", ALONE, ALONE, ALONE, ALONE]
    assert found.pairs == 2


def test_what_else_a_row_asks_belongs_to_its_prompt():
    """A system prompt and a history do, a number of the row does not; labels may be 0 and 1."""
    given = [
        {"prompt": "x", "system": system, "id": at, "completion": str(at), "label": at % 2}
        for at, system in enumerate(("s", "s", "t", "s"))
    ]
    found = pair_up(pa.Table.from_pylist(given), "completion", "label")
    assert (found.rows.tolist(), found.rejected.tolist()) == ([1, 2, 3], [0, -1, -1])
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}]
             for q, a in ("xa", "yb", "xc")]  # fmt: skip
    table = pa.table({"completion": talks, "label": [True, False, False]})
    found = pair_up(table, "completion", "label")
    assert (found.rows.tolist(), found.rejected.tolist()) == ([0, 1], [2, -1])
    for labels in (["true", '"False"'], [1.0, 0.0]):
        table = pa.table({"completion": ["a", "b"], "prompt": ["x", "x"], "label": labels})
        assert pair_up(table, "completion", "label").pairs == 1
    for wrong in ("yes", None, 2, 0.5):
        table = pa.table({"completion": ["a"], "prompt": ["x"], "label": [wrong]})
        (problem,) = pair_up(table, "completion", "label").problems
        assert problem.startswith("label is ")
        assert problem.endswith(", not true or false")


@pytest.mark.parametrize(
    ("good", "bad", "pairs"),
    [
        ("ab", "ab", "ab ba"),
        ("ca", "ba", "ca ab"),
        ("abc", "abc", "ac ba cb"),
        ("ad", "abc", "ab da"),
        ("ad", "a", "da"),
        ("aa", "aa", "aa aa"),
        ("ab", "cd", "ac bd"),
    ],
)
def test_an_answer_does_not_meet_its_equal_while_it_can_meet_another(good, bad, pairs):
    given = rows(*(f"x {one} +" for one in good), *(f"x {one} -" for one in bad))
    found = pair_up(pa.Table.from_pylist(given), "completion", "label")
    both = zip(found.rows, found.rejected, strict=True)
    made = [
        given[one]["completion"] + given[other]["completion"] for one, other in both if other >= 0
    ]
    assert " ".join(made) == pairs


def test_an_answer_that_says_nothing_takes_nobodys_partner():
    for empty, why in ((None, "null"), ("", "empty"), (" \n", "empty")):
        given = [{"prompt": "x", "completion": empty, "label": True}, *rows("x a +", "x b -")]
        found = pair_up(pa.Table.from_pylist(given), "completion", "label")
        assert (found.rows.tolist(), found.rejected.tolist()) == ([1, 0], [2, -1])
        assert found.problems == ["", f"completion is {why}"]
    said = [[{"role": "assistant", "content": text}] for text in ("", "a", "b")]
    table = pa.table({"prompt": ["x"] * 3, "completion": said, "label": [True, True, False]})
    assert pair_up(table, "completion", "label").rows.tolist() == [1, 0]


@pytest.fixture
def prepare(with_template, tmp_path):
    """Texts of the pairs that a run has of a dataset, and what became of the other rows."""

    def run(given, kind=None, name="kto.jsonl", bad_rows="drop", more=(), **entry):
        write_rows(tmp_path / name, given)
        entry |= {"path": str(tmp_path / name), "ds_type": "json", "split": "train"}
        entry |= {"type": kind} if kind else {}
        keys = {"datasets": [entry, *more], "dataset_num_proc": None}
        keys |= {"dataset_prepared_path": str(tmp_path / "prepared")}
        keys |= {"sera": {**with_template.sera, "bad_rows": bad_rows}}
        cfg = DictDefault({**with_template.to_dict(), **keys})
        restore_entries(cfg, {"datasets": keys["datasets"]})
        name_types(cfg)
        loaded, tokenizer = load_pairs(cfg).train_dataset, load_tokenizer(cfg)
        run.texts = [[row[name] for name in TEXTS] for row in loaded if not row[PROBLEM]]
        found = prepare_rows(loaded, tokenizer, [2], cfg, SeraConfig(**cfg.sera), "train")
        texts = zip(found.prompt_ids, found.chosen_ids, found.rejected_ids, strict=True)
        decoded = [tuple(map(tokenizer.decode, pair)) for pair in texts]
        return sorted(decoded), found.reasons(), sum(loaded[LABELLED][:])

    return run


ASKED = "<s> <|user|> b <|assistant|>"
PAIR = [(ASKED, "a </s>", "c </s>")]
GIVEN = rows("d e +", "b c -", "b a +")
ALONE_HERE = [f"1 row(s): {ALONE} (datasets[0] (kto.jsonl) rows 0)"]


def chat(row):
    """A row whose completion has the question before it."""
    turns = [{"role": "user", "content": row["prompt"]}]
    turns += [{"role": "assistant", "content": row["completion"]}]
    return {"completion": turns, "label": row["label"]}


def messages(row):
    (question, answer), label = chat(row)["completion"], row["label"]
    return {"prompt": [question], "completion": [answer], "label": label}


def renamed(row):
    return {"q": row["prompt"], "says": row["completion"], "ok": row["label"]}


FORMATS = {
    "prompt_format": "<s> <|user|> {prompt} <|assistant|>",
    "completion_format": " {completion}",
}
TYPES = {
    "messages": (GIVEN, "chat_template.default", {"field_messages": "prompt"}),
    "a prompt that no key names": (GIVEN, "chat_template.default", {}),
    "conversations": (list(map(chat, GIVEN)), "chat_template.argilla_chat", {}),
    "without a type": (list(map(messages, GIVEN)), None, {}),
    "fields": (
        list(map(renamed, GIVEN)),
        {"field_prompt": "q", "field_completion": "says", "field_label": "ok", **FORMATS},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_each_type_become_pairs(prepare, name):
    given, kind, entry = TYPES[name]
    assert prepare(given, kind, **entry) == (PAIR, ALONE_HERE, 3)


def test_the_hosts_types_of_single_answers(prepare):
    """This tokenizer does not know their special tokens, so of the text alone."""
    asked = [{**row, "question": row["prompt"]} for row in GIVEN]
    for name in ("chatml.ultra", "chatml.intel", "llama3.prompt_pairs"):
        with pytest.raises(ValueError, match="chosen equals rejected"):
            prepare(asked, name, name=f"{name}.jsonl")
        [(prompt, chosen, rejected)] = prepare.texts
        end = "<|eot_id|>" if "llama3" in name else "<|im_end|>"
        assert (chosen, rejected) == (f"a{end}", f"c{end}")
        assert "b" in prompt


def test_what_is_wrong_is_named_and_pairs_may_be_beside(prepare, tmp_path):
    text = {"field_prompt": "prompt", "field_chosen": "chosen", **FORMATS}
    text.pop("completion_format")
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "d", "chosen": "a", "rejected": "b"}])
    beside = {"path": str(tmp_path / "pairs.jsonl"), "ds_type": "json", "split": "train"}
    given = [*GIVEN, {"prompt": "b", "completion": None, "label": True}]
    given.append({"prompt": "b", "completion": "d", "label": False})
    found, reasons, labelled = prepare(
        given, {"field_completion": "completion", **FORMATS}, more=[beside | {"type": text}]
    )
    assert (len(found), labelled) == (2, 5)
    assert reasons == [
        ALONE_HERE[0].replace("1 row", "2 row").replace("rows 0", "rows 0, 4"),
        "1 row(s): completion is null (datasets[0] (kto.jsonl) rows 3)",
    ]
    with pytest.raises(ValueError, match=rf"bad_rows: raise, and 1 of the 2 .*{ALONE}"):
        prepare(GIVEN, "chat_template.default", bad_rows="raise", field_messages="prompt")
    with pytest.raises(ValueError, match=r"no prompt has both one with label: true .*rl: kto"):
        prepare(GIVEN[:2], "chat_template.default", name="alone.jsonl", field_messages="prompt")
    wrong = [*GIVEN[:2], {**GIVEN[2], "label": "good"}]
    with pytest.raises(ValueError, match=r"; 1 row\(s\): label is .*good.*, not true or"):
        prepare(wrong, "chat_template.default", name="wrong.jsonl", field_messages="prompt")
    with pytest.raises(ValueError, match=r"datasets\[0\].type: 'says' is not in the data"):
        prepare(GIVEN, {"field_completion": "says"}, name="other.jsonl")
