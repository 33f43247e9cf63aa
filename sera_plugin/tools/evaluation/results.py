"""An evaluation in figures: what `--json` prints, the terminal shows and the page is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sera_plugin import __version__
from sera_plugin.config.judge import JudgeConfig
from sera_plugin.labeling.judging import Judge
from sera_plugin.tools.evaluation.answers import Answer, Decoding
from sera_plugin.tools.evaluation.length import length_controlled
from sera_plugin.tools.evaluation.models import Model
from sera_plugin.tools.evaluation.prompts import Prompt, duplicates
from sera_plugin.tools.evaluation.verdicts import Judged
from sera_plugin.tools.evaluation.winrate import FloatArray, by_category, mean_score, win_rate
from sera_plugin.tools.report.output import NOTHING, Table, number, shown_name

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation has found. Lists of models have the baseline first.

    Attributes:
        path: the prompt file.
        prompts, models, decoding: what was asked, who answered, and how.
        answers: per model, in the order of the prompts.
        judge: who judged, None if nobody did.
        judged: per model; empty without a judge.
    """

    path: Path
    prompts: Sequence[Prompt]
    models: Sequence[Model]
    decoding: Decoding
    answers: Sequence[Sequence[Answer | None]]
    judge: Judge | None = None
    judged: Sequence[Judged] = ()


def figures(found: Evaluation) -> dict[str, Any]:
    """The evaluation as plain values; what is not a number is nan."""
    controlled = _controlled(found)
    models = [_model(found, index, controlled) for index in range(len(found.models))]
    return {
        "format_version": FORMAT_VERSION,
        "sera_plugin": __version__,
        "prompts": {
            "file": str(found.path),
            "sha256": hashlib.sha256(found.path.read_bytes()).hexdigest(),
            "number": len(found.prompts),
            "duplicates": duplicates(found.prompts),
        },
        "decoding": asdict(found.decoding),
        "judge": _judge(found.judge),
        "baseline": found.models[0].name,
        "models": models,
        "notes": _notes(found),
    }


def _model(found: Evaluation, index: int, controlled: FloatArray | None) -> dict[str, Any]:
    model, answers = found.models[index], found.answers[index]
    there = [one for one in answers if one is not None]
    facts: dict[str, Any] = {
        "name": model.name,
        "source": model.source,
        "answers": {
            "number": len(there),
            "mean_chars": float(np.mean([one.chars for one in there])) if there else None,
            # Of answers from a file they are not known.
            "mean_tokens": float(np.mean([one.tokens for one in there]))
            if there and model.answers is None
            else None,
            "unfinished": sum(one.unfinished for one in there),
            "empty": sum(not one.text for one in there),
        },
    }
    if not found.judged:
        return facts
    judged, seed = found.judged[index], found.decoding.seed
    if judged.scores is not None:
        mean, error = mean_score(judged.scores)
        facts["score"] = {"mean": mean, "error": error}
    if index:
        assert controlled is not None
        facts |= {
            "win_rate": asdict(win_rate(judged.outcomes, seed)),
            "length_controlled": float(controlled[index - 1]),
            "inconsistent": judged.inconsistent,
            "categories": {
                name: asdict(rate)
                for name, rate in by_category(
                    judged.outcomes, [prompt.category for prompt in found.prompts], seed
                ).items()
            },
        }
    return facts


def _controlled(found: Evaluation) -> FloatArray | None:
    if not found.judged:
        return None
    lengths = np.array(
        [[np.nan if one is None else one.chars for one in each] for each in found.answers]
    )
    outcomes = np.array([one.outcomes for one in found.judged[1:]])
    return length_controlled(outcomes, lengths[1:] - lengths[0])


def _judge(judge: Judge | None) -> dict[str, Any] | None:
    if judge is None:
        return None
    usage, description = judge.usage, judge.description
    cost = {}
    if "base_url" in description:
        config = JudgeConfig.model_validate(description)
        for name, replies in (("cost", usage.asked), ("cached_cost", usage.cached)):
            cost[name] = config.cost(replies.prompt_tokens, replies.completion_tokens)
    return {"name": judge.name, "description": description, "usage": asdict(usage), **cost}


