"""The block of a Python function that scores answers, and labelers that are mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from sera_plugin.config.block import Block, closest
from sera_plugin.config.kinds import LABELERS, LabelerKind, labeler_kind, labeler_name
from sera_plugin.config.quoting import quoted

if TYPE_CHECKING:
    from sera_plugin.config.sera import SeraConfig


class FunctionConfig(Block):
    """A function of the user's, called in processes of its own."""

    call: str
    """`file.py:function`, or `module:function` of an installed module. A relative path starts in
    the working directory."""
    timeout: float = Field(10.0, gt=0, le=86_400)
    """Seconds for an answer, by the clock; then it has no score, and the process ends."""
    processes: int = Field(1, ge=1, le=256)
    """Processes that call it at a time."""

    @classmethod
    def read(cls, value: object) -> object:
        """A call alone is a block too."""
        block = {"call": value} if isinstance(value, str) else value
        return cls.parse(block, "") if isinstance(block, dict) else block

    @field_validator("call")
    @classmethod
    def _names_both(cls, call: str) -> str:
        if ":" not in call:
            raise ValueError(
                f"{quoted(call)} names no function. Write file.py:function, or module:function"
            )
        return call


def known_labelers(value: object) -> object:
    """`labeler` as it is written; ValueError for a name that is none, with what is allowed."""
    for name in value if isinstance(value, (list, tuple)) else [value]:
        if name not in tuple(LABELERS):
            close = closest(str(name), LABELERS)
            hint = f" Did you mean {close}?" if close else ""
            allowed = ", ".join(LABELERS)
            raise ValueError(f"{quoted(name)} is no labeler: it is one of {allowed}.{hint}")
    return value


def mixed(named: tuple[str, ...]) -> str | tuple[str, ...]:
    """A list of labelers, one alone as itself; ValueError for some that cannot be mixed."""
    if len(named) == 1:
        return named[0]
    others = [name for name, kind in LABELERS.items() if kind.scores]
    once = len(set(named)) == len(named) and set(named[1:]) <= set(others)
    if named[:1] != ("implicit",) or not once:
        raise ValueError(
            f"{quoted(list(named))} cannot be mixed. A list begins with implicit, and then has "
            f"some of {', '.join(others)}, each once."
        )
    return named


def require_labels(config: SeraConfig) -> None:
    """ValueError where there is nothing that could weigh several labelers."""
    said = f"labeler: {quoted(list(config.labelers))} is weighed by the labels of held-out pairs"
    if config.reward != "fitted":
        raise ValueError(f"{said}, and reward: {config.reward} fits nothing. Set reward: fitted.")
    if config.judge is not None and config.judge.mode != "single":
        raise ValueError(
            f"{said}, and needs a number for each answer; judge.mode: {config.judge.mode} compares "
            "two. Set mode: single in the judge's block."
        )


def require_held_out(config: SeraConfig, pairs: int) -> None:
    """ValueError where several labelers are mixed and no pairs are held out."""
    if labeler_kind(config.labeler).mixed and not pairs:
        raise ValueError(
            f"sera.labeler: {quoted(list(config.labelers))} is weighed by the labels of held-out "
            "pairs, and none are held out. Set sera.held_out, val_set_size or test_datasets, or "
            "name one labeler."
        )


def require_sampled(config: SeraConfig, labeler: LabelerKind) -> None:
    """ValueError for prompts without answers where none could be sampled or ranked."""
    if config.prompts and (labeler.adds_dataset_answer or not config.bootstrap_ratio):
        ratio = config.bootstrap_ratio
        why = "needs a chosen answer to each prompt" if ratio else "ranks no samples"
        raise ValueError(
            f"prompts has no effect: labeler: {labeler_name(config.labeler)} with bootstrap_ratio: "
            f"{ratio} {why}. Remove prompts, or set another labeler and a bootstrap_ratio above 0."
        )


def require_candidates(config: SeraConfig, pairs_per_prompt: int) -> None:
    """ValueError if candidates are too few for so many pairs of a prompt."""
    if pairs_per_prompt > (most := config.candidates // 2):
        less = f" or lower bootstrap_ratio to {most}" if most and not config.prompts else ""
        raise ValueError(
            f"bootstrap_ratio: {config.bootstrap_ratio} needs {pairs_per_prompt} pairs per prompt, "
            f"but candidates: {config.candidates} gives at most {most}. Raise candidates to "
            f"{2 * pairs_per_prompt}{less}."
        )


def require_settings(config: SeraConfig, labeler: LabelerKind) -> None:
    """ValueError where keys of the block do not go together with who ranks."""
    name, ratio = labeler_name(config.labeler), config.bootstrap_ratio
    if labeler.adds_dataset_answer and ratio > 1:
        raise ValueError(
            f"bootstrap_ratio: {ratio} asks for more than one pair a prompt, but labeler: "
            f"{name} has one chosen answer for each. Set bootstrap_ratio to 1."
        )
    if (labeler.mixed or not labeler.implicit) and ratio == 0:
        raise ValueError(
            f"labeler: {name} ranks samples, but bootstrap_ratio: 0 samples none. Set "
            "bootstrap_ratio, for example to 0.3, or remove labeler."
        )
    for key, example in sorted(kind.setting for kind in LABELERS.values() if kind.setting):
        needed = any(LABELERS[one].setting == (key, example) for one in config.labelers)
        if needed and labeler.mixed and getattr(config, key) is None:
            raise ValueError(
                f"labeler: {quoted(list(config.labelers))} with {key} unset. Set {key}, for "
                f"example {key}: {example}."
            )
        if needed != (getattr(config, key) is not None):
            raise ValueError(
                f"labeler: {name} with {key} {'unset' if needed else 'set'} do not go "
                f"together. Set both (labeler: {key}, {key}: {example}), or neither."
            )
    if config.length_control != "none" and not labeler.gives_rewards:
        raise ValueError(
            f"length_control: {config.length_control} with labeler: {name} would put "
            "samples before the dataset's answers, because there are no rewards to take it "
            "off. Remove length_control, or set another labeler."
        )
