"""A reward model as a judge, with a model made up on the spot."""

import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from sera_plugin.labeling.judging import Answered, JudgeFailed, make_judge
from sera_plugin.rundir.journal import Journal
from sera_plugin.tools.demo.base_model import build_tokenizer

PROMPT = "f b d a e c"
ANSWERS = [Answered(PROMPT, " ".join("abcdefghijklmnopqrst"[:n])) for n in (6, 1, 20, 0, 13, 6)]


def save(directory: Path, labels: int = 1, **keys) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    keys = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **keys}
    keys |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_labels=labels, **keys)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture
def judge(tmp_path):
    """A judge with a journal; another call is another process's judge."""
    journals: list[Journal] = []

    def load(directory: Path):
        for journal in journals:
            journal.close()
        journals.append(Journal(tmp_path / "judge.jsonl"))
        return make_judge(str(directory), journals[-1])

    return load


def alone(directory: Path, answers) -> list[float]:
    """Each answer's logit by itself, without padding."""
    model = LlamaForSequenceClassification.from_pretrained(directory).eval()
    texts = (f"<s> <|user|> {one.question} <|assistant|> {one.answer}</s>" for one in answers)
    ask = partial(build_tokenizer(), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return [model(ask(text)["input_ids"]).logits.item() for text in texts]


def test_scores_are_the_models_logits_however_they_are_batched(reward_model, judge):
    scores = dict(judge(reward_model).score(ANSWERS))
    expected = alone(reward_model, ANSWERS)
    assert [scores[n] for n in range(6)] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 5
    loaded = judge(reward_model)  # an answer that does not fit has no score
    found = dict(loaded.score([Answered(PROMPT, " ".join("a" * 200)), ANSWERS[0]]))
    assert found[0] is None
    assert found[1] == pytest.approx(expected[0], abs=1e-5)
    assert (loaded.usage.refused, loaded.usage.cached.count) == (1, 1)


def test_a_reward_model_is_on_the_device_in_the_room_that_is_made_for_it(reward_model, tmp_path):
    """It asks for its weights, and for a pass of 8,192 tokens at a MiB each."""
    happened = []

    @contextmanager
    def room(wanted):
        happened.append(wanted)
        yield
        happened.append("left")

    with Journal(tmp_path / "judge.jsonl") as journal:
        loaded = make_judge(str(reward_model), journal, room)
        loaded._model.register_forward_hook(lambda *_: happened.append("passed"))
        move = loaded._model.to
        loaded._model.to = lambda device: happened.append(str(device)) or move(device)
        first = list(loaded.score(ANSWERS[:2]))
        assert list(loaded.score(ANSWERS[:2])) == first  # known: nothing has to wait for it
    weights = sum(each.nbytes for each in loaded._model.parameters())
    weights += sum(each.nbytes for each in loaded._model.buffers())
    assert happened == [weights + 2**33, "cpu", "passed", "cpu", "left"]


def test_scores_are_kept_and_belong_to_the_files(reward_model, judge, tmp_path):
    first = judge(reward_model)
    scores = dict(first.score(ANSWERS))
    assert (first.usage.asked.count, first.usage.cached.count) == (6, 0)
    again = judge(reward_model)
    again._model = None  # a forward pass would fail
    assert dict(again.score(ANSWERS)) == scores
    assert (again.usage.asked.count, again.usage.cached.count) == (0, 6)
    other = tmp_path / "other"
    shutil.copytree(reward_model, other)
    assert dict(judge(other).score(ANSWERS)) == pytest.approx(scores, abs=1e-6)
    assert judge(other).usage.cached.count == 0


def test_a_padding_token_may_be_the_tokenizers(judge, tmp_path, reward_model):
    scores = dict(judge(save(tmp_path / "unpadded", pad_token_id=None)).score(ANSWERS))
    assert scores == pytest.approx(dict(enumerate(alone(reward_model, ANSWERS))), abs=1e-5)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("chat_template.jinja", "cannot be loaded .*chat_template is not set"),
        ("config.json", "model cannot be loaded as a reward model: "),
        ("model.safetensors", "model cannot be loaded as a reward model: .*safetensors"),
        ("outputs", "has 2 outputs. A reward model has one"),
        ("weights", r"scores an answer nan. .* too large for torch.float32"),
    ],
)
def test_a_model_that_is_none_is_refused_and_damaged_weights_stop_the_judging(
    judge, tmp_path, broken, said
):
    directory = save(tmp_path / "model", labels=2 if broken == "outputs" else 1)
    model = LlamaForSequenceClassification.from_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")  # which nobody reads
    if broken == "weights":
        model.score.weight.data[:] = float("nan")
        model.save_pretrained(directory)
    (directory / broken).unlink(missing_ok=True)
    with pytest.raises((ValueError, JudgeFailed), match=said):
        list(judge(directory).score(ANSWERS))
