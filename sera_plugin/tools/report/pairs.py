"""Pairs of a run one by one: to read on a page or in a terminal, and to take away as a dataset."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.trust import SIDES
from sera_plugin.config.kinds import labeler_kind, labeler_name
from sera_plugin.rundir.writing import write_file, write_text
from sera_plugin.tools.report.output import fill, number, plain_table, shown_name, shown_text
from sera_plugin.tools.report.reading import Iteration, Run, Texts

SUFFIXES = (".jsonl", ".parquet")
#: A report stays small, and a screen readable: `inspect --row` shows the whole of a pair.
_FEW, _SUSPECTS = 8, 25
_FIGURES = [f"{side}_{what}" for what in ("logp", "reward") for side in SIDES]
#: What is said of an answer, and by which column of the candidates.
_FACTS = {"cut at the longest length": "unfinished", "the dataset's": "given"}

Pair = dict[str, Any]
Rows = npt.NDArray[np.intp]


def _offline(run: Run, one: Iteration, rows: Rows) -> list[Pair]:
    """Pairs of the dataset, and what each policy up to the newest thought of them."""
    margins = {each.number: each.margin for each in run.iterations if each.margin is not None}
    return [
        {
            "row": row,
            "margins": {iteration: float(margin[row]) for iteration, margin in margins.items()},
            "selected": bool(one.offline["selected"][row]),
            **_known(run, row),
            **{name: column[row] for name, column in run.tokens.items()},
        }
        for row in rows.tolist()
    ]


def _known(run: Run, row: int) -> Pair:
    """What the dataset says of a pair beside its texts."""
    columns = {name: values[row].as_py() for name, values in run.scores.items()}
    swapped = run.swapped is not None and run.swapped[row]
    return {"columns": columns} | ({"label": "swapped on purpose"} if swapped else {})


def _sampled(run: Run, one: Iteration, places: Rows) -> list[Pair]:
    """Bootstrapped pairs, by their places in bootstrapped.parquet."""
    pairs, samples, tokens, answers = one.bootstrapped, one.candidates, one.tokens(), one.places()
    found = []
    for place in places.tolist():
        row, at = int(pairs["row"][place]), {side: answers[side][place] for side in SIDES}
        facts = {
            fact: " and ".join(side for side in SIDES if samples[name][at[side]])
            for fact, name in _FACTS.items()
        }
        found.append({
            "row": row,
            "margins": {one.number: float(pairs["margin"][place])},
            "selected": bool(pairs["selected"][place]),
            "columns": {fact: sides for fact, sides in facts.items() if sides},
            "prompt": run.prompts[row],
            **{side: tokens[at[side]] for side in SIDES},
        })  # fmt: skip
    return found


def _kept(run: Run, one: Iteration) -> Rows:
    """Places in bootstrapped.parquet: kept pairs, but for those whose prompts are missing."""
    pairs = one.bootstrapped
    return np.flatnonzero(pairs["selected"] & (pairs["row"] < len(run.prompts)))


def facts_of(pair: Pair) -> dict[str, str]:
    """What is special about a pair, as it can be shown."""
    shown = {
        shown_name(name): shown_text(f"{v:.4g}" if isinstance(v, float) else v, 200)
        for name, v in pair["columns"].items()
    }
    return shown | ({"label": pair["label"]} if "label" in pair else {})


def _doubted(margin: FloatArray) -> Rows:
    """The rows of negative margin, lowest first."""
    order = np.argsort(margin, kind="stable")
    return order[margin[order] < 0]


def examples(run: Run) -> list[dict[str, Any]]:
    """The pairs of the newest iterations that say most about run and data, in groups by name."""
    groups: list[tuple[str, Iteration, list[Pair]]] = []
    if run.tokens and (one := run.with_margins) is not None:
        margin = one.offline["margin"]
        parts = {
            "mislabelled": _doubted(margin)[:_SUSPECTS],
            "decided": np.argsort(margin, kind="stable")[::-1][:_FEW],
            "undecided": np.argsort(np.abs(margin), kind="stable")[:_FEW],
        }
        groups += [(name, one, _offline(run, one, rows)) for name, rows in parts.items()]
    sampled = [one for one in run.iterations if one.bootstrapped and one.candidates]
    # An iteration that does not follow its reward has kept none.
    if run.tokens and (sampled := [one for one in sampled if len(_kept(run, one))]):
        one, made = sampled[-1], sampled[-1].bootstrapped
        kept = _kept(run, one)
        order = kept[np.argsort(-made["margin"][kept], kind="stable")]
        parts = {"best-bootstrapped": order[:_FEW], "worst-bootstrapped": order[_FEW:][::-1][:_FEW]}
        if labeler_kind(run.labeler).adds_dataset_answer:
            parts = {"bootstrapped": order[:_FEW]}
        groups += [(name, one, _sampled(run, one, places)) for name, places in parts.items()]
    return [
        {"name": name, "t": one.number, "by_margin": one.by_margin, "pairs": pairs}
        for name, one, pairs in groups
        if pairs
    ]


def describe_pair(run: Run, row: int, texts: Texts) -> Pair:
    """What each policy thought of a pair: log-probabilities, rewards, margin, its candidates."""
    total = max(run.total or 0, len(run.prompts))
    if not 0 <= row < total:
        raise ValueError(f"--row: {row} is not in the run; it has rows 0 to {total - 1}")
    found: Pair = {"row": row, "unit": run.unit, "labeler": labeler_name(run.labeler)}
    if columns := run.tokens:
        if row >= len(columns["prompt"]):  # of `sera.prompts`
            columns = {"prompt": run.prompts}
        found |= {name: texts.exact(column[row]) for name, column in columns.items()}
        found["tokens"] = {name: int(column.lengths[row]) for name, column in columns.items()}
    found["text"] = texts.source if texts.tokenizer is not None else None
    found |= {"columns": {}} if row >= (run.total or 0) else _known(run, row)
    found["iterations"] = [_thought(one, row, texts) for one in run.iterations]
    return found


def _thought(one: Iteration, row: int, texts: Texts) -> dict[str, Any]:
    thought: dict[str, Any] = {"iteration": one.number}
    samples, pairs = one.candidates, one.bootstrapped
    if one.offline and row < len(one.offline["row"]):
        names = [name for name in _FIGURES if name in one.offline]
        thought |= {name: float(one.offline[name][row]) for name in names}
        thought["margin"] = None if one.margin is None else float(one.margin[row])
        thought["selected"] = bool(one.offline["selected"][row])
    if samples:
        tokens = one.tokens()
        thought["candidates"] = [
            {
                "candidate": int(samples["candidate"][index]),
                "text": texts.exact(tokens[index]),
                "tokens": int(samples["length"][index]),
                "unfinished": bool(samples["unfinished"][index]),
                "from_dataset": bool(samples["given"][index]),
                "logps": samples["logps"][index].tolist(),
                "reward": float(samples["reward"][index]),
            }
            for index in np.flatnonzero(samples["row"] == row).tolist()
        ]
        for place in np.flatnonzero(pairs["row"] == row) if pairs else ():
            for side in SIDES:
                thought["candidates"][int(pairs[f"{side}_candidate"][place])] |= {
                    "paired_as": side,
                    "pair_margin": float(pairs["margin"][place]),
                    "pair_selected": bool(pairs["selected"][place]),
                }
    return thought


def show_pair(pair: Pair, texts: Texts) -> str:
    """`describe_pair` for a terminal."""
    names = [*_FIGURES, "margin"]
    kept = {True: "kept", False: "dropped", None: number(None)}
    rows = [
        [
            str(one["iteration"]),
            *(number(one.get(name), ".3f") for name in names),
            kept[one.get("selected")],
        ]
        for one in pair["iterations"]
    ]
    table = plain_table(["iteration", *(name.replace("_", " ") for name in names), "pair"], rows)
    implicit = pair["labeler"].startswith("implicit")
    return fill("pair.txt", pair=pair, texts=texts, table=table, implicit=implicit)[:-1]


def suspects(run: Run, most: int, texts: Texts) -> list[Pair]:
    """Pairs on which the newest policy disagrees with the label, the most negative margin first."""
    one = run.with_margins
    if one is None:
        raise ValueError(
            f"{run.root} has no margins yet: they exist from iteration 2 on, once its offline "
            "pairs are scored."
        )
    pairs = _offline(run, one, _doubted(one.offline["margin"])[:most])
    return [pair | {name: texts.exact(pair[name]) for name in run.tokens} for pair in pairs]


def show_suspects(run: Run, found: list[Pair]) -> str:
    """`suspects` for a terminal."""
    if not found:
        return "No pair has a negative margin."
    margins = [f"margin t={iteration}" for iteration in found[0]["margins"]]
    given = {} if run.swapped is None else {"label": "as given"}
    head = ["row", *margins, "pair", *map(shown_name, run.scores), *given]
    rows = [
        [
            str(one["row"]),
            *(f"{margin:+.3f}" for margin in one["margins"].values()),
            "kept" if one["selected"] else "dropped",
            *facts_of(given | one).values(),
        ]
        for one in found
    ]
    return fill("suspects.txt", run=run, pairs=found, table=plain_table(head, rows))[:-1]


def export(
    run: Run, texts: Texts, path: Path, which: str, iteration: int | None
) -> tuple[int, int]:
    """Write pairs with `prompt`, `chosen`, `rejected`, and `row` and `margin` for the curious.

    Of a run with `label_noise`, offline pairs have `swapped` too: their answers are as trained.
    Returns how many pairs are written, and of which iteration: the newest with any unless one is
    given. A ValueError if there is nothing to write, or nowhere to write it.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--export: {path} must end in {' or '.join(SUFFIXES)}")
    if path.exists():
        raise ValueError(f"--export: {path} exists. Remove it, or name another file.")
    if texts.tokenizer is None:
        raise ValueError(f"--export: the texts cannot be written, because there is {texts.source}")
    if not run.tokens:
        raise ValueError(f"--export: {run.root / 'dataset.parquet'} is missing or damaged")
    one, pairs = _pairs(run, which, iteration)
    columns = {
        "prompt": pa.array([texts.prompt(pair["prompt"]) for pair in pairs], pa.string()),
        **{side: pa.array([texts.completion(pair[side]) for pair in pairs], pa.string())
           for side in SIDES},
        "row": pa.array([pair["row"] for pair in pairs], pa.int64()),
        "margin": pa.array([pair["margins"].get(one.number) for pair in pairs], pa.float64()),
    }  # fmt: skip
    if run.swapped is not None and which != "bootstrapped":
        columns["swapped"] = pa.array(["label" in pair for pair in pairs], pa.bool_())
    table = pa.table(columns)
    if path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
        write_text(path, "".join(lines))
    else:
        write_file(path, lambda partial: pq.write_table(table, partial))
    return len(pairs), one.number


def _pairs(run: Run, which: str, iteration: int | None) -> tuple[Iteration, list[Pair]]:
    """The pairs to export, and whose they are."""
    if iteration is not None and iteration not in run.begun:
        begun = ", ".join(map(str, run.begun)) or "none"
        raise ValueError(f"iteration {iteration} is not in {run.root} (begun: {begun})")
    for one in reversed(run.iterations) if iteration is None else [run.begun[iteration]]:
        if which == "bootstrapped" and one.bootstrapped and one.candidates:
            return one, _sampled(run, one, _kept(run, one))
        if which != "bootstrapped" and one.offline:
            rows = np.flatnonzero(one.offline["selected"] == (which == "kept"))
            return one, _offline(run, one, rows)
    if iteration is None:
        raise ValueError(
            f"--which: no iteration in {run.root} has {which} pairs; its report says what each "
            "trained on"
        )
    what = "bootstrapped pairs" if which == "bootstrapped" else "whole offline.parquet"
    raise ValueError(f"--iteration: {iteration} has no {what}")
