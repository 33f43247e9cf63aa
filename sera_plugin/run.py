"""What a run is, on paper: run.json, the log block at the start, and whether two runs are one."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from sera_plugin import __version__
from sera_plugin.iteration import Method, Pairs
from sera_plugin.sampling.choose import Choice
from sera_plugin.schedule import Schedule
from sera_plugin.shown import public
from sera_plugin.store import FORMAT_VERSION, RunStore, fingerprint

_PACKAGES = ("axolotl", "torch", "transformers", "trl", "peft", "pyarrow")
#: Keys of `sera:` that change who samples, and not from what.
_WHO_SAMPLES = frozenset({"sampler", "vllm_python"})


def describe_run(
    config: Mapping[str, Any],
    loss: str,
    beta: float,
    method: Method,
    pairs: Pairs,
    evaluation_pairs: int,
    end_ids: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """The content of run.json.

    Args:
        config: the host's resolved configuration; secrets are left out.
        loss, beta, method: what is optimised.
        pairs, evaluation_pairs: the data, the held-out part as a count.
        end_ids: token ids that end a completion.
        seed: the host's seed.
    """
    return {
        "format_version": FORMAT_VERSION,
        "versions": {
            "sera_plugin": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "config": public(_plain(config)),
        "loss": loss,
        "beta": beta,
        "per_token": method.per_token,
        "pairs": len(pairs),
        "evaluation_pairs": evaluation_pairs,
        "dataset_fingerprint": fingerprint(
            (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
        ),
        "end_ids": [int(token) for token in end_ids],
        "seed": seed,
    }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is set, as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    return {key: value for key, value in plain.items() if value is not None}


def announce(
    run: Mapping[str, Any],
    method: Method,
    schedule: Schedule,
    store: RunStore,
    sampler: Choice | None,
) -> str:
    """The log block at the start: settings, what each iteration trains on, files.

    `sampler` is None where nothing is sampled.
    """
    config = method.config
    lines = [
        "SeRA run",
        f"  loss {run['loss']}, beta {run['beta']:g}, rewards "
        f"{'averaged per token' if method.per_token else 'summed over tokens'}",
        f"  keep {config.selection_ratio:g} N, sample {config.bootstrap_ratio:g} N "
        f"(R = {config.candidates}, temperature {config.temperature:g}, top_p "
        f"{config.top_p:g}, up to {config.max_new_tokens} tokens), gamma {config.gamma:g}",
        f"  N = {run['pairs']} pairs, {run['evaluation_pairs']} held out, seed {run['seed']}",
        "  optimizer and learning-rate schedule "
        + ("restart every iteration" if config.restart_optimizer else "run on"),
    ]
    for iteration, size in enumerate(schedule.pairs, start=1):
        what = f"{method.kept} kept + {method.bootstrapped} sampled"
        lines.append(
            f"  iteration {iteration}: {size} pairs "
            f"({'all offline pairs' if iteration == 1 else what}), {schedule.steps(iteration)} "
            f"steps, reference theta_{iteration - 1}"
        )
    if sampler is not None:
        lines.append(f"  sampler: {sampler.name} ({sampler.reason})")
    lines.append(f"  {schedule.total_steps} steps in all; files go to {store.root}")
    return "\n".join(lines)


def require_same_run(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run whose data or method is another one's.

    Raises:
        ValueError: naming everything that changed, with both values.
    """
    changed = [
        f"{key}: {earlier.get(key)!r} -> {now[key]!r}"
        for key in ("dataset_fingerprint", "loss", "beta", "per_token", "seed", "end_ids")
        if earlier.get(key) != now[key]
    ]
    for key in ("base_model", "adapter", "num_epochs", "sequence_len", "learning_rate"):
        before, after = earlier["config"].get(key), now["config"].get(key)
        if before != after:
            changed.append(f"{key}: {before!r} -> {after!r}")
    before, after = (
        {
            key: value
            for key, value in (run["config"].get("sera") or {}).items()
            if key not in _WHO_SAMPLES
        }
        for run in (earlier, now)
    )
    changed += [
        f"sera.{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changed:
        raise ValueError(
            "this run cannot continue the one in its output_dir, because these changed since it "
            f"began: {'; '.join(changed)}. Restore them, or set another output_dir."
        )
