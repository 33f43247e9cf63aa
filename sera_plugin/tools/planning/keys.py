"""What the keys of a resolved configuration mean for a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sera_plugin.algorithm.method import Method
from sera_plugin.algorithm.schedule import Schedule
from sera_plugin.tools.planning.counts import Counting, Lengths, evaluations, padding
from sera_plugin.tools.planning.disk import Saving
from sera_plugin.tools.planning.optimizers import KNOWN, state_bytes
from sera_plugin.tools.planning.setting import Setting, trained, trained_bytes, weight_bytes
from sera_plugin.tools.planning.shape import Shape

#: Checkpoints that the host keeps unless configured otherwise.
_LIMIT = 4


def counting_of(
    cfg: Mapping[str, Any], method: Method, pairs: Lengths, held_out: Lengths | None
) -> Counting:
    """Pairs, steps and tokens, for one process.

    Args:
        cfg: the host's resolved configuration.
        method: the method's constants.
        pairs, held_out: lengths of the data.
    """
    micro_batch = int(cfg["micro_batch_size"])
    schedule = Schedule(
        method.sizes,
        micro_batch,
        int(cfg.get("gradient_accumulation_steps") or 1),
        bool(cfg.get("dataloader_drop_last")),
    )
    strategy = "steps" if cfg.get("eval_steps") else cfg.get("eval_strategy")
    steps, iterations = schedule.total_steps, len(schedule.pairs)
    multiple = cfg.get("pad_to_multiple_of")
    return Counting(
        method=method,
        schedule=schedule,
        pairs=pairs,
        held_out=held_out,
        sequence_len=cfg.get("sequence_len"),
        evaluations=evaluations(strategy, cfg.get("eval_steps"), steps, iterations),
        padding=padding(pairs, micro_batch, multiple, int(cfg.get("seed") or 0)),
        sampled=None,
    )


def setting_of(
    cfg: Mapping[str, Any], shape: Shape, counting: Counting, sampler: str, on_gpu: bool
) -> Setting:
    """What memory depends on.

    Args:
        cfg: the host's resolved configuration.
        shape: the model's.
        counting: the data and the method.
        sampler: what samples.
        on_gpu: whether the run will be on a GPU.
    """
    adapter = bool(shape.adapter)
    pairs, config = counting.pairs, counting.method.config
    everything = [pairs] if counting.held_out is None else [pairs, counting.held_out]
    longest = max(int(each.longer.max()) for each in everything)
    completion = max(int(max(each.chosen.max(), each.rejected.max())) for each in everything)
    sample = 0
    if counting.method.sampled(len(counting.schedule.pairs)):
        sample = int(counting.limits.max())
        longest = max(longest, int((pairs.prompt + counting.limits).max()))
    bits = 4 if cfg.get("load_in_4bit") else 8 if cfg.get("load_in_8bit") else None
    quantisation = cfg.get("bnb_config_kwargs") or {}
    engine = cfg.get("vllm") or {}
    narrowed = cfg.get("attn_needs_dtype_cast") or cfg.get("fsdp_config")
    return Setting(
        width=4 if "32" in str(cfg.get("torch_dtype")) else 2,
        bits=bits if adapter else None,
        double_quantised=bool(quantisation.get("bnb_4bit_use_double_quant", True)),
        wide_norms=not (adapter or narrowed or cfg.get("cut_cross_entropy")),
        optimizer=optimizer_of(cfg),
        micro_batch=int(cfg["micro_batch_size"]),
        accumulation=int(cfg.get("gradient_accumulation_steps") or 1),
        checkpointing=bool(cfg.get("gradient_checkpointing")),
        offloading=bool(cfg.get("activation_offloading")),
        eager=cfg.get("attn_implementation") == "eager",
        dropout=0 if not cfg.get("lora_dropout") else 1 if on_gpu else 4,
        longest=longest,
        completion=max(completion, sample),
        prompt=int(pairs.prompt.min()),
        sample=sample,
        candidates=config.candidates,
        sequence_len=int(cfg.get("sequence_len") or 0),
        sampler=sampler,
        utilization=engine.get("gpu_memory_utilization"),
        engines=int(engine.get("tensor_parallel_size") or 1),
    )


def optimizer_of(cfg: Mapping[str, Any]) -> str:
    """The optimizer as the YAML names it."""
    optimizer = cfg.get("optimizer") or "adamw_torch_fused"
    return str(getattr(optimizer, "value", optimizer))


def saving_of(
    cfg: Mapping[str, Any], shape: Shape, setting: Setting, counting: Counting, tokenizer: int
) -> Saving:
    """What goes to disk, and how often.

    Args:
        cfg: the host's resolved configuration.
        shape, setting, counting: of the run.
        tokenizer: bytes of its files.
    """
    iterations, steps = len(counting.schedule.pairs), counting.schedule.total_steps
    saves = 0
    if str(cfg.get("save_strategy") or "").removeprefix("SaveStrategy.").lower() != "no":
        every = cfg.get("save_steps")
        # One at every iteration's end, whatever else is asked for.
        within = 0 if not every else round(1 / every) if every < 1 else steps // int(every)
        saves = max(iterations, within)
    optimizer = (
        0 if cfg.get("save_only_model") else state_bytes(setting.optimizer, trained(shape, setting))
    )
    return Saving(
        model=trained_bytes(shape, setting),
        base=weight_bytes(shape, setting) if shape.adapter else 0,
        optimizer=optimizer,
        tokenizer=tokenizer,
        saves=saves,
        limit=int(cfg.get("save_total_limit") or _LIMIT),
        adapter=bool(shape.adapter),
    )


def notes_of(
    cfg: Mapping[str, Any],
    shape: Shape,
    setting: Setting,
    counting: Counting,
    other_layers: tuple[str, ...],
    quantised_already: str | None,
) -> list[str]:
    """What the figures leave out or take for granted, in sentences."""
    optimizer = setting.optimizer
    notes = {
        "Samples are expected to be as long as chosen answers are "
        f"({counting.expected.mean():.0f} tokens on average).": counting.sampled is None
        and setting.sample,
        f"optimizer: {optimizer} is counted like AdamW in float32.": optimizer not in KNOWN,
        "State of paged optimizers is counted on the device; where that is short it moves to "
        "host memory by itself.": optimizer.startswith("paged"),
        "Activations of a mixture of experts are counted as one feed-forward "
        "part's.": shape.expert_elements,
        f"Activations of {', '.join(other_layers)} layers are counted as "
        "attention's.": other_layers,
        f"The checkpoint is quantised with {quantised_already}; its weights are counted as the "
        "YAML would load them.": quantised_already,
        "fsdp_config shares weights, gradients and optimizer state among processes; all figures "
        "here are for one process that holds them all.": cfg.get("fsdp_config"),
    }
    return [note for note, applies in notes.items() if applies]
