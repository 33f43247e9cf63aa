"""How sequences are put into a forward pass.

A line of a batch has a prompt with one completion, or with several that attend to the prompt and
not to each other, so that the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    """Put completions of equal prompts into one line where that costs less.

    Returns:
        Lines that have each completion once; one each if `sharing` is None.
    """
    if sharing is None:
        return [(index,) for index in range(len(prompts))]
    by_prompt: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt.tobytes(), []).append(index)

    def cost(line: Line) -> float:
        tokens = len(prompts[line[0]]) + sum(len(completions[index]) for index in line)
        return sharing.cost(tokens, len(line))

    lines: list[Line] = []
    for indices in by_prompt.values():
        indices.sort(key=lambda index: len(completions[index]))
        plans = [
            [tuple(indices[at : at + size]) for at in range(0, len(indices), size)]
            for size in range(1, min(len(indices), _MOST_SHARED) + 1)
        ]
        lines += min(plans, key=lambda plan: sum(map(cost, plan)))
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
        """Of (n, length) token ids, one completion a line, and a mask of where it is."""
        line, position = completion_mask.nonzero(as_tuple=True)
        label = input_ids[line, position]
        return cls(line, position - 1, label, completion_mask.sum(dim=1).tolist())

    def with_prompts(self, input_ids: Tensor, completion_mask: Tensor) -> Targets:
        """The same and the prompts of the first half of the lines, all but their first token."""
        begins = completion_mask.argmax(dim=1, keepdim=True)
        before = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < begins
        before[:, 0] = False  # nothing predicts it
        prompts = Targets.of(input_ids, before[: len(input_ids) // 2])
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
    """A batch of some lines of (n,) prompts and completions, padded on the right.

    No mask says what is padding: attention is causal, so nothing that is scored sees it.

    Returns:
        The model's inputs, and what to score, in the order of the lines.
    """
    sizes = [len(prompts[line[0]]) + sum(len(completions[i]) for i in line) for line in lines]
    packed = layout == "packed"
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
            targets.append(
                np.stack([np.full(end - begin, row), predicted_at, input_ids[row, begin:end]])
            )

    inputs = {"input_ids": torch.from_numpy(input_ids).to(device)}
    if layout != "padded":
        inputs["position_ids"] = torch.from_numpy(position_ids).to(device)
    if layout == "shared":
        inputs["attention_mask"] = _prompt_mask(torch.from_numpy(part).to(device))
    lengths = [one.shape[1] for one in targets]
    row_of, position, label = torch.from_numpy(np.hstack(targets)).to(device)
    return inputs, Targets(row_of, position, label, lengths)


def _prompt_mask(part: Tensor) -> Tensor:
    """(lines, 1, length, length) from (lines, length) parts: True where a token may attend.

    That is back to its own part and to the prompt.
    """
    length = part.shape[1]
    back = torch.ones(length, length, dtype=torch.bool, device=part.device).tril()
    from_part, to_part = part[:, :, None], part[:, None, :]
    return (back & ((from_part == to_part) | (to_part == 0)))[:, None]
