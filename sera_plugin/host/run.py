"""What a run is, on paper: run.json, the blocks in the log, and whether two runs are one."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel

from sera_plugin import __version__
from sera_plugin.algorithm.method import Method, Schedule
from sera_plugin.algorithm.pairs import Beside, Pairs
from sera_plugin.algorithm.summary import not_followed
from sera_plugin.config.credentials import Known, public, storable
from sera_plugin.config.kinds import LABELERS, SELECTIONS, labeler_name
from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.labeling.judging.function import content_of
from sera_plugin.rundir.format import FORMAT_VERSION
from sera_plugin.rundir.tokens import TokenColumn, fingerprint

if TYPE_CHECKING:
    from sera_plugin.sampling.samplers import Choice

_PACKAGES = ("axolotl", "torch", "transformers", "trl", "peft", "pyarrow")
LOG = logging.getLogger("axolotl.sera")
#: Keys that may change between the parts of one run, as patterns: they decide what is logged,
#: saved, evaluated or sent where, or how the same numbers are computed. Data and templates are
#: compared as token ids, whatever keys they come from. Any other key is part of what the run is.
HARMLESS = (
    # where it is logged, and how often
    *("logging_*", "log_*", "disable_tqdm", "debug", "include_*", "generat*", "num_generation_*"),
    *("wandb_*", "mlflow_*", "comet_*", "trackio_*", "swanlab_*", "otel_*", "profiler_*"),
    *("use_tensorboard", "use_wandb", "use_mlflow", "use_comet", "use_trackio", "use_otel_metrics"),
    # when it is saved and evaluated, and where that goes
    *("save_*", "saves_per_epoch", "eval_*", "evals_per_epoch", "lm_eval_*", "hub_*", "push_*"),
    "sera.push_to_hub",
    *("output_dir", "resume_from_checkpoint", "auto_resume_from_checkpoints"),
    *("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model"),
    *("axolotl_config_path", "dataset_prepared_path", "strict", "plugins"),
    # where the tokens come from; they are compared themselves
    *("datasets", "test_datasets", "val_set_size", "dataset_*", "shuffle_*", "chat_template*"),
    *("special_tokens", "tokens", "added_tokens*", "tokenizer_*", "excess_length_strategy"),
    *("is_preprocess", "skip_prepare_dataset", "preprocess_*", "default_system_message"),
    # how the same numbers are computed, and where
    *("attn_*", "flash_attention", "sdp_attention", "xformers_attention", "liger_*"),
    *("gradient_checkpointing*", "activation_offloading", "layer_offloading", "torch_compile*"),
    *("dpo_padding_free", "dpo_use_liger_kernel"),
    *("dataloader_*", "device", "device_map", "max_memory", "low_cpu_mem_usage", "*capabilities"),
    *("experimental_skip_move_to_device", "gpu_memory_limit", "use_ray", "ray_*"),
    *("resources_per_worker", "local_rank", "world_size", "ddp*", "vllm"),
    # who samples, what is kept for reading, how a judge is reached, and what it costs
    *("sera.sampler", "sera.servers", "sera.vllm_python", "sera.keep_policies"),
    *("sera.score_columns", "sera.held_out", "sera.keep", "sera.bad_rows", "sera.prompts"),
    *("sera.judge.api_key_env", "sera.judge.concurrency", "sera.judge.timeout"),
    *("sera.judge.*_price", "sera.function.timeout", "sera.function.processes"),
    # compared as the commit that it leads to
    "revision_of_model",
    # compared as what they come to: pairs per step of all processes, beta of the loss
    *("batch_size", "micro_batch_size", "gradient_accumulation_steps", "rl_beta"),
)


@cache
def known_keys() -> Known:
    """The keys of a configuration, of the host's schema and of ours, without its free blocks."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    return {**_keys_of(AxolotlInputConfig), "sera": _keys_of(SeraConfig)}


def _keys_of(*schemas: type[BaseModel]) -> Known:
    return {
        name: _keys_of(*(kind for kind in kinds if issubclass(kind, BaseModel)))
        for schema in schemas
        for name, one in schema.model_fields.items()
        if not (kinds := _kinds(one.annotation)) & {dict, object}
    }


