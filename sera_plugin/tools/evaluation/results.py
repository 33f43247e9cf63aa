"""An evaluation in figures, as `--json` prints them, in a terminal and on the page."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from sera_plugin import __version__
from sera_plugin.config.block import JudgeConfig
from sera_plugin.labeling.judging import Judge, Verdict
from sera_plugin.tools.evaluation.answers import Answer, Decoding
from sera_plugin.tools.evaluation.models import Model
from sera_plugin.tools.evaluation.prompts import Prompt
from sera_plugin.tools.evaluation.winrate import (
    FloatArray,
    by_category,
    length_controlled,
    mean_score,
    win_rate,
)
from sera_plugin.tools.report.output import NOTHING, Table, fill, number, shown_name, shown_text

FORMAT_VERSION = 1
#: Examples of each kind per model, and the longest text of one.
_EXAMPLES, _LONGEST = 8, 4_000


@dataclass(frozen=True)
class Judged:
    """One model, judged; in the order of the prompts."""

    #: On its answers against the baseline's: None for the baseline, and where either has none.
    verdicts: list[Verdict | None]
    #: (n,) of a judge that scores, nan where there is none.
    scores: FloatArray | None = None

    @property
    def outcomes(self) -> FloatArray:
        """(n,) 0 to 1, nan where there is none."""
        return np.array([one and one.outcome for one in self.verdicts], dtype=np.float64)

    @property
    def inconsistent(self) -> float | None:
        """The share of verdicts that turn with the order of the answers; None if none can."""
        known = [one.consistent for one in self.verdicts if one and one.consistent is not None]
        return known.count(False) / len(known) if known else None


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation has found; the baseline is the first model."""

    path: Path
    prompts: Sequence[Prompt]
    models: Sequence[Model]
    decoding: Decoding
    #: Per model, in the order of the prompts.
    answers: Sequence[Sequence[Answer | None]]
    judge: Judge | None = None
    #: Per model; empty without a judge.
    judged: Sequence[Judged] = ()


# ------------------------------------------------------------------ figures


def figures(found: Evaluation) -> dict[str, Any]:
    """The evaluation as plain values; what is not a number is nan."""
    repeated = len(found.prompts) - len({prompt.turns for prompt in found.prompts})
    return {
        "format_version": FORMAT_VERSION,
        "sera_plugin": __version__,
        "prompts": {
            "file": str(found.path),
            "sha256": hashlib.sha256(found.path.read_bytes()).hexdigest(),
            "number": len(found.prompts),
            "duplicates": repeated,
        },
        "decoding": asdict(found.decoding),
        "judge": _judge(found.judge),
        "baseline": found.models[0].name,
        "models": _models(found),
        "notes": _notes(found, repeated),
    }


def _models(found: Evaluation) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = []
    for model, answers in zip(found.models, found.answers, strict=True):
        there = [one for one in answers if one is not None]
        chars = [one.chars for one in there]
        # Of answers from a file they are not known.
        tokens = [] if model.answers else [sum(t.tokens for t in one.turns) for one in there]
        said = {
            "number": len(there),
            "mean_chars": float(np.mean(chars)) if chars else None,
            "mean_tokens": float(np.mean(tokens)) if tokens else None,
            "unfinished": sum(one.unfinished for one in there),
            "empty": sum(not one.text for one in there),
        }
        models.append({"name": model.name, "source": model.source, "answers": said})
    if not found.judged:
        return models
    categories, seed = [prompt.category for prompt in found.prompts], found.decoding.seed
    lengths = np.array([[one and one.chars for one in each] for each in found.answers], float)
    outcomes = np.array([one.outcomes for one in found.judged])
    controlled = [np.nan, *length_controlled(outcomes[1:], lengths[1:] - lengths[0])]
    for index, (facts, judged) in enumerate(zip(models, found.judged, strict=True)):
        if judged.scores is not None:
            facts["score"] = dict(zip(("mean", "error"), mean_score(judged.scores), strict=True))
        if index:
            rates = by_category(outcomes[index], categories, seed)
            facts["win_rate"] = asdict(win_rate(outcomes[index], seed))
            facts["length_controlled"] = float(controlled[index])
            facts["inconsistent"] = judged.inconsistent
            facts["categories"] = {name: asdict(rate) for name, rate in rates.items()}
    return models


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


def _notes(found: Evaluation, repeated: int) -> list[str]:
    """What a reader must know before the figures are believed."""
    notes = []
    if repeated:
        notes.append(f"{repeated} of {len(found.prompts)} prompts are repetitions; each counts.")
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


# ------------------------------------------------------------------ tables


def shown(figures: Mapping[str, Any]) -> str:
    """The evaluation for a terminal."""
    parts = [one.text() for one in _tables(figures)]
    judge = figures["judge"]
    if judge is not None:
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
        parts.append(f"{said}.")
    if figures["notes"]:
        parts.append("\n".join(figures["notes"]))
    return "\n\n".join(parts)


def _tables(figures: Mapping[str, Any]) -> list[Table]:
    """A line per model, and win rates by category where there are several."""
    models = figures["models"]
    judged = [one for one in models if "win_rate" in one]
    lines = [_line(one, bool(judged)) for one in models]
    rows = [[cell for _, cell in line] for line in lines]
    against = f"Against {figures['baseline']}, on {figures['prompts']['number']} prompts."
    title, note = ("Win rates", against) if judged else ("Answers", "")
    found = [Table(title, [name for name, _ in lines[0]], rows, note)]
    if judged and len(judged[0]["categories"]) > 1:
        found.append(_by_category(judged))
    return found


