"""Bytes of activations, logits and caches while passes are made.

Sources: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
section 4, which counts what each operation of a layer keeps for its backward pass, done here for
the layers of transformers 5.16; Kwon et al. 2023 for the cache; and this package's own modules for
what they do at a time.
"""

from __future__ import annotations

from sera_plugin.model.memory import (
    KEPT_LOGITS,
    LOGITS,
    SAMPLED_ON_CPU,
    SCORED_ON_CPU,
    cache_bytes,
    scoring_bytes_per_token,
    tokens_per_pass,
)
from sera_plugin.tools.planning.setting import Setting
from sera_plugin.tools.planning.shape import Shape


def kept_per_token(shape: Shape, setting: Setting) -> float:
    """Bytes that all layers keep of one token for the backward pass.

    By operation, with h the hidden size, i the intermediate, q the width of all query heads, and w
    the bytes of the type that is computed in:

    - norms: their input in float32 (4 h); where they are trained and no LayerNorm, what they scale
      (h in the type of the hidden states)
    - linear layers that are trained or adapted: their input; one for all that share it, or one each
      where it is cast for them (in 16 bits, under an adapter or behind a float32 norm)
    - attention: queries, keys, values and output (4 w q: a padded batch has a mask, and under a
      mask transformers repeats keys and values), a float32 per head, the mask's row; eager
      attention: probabilities in float32 and in w
    - feed-forward: gated 3 w i, else w i
    - dropout of an adapter: its mask beside what goes in, for each linear layer
    """
    h, i, q, w = shape.hidden, shape.intermediate, shape.queries, setting.width
    hidden_width = 4 if setting.wide_norms else w
    normed, scaled = shape.normed
    kept = 4.0 * normed + (0 if shape.adapter else hidden_width * scaled)
    kept += _inputs(shape, setting)
    row = 4 + w if w != 4 else 4
    attention = 4 * w * q + 4 * shape.heads + w * setting.longest
    if setting.eager:
        attention += shape.heads * setting.longest * row
    feed_forward = (3 if shape.gated else 1) * w * i
    return kept + shape.layers * (attention + feed_forward) + 2 * hidden_width * h


def _inputs(shape: Shape, setting: Setting) -> float:
    """Inputs that linear layers keep, per token; attention's own output is counted there."""
    w = setting.width
    taken = [layer for layer in shape.linears if layer.adapted or not shape.adapter]
    if shape.adapter and setting.dropout:
        return float(sum((w + setting.dropout) * layer.inputs for layer in taken))
    cast = w == 2 and (bool(shape.adapter) or setting.wide_norms)
    found, blocks = 0, set()
    for layer in taken:
        if layer.source == "attention":
            found += layer.inputs if cast and shape.adapter else 0
        elif layer.source == "activated" or cast or layer.block not in blocks:
            found += layer.inputs
            blocks.add(layer.block)
    return float(w * found)


def training_activations(shape: Shape, setting: Setting) -> tuple[int, int]:
    """What a micro-batch of the longest pairs keeps for its backward pass: (device, host) bytes.

    The first layer of the backward pass has gradients in work, of its output and two of what is
    between (one where nothing is gated), when the logits are gone. With checkpointing the inputs of
    layers stay, and one layer is computed again at a time. Offloading moves what stays to host
    memory: with an adapter all activations, else the layers' inputs.
    """
    tokens = 2 * setting.micro_batch * setting.longest
    hidden_width = 4 if setting.wide_norms else setting.width
    layers = tokens * kept_per_token(shape, setting)
    one = layers / shape.layers
    inputs = tokens * shape.layers * hidden_width * shape.hidden
    if setting.offloading:
        return round(2 * one), round(layers if shape.adapter else inputs)
    between = (2 if shape.gated else 1) * shape.intermediate
    working = tokens * setting.width * (shape.hidden + between)
    logits = training_logits(shape, setting)
    if setting.checkpointing:
        return round(inputs + max(0.0, one + working - logits)), 0
    return round(layers + max(0, working - logits)), 0


def training_logits(shape: Shape, setting: Setting) -> int:
    """Logits of a micro-batch while it is trained: what is kept, and one chunk in work.

    Source: `forward.completion_logps`. All are kept as their log-softmax in float32, or those of
    one chunk at a time; behind it come the gradients of the loss and of the logits.
    """
    elements = 2 * setting.micro_batch * setting.completion * shape.vocabulary
    chunk = min(elements, LOGITS)
    return 4 * (elements if elements <= KEPT_LOGITS else chunk) + 8 * chunk


def _passing(shape: Shape, setting: Setting, tokens: int) -> int:
    """Activations of a pass without gradients: hidden states, and one layer at its widest.

    That is a norm in float32 (three of h), attention (queries, repeated keys and values, output)
    or the feed-forward part (three of i where it is gated).
    """
    h, w = shape.hidden, setting.width
    inner = (3 if shape.gated else 2) * shape.intermediate
    widest = max(12 * h, w * (h + 4 * shape.queries), w * (h + inner))
    return tokens * (w * h + widest)


def scoring(shape: Shape, setting: Setting, memory: int | None) -> dict[str, int]:
    """A scoring pass of as many tokens as `logprobs.scoring_budget` plans.

    Args:
        memory: of the GPU in bytes, None on a CPU.
    """
    per_token = scoring_bytes_per_token(shape.hidden)
    tokens = tokens_per_pass(memory, per_token, setting.sequence_len, SCORED_ON_CPU)
    # In float32, and their log-softmax; before that as they were computed.
    each = 8 if setting.width == 4 else 8 + setting.width
    logits = min(tokens * shape.vocabulary, LOGITS) * each
    return {"activations": _passing(shape, setting, tokens), "logits": logits}


def sampling(shape: Shape, setting: Setting, memory: int | None) -> dict[str, int]:
    """A batch of prompts with all their candidates in `sampling.transformers`, at full length.

    The cache grows by a copy of one layer's keys or values at a time, and what computing the
    prompts took is gone by then. Sampling by top_p sorts the logits: their values, places,
    probabilities and sums take 32 bytes each.

    Args:
        memory: of the GPU in bytes, None on a CPU.
    """
    sizes = (shape.layers, shape.kv_heads, shape.head)
    planned = tokens_per_pass(memory, cache_bytes(*sizes, 4), setting.sequence_len, SAMPLED_ON_CPU)
    tokens = max(planned, setting.candidates * setting.longest)
    lines = max(setting.candidates, tokens // (setting.prompt + setting.sample))
    prompts = max(0, tokens - lines * setting.sample)
    per_token = cache_bytes(*sizes, setting.width)
    later = (tokens - prompts) * per_token
    first, each = _passing(shape, setting, prompts), _passing(shape, setting, lines)
    return {
        "activations": max(each, first - later),
        "logits": 32 * lines * shape.vocabulary,
        "cache": tokens * per_token + tokens * per_token // (2 * shape.layers),
    }