def _kinds(annotation: Any) -> set[type]:
    """The classes that a type is made of; `object` for what may be anything."""
    if annotation is Any:
        return {object}
    inner = get_args(annotation)
    found = {annotation} if isinstance(annotation, type) else set()
    return found.union(*map(_kinds, inner)) | ({dict} if get_origin(annotation) is dict else set())


def kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as run.json has it: what is set, without secrets."""
    content: dict[str, Any] = storable(
        {k: value for k, value in config.items() if value is not None}
    )
    return dict(public(content, known_keys()))


def describe_run(
    config: Mapping[str, Any],
    loss: str,
    beta: float,
    method: Method,
    schedule: Schedule,
    pairs: Pairs,
    held_out: Pairs | None,
    end_ids: Sequence[int],
    prompts: pa.Table | None = None,
    labelled: int = 0,
    columns: Beside | None = None,
) -> dict[str, Any]:
    """The content of run.json, without secrets; `config` is the host's, resolved.

    `prompts` is prompts.parquet, `labelled` how many single answers the pairs were looked for in,
    `columns` what the dataset says beside pairs, held-out pairs and prompts.
    """
    gap = method.annotations.score_gap
    more: dict[str, Any] = {"labelled_answers": labelled} if labelled else {}
    if columns is not None and any(LABELERS[one].reads_columns for one in method.config.labelers):
        more["columns_fingerprint"] = columns.fingerprint()
    if prompts is not None:
        more |= {
            "prompts": len(prompts),
            "prompts_fingerprint": fingerprint([TokenColumn(prompts["prompt_ids"])]),
        }
    told = kept(config)
    sera = told.get("sera") or {}
    if method.config.function is not None:
        more["function_sha256"] = content_of(method.config.function.call)
    return {
        "format_version": FORMAT_VERSION,
        "versions": {
            "sera_plugin": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "config": told,
        "local_datasets": _local([*(told.get("datasets") or ()), *sera.get("prompts", ())]),
        "loss": loss,
        "beta": beta,
        "per_token": method.per_token,
        "micro_batch": schedule.batch_size,
        "accumulation": schedule.accumulation,
        "pairs": len(pairs),
        "evaluation_pairs": len(held_out) if held_out else 0,
        **more,
        "dataset_fingerprint": fingerprint(vars(pairs).values()),
        "evaluation_fingerprint": fingerprint(vars(held_out).values()) if held_out else None,
        "score_fingerprint": None if gap is None else hashlib.sha256(gap.tobytes()).hexdigest(),
        "end_ids": [int(token) for token in end_ids],
        "seed": method.seed,
    }


def _local(entries: Iterable[Any]) -> list[str]:
    """Those of the datasets' paths that the host reads from this machine's disk."""
    paths = [str(one.get("path", "")) for one in entries if isinstance(one, Mapping)]
    return sorted({path for path in paths if os.path.exists(path)})


def announce(
    run: Mapping[str, Any], method: Method, schedule: Schedule, sampler: Choice | None
) -> str:
    """The plan, a log block once the pairs are known; `sampler` is None if nothing is sampled."""
    config = method.config
    by = "" if config.labeler == "implicit" else f" by {labeler_name(config.labeler)}"
    rewards = "averaged per token" if method.per_token else "summed over tokens"
    restarts = "restart every iteration" if config.restart_optimizer else "run on"
    kept = SELECTIONS[config.selection].keeps.format(ratio=config.selection_ratio)
    lines = [
        "SeRA plan",
        f"  loss {run['loss']}, beta {run['beta']:g}, rewards {rewards}",
        f"  keep {kept}; sample {round(config.bootstrap_ratio * method.total):,} pairs{by}, of "
        f"{config.candidates} answers a prompt (temperature {config.temperature:g}, top_p "
        f"{config.top_p:g}, up to {config.max_new_tokens} tokens); gamma {config.gamma:g}",
    ]
    for key in ("length_control", "offline_length_control", "label_noise"):
        if getattr(config, key) not in ("none", 0):
            lines.append(f"  {key}: {getattr(config, key)}")
    lines += [
        f"  {run['pairs']} pairs, {run['evaluation_pairs']} held out, seed {run['seed']}"
        + (f"; {method.prompts} more prompts are sampled" if method.prompts else ""),
        f"  optimizer and learning-rate schedule {restarts}",
    ]
    for t, size in enumerate(schedule.pairs, start=1):
        whole = method.kept(t) == method.total and not method.sampled(t)
        pairs = f"{method.kept(t)} kept + {method.sampled(t)} sampled"
        reference = f"reference theta_{method.reference(t)}"
        lines.append(
            f"  iteration {t}: {size} pairs ({'all offline pairs' if whole else pairs}), "
            f"{schedule.steps(t)} steps, {'no reference' if method.reference_free else reference}"
        )
    if sampler is not None:
        lines.append(f"  sampler: {sampler.name} ({sampler.reason})")
    return "\n".join([*lines, f"  {schedule.total_steps} steps in all"])


def describe_start(summary: Mapping[str, Any], unit: str) -> str:
    """The log block before an iteration's first step: what it will train on; `unit` of margins."""
    pairs: Mapping[str, int] = summary["pairs"]
    lines = [
        f"SeRA iteration {summary['iteration']}: trains on {pairs['trained']} pairs",
        f"  offline: {pairs['kept']} of {pairs['offline']} pairs kept",
    ]
    if "offline_accuracy" in summary:
        lines[-1] += (
            f", median margin {summary['margins']['offline']['0.5']:+.3f} {unit}, "
            f"{summary['offline_accuracy']:.0%} agree with their label"
        )
    if "jaccard_with_previous" in summary:
        lines[-1] += f", Jaccard with the last selection {summary['jaccard_with_previous']:.2f}"
    if "margin" in (noise := summary.get("noise", {})):
        lines.append(
            f"  from batch to batch rounding moves a margin by {noise['margin']:.2g} {unit}"
        )
        if "within" in noise:
            lines[-1] += f"; {noise['within']:.0%} of the pairs are nearer to the cut than that"
    swapped = summary.get("label_noise")
    if swapped and swapped["recall"] is not None:
        lines.append(
            f"  label noise: {swapped['swapped_dropped']} of {swapped['swapped']} swapped pairs "
            f"dropped (recall {swapped['recall']:.0%}, precision {swapped['precision']:.0%})"
        )
    if samples := summary.get("samples"):
        unranked = f", {samples['unranked']} unranked" if samples["unranked"] else ""
        lines.append(
            f"  sampled: {pairs['bootstrapped_kept']} of {pairs['bootstrapped_found']} pairs kept, "
            f"from {samples['sampled']} samples of {summary['sampler'].get('name')} "
            f"({samples['duplicates']} duplicate, {samples['unfinished']} unfinished, "
            f"{samples['ties']} ties{unranked})"
        )
        if "length_control" in samples:
            lines[-1] += f", {samples['length_control']:+.3g} a token taken off"
    if reward := not_followed(summary):
        kept = "all offline pairs are kept" if pairs["kept"] == pairs["offline"] else ""
        taken = "" if pairs["bootstrapped_kept"] else "no samples taken"
        lines.append(f"  the {reward} is not followed: {', '.join(filter(None, (kept, taken)))}")
    elif pairs["bootstrapped_kept"] < pairs["bootstrapped_wanted"]:
        lines.append(
            f"  fewer sampled pairs than the {pairs['bootstrapped_wanted']} asked for: raise "
            "sera.candidates or sera.temperature, or lower sera.bootstrap_ratio"
        )
    if "evaluation" in summary:
        lines.append(f"  held out: {summary['evaluation']['accuracy']:.0%} agree with their label")
    if "errors" in (reward := summary.get("reward", {})):
        lines[-1] += f" ({reward['paper_accuracy']:.0%} by the paper's reward)"
        lines.append(f"  reward: {_weights(reward)}")
    if "reward" in (labeler := summary.get("labeler", {})):
        mixed = labeler["reward"]
        lines.append(
            f"  with the scores of {', '.join(labeler['judges'])} it ranks "
            f"{mixed['accuracy']:.0%} of the held-out pairs as labelled: {_weights(mixed)}"
        )
    return "\n".join(lines)


