"""How sequences are put into a forward pass.

A line of a batch has a prompt with one completion, or with several that attend to the prompt and
not to each other, so that the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.int32]

#: Completions, by index, that follow one prompt.
Line = tuple[int, ...]

#: `padded`: a line per sequence. `packed`: one line of all sequences, for kernels that tell them
#: apart by their positions. `shared`: a line per prompt and a mask.
Layout = Literal["padded", "packed", "shared"]

#: More completions than this never share a prompt: attention between them grows with the square.
_MOST_SHARED = 8


@dataclass(frozen=True)
class Sharing:
    """When completions share a prompt.

    Attributes:
        attention: what a pair of tokens costs in attention, in units of what a token costs in the
            weights.
        longest: most tokens of a line that is shared.
    """

    attention: float
    longest: int

    def cost(self, tokens: int, completions: int) -> float:
        """A line's cost. Kernels skip half of a causal mask; one that they read they compute."""
        if completions == 1:
            return tokens + self.attention * tokens**2 / 2
        return tokens + self.attention * tokens**2 if tokens <= self.longest else np.inf


def plan_lines(
    prompts: Sequence[Ids], completions: Sequence[Ids], sharing: Sharing | None
) -> list[Line]:
    """Put completions of one prompt into one line where that costs less.

    Args:
        prompts, completions: (n,) arrays of token ids each; equal prompts are one prompt.
        sharing: None gives every completion a line of its own.

    Returns:
        Lines that have each completion once.
    """
    if sharing is None:
        return [(index,) for index in range(len(prompts))]
    by_prompt: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt.tobytes(), []).append(index)
    lines: list[Line] = []
    for indices in by_prompt.values():
        indices.sort(key=lambda index: len(completions[index]))
        prompt_length = len(prompts[indices[0]])
        lengths = [len(completions[index]) for index in indices]
        costs = []
        for size in range(1, min(len(indices), _MOST_SHARED) + 1):
            parts = [lengths[at : at + size] for at in range(0, len(lengths), size)]
            costs.append(sum(sharing.cost(prompt_length + sum(part), len(part)) for part in parts))
        size = 1 + int(np.argmin(costs))
        lines += [tuple(indices[at : at + size]) for at in range(0, len(indices), size)]
    return lines


@dataclass(frozen=True)
class Targets:
    """Which tokens of a batch are scored, completion after completion.

    Attributes:
        line, position: (c,) where in (lines, length) each is predicted.
        label: (c,) its token id.
        lengths: (n,) tokens of each completion, c in all.
    """

    line: Tensor
    position: Tensor
    label: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, input_ids: Tensor, completion_mask: Tensor) -> Targets:
        """Of a batch with one completion a line.

        Args:
            input_ids: (n, length) token ids.
            completion_mask: (n, length), 1 where a token belongs to the completion.
        """
        line, position = completion_mask.nonzero(as_tuple=True)
        label = input_ids[line, position]
        return cls(line, position - 1, label, completion_mask.sum(dim=1).tolist())

    def with_prompts(self, input_ids: Tensor, completion_mask: Tensor) -> Targets:
        """The same and the prompts of the first half of the lines, all but their first token.

        Args:
            input_ids, completion_mask: as `of` takes them.
        """
        begins = completion_mask.argmax(dim=1, keepdim=True)
        before = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < begins
        before[:, 0] = False  # nothing predicts it
        before = before[: len(input_ids) // 2]
        prompts = Targets.of(input_ids, before)
        return Targets(
            torch.cat([self.line, prompts.line]),
            torch.cat([self.position, prompts.position]),
            torch.cat([self.label, prompts.label]),
            [*self.lengths, *prompts.lengths],
        )


def collate(
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    lines: Sequence[Line],
    layout: Layout,
    pad_id: int,
    device: torch.device,
) -> tuple[dict[str, Any], Targets]:
    """A batch, padded on the right.

    No mask says what is padding: attention is causal, so nothing that is scored sees it.

    Args:
        prompts, completions: (n,) arrays of token ids each.
        lines: which of them to take, and how.
        layout: how the lines lie in the batch.
        pad_id: padding token id.
        device: where the batch goes.

    Returns:
        The model's inputs, and what to score, in the order of the lines.
    """
    found = [_flatten(prompts[line[0]], [completions[index] for index in line]) for line in lines]
    sizes = [len(one.ids) for one in found]
    packed = layout == "packed"
    shape = (1, sum(sizes)) if packed else (len(lines), max(sizes))
    starts = np.cumsum([0, *sizes[:-1]]) if packed else np.zeros(len(lines), dtype=np.int64)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    part = np.full(shape, -1, dtype=np.int64)
    for number, (one, start) in enumerate(zip(found, starts, strict=True)):
        place = (0 if packed else number, slice(start, start + len(one.ids)))
        input_ids[place], position_ids[place], part[place] = one.ids, one.positions, one.part

    def on_device(values: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(device)

    counts = [len(one.predicted_at) for one in found]
    targets = Targets(
        line=on_device(
            np.repeat(np.zeros_like(starts) if packed else np.arange(len(lines)), counts)
        ),
        position=on_device(
            np.concatenate([one.predicted_at for one in found]) + np.repeat(starts, counts)
        ),
        label=on_device(
            np.concatenate([completions[i] for line in lines for i in line]).astype(np.int64)
        ),
        lengths=[len(completions[index]) for line in lines for index in line],
    )
    inputs = {"input_ids": on_device(input_ids)}
    if layout != "padded":
        inputs["position_ids"] = on_device(position_ids)
    if layout == "shared":
        inputs["attention_mask"] = _prompt_mask(on_device(part))
    return inputs, targets


class _Flat(NamedTuple):
    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    #: 0 in the prompt, 1 in the first answer, ...
    part: npt.NDArray[np.int64]
    predicted_at: npt.NDArray[np.int64]


def _flatten(prompt: Ids, answers: Sequence[Ids]) -> _Flat:
    """A line. Each answer's first token is predicted at the prompt's last, others one before."""
    begin, sizes = len(prompt), [len(answer) for answer in answers]
    ids = np.concatenate([prompt, *answers])
    predicted_at = np.arange(begin, len(ids)) - 1
    predicted_at[np.cumsum([0, *sizes[:-1]])] = begin - 1
    positions = [np.arange(begin), *(np.arange(begin, begin + size) for size in sizes)]
    part = np.repeat(np.arange(len(sizes) + 1), [begin, *sizes])
    return _Flat(ids, np.concatenate(positions), part, predicted_at)


def _prompt_mask(part: Tensor) -> Tensor:
    """(lines, 1, length, length), True where a token may attend: back to its part and the prompt.

    Args:
        part: (lines, length), 0 in the prompt, -1 in the padding.
    """
    length = part.shape[1]
    back = torch.ones(length, length, dtype=torch.bool, device=part.device).tril()
    from_part, to_part = part[:, :, None], part[:, None, :]
    return (back & ((from_part == to_part) | (to_part == 0)))[:, None]
