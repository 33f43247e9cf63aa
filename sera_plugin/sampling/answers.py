"""What an engine answers is checked here, once, before anything of it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from sera_plugin.algorithm.protocols import Candidate, SamplingSettings
from sera_plugin.config.quoting import quoted

#: Most characters of a wrong answer that a message quotes.
_QUOTED = 100


def read_candidates(
    choices: object, settings: SamplingSettings, limit: int, vocabulary: int
) -> list[Candidate]:
    """The R candidates of one prompt, in the order of their index.

    Args:
        choices: the engine's answer: a list of objects with `index`, `token_ids` and
            `finish_reason`.
        settings: what was asked for.
        limit: most tokens of a candidate of this prompt.
        vocabulary: number of token ids that the model knows.

    Raises:
        ValueError: saying what is wrong, where they are not R different choices within the
            vocabulary and the limit, each with an end token if and only if it stopped.
    """
    if not isinstance(choices, list) or not all(isinstance(each, Mapping) for each in choices):
        raise ValueError(f"its choices are {quoted(choices, _QUOTED)}")
    indices = [each.get("index") for each in choices]
    if not _are_ids(indices) or sorted(indices) != list(range(settings.candidates)):
        raise ValueError(
            f"{settings.candidates} choices were asked for, and those with index "
            f"{quoted(indices, _QUOTED)} came back"
        )
    choices.sort(key=lambda each: each["index"])
    return [_candidate(each, settings.end_ids, limit, vocabulary) for each in choices]


def _candidate(
    choice: Mapping[str, Any], end_ids: tuple[int, ...], limit: int, vocabulary: int
) -> Candidate:
    ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    if not _are_ids(ids):
        raise ValueError(f"its token ids are {quoted(ids, _QUOTED)}")
    if not 1 <= len(ids) <= limit:
        raise ValueError(f"1 to {limit} tokens were asked for, and {len(ids)} came back")
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(
            f"token ids go from {min(ids)} to {max(ids)}, but the model's vocabulary has "
            f"{vocabulary} tokens"
        )
    if reason not in ("stop", "length"):
        raise ValueError(f"its finish reason is {quoted(reason, _QUOTED)}, not 'stop' or 'length'")
    ends = [place for place, token in enumerate(ids) if token in end_ids]
    if ends != ([len(ids) - 1] if reason == "stop" else []):
        raise ValueError(
            f"a candidate of {len(ids)} tokens with the finish reason {reason!r} has end tokens at "
            f"{quoted(ends, _QUOTED)}"
        )
    return Candidate(ids, reason)


def _are_ids(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int for value in values)