def _weights(reward: Mapping[str, Any]) -> str:
    """What each feature of a fitted reward counts."""
    of = {name: f"likelihood under {name}" for name in reward["weights"] if "theta_" in name}
    each = [
        f"{of.get(name, name)} counts {weight:+.2f} +- {reward['errors'][name]:.2f}"
        + " a token" * (name == "length")
        for name, weight in reward["weights"].items()
    ]
    return ", ".join(each)


def describe_end(summary: Mapping[str, Any]) -> str:
    """The log block after an iteration's last step: what it cost."""
    seconds = ", ".join(
        f"{phase.replace('_', ' ')} {spent:.1f} s" for phase, spent in summary["seconds"].items()
    )
    drift = summary["drift"]
    return (
        f"SeRA iteration {summary['iteration']} is trained ({seconds})\n"
        f"  it began {drift['chosen']:+.2f} (chosen) and {drift['rejected']:+.2f} (rejected) nats "
        "per answer from the initial policy"
    )


#: What run.json says beside the configuration that makes a run what it is, for a reader.
_IDENTITY = (
    ("pairs", "N, the number of usable pairs"),
    ("dataset_fingerprint", "the pairs' token ids (datasets, chat_template, tokenizer)"),
    ("evaluation_fingerprint", "the held-out pairs' token ids (test_datasets, val_set_size)"),
    ("prompts_fingerprint", "the token ids of the prompts without answers (sera.prompts)"),
    ("score_fingerprint", "the scores that select (score_columns, datasets)"),
    ("columns_fingerprint", "what a function may take of rows (score_columns, datasets, prompts)"),
    ("end_ids", "the tokens that end a completion"),
    ("loss", "the loss"),
    ("beta", "beta of the loss (rl_beta, trl.beta)"),
    ("per_token", "whether rewards are averaged over tokens"),
    ("seed", "seed"),
)
#: Fewer processes go on with more accumulation, and the same steps.
_PER_STEP = "pairs per optimizer step (micro_batch_size x gradient_accumulation_steps x processes)"


