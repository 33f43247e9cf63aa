"""Which sampler a run takes, and why."""

from __future__ import annotations

from dataclasses import dataclass

from sera_plugin.sampling.interpreter import find_vllm

SAMPLERS = ("transformers", "vllm", "vllm-server")


@dataclass(frozen=True)
class Choice:
    """A sampler by its name in `sera.sampler`, and why it was taken.

    `fell_back` is true where the YAML names another one.
    """

    name: str
    reason: str
    fell_back: bool = False


def choose_sampler(asked: str, python: str, problem: str | None) -> Choice:
    """Decide once, when a run starts.

    Args:
        asked: `sera.sampler`.
        python: the interpreter that should have vLLM.
        problem: why vLLM would not serve this kind of policy, or None.

    Raises:
        ValueError: if vLLM is asked for by name and its interpreter does not import it.
    """
    if asked == "transformers":
        return Choice(asked, "in the training process, as sera.sampler says")
    if problem:
        return Choice("transformers", f"in the training process: {problem}", asked != "auto")
    if asked == "vllm-server":
        return Choice(asked, "a running server, as sera.sampler says")
    try:
        version = find_vllm(python)
    except RuntimeError as error:
        if asked == "vllm":
            raise ValueError(
                f"sera.sampler: vllm, but {error}. Set sera.vllm_python to the Python of an "
                "environment that has vLLM (docs/sampling.md says how to make one), or set "
                "sera.sampler to auto or transformers."
            ) from None
        return Choice("transformers", f"in the training process: {error}")
    return Choice("vllm", f"{version}, found in {python}; starts for each sampling phase")
