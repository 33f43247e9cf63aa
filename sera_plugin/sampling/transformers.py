"""Sampling inside the training process with transformers' own `generate`."""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import add
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from sera_plugin.algorithm.method import Candidate, Chunk, SamplingSettings, TokenIds
from sera_plugin.model.budget import TokenBudget, batches_by_length
from sera_plugin.model.forward import evaluating, innermost
from sera_plugin.rundir.ranks import WHOLE, Shard
from sera_plugin.sampling.engine import room


class TransformersSampler:
    """Samples from the loaded model, which is left in the mode (train or eval) it came in.

    `token_budget` is the most tokens of one batch's prompts and candidates together, `autocast` the
    context training computes its loss in, `shard` this process's part of the batches, in step where
    the model is sharded, `policy` the context in which the model is the policy to sample from,
    `device` where it computes, and `size` what a sequence counts for (from the tokens of its prompt
    and the most to sample).
    """

    def __init__(
        self,
        model: Any,
        pad_id: int,
        token_budget: int,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        shard: Shard = WHOLE,
        policy: Callable[[], AbstractContextManager[object]] = nullcontext,
        device: torch.device | str = "cpu",
        size: Callable[[int, int], int] = add,
    ) -> None:
        self.report: dict[str, Any] = {"name": "transformers"}
        self.seconds: dict[str, float] = {}
        self.longest: int | None = None
        self.model, self.pad_id = model, pad_id
        self.budget = TokenBudget(token_budget, "sampling", device)
        self.autocast, self.shard, self.policy, self.size = autocast, shard, policy, size

    def sample(
        self, prompts: Sequence[TokenIds], settings: SamplingSettings, skip: Collection[int] = ()
    ) -> Generator[Chunk, None, None]:
        """See `CandidateSampler.sample`. A chunk is one batch of prompts of similar length."""
        skip = frozenset(skip)
        limits = [room(row, prompt, settings) for row, prompt in enumerate(prompts)]
        # A prompt counts with all of its candidates at full length: memory is bounded beforehand. A
        # batch is as wide as its longest prompt, and may be sampled for as long as its shortest.
        sizes = [
            self.size(len(prompt), settings.max_new_tokens) * settings.candidates
            for prompt in prompts
        ]
        # Batches are planned over all rows, finished ones included: a row's random stream is its
        # batch's, and must be the same when an interrupted call is made again.
        planned = batches_by_length(sizes, self.budget.planned)
        batches = [batch for batch in planned if not skip.issuperset(batch)]

        def generate(batch: list[int]) -> list[list[Candidate]]:
            if skip.issuperset(batch):  # a finished part of an unfinished batch
                return [[] for _ in batch]
            # A random stream of its own for every batch, told by the first row in it.
            seed = (settings.seed * 1_000_003 + batch[0] * 9_176 + 1) % 2**63
            mine = [(prompts[row], limits[row]) for row in batch]
            return self._generate(mine, settings, seed)

        with evaluating(self.model), self.policy():
            tokens = [sum(sizes[row] for row in batch) for batch in batches]
            mine = self.shard.of(batches, tokens)
            for batch, generated in self.budget.run(mine, sizes, generate, self.shard.in_step):
                found = zip(batch, generated, strict=True)
                # Another sampler may have finished a part of the batch.
                chunk = [(row, candidates) for row, candidates in found if row not in skip]
                if chunk:
                    yield chunk
            for _ in range(self.shard.idle(batches)):
                generate(batches[-1])  # the smallest: only to take part

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[tuple[TokenIds, int]], settings: SamplingSettings, seed: int
    ) -> list[list[Candidate]]:
        """Candidates of each (prompt, most tokens to sample)."""
        device = self.budget.device
        lines = [torch.tensor(np.asarray(prompt), dtype=torch.long) for prompt, _ in prompts]
        pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
        input_ids = pad_left(lines, padding_value=self.pad_id)
        attention = pad_left([torch.ones_like(line) for line in lines])
        width = input_ids.shape[1]
        config = GenerationConfig(
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            num_return_sequences=settings.candidates,
            max_new_tokens=max(limit for _, limit in prompts),
            eos_token_id=list(settings.end_ids),
            pad_token_id=self.pad_id,
        )
        devices = [device] if device.type == "cuda" else []
        inner = innermost(self.model)
        # The outermost sharded model gathers what is left outside its layers.
        model = self.model if self.shard.in_step else inner
        # transformers fills what a config leaves open from the model's own (a repetition penalty,
        # a minimum length), which would sample from another policy.
        own = [(each, each.generation_config) for each in {inner, model}]
        try:
            for each, _ in own:
                each.generation_config = GenerationConfig()
            with torch.random.fork_rng(devices=devices), self.autocast():
                torch.manual_seed(seed)
                output = model.generate(
                    input_ids=input_ids.to(device),
                    attention_mask=attention.to(device),
                    generation_config=config,
                    # A rank that has finished makes forward passes until all have.
                    synced_gpus=self.shard.in_step,
                )
        finally:
            for each, before in own:
                each.generation_config = before
        sampled = output[:, width:].cpu().view(len(prompts), settings.candidates, -1).tolist()
        return [
            [_finish(ids, limit, settings.end_ids) for ids in group]
            for group, (_, limit) in zip(sampled, prompts, strict=True)
        ]


def _finish(ids: list[int], limit: int, end_ids: Sequence[int]) -> Candidate:
    """Cut a generated row after its end token, or at the prompt's own limit."""
    for position, token in enumerate(ids[:limit]):
        if token in end_ids:
            return Candidate(ids[: position + 1], "stop")
    return Candidate(ids[:limit], "length")
