"""The demo's world: its reward, its demonstrations, its labels, and a model that speaks in it."""

from random import Random

import click
import pytest
import torch
import yaml

from sera_plugin.tools.demo import base_model
from sera_plugin.tools.demo import world as demo_world
from sera_plugin.tools.demo.base_model import load_model, respond
from sera_plugin.tools.demo.run import compared_with, make_pairs, run_demo, trained
from sera_plugin.tools.demo.world import Labelling, label, make_prompt, true_reward
from tests.conftest import make_config

PROMPT, BEST = "f b d a e c", "a b c d e f"
DRAWS = 4_000
#: Five standard errors of a share near 1/2 among DRAWS; the draws are seeded, so nothing flickers.
TOLERANCE = 5 * 0.5 / DRAWS**0.5


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (BEST, 1.0),
        ("", 0.0),
        ("x y z", 0.0),
        ("a", 2 / 7),  # one letter is right: 2 * 1 / (1 + 6)
        ("a b c d e", 10 / 11),  # one letter is missing: 2 * 5 / (5 + 6)
        ("a a b c d e f", 12 / 13),  # one letter is said twice: 2 * 6 / (7 + 6)
        ("b a c d e f", 10 / 12),  # two neighbours changed places, so five are in order
        ("f e d c b a", 2 / 12),  # backwards, any one letter is in order: 2 * 1 / (6 + 6)
        (PROMPT, 6 / 12),  # a e, a c, b d e and others; the longest has 3
        # Two wrong letters and three fillers, of which only the letters count: 2 * 5 / (7 + 6).
        ("um a x b so c y d like e", 10 / 13),
        (f"well {BEST} um", 1.0),
    ],
)
def test_true_reward_by_hand(response, reward):
    assert true_reward(PROMPT, response) == pytest.approx(reward, abs=1e-12)


def test_prompts_are_six_letters_and_demonstrations_of_every_quality():
    random = Random(0)
    prompts = [make_prompt(random) for _ in range(2_000)]
    letters, fillers = set(demo_world.LETTERS), set(demo_world.FILLERS)
    assert all(len(set(prompt.split()) & letters) == 6 for prompt in prompts)
    assert make_prompt(Random(3)) == make_prompt(Random(3)) != make_prompt(Random(4))
    responses = [demo_world.demonstrate(prompt, random) for prompt in prompts]
    rewards = [true_reward(p, r) for p, r in zip(prompts, responses, strict=True)]
    # Some perfect, some poor, and most between: preference data needs answers that differ.
    assert 0.05 < sum(r == 1 for r in rewards) / len(rewards) < 0.5
    assert 0.05 < sum(r < 0.6 for r in rewards) / len(rewards) < 0.5
    assert {word for response in responses for word in response.split()} == letters | fillers
    assert all(response.strip() for response in responses)


@pytest.mark.parametrize(
    ("one", "bonus", "probability"),
    [
        # Rewards 10/12 and 1 at temperature 0.15: 1 / (1 + exp((1/6) / 0.15)).
        ("b a c d e f", 0.0, 0.2477),
        # As good, with three fillers at 0.1 each: 1 / (1 + exp(-0.3)), whichever is named first.
        (f"well so um {BEST}", 0.1, 0.5744),
    ],
)
def test_labels_are_bradley_terry_on_true_reward_and_length(one, bonus, probability):
    def share(one: str, other: str) -> float:
        random, how = Random(0), Labelling(temperature=0.15, length_bonus=bonus, noise=0.0)
        return sum(label(PROMPT, one, other, how, random)[0] == one for _ in range(DRAWS)) / DRAWS

    assert share(one, BEST) == pytest.approx(probability, abs=TOLERANCE)
    assert share(BEST, one) == pytest.approx(1 - probability, abs=TOLERANCE)
    assert share(one, BEST) == share(one, BEST)


def test_noise_swaps_its_share_of_labels_and_says_which():
    # So low a temperature decides every label by the reward, and must not overflow.
    noisy = Labelling(temperature=1e-9, length_bonus=0.0, noise=0.2)
    random = Random(0)
    labels = [label(PROMPT, "f", BEST, noisy, random) for _ in range(DRAWS)]
    assert all((chosen == "f") == swapped for chosen, _, swapped in labels)
    assert sum(swapped for *_, swapped in labels) / DRAWS == pytest.approx(0.2, abs=TOLERANCE)