def require_same_run(earlier: Mapping[str, Any], now: Mapping[str, Any], root: Path) -> None:
    """Refuse to continue the run in `root` where its run.json has another method or other data.

    Raises:
        ValueError: naming everything that changed, with both values, and how to start fresh.
    """
    # An earlier version may have left things in that this one leaves out.
    before, after = (
        flat(public(one["config"], known_keys()))
        | {meaning: one.get(key) for key, meaning in _IDENTITY}
        | {_PER_STEP: (one.get("micro_batch") or 0) * (one.get("accumulation") or 0)}
        for one in (earlier, now)
    )
    digests = {meaning for key, meaning in _IDENTITY if key.endswith("_fingerprint")}
    columns = dict(_IDENTITY)["columns_fingerprint"]
    read = {"sera.score_columns"} if before.get(columns) != after.get(columns) else set()
    changed = [
        key if key in digests else f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and (key in read or not any(fnmatchcase(key, pattern) for pattern in HARMLESS))
    ]
    if changed:
        raise ValueError(
            f"the run in {root} cannot be continued, because these changed since it began: "
            f"{'; '.join(changed)}. Restore them to continue it. To start fresh, set another "
            "output_dir; this run stays as it is."
        )
    if "function_sha256" in earlier and earlier["function_sha256"] != now.get("function_sha256"):
        LOG.warning(
            "SeRA: the file of sera.function has changed since the run began: what was ranked "
            "stays, and what is ranked from here on is by the file as it is now."
        )


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with `sera.KEY` and `sera.judge.KEY` beside the other keys."""
    found = dict(config)
    for block in ("sera", "sera.judge", "sera.function"):
        inner = found.pop(block, None) or {}
        found |= {f"{block}.{key}": value for key, value in inner.items()}
    return found


def _short(value: Any) -> str:
    return "unset" if value is None else quoted(value)
