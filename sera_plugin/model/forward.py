"""One forward pass, for scoring and for training alike: log pi(y|x) of a batch's completions.

Scoring and training take the same function of the logits, in float32 whatever the model computes
in, so that a policy compared with itself gives zero. Logits exist only where a completion's token
is predicted, and only some at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sera_plugin.model.memory import KEPT_LOGITS, LOGITS
from sera_plugin.model.packing import Layout, Targets, collate


def completion_logps(
    logits: Callable[[Tensor], Tensor], states: Tensor, targets: Targets, vocabulary: int
) -> Tensor:
    """Sum the log-probabilities of each completion's tokens.

    Args:
        logits: maps (m, size) states to (m, vocabulary) logits.
        states: (c, size), one for each target.
        targets: what to score, n completions with c tokens.
        vocabulary: logits per token.

    Returns:
        (n,) float32 sums in nats. Differentiable; where logits are many, the backward pass computes
        them again instead of keeping them.
    """

    def losses(states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits(states).float(), labels, reduction="none")

    size = max(1, LOGITS // vocabulary)
    chunks = list(zip(states.split(size), targets.label.split(size), strict=True))
    if torch.is_grad_enabled() and len(states) * vocabulary > KEPT_LOGITS:
        found = [checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        found = [losses(*chunk) for chunk in chunks]
    return -torch.stack([part.sum() for part in torch.cat(found).split(targets.lengths)])


def forward_logps(
    model: nn.Module, inputs: Mapping[str, Any], targets: Targets, in_head: bool | None = None
) -> tuple[Tensor, Any]:
    """One forward pass of a causal language model, wrapped or not.

    Returns:
        (n,) float32 log pi(completion | prompt) in nats, and the model's output. Its logits are
        not those of all tokens.
    """
    if in_head is None:  # as `abilities` finds it
        in_head = abilities(model).in_head and not is_compiled_module(model)
    base = innermost(model)
    length = inputs["input_ids"].shape[1]
    vocabulary = base.config.get_text_config().vocab_size
    if in_head:
        with _scoring_head(base.get_output_embeddings(), targets, length, vocabulary) as found:
            output = model(**inputs, use_cache=False)
        (logps,) = found
        # Sharded weights are gathered for the backward pass once a gradient reaches the output.
        return logps + 0.0 * output.logits.flatten(), output
    # Logits are needed from the first token's predecessor on, and nowhere before.
    keep = {}
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        keep["logits_to_keep"] = length - int(targets.position.min())
    output = model(**inputs, **keep, use_cache=False)
    kept = output.logits[targets.line, targets.position - length + output.logits.shape[1]]
    return completion_logps(lambda logits: logits, kept, targets, vocabulary), output


@contextmanager
def _scoring_head(
    head: nn.Module, targets: Targets, length: int, vocabulary: int
) -> Iterator[list[Tensor]]:
    """The output layer takes its logits at the targets only, and sums them up into the list.

    Inside the model's own forward, so that whatever wraps the model or the layer stays in force.
    """
    logits = head.forward
    own = vars(head).get("forward")
    found: list[Tensor] = []

    def score(hidden: Tensor) -> Tensor:
        # Tokens that a wrapper has put before a line are not counted in positions.
        states = hidden[targets.line, targets.position - length + hidden.shape[1]]
        sums = completion_logps(lambda part: logits(part[None])[0], states, targets, vocabulary)
        found.append(sums)
        return sums[:, None, None]

    head.forward = score  # type: ignore[method-assign]
    try:
        yield found
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]


@dataclass(frozen=True)
class Abilities:
    """What a model takes, beside a plain batch.

    Attributes:
        in_head: its output layer may give log-probabilities instead of logits; not where the
            model changes logits afterwards (Gemma 2 caps them, Cohere and Granite scale them).
        packed: several sequences in one line, distinguished by their positions.
        shared: a mask of our own, so that completions share a prompt.
    """

    in_head: bool
    packed: bool
    shared: bool


_KNOWN: WeakKeyDictionary[nn.Module, Abilities] = WeakKeyDictionary()
#: What a model may raise at inputs that it does not take.
_REFUSALS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def abilities(model: nn.Module) -> Abilities:
    """Find out once what a model takes, by a few tokens scored in every way.

    Where ranks share the model's weights all of them must call this at the same time.
    """
    base = innermost(model)
    if base in _KNOWN:
        return _KNOWN[base]
    text = base.config.get_text_config()
    device = next(model.parameters()).device
    prompt = np.arange(4, dtype=np.int32)
    answers = [np.arange(4, 7, dtype=np.int32), np.arange(2, 9, dtype=np.int32)]

    def score(layout: Layout, in_head: bool) -> tuple[Tensor, Any]:
        lines = [(0, 1)] if layout == "shared" else [(0,), (1,)]
        inputs, targets = collate([prompt, prompt], answers, lines, layout, 0, device)
        return forward_logps(model, inputs, targets, in_head)

    def gives_the_same(layout: Layout, in_head: bool) -> bool:
        try:
            logps, output = score(layout, in_head)
        except _REFUSALS:
            return False
        returned = output.logits.flatten()
        if in_head and not torch.equal(returned, logps.to(returned.dtype)):
            return False  # something comes after the output layer
        return torch.allclose(logps, plain, rtol=0.01)

    was_training = model.training
    model.eval()
    try:
        plain, _ = score("padded", in_head=False)
        in_head = gives_the_same("padded", in_head=True)
        attention = text._attn_implementation
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        _KNOWN[base] = Abilities(
            in_head,
            packed="flash" in attention and gives_the_same("packed", in_head),
            # Other kinds of layers carry a state along the line, which no mask cuts.
            shared=attention == "sdpa"
            and kinds <= {"full_attention", "sliding_attention"}
            and gives_the_same("shared", in_head),
        )
    finally:
        model.train(was_training)
    return _KNOWN[base]


def innermost(model: Any) -> Any:
    """The transformers model inside compiled, distributed and PEFT wrappers."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
