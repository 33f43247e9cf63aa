"""An evaluation in figures, as `--json` prints them, in a terminal and on the page."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from sera_plugin import __version__
from sera_plugin.config.block import JudgeConfig
from sera_plugin.labeling.judging import Judge, Verdict
from sera_plugin.tools.evaluation.answers import Answer, Decoding, Prompt
from sera_plugin.tools.evaluation.models import Model
from sera_plugin.tools.evaluation.tables import best_of, check_tables, shares_table, told
from sera_plugin.tools.evaluation.winrate import (
    FloatArray,
    by_group,
    length_controlled,
    mean_score,
    share,
    win_rate,
)
from sera_plugin.tools.report.output import Table, fill, number, shown_name

FORMAT_VERSION = 1
#: Examples of each kind per model.
_EXAMPLES = 8
_WINS = ("wins", "± se", "95% interval", "length-controlled", "won/tied/lost")


@dataclass
class Entry:
    """A model, its answers and what a judge says of them, in the order of the prompts."""

    model: Model
    answers: Sequence[Answer | None]
    #: On its answers against the baseline's: None for the baseline, and where either has none.
    verdicts: list[Verdict | None]
    #: (n,) of a judge that scores, nan where there is none; (0,) of one that compares.
    scores: FloatArray = field(default_factory=lambda: np.empty(0))
    #: (n,) outcomes of each check, 0 to 1, nan where there is none.
    checks: dict[str, FloatArray] = field(default_factory=dict)

    @property
    def outcomes(self) -> FloatArray:
        """(n,) 0 to 1, nan where there is none."""
        return np.array([one and one.outcome for one in self.verdicts], dtype=np.float64)


@dataclass
class Evaluation:
    """All that an evaluation has found; the baseline is the first entry."""

    path: Path
    prompts: Sequence[Prompt]
    decoding: Decoding
    entries: Sequence[Entry]
    judge: Judge | None = None


def figures(found: Evaluation) -> dict[str, Any]:
    """The evaluation as plain values; what is not a number is nan."""
    notes, remarks = told(_remarks(found))
    return {
        "format_version": FORMAT_VERSION,
        "sera_plugin": __version__,
        "prompts": {
            "file": str(found.path),
            "sha256": hashlib.sha256(found.path.read_bytes()).hexdigest(),
            "number": len(found.prompts),
            "duplicates": _repeated(found),
        },
        "decoding": asdict(found.decoding),
        "judge": _judge(found.judge),
        "baseline": found.entries[0].model.name,
        "models": _models(found),
        "notes": notes,
        "remarks": remarks,
    }


def _repeated(found: Evaluation) -> int:
    return len(found.prompts) - len({prompt.turns for prompt in found.prompts})


def _models(found: Evaluation) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = []
    categories = np.array([prompt.category for prompt in found.prompts], dtype=object)
    for entry in found.entries:
        there = [one for one in entry.answers if one is not None]
        chars = [one.chars for one in there]
        # Of answers from a file they are not known.
        tokens = [sum(t.tokens for t in one.turns) for one in there if not entry.model.answers]
        said = {
            "number": len(there),
            "mean_chars": float(np.mean(chars)) if chars else None,
            "mean_tokens": float(np.mean(tokens)) if tokens else None,
            "unfinished": sum(one.unfinished for one in there),
            "empty": sum(not one.text for one in there),
        }
        facts: dict[str, Any] = {"name": entry.model.name, "source": entry.model.source}
        facts["answers"] = said
        if entry.checks:
            facts["checks"] = {
                spec: asdict(share(one)) | {"categories": by_group(share, one, categories)}
                for spec, one in entry.checks.items()
            }
        models.append(facts)
    if found.judge is None:
        return models
    rated = partial(win_rate, seed=found.decoding.seed)
    lengths = np.array([[a and a.chars for a in entry.answers] for entry in found.entries], float)
    outcomes = np.array([entry.outcomes for entry in found.entries])
    controlled = [np.nan, *length_controlled(outcomes[1:], lengths[1:] - lengths[0])]
    for index, (facts, entry) in enumerate(zip(models, found.entries, strict=True)):
        if entry.scores.size:
            facts["score"] = dict(zip(("mean", "error"), mean_score(entry.scores), strict=True))
        if index:
            # Verdicts that turn with the order of the answers.
            known = [one.consistent for one in entry.verdicts if one and one.consistent is not None]
            facts["win_rate"] = asdict(rated(outcomes[index]))
            facts["length_controlled"] = float(controlled[index])
            facts["inconsistent"] = known.count(False) / len(known) if known else None
            facts["categories"] = by_group(rated, outcomes[index], categories)
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


def _remarks(found: Evaluation) -> Iterable[tuple[float, str]]:
    """What a reader must know before the figures are believed, and how much of them it touches."""
    total, repeated = len(found.prompts), _repeated(found)
    yield repeated / total, f"{repeated} of {total} prompts are repetitions; each counts."
    for entry in found.entries:
        name, answers = entry.model.name, list(zip(found.prompts, entry.answers, strict=True))
        missing = [prompt.row for prompt, one in answers if one is None]
        rows = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        why = "not in its file" if entry.model.answers else "no room in its context"
        yield (
            len(missing) / total,
            f"{name}: no answer to {len(missing)} of {total} prompts, which are "
            f"left out of its comparisons ({why}; rows {rows}).",
        )
        cut = sum(one.unfinished for _, one in answers if one is not None)
        yield (
            cut / total,
            f"{name}: {cut} of {total} answers are cut at --max-new-tokens, "
            f"{found.decoding.max_new_tokens}.",
        )
        for spec, outcomes in entry.checks.items():
            unknown = int(np.isnan(outcomes).sum()) - len(missing)
            yield unknown / total, f"{name}: {spec} cannot tell of {unknown} of {total} answers."
    if found.judge is not None:
        usage = found.judge.usage
        asked = total * len(found.entries)
        yield (
            usage.unparsed / asked,
            f"{usage.unparsed} verdicts could not be read, or were None, and are missing.",
        )
        yield (
            usage.failed / asked,
            f"{usage.failed} answers have no score: the function raised, ended its process, took "
            "too long or gave no finite number.",
        )
        yield (
            usage.refused / asked,
            f"{usage.refused} verdicts are missing: the judge took no such request.",
        )


def shown(figures: Mapping[str, Any]) -> str:
    """The evaluation for a terminal."""
    judge = figures["judge"]
    return fill("eval.txt", figures=figures, tables=_tables(figures), judge=judge).strip()


def _tables(figures: Mapping[str, Any]) -> list[Table]:
    """A line per model, and win rates by category where there are several."""
    models = figures["models"]
    judged = [one for one in models if "win_rate" in one]
    lines = [_line(one, bool(judged)) for one in models]
    rows = [[cell for _, cell in line] for line in lines]
    against = f"Against {figures['baseline']}, on {figures['prompts']['number']} prompts."
    title, note = ("Win rates", against) if judged else ("Answers", "")
    rates = [0.5, *(one["win_rate"]["rate"] for one in models[1:])] if judged else []
    found = [Table(title, [name for name, _ in lines[0]], rows, note, best=best_of(rates))]
    categories = {one["name"]: one["categories"] for one in judged}
    if judged and len(judged[0]["categories"]) > 1:
        title, note = "Win rates by category", "With their 95% intervals."
        found.append(shares_table(title, ("category", "prompts"), categories, note))
    for spec in models[0].get("checks", ()):
        found += check_tables(spec, {one["name"]: one["checks"][spec] for one in models})
    return found


def _line(one: Mapping[str, Any], judged: bool) -> list[tuple[str, str]]:
    """A model's cells, each with its column's name."""
    cells = [("model", one["name"])]
    if "score" in one:
        cells.append(("score", number(one["score"]["mean"], ".4g")))
        cells.append(("± se", number(one["score"]["error"], ".2g")))
    wins = ["baseline", "", "", "", ""]
    if "win_rate" in one:
        rate = one["win_rate"]
        shares = (rate["rate"], rate["error"], rate["low"], rate["high"], one["length_controlled"])
        won, error, low, high, controlled = (number(share, ".1%") for share in shares)
        counts = f"{rate['wins']}/{rate['ties']}/{rate['losses']}"
        wins = [won, error, f"{low} to {high}", controlled, counts]
    cells += zip(_WINS, wins, strict=True) if judged else ()
    for name, key in (("characters", "mean_chars"), ("tokens", "mean_tokens")):
        cells.append((name, number(one["answers"][key], ",.0f")))
    return cells


def page(found: Evaluation, figures: Mapping[str, Any]) -> str:
    """The page as HTML: win rates with their intervals, categories, and answers to read."""
    judge, models = figures["judge"], figures["models"]
    settings = [("prompts", figures["prompts"]["file"])]
    settings += [(f"model {one['name']}", one["source"]) for one in models]
    settings += figures["decoding"].items()
    if judge is not None:
        settings += [(f"judge: {key}", value) for key, value in judge["description"].items()]
    prompts = number(figures["prompts"]["number"], ",")
    return fill(
        "eval.html",
        title=f"Evaluation on {shown_name(found.path.name)}",
        figures=figures,
        facts=[("baseline", figures["baseline"]), ("prompts", prompts), *_facts(found, judge)],
        rated=[
            one for one in models if "win_rate" in one and not np.isnan(one["win_rate"]["rate"])
        ],
        tables=_tables(figures),
        prompts=found.prompts,
        baseline=found.entries[0],
        groups=_groups(found),
        settings=settings,
    )


def _facts(found: Evaluation, judge: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the head of the page says of the judge."""
    if judge is None:
        return []
    facts = [("judge", shown_name(judge["name"], 120))]
    known = [one.consistent for entry in found.entries for one in entry.verdicts
             if one is not None and one.consistent is not None]  # fmt: skip
    if known:
        turned = known.count(False) / len(known)
        facts.append(("verdicts that turn with the order", number(turned, ".0%")))
    replies = sum(judge["usage"][kind]["count"] for kind in ("asked", "cached"))
    if replies:
        facts.append(("replies of the judge", number(replies, ",")))
    if judge.get("cost") is not None:
        facts.append(("price", number(judge["cost"] + judge["cached_cost"], ".2f")))
    return facts


def _groups(found: Evaluation) -> list[dict[str, Any]]:
    """For each model some answers that lost and some that won, drawn by the seed."""
    groups = []
    for entry in found.entries[1:]:
        outcomes = entry.outcomes
        for kind, chosen in (("loses", outcomes < 0.5), ("wins", outcomes > 0.5)):
            rows = np.flatnonzero(chosen).tolist()
            drawn = sorted(Random(found.decoding.seed).sample(rows, min(_EXAMPLES, len(rows))))
            if drawn:
                groups.append({"entry": entry, "kind": kind, "of": len(rows), "rows": drawn})
    return groups
