"""A reward model ranks: with samples of the policy, the paper's OAIF row (Guo et al. 2024)."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from sera_plugin.labeling import FloatArray, Ranked, Ranker
from sera_plugin.labeling.conversation import Conversation
from sera_plugin.ranks import Ranks

LOG = logging.getLogger("axolotl.sera")

_BATCH = 8


class RewardModel(Ranker):
    """A sequence classification model with one label, loaded for the phase.

    Args:
        path: its directory.
        conversation: the policy's.
        device: where it runs, beside the policy.
        ranks: the run's processes; each scores its part.
        quiet: no progress bar.
    """

    def __init__(
        self,
        path: str,
        conversation: Conversation,
        device: torch.device,
        ranks: Ranks,
        quiet: bool,
    ) -> None:
        super().__init__("reward_model")
        self.path, self.conversation, self.device = path, conversation, device
        self.ranks, self.quiet = ranks, quiet
        self.report["model"] = path

    def rewards(self, ranked: Ranked) -> FloatArray:
        """(n,) the model's logit; see `Labeler.rewards`.

        Raises:
            ValueError: if the directory holds no such model, or it gives more than one number.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not Path(self.path).is_dir():
            raise ValueError(
                f"sera.reward_model: {self.path} is no directory. Name a local sequence "
                "classification model with one label."
            )
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.path, dtype="auto", use_safetensors=True
        )
        if model.config.num_labels != 1:
            raise ValueError(
                f"sera.reward_model: {self.path} gives {model.config.num_labels} numbers for an "
                "answer. Name a model with num_labels: 1."
            )
        if not tokenizer.chat_template:
            raise ValueError(
                f"sera.reward_model: {self.path} has no chat template, so it cannot be told which "
                "part is the answer. Add chat_template to its tokenizer."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        model.to(self.device).eval()
        texts = [
            tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": self.conversation.question(prompt)},
                    {"role": "assistant", "content": self.conversation.answer(answer)},
                ],
                tokenize=False,
            )
            for prompt, answer in zip(ranked.prompts, ranked.answers, strict=True)
        ]
        longest = getattr(model.config, "max_position_embeddings", None)
        # Similar lengths together: little padding.
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        mine = order[self.ranks.rank :: self.ranks.world]
        found = np.zeros(len(texts))
        bar = tqdm(total=len(mine), unit="answer", desc="SeRA: reward model", disable=self.quiet)
        with torch.inference_mode(), bar:
            for at in range(0, len(mine), _BATCH):
                part = mine[at : at + _BATCH]
                inputs = tokenizer(
                    [texts[index] for index in part],
                    return_tensors="pt",
                    padding=True,
                    add_special_tokens=False,
                    truncation=longest is not None,
                    max_length=longest,
                ).to(self.device)
                inputs.pop("token_type_ids", None)
                found[part] = model(**inputs).logits[:, 0].float().cpu().numpy()
                bar.update(len(part))
        del model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.ranks.sum(found)
