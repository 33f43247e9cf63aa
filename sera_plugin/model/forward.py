"""One forward pass, for scoring and for training alike: log pi(y|x) of a batch's completions.

Both take the same function of the logits, in float32 whatever the model computes in, so that a
policy compared with itself gives zero. Logits exist only where a completion's token is predicted,
and only some at a time. A line of a batch has a prompt with one completion, or with several that
attend to the prompt and not to each other, so that the prompt is computed once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Ids = npt.NDArray[np.int32]
#: Completions, by index, that follow one prompt.
Line = tuple[int, ...]

#: Float32 logits at a time, 64 MiB: more is slower on a CPU and saves nothing on a GPU. Of a batch
#: with no more than 256 MiB training keeps them all for its backward pass.
LOGITS, KEPT_LOGITS = 2**24, 2**26
#: What a model may raise at inputs that it does not take.
REFUSALS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


def innermost(model: Any) -> Any:
    """The transformers model inside compiled, distributed and PEFT wrappers."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode inside the block, and afterwards in the mode it came in.

    A mixture of experts leaves out its balancing loss, which only a step reads and a config may
    ask for in every pass. transformers 5.16 computes it by the mask, and fails where that is longer
    than the pass (sampling) or one of our own (completions that share a prompt).
    """
    was_training = model.training
    text = innermost(model).config.get_text_config()
    balances = getattr(text, "output_router_logits", None)
    model.eval()
    if balances:
        text.output_router_logits = False
    try:
        yield
    finally:
        if balances:
            text.output_router_logits = balances
        model.train(was_training)


@dataclass(frozen=True)
class Targets:
    """Which tokens of a batch are scored: c tokens of n completions, one after the other."""

    line: Tensor  # (c,)
    position: Tensor  # (c,) where in (lines, length) each is predicted
    label: Tensor  # (c,) its token id
    lengths: list[int]  # (n,) tokens of each completion

    @classmethod
    def of(cls, input_ids: Tensor, completion_mask: Tensor) -> Targets:
        """Of (n, length) token ids, one completion a line, and a mask of where it is."""
        line, position = completion_mask.nonzero(as_tuple=True)
        label = input_ids[line, position]
        return cls(line, position - 1, label, completion_mask.sum(dim=1).tolist())

    def with_prompts(self, input_ids: Tensor, completion_mask: Tensor) -> Targets:
        """The same and the prompts of the first half of the lines, all but their first token."""
        begins = completion_mask.argmax(dim=1, keepdim=True)
        before = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < begins
        before[:, 0] = False  # nothing predicts it
        half = len(input_ids) // 2
        mask = torch.cat([completion_mask, before[:half]])
        both = Targets.of(torch.cat([input_ids, input_ids[:half]]), mask)
        return replace(both, line=both.line % len(input_ids))


def completion_logps(
    logits: Callable[[Tensor], Tensor], states: Tensor, targets: Targets, vocabulary: int
) -> Tensor:
    """Sum the log-probabilities of each completion's tokens.

    `logits` maps (m, size) states to (m, vocabulary) logits; `states` is (c, size), one for each
    target. Returns (n,) float32 sums in nats. Where logits are many, the backward pass computes
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
    """(n,) float32 log pi(completion | prompt) in nats, by one pass of a causal language model.

    And the model's output, whose logits are not those of all tokens.
    """
    if in_head is None:  # as `abilities` finds it
        in_head = abilities(model, inputs["input_ids"].device).in_head and not is_compiled_module(
            model
        )
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
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module computes something else inside the block; its hooks stay in force."""
    own = {name: value for name, value in vars(module).items() if name == "forward"}
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        vars(module).update(own)


@contextmanager
def _scoring_head(
    head: nn.Module, targets: Targets, length: int, vocabulary: int
) -> Iterator[list[Tensor]]:
    """The output layer takes its logits at the targets only, and sums them up into the list.

    Inside the model's own forward, so that whatever wraps the model or the layer stays in force.
    """
    logits = head.forward
    found: list[Tensor] = []

    def score(hidden: Tensor) -> Tensor:
        # Tokens that a wrapper has put before a line are not counted in positions.
        states = hidden[targets.line, targets.position - length + hidden.shape[1]]
        sums = completion_logps(lambda part: logits(part[None])[0], states, targets, vocabulary)
        found.append(sums)
        return sums[:, None, None]

    with forward_replaced(head, score):
        yield found


@dataclass(frozen=True)
class Abilities:
    """What a model takes, beside a plain batch."""

    #: Log-probabilities from its output layer; not where it changes logits afterwards (Gemma 2
    #: caps them, Cohere and Granite scale them).
    in_head: bool
    packed: bool  # several sequences in one line, told apart by where each ends
    shared: bool  # a mask of our own, so that completions share a prompt


_KNOWN: WeakKeyDictionary[nn.Module, Abilities] = WeakKeyDictionary()


@torch.no_grad()
def abilities(model: nn.Module, device: torch.device | str = "cpu") -> Abilities:
    """Find out once what a model takes, by a few tokens scored in every way; a collective call.

    `device` is where its passes are made: sharded weights may rest elsewhere.
    """
    base = innermost(model)
    if base in _KNOWN:
        return _KNOWN[base]
    text = base.config.get_text_config()
    apart: list[Line] = [(0,), (1,)]
    prompt = np.arange(4, dtype=np.int32)
    answers = [np.arange(4, 7, dtype=np.int32), np.arange(2, 9, dtype=np.int32)]

    def score(in_head: bool, lines: list[Line], packed: bool = False) -> tuple[Tensor, Any]:
        inputs, targets = collate([prompt, prompt], answers, lines, 0, device, packed)
        return forward_logps(model, inputs, targets, in_head)

    def gives_the_same(in_head: bool, lines: list[Line], packed: bool = False) -> bool:
        try:
            logps, output = score(in_head, lines, packed)
        except REFUSALS:
            return False
        returned = output.logits.flatten()
        if in_head and not torch.equal(returned, logps.to(returned.dtype)):
            return False  # something comes after the output layer
        return torch.allclose(logps, plain, rtol=0.01)

    with evaluating(model):
        plain, _ = score(False, apart)
        in_head = gives_the_same(True, apart)
        attention = text._attn_implementation
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        _KNOWN[base] = Abilities(
            in_head,
            packed="flash" in attention and gives_the_same(in_head, apart, packed=True),
            # Other kinds of layers carry a state along the line, which no mask cuts.
            shared=attention == "sdpa"
            and kinds <= {"full_attention", "sliding_attention"}
            and gives_the_same(in_head, [(0, 1)]),
        )
    return _KNOWN[base]


def collate(
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    lines: Sequence[Line],
    pad_id: int,
    device: torch.device | str,
    packed: bool = False,
) -> tuple[dict[str, Any], Targets]:
    """Some lines of (n,) prompts and completions as the model's inputs, and what to score in them.

    Padded on the right without a mask: attention is causal, and nothing that is scored sees it.
    `packed` lines are one, for kernels that are told where each ends.
    """
    sizes = [len(prompts[x[0]]) + sum(len(completions[index]) for index in x) for x in lines]
    shared = any(len(line) > 1 for line in lines)
    shape = (1, sum(sizes)) if packed else (len(lines), max(sizes))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    part = np.full(shape, -1, dtype=np.int64)  # 0 in a prompt, 1 in its first completion, ...
    targets: list[npt.NDArray[np.int64]] = []  # (line, position, label) of each completion
    end = 0
    for number, line in enumerate(lines):
        row, start = (0, end) if packed else (number, 0)
        prompt_end = end = start + len(prompts[line[0]])
        input_ids[row, start:end] = prompts[line[0]]
        position_ids[row, start:end] = np.arange(end - start)
        part[row, start:end] = 0
        for place, index in enumerate(line, start=1):
            begin, end = end, end + len(completions[index])
            input_ids[row, begin:end] = completions[index]
            position_ids[row, begin:end] = np.arange(end - begin) + prompt_end - start
            part[row, begin:end] = place
            # The prompt's last token predicts the first, and every other one the next.
            predicted_at = np.arange(begin, end) - 1
            predicted_at[0] = prompt_end - 1
            rows = np.full(end - begin, row)
            targets.append(np.stack([rows, predicted_at, input_ids[row, begin:end]]))

    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(input_ids).to(device)}
    if packed or shared:
        inputs["position_ids"] = torch.from_numpy(position_ids).to(device)
    if packed:
        inputs |= _ends_of(sizes, device)
    if shared:
        # A token attends back to its own part and to the prompt: (lines, 1, length, length).
        parts = torch.from_numpy(part).to(device)
        from_part, to_part = parts[:, :, None], parts[:, None, :]
        inputs["attention_mask"] = ((from_part == to_part) | (to_part == 0)).tril()[:, None]
    lengths = [one.shape[1] for one in targets]
    row_of, position, label = torch.from_numpy(np.hstack(targets)).to(device)
    return inputs, Targets(row_of, position, label, lengths)


def without_padding(
    input_ids: Tensor, attention_mask: Tensor, targets: Targets
) -> tuple[dict[str, Any], Targets]:
    """A batch that is padded on the right as one `packed` line, and its targets in that line.

    `input_ids` and `attention_mask` are (lines, length). What a model computes of a token is the
    same, and padding is not computed.
    """
    row, position = attention_mask.nonzero(as_tuple=True)
    sizes = attention_mask.sum(dim=1)
    inputs = {
        "input_ids": input_ids[row, position][None],
        "position_ids": position[None],
        **_ends_of(sizes.tolist(), input_ids.device),
    }
    begins = sizes.cumsum(dim=0) - sizes
    moved = targets.position + begins[targets.line]
    return inputs, replace(targets, line=torch.zeros_like(targets.line), position=moved)


def _ends_of(sizes: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """Where each sequence of a packed line ends, as flash attention takes it.

    Or transformers 5.16 looks for it in the positions, and waits for a GPU in every layer.
    """
    ends = torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32)).to(device)
    found: dict[str, Any] = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends)
    return found | dict.fromkeys(("max_length_q", "max_length_k"), max(sizes))