def _notes(found: Evaluation) -> list[str]:
    """What a reader must know before the figures are believed."""
    notes = []
    again = duplicates(found.prompts)
    if again:
        notes.append(f"{again} of {len(found.prompts)} prompts are repetitions; each counts.")
    for model, answers in zip(found.models, found.answers, strict=True):
        missing = [p.row for p, one in zip(found.prompts, answers, strict=True) if one is None]
        if missing:
            rows = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            why = "not in its file" if model.answers else "no room in its context"
            notes.append(
                f"{model.name}: no answer to {len(missing)} of {len(answers)} prompts, which are "
                f"left out of its comparisons ({why}; rows {rows})."
            )
        cut = sum(one.unfinished for one in answers if one is not None)
        if cut:
            notes.append(
                f"{model.name}: {cut} of {len(answers)} answers are cut at --max-new-tokens, "
                f"{found.decoding.max_new_tokens}."
            )
    if found.judge is not None:
        usage = found.judge.usage
        if usage.unparsed:
            notes.append(f"{usage.unparsed} verdicts could not be read and are missing.")
        if usage.refused:
            notes.append(f"{usage.refused} verdicts are missing: the judge took no such request.")
    return notes


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """A line per model, and win rates by category where there are several."""
    models = figures["models"]
    judged = [one for one in models if "win_rate" in one]
    against = f"Against {figures['baseline']}, on {figures['prompts']['number']} prompts."
    lines = [_line(one, bool(judged)) for one in models]
    head = [name for name, _ in lines[0]]
    rows = [[cell for _, cell in line] for line in lines]
    found = [Table("Win rates" if judged else "Answers", head, rows, against if judged else "")]
    names = list(judged[0]["categories"]) if judged else []
    if len(names) > 1:
        found.append(_by_category(names, judged))
    return found


def _line(one: Mapping[str, Any], judged: bool) -> list[tuple[str, str]]:
    """A model's cells, each with its column's name."""
    cells = [("model", one["name"])]
    if "score" in one:
        cells.append(("score", number(one["score"]["mean"], ".4g")))
        cells.append(("± se", number(one["score"]["error"], ".2g")))
    if judged:
        cells += _wins(one)
    for name, key in (("characters", "mean_chars"), ("tokens", "mean_tokens")):
        cells.append((name, number(one["answers"][key], ",.0f")))
    return cells


def _wins(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    rate = one.get("win_rate")
    if rate is None:
        cells = ["baseline", "", "", "", ""]
    else:
        cells = [
            number(rate["rate"], ".1%"),
            number(rate["error"], ".1%"),
            f"{number(rate['low'], '.1%')} to {number(rate['high'], '.1%')}",
            number(one["length_controlled"], ".1%"),
            f"{rate['wins']}/{rate['ties']}/{rate['losses']}",
        ]
    names = ("wins", "± se", "95% interval", "length-controlled", "won/tied/lost")
    return list(zip(names, cells, strict=True))


def _by_category(names: Sequence[str], judged: Sequence[Mapping[str, Any]]) -> Table:
    rows, shades = [], []
    for name in names:
        rates = [one["categories"][name] for one in judged]
        total = sum(rates[0][what] for what in ("wins", "ties", "losses", "missing"))
        rows.append([shown_name(name) or "(none)", str(total), *map(_with_error, rates)])
        values = [rate["rate"] for rate in rates]
        shades.append([None, None, *(None if np.isnan(value) else value for value in values)])
    head = ["category", "prompts", *(one["name"] for one in judged)]
    return Table("Win rates by category", head, rows, "Rate and one standard error.", shades)


def _with_error(rate: Mapping[str, Any]) -> str:
    if np.isnan(rate["rate"]):
        return NOTHING
    return f"{number(rate['rate'], '.1%')} ± {number(rate['error'], '.1%')}"


def shown(figures: Mapping[str, Any]) -> str:
    """The evaluation for a terminal."""
    parts = [one.text() for one in tables(figures)]
    judge = figures["judge"]
    if judge is not None:
        parts.append(_judging(judge))
    if figures["notes"]:
        parts.append("\n".join(figures["notes"]))
    return "\n\n".join(parts)


def _judging(judge: Mapping[str, Any]) -> str:
    asked, cached = (judge["usage"][name] for name in ("asked", "cached"))
    said = f"Judge {shown_name(judge['name'], 120)}"
    if asked["count"] or cached["count"]:
        said += f": {asked['count']:,} replies asked for"
    if cached["count"]:
        said += f", {cached['count']:,} were there"
    if asked["prompt_tokens"] or asked["completion_tokens"]:
        said += f"; {asked['prompt_tokens']:,} + {asked['completion_tokens']:,} tokens"
    if judge.get("cost") is not None:
        said += f", price {judge['cost']:.2f} (of the cached ones {judge['cached_cost']:.2f})"
    return said + "."
