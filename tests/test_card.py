"""The card of a model: true, without places of the machine, and obeyed by no reader's renderer."""

import json
import re
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from sera_plugin.config.quoting import in_markdown
from sera_plugin.rundir.format import read_json
from sera_plugin.rundir.store import write_json
from sera_plugin.tools.report.reading import Run, Texts, find_run
from sera_plugin.tools.sharing.card import model_card, write_card
from sera_plugin.tools.sharing.messages import Chat
from sera_plugin.tools.sharing.names import run_id
from sera_plugin.tools.sharing.pairs import Pairs
from sera_plugin.tools.sharing.plan import _without_places
from tests.report_run import WORDS, make_run

HOSTILE = (
    "<script>alert(1)</script> | `x` ``` **b** _i_ [l](http://e.com) ![p](http://e.com/p) www.e.com"
    " a@b.com $x$ \\( :smile: &lt; # h"
)


def card_of(output_dir: Path, **how):
    return model_card(Run(find_run(output_dir)), **how)


def parsed(card):
    """What stands in a card, as a renderer that lets HTML through sees it."""
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False}).enable("strikethrough")
    tokens = markdown.parse(card.text)
    return [*tokens, *(child for token in tokens for child in token.children or ())]


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("a_b | c", 9, "a&#95;b &#124; c"),
        ("one\ntwo\x1b[31m", 99, "one<br>two"),
        ("日本 é", 9, "日本 é"),
        ("www.x\u202e", 9, "www&#46;x&#92;u202e"),
        ("abcdef", 4, "abcd [... 2 more characters]"),
    ],
)
def test_text_as_markdown_shows_it(text, limit, shown):
    assert in_markdown(text, limit) == shown


def test_what_is_hostile_is_text_and_reads_as_it_stands():
    table = f"| a | b |\n| --- | --- |\n| {in_markdown(HOSTILE, 999)} | {in_markdown('x', 9)} |"
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    (cell, _) = [t for t in markdown.parse(table) if t.type == "inline"][2:]
    assert {child.type for child in cell.children} <= {"text", "text_special"}
    assert "".join(child.content for child in cell.children) == HOSTILE


def test_a_card_says_what_the_run_did(tmp_path):
    base = tmp_path / "secret-place" / "my-base"
    base.mkdir(parents=True)
    data = [
        {"path": str(tmp_path / "secret-place/pairs.jsonl"), "ds_type": "json"},
        {"path": "org/preferences"},
    ]
    config = {"base_model": str(base), "adapter": "lora", "lora_r": 8, "datasets": data}
    store = make_run(tmp_path / "my-run", config=config)
    card = card_of(tmp_path / "my-run")
    assert card.data.base_model is None
    assert card.data.datasets == ["org/preferences"]
    assert card.data.library_name == "peft"
    assert set(card.data.tags) >= {"sera", "dpo", "axolotl"}
    assert "secret-place" not in str(card)
    assert str(tmp_path) not in str(card)
    for part in ("`my-base`", "`pairs.jsonl` (local)", "theta_3", "lora_r `8`", "ko2025sera"):
        assert part in card.text, part
    second = store.summary(2)
    kept, sampled = second["pairs"]["kept"], second["pairs"]["bootstrapped_kept"]
    accuracy = f"{second['evaluation']['accuracy']:.0%}"
    row = next(line for line in card.text.splitlines() if line.startswith("| 2 |")).split(" | ")
    assert row[1:4] == ["12", str(kept), str(sampled)]
    assert row[-1] == f"{accuracy} |"
    assert (kept, sampled) == (6, 6)
    for alarm in second["alarms"]:
        assert alarm["text"] in card.text
    assert 'PeftModel.from_pretrained(base, "path/to/this/directory")' in card.text
    assert str(card_of(tmp_path / "my-run")) == str(card)


def test_a_base_model_of_the_hub_is_named_in_the_metadata(tmp_path):
    make_run(tmp_path)
    card = card_of(tmp_path, name="user/mine", revision="iteration-2", policy=2)
    assert card.data.base_model == "org/none-such"
    assert card.data.library_name == "transformers"
    assert '"user/mine", revision="iteration-2"' in card.text
    assert "theta_2, the policy after iteration 2 of 3. Training kept theta_3" in card.text


def test_the_policy_that_is_kept_is_told_with_the_losses_that_decided(tmp_path):
    store = make_run(tmp_path)
    losses = [0.6931, 0.5, 0.6, 0.8]
    ending = {"policies": 3, "kept": 1, "held_out_losses": losses}
    store.end = 4
    store.write_summary(4, ending)
    card = card_of(tmp_path)
    assert "This is theta_1" in card.text
    assert "every later policy is clearly worse" in card.text
    assert "theta_1 0.5, theta_2 0.6, theta_3 0.8" in card.text


