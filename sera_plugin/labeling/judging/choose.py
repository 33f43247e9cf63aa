"""A judge by what the command line calls it."""

from __future__ import annotations

from pathlib import Path

from sera_plugin.config.judge import read_judge
from sera_plugin.config.quoting import quoted
from sera_plugin.labeling.judging import Judge
from sera_plugin.labeling.judging.api import api_judge
from sera_plugin.labeling.judging.function import FunctionJudge
from sera_plugin.rundir.journal import Journal


def make_judge(spec: str, journal: Journal) -> Judge:
    """The judge that a name stands for.

    Args:
        spec: a YAML file with an API judge, a directory with a reward model, or a function as
            `module:function` or `file.py:function`.
        journal: where what it says is kept.

    Raises:
        ValueError: if it is none of these, or cannot be used.
        JudgeFailed: if the key of an API judge is not there.
    """
    if spec.endswith((".yaml", ".yml")):
        return api_judge(read_judge(Path(spec)), journal)
    if Path(spec).is_dir():
        from sera_plugin.labeling.judging.reward_model import RewardModelJudge

        return RewardModelJudge(Path(spec), journal)
    if ":" in spec:
        return FunctionJudge(spec)
    raise ValueError(
        f"judge: {quoted(spec)} is neither a YAML file, a directory nor a function. Give "
        "judge.yaml (an API judge), the directory of a reward model, or "
        "module:function or file.py:function."
    )
