"""Write docs/configuration.md from the schema: `make docs`."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from sera_plugin.args import DEFAULT_BETA, SeraConfig
from sera_plugin.judging.config import JudgeConfig

PAGE = Path(__file__).parent / "configuration.md"

HOST_KEYS = [
    ("num_epochs", "T, the number of iterations; a whole number. 3 unless set."),
    (
        "rl_beta, trl.beta",
        "beta of the loss. Unless set, the paper's: "
        + ", ".join(f"{beta:g} for {loss}" for loss, beta in DEFAULT_BETA.items())
        + " (SimPO, KTO-Pair and ORPO: those of their own papers).",
    ),
    (
        "dpo_label_smoothing",
        "Share of labels taken to be wrong: cDPO with `loss: dpo`, rDPO with `loss: robust`.",
    ),
    (
        "dpo_loss_type, dpo_loss_weights, dpo_use_weighting",
        "Any loss type of the host's DPO trainer instead of `sera.loss`.",
    ),
    ("simpo_gamma, cpo_alpha", "SimPO's target margin and NLL weight; 0 unless set."),
    ("sequence_len", "Longest prompt + completion in tokens, for data and for samples."),
    (
        "excess_length_strategy",
        "`drop` (default), `truncate` or `raise` for longer rows; see data.md.",
    ),
    ("seed", "Seeds new adapters, data order and samples."),
    (
        "warmup_ratio, warmup_steps",
        "Warm-up of each iteration with `restart_optimizer: true`, else of the run.",
    ),
    ("val_set_size, test_datasets", "Held-out pairs, scored and referenced anew each iteration."),
    (
        "vllm",
        "How vLLM samples: `gpu_memory_utilization` (unset: what is free), `tensor_parallel_size`, "
        "`dtype` (unset: as trained), `max_model_len` (unset: prompts + `max_new_tokens`), "
        "`enforce_eager`, `enable_prefix_caching`; for `vllm-server`, `host` and `port`. See "
        "sampling.md.",
    ),
    (
        "gradient_accumulation_steps, gradient_checkpointing, optimizer",
        "As for any other `rl`: reentrant or not, 8-bit and paged optimizers too.",
    ),
    (
        "activation_offloading",
        "`true` keeps activations in host memory (TRL's offloader, for accelerators only); "
        "`hidden_states` with reentrant checkpointing is the host's own.",
    ),
    ("lora_model_dir", "An adapter to continue; theta_0 is the base model with it."),
    (
        "auto_resume_from_checkpoints, resume_from_checkpoint",
        "Continue the run in `output_dir` where it stopped.",
    ),
]


def kind(field: FieldInfo) -> str:
    """The type as a YAML author thinks of it."""
    return " \\| ".join(_kinds(field.annotation))


def _kinds(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [f"`{value}`" for value in typing.get_args(annotation)]
    names: dict[Any, str] = {
        float: "number",
        int: "whole number",
        bool: "true or false",
        str | None: "path",
        JudgeConfig | None: "block of keys",
    }
    if annotation in names:
        return [names[annotation]]
    if typing.get_origin(annotation) is typing.Union:
        return [kind for one in typing.get_args(annotation) for kind in _kinds(one)]
    return ["list of names"]


def limits(field: FieldInfo) -> str:
    """Bounds in words."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    return ", ".join(found)


def default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    return {(): "[]", None: "unset"}.get(value, str(value))


def render() -> str:
    """The whole page."""
    lines = [
        "# Configuration",
        "",
        "<!-- Written by docs/generate.py from sera_plugin/args.py; `make docs` rewrites it. -->",
        "",
        "## Inside `sera:`",
        "",
        "Unknown keys are errors. Every key has a default; `rl: sera` alone runs the paper's SeRA.",
        "",
        "| key | default | allowed | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in SeraConfig.model_fields.items():
        allowed = ", ".join(filter(None, (kind(field), limits(field))))
        lines.append(f"| `{name}` | `{default(field)}` | {allowed} | {field.description} |")
    lines += [
        "",
        "`bootstrap_ratio` needs `ceil(bootstrap_ratio)` disjoint pairs a prompt, and `candidates`",
        "give `candidates // 2`: asking for more is an error that says which number to raise. What",
        "`selection`, `labeler`, `reference` and length control make of a run is in systems.md.",
        "",
        "## Host keys that SeRA reads",
        "",
        "| key | what SeRA does with it |",
        "|---|---|",
    ]
    for keys, meaning in HOST_KEYS:
        lines.append(f"| {', '.join(f'`{key}`' for key in keys.split(', '))} | {meaning} |")
    lines += [
        "",
        "## Refused, with the remedy, before any model is loaded",
        "",
        "`max_steps`, `streaming`, `pretraining_dataset`, `sample_packing`, `relora`,",
        "`dpo_use_liger_kernel` (Liger's fused DPO loss computes its reference itself, and TRL",
        "refuses precomputed values with it, for any `sera.loss` or `dpo_loss_type`),",
        "`use_liger_kernel`,",
        "`layer_offloading`, other kinds of `activation_offloading`,",
        "`precompute_ref_log_probs: false`, `rl_adapter_ref_model`, `neftune_noise_alpha`,",
        "`context_parallel_size` above 1, a `trainer_cls` of your own, a `num_epochs` that is not",
        "whole, misspelt `sera` keys inside or beside the block, a `sera:` block or the plugin",
        "line with another `rl`, a `dpo_loss_type` that TRL does not have, and `datasets` or",
        "`test_datasets` that are no list of blocks with a `path`.",
        "",
        "Kernels for the cross-entropy of labels (`liger_fused_linear_cross_entropy`,",
        "`cut_cross_entropy`, ...) have no effect on a preference loss: a warning names them.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