@pytest.mark.parametrize(
    ("made", "said", "unsaid"),
    [
        ({"iterations": 1}, "nothing was sampled", "Pairs that it made"),
        ({"sera": {"bootstrap_ratio": 0}}, "nothing was sampled", "adds pairs that it samples"),
        ({"words": None}, "and 4 held out", "Pairs that it made"),
        ({"held_out": 0}, "and 0 held out", "%"),
    ],
)
def test_a_card_says_no_more_than_is_known(tmp_path, made, said, unsaid):
    make_run(tmp_path, **made)
    card = card_of(tmp_path)
    assert said in card.text
    table = card.text[card.text.index("# Iterations") :] if unsaid == "%" else card.text
    assert unsaid not in table.partition("# Alarms")[0]


def test_a_run_that_was_cut_off_says_so(tmp_path):
    store = make_run(tmp_path)
    summary = store.summary(3)
    del summary["seconds"]["train"]
    store.write_summary(3, summary)
    card = card_of(tmp_path)
    assert "**Training has not finished**: 2 of 3 iterations" in card.text
    # Nothing was trained on in the third, whatever it has ranked.
    assert [one.number for one in Pairs(Run(store), "user/x").iterations] == [2]
    assert write_card(tmp_path).read_text(encoding="utf-8") == str(card)


def test_prompts_and_a_reward_without_trust_are_told(tmp_path):
    prompts = [{"path": "org/prompts"}, {"path": str(tmp_path / "secret/mine.jsonl")}]
    sera = {"reward": "fitted", "trust": "act", "prompts": prompts}
    store = make_run(tmp_path / "run", sera=sera, held_out=2, prompts=5)
    card = card_of(tmp_path / "run")
    assert card.data.datasets == ["org/prompts"]
    assert "`mine.jsonl` (local); N = 12 pairs, and 2 held out; 5 more prompts, which" in card.text
    said = "in iteration 2, 3 the reward was not trusted: it dropped no pair, and was trained on no"
    assert said in card.text
    assert "secret" not in str(card)
    pairs = Pairs(Run(store), "user/x").card()
    assert pairs.data.source_datasets == ["org/prompts"]
    assert "from 12 on they are prompts without answers" in pairs.text


def test_texts_of_a_run_are_shown_and_not_obeyed(tmp_path):
    words = [f"{HOSTILE}{number}" for number in range(len(WORDS))]
    hostile = {"path": "<img src=x>|`.jsonl", "ds_type": "json"}
    make_run(tmp_path, words=words, config={"base_model": "a`b|<b>", "datasets": [hostile]})
    card = card_of(tmp_path)
    tokens = parsed(card)
    html = {t.content for t in tokens if t.type in ("html_inline", "html_block")}
    assert html == {"<br>"} or not html
    links = {t.attrGet("href") for t in tokens if t.type == "link_open"}
    assert {re.sub(r"^https://([^/]+).*", r"\1", one) for one in links} == {"arxiv.org"}
    shown = [t.content for t in tokens if t.type == "text" and "alert(1)" in t.content]
    assert not any(t.type in ("image", "strong_open", "code_block") for t in tokens)
    assert shown or "alert" in "".join(t.content for t in tokens if t.type.startswith("text"))
    rows = [line for line in card.text.splitlines() if line.startswith("| &#60;")]
    assert rows
    assert all(line.count(" | ") == 3 for line in rows)


TEMPLATES = {
    "chatml": "{% for m in messages %}<s> [{{ m.role }}] {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> [assistant]{% endif %}",
    "no roles": "{% for m in messages %}{% if m.role == 'system' %}{{ raise() }}{% endif %}"
    "{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>"
    "{% endif %}{% endfor %}",
}