def _line(one: Mapping[str, Any], judged: bool) -> list[tuple[str, str]]:
    """A model's cells, each with its column's name."""
    cells = [("model", one["name"])]
    if "score" in one:
        cells.append(("score", number(one["score"]["mean"], ".4g")))
        cells.append(("± se", number(one["score"]["error"], ".2g")))
    if judged:
        rate = one.get("win_rate")
        wins = ["baseline", "", "", "", ""]
        if rate is not None:
            wins = [number(rate[name], ".1%") for name in ("rate", "error", "low", "high")]
            wins[2:] = [
                " to ".join(wins[2:]),
                number(one["length_controlled"], ".1%"),
                f"{rate['wins']}/{rate['ties']}/{rate['losses']}",
            ]
        names = ("wins", "± se", "95% interval", "length-controlled", "won/tied/lost")
        cells += zip(names, wins, strict=True)
    for name, key in (("characters", "mean_chars"), ("tokens", "mean_tokens")):
        cells.append((name, number(one["answers"][key], ",.0f")))
    return cells


def _by_category(judged: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[list[str]] = []
    shades: list[list[float | None]] = []
    for name, first in judged[0]["categories"].items():
        total = sum(first[what] for what in ("wins", "ties", "losses", "missing"))
        rows.append([shown_name(name) or "(none)", str(total)])
        shades.append([None, None])
        for one in judged:
            rate = one["categories"][name]
            known = not np.isnan(rate["rate"])
            error = number(rate["error"], ".1%")
            rows[-1].append(f"{number(rate['rate'], '.1%')} ± {error}" if known else NOTHING)
            shades[-1].append(rate["rate"] if known else None)
    head = ["category", "prompts", *(one["name"] for one in judged)]
    return Table("Win rates by category", head, rows, "Rate and one standard error.", shades)


# ------------------------------------------------------------------ the page


def page(found: Evaluation, figures: Mapping[str, Any]) -> str:
    """The page as HTML: win rates with their intervals, categories, and answers to read."""
    judge, models = figures["judge"], figures["models"]
    intervals = []  # where each model's rates are, 0 to 100
    for one in models:
        rate = one.get("win_rate")
        if rate is not None and not np.isnan(rate["rate"]):
            places = {name: 100 * rate[name] for name in ("rate", "low", "high")}
            controlled = 100 * one["length_controlled"]
            intervals.append({"name": one["name"], "controlled": controlled, **places})
    settings = [("prompts", figures["prompts"]["file"])]
    settings += [(f"model {one['name']}", one["source"]) for one in models]
    settings += figures["decoding"].items()
    if judge is not None:
        settings += [(f"judge: {key}", value) for key, value in judge["description"].items()]
    return fill(
        "eval.html",
        title=f"Evaluation on {shown_name(found.path.name)}",
        figures=figures,
        facts=_facts(figures),
        intervals=intervals,
        tables=_tables(figures),
        groups=_groups(found),
        settings=[(shown_text(str(k), 80), shown_text(str(v), 300)) for k, v in settings],
    )


def _facts(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    judge = figures["judge"]
    facts = [("baseline", figures["baseline"]), ("prompts", f"{figures['prompts']['number']:,}")]
    facts.append(("judge", "none" if judge is None else shown_name(judge["name"], 120)))
    inconsistent = [one.get("inconsistent") for one in figures["models"]]
    known = [share for share in inconsistent if share is not None]
    if known:
        facts.append(("verdicts that turn with the order", f"{sum(known) / len(known):.0%}"))
    if judge is not None:
        replies = sum(judge["usage"][name]["count"] for name in ("asked", "cached"))
        if replies:
            facts.append(("replies of the judge", f"{replies:,}"))
        if judge.get("cost") is not None:
            facts.append(("price", f"{judge['cost'] + judge['cached_cost']:.2f}"))
    return facts


def _groups(found: Evaluation) -> list[dict[str, Any]]:
    """For each model some answers that lost and some that won, drawn by the seed."""
    groups = []
    for index, judged in enumerate(found.judged[1:], start=1):
        name, outcomes = found.models[index].name, judged.outcomes
        for kind, chosen in (("loses", outcomes < 0.5), ("wins", outcomes > 0.5)):
            rows = np.flatnonzero(chosen).tolist()
            drawn = Random(found.decoding.seed).sample(rows, min(_EXAMPLES, len(rows)))
            if drawn:
                examples = [_example(found, index, row) for row in sorted(drawn)]
                group = {"title": f"{name} {kind}", "model": name, "of": len(rows)}
                groups.append({**group, "examples": examples})
    return groups


def _example(found: Evaluation, index: int, row: int) -> dict[str, Any]:
    prompt, both = found.prompts[row], (found.judged[index], found.judged[0])
    facts = {"outcome": number(both[0].outcomes[row], ".2f")}
    scores = [number(one.scores[row]) for one in both if one.scores is not None]
    if scores:
        facts["scores"] = " against ".join(scores)
    if prompt.category:
        facts["category"] = shown_name(prompt.category)
    texts = {"prompt": prompt.question}
    for side, place in (("mine", index), ("theirs", 0)):
        answer = found.answers[place][row]
        assert answer is not None
        texts[side] = answer.text
    shown = {name: shown_text(text, _LONGEST) for name, text in texts.items()}
    return {"row": prompt.row, "facts": facts, **shown}