def test_pairs_leave_out_equal_and_empty_responses_and_carry_the_truth():
    rows = make_pairs([PROMPT] * 4, [BEST, BEST, " ", "a"], ["a", BEST, "a", "f"])
    assert [{row["chosen"], row["rejected"]} for row in rows] == [{BEST, "a"}, {"a", "f"}]
    for row in rows:
        for side in ("chosen", "rejected"):
            assert row[f"score_{side}"] == true_reward(PROMPT, row[side])


def test_a_tiny_base_model_trains_and_samples_reproducibly(tmp_path):
    weights = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        base_model.train_base_model(tmp_path / name, steps=3, batch_size=8, seed=seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]

    model, tokenizer = load_model(tmp_path / "one")
    prompts = [make_prompt(Random(n)) for n in range(6)]
    state = torch.random.get_rng_state()
    first, again, other = (
        respond(model, tokenizer, prompts, max_new_tokens=5, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == again != other
    assert len(first) == 6
    assert all(len(response.split()) <= 5 for response in first)


def test_shorter_prompts_are_padded_on_the_left(world):
    """A padded prompt must be answered as it is alone; next to greedy shows it without luck."""
    model, tokenizer = load_model(world.base)
    prompts = ["c a b", PROMPT]
    together = respond(model, tokenizer, prompts, temperature=1e-4)
    alone = [respond(model, tokenizer, [prompt], temperature=1e-4)[0] for prompt in prompts]
    assert together == alone


def test_template_and_prompt_format_are_the_same_tokens():
    tokenizer = base_model.build_tokenizer()
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": BEST}]
    how = {"tokenize": True, "return_dict": False}
    text = base_model.PROMPT_FORMAT.format(prompt=PROMPT)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(prompt) == 3 + 6
    assert tokenizer.unk_token_id not in prompt
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **how)
    assert asked == prompt
    whole = [*prompt, *tokenizer.convert_tokens_to_ids(BEST.split()), tokenizer.eos_token_id]
    assert tokenizer.apply_chat_template(turns, **how) == whole


@pytest.mark.parametrize(
    ("keys", "there", "message"),
    [
        ({"base_model": "elsewhere"}, None, r"elsewhere, but the demo writes .*base-model"),
        ({"datasets": [{"path": "p"}]}, None, r"datasets\[0\].path: p, but .*pairs.jsonl"),
        ({"datasets": None}, None, r"has to be a YAML with base_model, datasets and output_dir"),
        ({}, "run/sera", "holds an earlier run"),
        ({}, "prepared", r"prepared from another .*pairs.jsonl"),
    ],
)
def test_a_demo_that_would_mix_things_up_is_refused(tmp_path, keys, there, message):
    demo, path = tmp_path / "demo", tmp_path / "config.yaml"
    settings = {"base_model": f"{demo}/base-model", "dataset_prepared_path": f"{demo}/prepared"}
    settings |= {"datasets": [{"path": f"{demo}/pairs.jsonl"}], "output_dir": f"{demo}/run"}
    path.write_text(yaml.safe_dump(settings | keys), encoding="utf-8")
    if there:
        (demo / there).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        run_demo(demo, path)
    assert demo.exists() == bool(there)
    assert not (demo / "base-model").exists()


@pytest.mark.slow
@pytest.mark.nightly
def test_what_a_demo_is_compared_with_is_trained_once(world, tmp_path):
    settings = make_config(world.directory, tmp_path) | {"num_epochs": 1, "test_datasets": None}
    others = compared_with(settings, tmp_path)

    def times():
        for _ in range(2):
            with trained(others.values()):
                pass
            yield {path: path.stat().st_mtime for path in tmp_path.glob("*/model.safetensors")}

    first, second = times()
    assert sorted(path.parent.name for path in first) == ["paper-sera", "plain-dpo"]
    assert first == second
    # By another YAML it is trained again, which fails here.
    others["plain DPO, 1 epochs"]["learning_rate"] = "much"
    said = r"plain-dpo.yaml` failed; see .*plain-dpo.log"
    with pytest.raises(click.ClickException, match=said), trained(others.values()):
        pass
    assert "much" in (tmp_path / "plain-dpo.log").read_text()
    assert (tmp_path / "paper-sera/model.safetensors").stat().st_mtime in first.values()
