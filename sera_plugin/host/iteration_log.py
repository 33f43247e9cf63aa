"""What the log says of an iteration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe_start(summary: Mapping[str, Any], unit: str) -> str:
    """The log block before an iteration's first step: what it will train on.

    Args:
        summary: as `summarize` returns it.
        unit: of margins.
    """
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
    noise = summary.get("label_noise")
    if noise and noise["recall"] is not None:
        lines.append(
            f"  label noise: {noise['swapped_dropped']} of {noise['swapped']} swapped pairs "
            f"dropped (recall {noise['recall']:.0%}, precision {noise['precision']:.0%})"
        )
    if "samples" in summary:
        samples = summary["samples"]
        lines.append(
            f"  sampled: {pairs['bootstrapped_kept']} of {pairs['bootstrapped_found']} pairs kept, "
            f"from {samples['sampled']} samples of {summary['sampler'].get('name')} "
            f"({samples['duplicates']} duplicate, {samples['unfinished']} unfinished, "
            f"{samples['ties']} ties"
            + (f", {samples['unranked']} without a verdict)" if samples["unranked"] else ")")
        )
        if "length_control" in samples:
            lines[-1] += f", {samples['length_control']:+.3g} a token taken off"
    if pairs["bootstrapped_kept"] < pairs["bootstrapped_wanted"]:
        lines.append(
            f"  fewer sampled pairs than the {pairs['bootstrapped_wanted']} asked for: raise "
            "sera.candidates or sera.temperature, or lower sera.bootstrap_ratio"
        )
    if "evaluation" in summary:
        lines.append(f"  held out: {summary['evaluation']['accuracy']:.0%} agree with their label")
    return "\n".join(lines)


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