@pytest.fixture
def chat(tmp_path, request):
    """A run whose tokenizer has a template, and how that tokenizer makes ids of messages."""
    words = [
        "<s>",
        "</s>",
        "[user]",
        "[assistant]",
        "[system]",
        "[INST]",
        "[/INST]",
        "a",
        "b",
        "c",
        "d",
        "e",
    ]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    inner.pre_tokenizer = WhitespaceSplit()
    store = make_run(tmp_path, words=None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.save_pretrained(tmp_path)
    run = Run(find_run(store.root.parent))

    def ids(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return Chat(run, Texts(run)), ids


def conversation(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    said = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + said


@pytest.mark.parametrize("chat", ["chatml"], indirect=True)
def test_a_template_is_undone_to_the_messages_it_was_given(chat):
    """This tokenizer's text has a blank between any two tokens, as its template writes them."""
    undo, ids = chat
    for messages in (
        conversation("a b"),
        conversation("a", "b c", "d"),
        conversation("a", system="c d"),
        conversation("a", "b", "c", "d", "e", system="b"),
    ):
        assert undo.prompt(ids(messages)) == messages
    assert undo.prompt(ids(conversation("a"))[1:]) is None  # something is missing
    assert undo.prompt([7, 8]) is None  # plain text


@pytest.mark.parametrize("chat", ["no roles"], indirect=True)
def test_a_template_that_cannot_be_undone_for_certain_is_not(chat):
    undo, ids = chat
    messages = conversation("a", "b c", "d")
    assert undo.prompt(ids(messages)) is None
    assert undo.prompt([7, 8]) is None


def test_who_ranked_the_pairs_is_said(tmp_path):
    """Of the same files, as if other labelers and selections had made them."""
    store = make_run(tmp_path)
    description = read_json(store.run_file)
    for labeler, selection, card_says, pairs_say in (
        ("implicit", "irm", "ranked by its implicit reward.", "nats; of `sampled` ones what `impl"),
        ("judge", "irm", "ranked by the judge.", "what `judge` ranked them by, in its own unit"),
        (
            "function",
            "irm",
            "ranked by `function` (`score` of `checks.py`)",
            "what `function` ranked",
        ),
        (
            ["implicit", "judge"],
            "irm",
            "policy, ranked by its implicit reward and the scores",
            "`impl",
        ),
        (
            "spin",
            "irm",
            "SeRA ([Ko et al., ICLR 2025](https://arxiv.org/abs/2410.09362)): in it",
            "",
        ),
        ("spin", "irm", "The rejected answers are the model's own words, the chosen ones", "; of"),
        ("implicit", "random", "ranked by its", "did not select them (`sera.selection: random`"),
    ):
        description["config"]["sera"] |= {"labeler": labeler, "selection": selection}
        description["config"]["sera"]["function"] = None
        if labeler == "function":
            description["config"]["sera"]["function"] = {"call": "/home/me/checks.py:score"}
        # Of SPIN the dataset's is one more.
        description["config"]["sera"]["candidates"] = 3 if labeler == "spin" else 4
        write_json(store.run_file, description)
        run = Run(store)
        assert card_says in model_card(run).text
        assert pairs_say in Pairs(run, "user/x").card().text


def test_what_was_a_place_where_it_trained_is_none_on_the_hub(tmp_path, monkeypatch):
    """Nor is it looked for where the card is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    judge = {"base_url": "http://127.0.0.1:8000/v1", "model": "/secret/place/my-judge"}
    config = {"datasets": [{"path": "a/b"}, {"path": "c/d"}]}
    store = make_run(tmp_path / "run", config=config)
    description = read_json(store.run_file)
    assert description["local_datasets"] == ["a/b"]
    description["config"]["sera"] |= {"labeler": "judge", "judge": judge}
    write_json(store.run_file, description)
    (tmp_path / "elsewhere/c/d").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    card = card_of(tmp_path / "run")
    assert card.data.datasets == ["c/d"]
    assert "`b` (local)" in card.text
    assert "ranked by `judge` (`my-judge`)" in card.text
    judge["model"] = "org/judge"
    write_json(store.run_file, description)
    assert "ranked by `judge` (`org/judge`)" in card_of(tmp_path / "run").text


def test_no_absolute_path_is_in_a_configuration_that_is_pushed():
    template = "/a/b\n{{ messages }}"
    config = {"auto_map": {"x": ["/home/me/code"]}, "chat_template": template, "pad_token": "/"}
    kept = {"content": "/think", "model": "org/name", "base_model": "org/base"}
    assert _without_places(config | kept, "org/base") == (
        {"auto_map": {"x": ["code"]}, "chat_template": template, "pad_token": "/"} | kept
    )


def test_two_runs_of_one_configuration_are_two_and_a_copy_is_the_same(tmp_path):
    one, other = (make_run(tmp_path / name, iterations=1) for name in ("one", "other"))
    drawn = [run_id(Run(store)) for store in (one, other)]
    assert drawn[0] != drawn[1]
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in drawn)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    make_run(tmp_path / "copy", iterations=1)  # goes on with what is there
    assert run_id(Run(find_run(tmp_path / "copy"))) == drawn[0]
    # Runs of earlier versions have none: what they are made of.
    for store in (one, other):
        description = read_json(store.run_file)
        del description["run_id"]
        write_json(store.run_file, description)
    assert run_id(Run(one)) == run_id(Run(other)) not in drawn


def test_a_card_is_json_and_yaml_that_the_client_reads_back(tmp_path):
    make_run(tmp_path)
    card = card_of(tmp_path)
    assert json.loads(json.dumps(card.data.to_dict()))["sera_run"]
