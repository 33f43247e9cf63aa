"""Bytes of optimizer state by the optimizer's name in the YAML."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: States per weight in the type of the weight (torch keeps `zeros_like` it).
_LIKE_WEIGHTS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
}
#: States per weight in float32 (bitsandbytes).
_WIDE = {"paged_adamw_32bit": 2, "lion_32bit": 1, "paged_lion_32bit": 1}
#: States per weight in 8 bits, in blocks of 256 with a float32 scale; weights of fewer than 4096
#: elements, and embeddings with Adam (transformers' own exception), in float32.
_BLOCKWISE = {
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
}
_BLOCK, _SMALL = 256, 4096

#: Those that make a copy as large as the weights in each step on a GPU (torch's documentation of
#: `foreach`).
FOREACH = frozenset({"adamw_torch"})

KNOWN = frozenset({*_LIKE_WEIGHTS, *_WIDE, *_BLOCKWISE})


def state_bytes(optimizer: str, weights: Sequence[tuple[int, int, bool]]) -> int:
    """State of all weights; of an optimizer that is not known as much as AdamW's in float32.

    Args:
        optimizer: as the YAML names it.
        weights: (elements, bytes per element, whether an embedding) of each that is trained.

    Source: Loshchilov and Hutter 2019 (AdamW has two moments); Chen et al. 2023 (Lion has one);
    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.
    """
    if optimizer in _LIKE_WEIGHTS:
        return sum(_LIKE_WEIGHTS[optimizer] * count * width for count, width, _ in weights)
    if optimizer not in _BLOCKWISE:
        return sum(4 * _WIDE.get(optimizer, 2) * count for count, _, _ in weights)
    states = _BLOCKWISE[optimizer]
    total = 0
    for count, _, embedding in weights:
        if count < _SMALL or embedding:
            total += 4 * states * count
        else:
            total += states * (count + 4 * math.ceil(count / _BLOCK))
    return total
