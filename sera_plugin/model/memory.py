"""How much of anything is done at a time: what memory is planned with. Numbers only."""

from __future__ import annotations

GIB = 2**30

#: Float32 logits at a time, 64 MiB: more is slower on a CPU and saves nothing on a GPU. Of a batch
#: with no more than 256 MiB training keeps them all for its backward pass.
LOGITS, KEPT_LOGITS = 2**24, 2**26

#: Of a GPU's memory one pass may take this part; more tokens than these are no faster.
_SHARE, _MOST = 8, 32_768
#: Tokens per pass where there is no GPU: more leave a CPU's cache when scoring.
SCORED_ON_CPU, SAMPLED_ON_CPU = 2_048, 16_384

#: Context, activations and CUDA graphs of an engine; what two measurements may differ by.
ENGINE_OVERHEAD, ENGINE_SLACK = 3 * GIB, 1 * GIB
#: Prompts at full length that an engine's cache should hold for sampling to be fast.
ENGINE_SEQUENCES = 32


def tokens_per_pass(memory: int | None, bytes_per_token: int, longest: int, on_cpu: int) -> int:
    """Tokens per forward pass, a power of two unless the longest sequence there can be is longer.

    `on_cpu` without a GPU, where `memory`, the GPU's in bytes, is None.
    """
    tokens = on_cpu
    if memory is not None:
        room = memory // _SHARE
        tokens = min(_MOST, 1 << (max(1, room // bytes_per_token).bit_length() - 1))
    return max(longest, tokens)


def scoring_bytes_per_token(hidden: int) -> int:
    """A token's activations without gradients: up to 32 hidden states of 16 bits."""
    return 64 * hidden


def cache_bytes(layers: int, kv_heads: int, head: int, width: int) -> int:
    """Keys and values of one token in all layers, of `width` bytes each.

    Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", section 3.
    """
    return 2 * layers * kv_heads * head * width
