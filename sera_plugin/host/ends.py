"""The first and the last words of `axolotl train`, as blocks in the log.

The first is of the YAML alone, before the host prints all of it; `run.announce` has the numbers
once the pairs are known. The last is read from the run directory.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from sera_plugin.algorithm.best import FIGURE
from sera_plugin.algorithm.summary import not_followed
from sera_plugin.config.kinds import SELECTIONS, labeler_kind
from sera_plugin.config.quoting import plain
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir.store import RunStore

#: Most things of a kind that the last block lists one by one.
_LISTED = 6
_SAMPLERS = {
    "auto": "vLLM where it is found, else this process",
    "transformers": "this process",
    "vllm": "vLLM, started for each iteration",
    "vllm-server": "`vllm serve`, which runs already",
}


def describe_beginning(cfg: Mapping[str, Any], sera: SeraConfig) -> str:
    """What will happen, by a resolved configuration that the host has yet to validate."""
    output = plain(str(cfg.get("output_dir") or "./model-out"), 200)
    config = plain(str(cfg.get("axolotl_config_path") or "YAML"), 200)
    data = ", ".join(plain(str(one.get("path")), 100) for one in cfg["datasets"])
    weights = f"its {cfg['adapter']} adapter" if cfg.get("adapter") else "all of its weights"
    each = f"keeps {SELECTIONS[sera.selection].keeps.format(ratio=sera.selection_ratio)}"
    if sera.bootstrap_ratio:
        each += (
            f" and adds {sera.bootstrap_ratio:g} times as many pairs of the policy's own answers"
        )
    continues = cfg.get("auto_resume_from_checkpoints") or cfg.get("resume_from_checkpoint")
    again = "" if continues else " with auto_resume_from_checkpoints: true in the YAML"
    lines = [
        "SeRA: what this run will do",
        f"  model: {plain(str(cfg['base_model']), 200)}, {weights}",
        f"  pairs: {data}; held out: {_held_out(cfg, sera)}",
        f"  {cfg['num_epochs']} iterations, one per epoch; from iteration {sera.first_iteration} "
        f"on each {each}",
        f"  the policy's answers come from {_SAMPLERS[sera.sampler]} (sera.sampler: "
        f"{sera.sampler}), and are ranked by {labeler_kind(sera.labeler).ranks_by}",
        f"  trained model: {output}; what the run records: {output}/sera",
        f"  steps, time and memory, before anything is trained: axolotl sera plan {config}",
        f"  to stop: Ctrl-C; to go on from the newest checkpoint: the same command{again}",
    ]
    if not sera.bootstrap_ratio:
        del lines[4]
    return "\n".join(lines)


def _held_out(cfg: Mapping[str, Any], sera: SeraConfig) -> str:
    for key in ("test_datasets", "val_set_size"):
        if cfg.get(key):
            return key if key == "test_datasets" else f"{key}: {cfg[key]}"
    if sera.held_out is not None:
        return f"sera.held_out: {sera.held_out:g}"
    return "5 % of them, if not few (sera.held_out)" if sera.pairs_held_out(10_000) else "none"


def describe_done(output_dir: Path, config: str, report: Path | None) -> str:
    """What was done, which policy is kept and why, and what to do with it.

    `config` is the YAML's path; None for a report that could not be written.

    Raises:
        ValueError: if run.json is damaged.
    """
    store = RunStore(output_dir)
    run, ending = store.description(), store.ending()
    if run is None:
        return f"SeRA: no run is recorded in {store.root}"
    done = list(takewhile(bool, map(store.summary, count(1))))
    spent = [one.get("seconds", {}) for one in (*done, ending)]
    # An engine's start and stop are parts of `sample`.
    seconds = sum(s for each in spent for name, s in each.items() if not name.endswith("_engine"))
    lines = [
        f"SeRA is done: {len(done)} iterations in {timedelta(seconds=round(seconds))} (h:mm:ss), "
        f"{run['pairs']:,} pairs, {run['evaluation_pairs']:,} held out",
        *_few([f"  iteration {one['iteration']}: {_trained(one)}" for one in done]),
        *_why(run, ending, len(done), store.last),
    ]
    if ranked := [one for one in done if "evaluation" in one]:
        each = [
            f"{one['evaluation']['accuracy']:.0%} after {one['iteration'] - 1}" for one in ranked
        ]
        lines.append(f"  held-out pairs ranked as labelled, by iteration: {', '.join(_few(each))}")
    raised: dict[str, list[str]] = {}
    for one in done:
        for alarm in one.get("alarms", ()):
            raised.setdefault(alarm["name"], []).append(str(one["iteration"]))
    said = [f"{name} (iteration {', '.join(_few(where))})" for name, where in raised.items()]
    lines.append(f"  alarms: {'; '.join(said) or 'none'}")
    lines += [f"  what they mean, charts and pairs to read: {report}"] if report else []
    adapter = run["config"].get("adapter")
    kept = adapter or run["config"]["sera"].get("keep_policies")
    compare = f"axolotl sera eval {output_dir}{' --iterations' if kept else ''} --prompts FILE"
    lines.append(f"  to compare {'all policies' if kept else 'it with the base model'}: {compare}")
    if adapter:
        merge = f"axolotl merge-lora {config} --lora-model-dir {output_dir}"
        lines.append(f"  to have the adapter in the model's own weights: {merge}")
    lines.append(
        f"  the trained {'adapter' if adapter else 'model'} is in {output_dir}, and loads like any "
        "other of its kind"
    )
    if not run["config"]["sera"].get("push_to_hub"):
        push = f"axolotl sera push {output_dir} --to USER/NAME"
        lines.append(f"  to share policies and pairs: {push}")
    return "\n".join(lines)


def _few(lines: Sequence[str]) -> list[str]:
    """All of them, or the first and the last ones."""
    if len(lines) <= _LISTED:
        return list(lines)
    return [*lines[: _LISTED // 2], "...", *lines[-_LISTED // 2 :]]


def _trained(summary: Mapping[str, Any]) -> str:
    pairs: Mapping[str, int] = summary["pairs"]
    said = f"{pairs['kept']:,} of {pairs['offline']:,} pairs kept"
    if pairs["bootstrapped_wanted"]:
        said += f", {pairs['bootstrapped_kept']:,} sampled"
    reward = not_followed(summary)
    return f"{said} (the {reward} was not trusted)" if reward else said


def _why(
    run: Mapping[str, Any], ending: Mapping[str, Any], last: int, elsewhere: Path
) -> list[str]:
    """Which policy is kept, and why."""
    keep = run["config"]["sera"].get("keep")
    if not ending:
        why = "best needs held-out pairs: set val_set_size, test_datasets or sera.held_out"
        why = f" ({why})" if keep == "best" else ""
        return [f"  kept: the policy after iteration {last}, the last (sera.keep: {keep}){why}"]
    kept, losses = ending["kept"], ending["held_out_losses"]
    why = "none before it is clearly better"
    if kept != last:
        why = "each later one is clearly worse than an earlier one"
    lines = [f"  kept: the policy after iteration {kept}{', the last' * (kept == last)}: {why}"]
    each = [
        f"{f'after {t}' if t else 'before'} {loss:.4g}"
        for t, loss in enumerate(losses)
        if loss is not None
    ]
    lines.append(f"    {FIGURE}: {', '.join(_few(each))}")
    if None not in (losses[0], losses[kept]) and losses[kept] >= losses[0]:
        lines.append("    which is no lower than before training")
    if kept != last:
        lines.append(f"    that after iteration {last} is in {elsewhere / 'policy'}")
    return lines
