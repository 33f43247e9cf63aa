"""The demo's language model: a word-level tokenizer and a small Llama trained from scratch."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from sera_plugin.tools.demo.world import FILLERS, LETTERS, demonstrate, make_prompt

PROMPT_FORMAT = "<s> <|user|> {prompt} <|assistant|>"
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} <|assistant|> "
    "{{ m['content'] }}{{ eos_token }}{% else %} <|user|> {{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <|assistant|>{% endif %}"
)


def build_tokenizer() -> FastTokenizer:
    """One token per letter and filler word, with a chat template."""
    special = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>")
    vocabulary = {word: index for index, word in enumerate((*special, *LETTERS, *FILLERS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FastTokenizer(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=_TEMPLATE,
        model_max_length=64,
    )


def train_base_model(
    directory: Path, *, steps: int = 700, batch_size: int = 128, seed: int = 0
) -> None:
    """Train on corrupted demonstrations; 700 steps leave the model under-trained on purpose."""
    tokenizer = build_tokenizer()
    random = Random(seed)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # Without a terminal, without a bar.
    for _ in (bar := tqdm(range(steps), desc="train the base model", unit="step", disable=None)):
        prompts = [make_prompt(random) for _ in range(batch_size)]
        texts = [
            f"{PROMPT_FORMAT.format(prompt=prompt)} {demonstrate(prompt, random)}</s>"
            for prompt in prompts
        ]
        batch = _batch(tokenizer, texts)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : len(PROMPT_FORMAT.split()) + len(prompts[0].split()) - 1] = -100
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _batch(tokenizer: Any, texts: list[str], **how: Any) -> dict[str, Any]:
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, **how)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def load_model(directory: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a full set of weights, or of an adapter on its base."""
    tokenizer = FastTokenizer.from_pretrained(directory, local_files_only=True)
    if (directory / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(directory), tokenizer
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, tokenizer


@torch.no_grad()
def respond(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 16,
    batch_size: int = 500,
    seed: int = 0,
) -> list[str]:
    """Sample one response to each prompt, without special tokens, from the whole distribution.

    Prompts are letters separated by spaces, of any length. The seed is that of all batches
    together; the caller's random state stays as it was.
    """
    model.eval()
    responses: list[str] = []
    how = {"do_sample": True, "temperature": temperature, "top_k": 0}
    how |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        starts = range(0, len(prompts), batch_size)
        for first in tqdm(starts, desc="sample", unit="batch", disable=None):
            texts = [PROMPT_FORMAT.format(prompt=p) for p in prompts[first : first + batch_size]]
            batch = _batch(tokenizer, texts, padding_side="left")
            new = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
            responses += tokenizer.batch_decode(new, skip_special_tokens=True)
    return responses
