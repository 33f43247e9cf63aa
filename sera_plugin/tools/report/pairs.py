"""Pairs of a run one by one: to read on a page or in a terminal, and to take away as a dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.algorithm.algorithm import SIDES
from sera_plugin.config.kinds import LABELERS
from sera_plugin.rundir.checksums import write_file, write_text
from sera_plugin.tools.report.output import (
    NOTHING,
    fill,
    number,
    plain_table,
    shown_name,
    shown_text,
)
from sera_plugin.tools.report.reading import TEXTS, Iteration, Run
from sera_plugin.tools.report.tokens import Texts

SUFFIXES = (".jsonl", ".parquet")
#: A report stays small, and a screen readable: `inspect --row` shows the whole of a pair.
_LONGEST = {"prompt": 1_200, "chosen": 1_600, "rejected": 1_600}
_FEW, _SUSPECTS, _GLANCE = 8, 25, 120


def _offline(run: Run, one: Iteration, row: int) -> dict[str, Any]:
    """A pair of the dataset, and what each policy up to the newest thought of it."""
    assert one.selected is not None
    margins = {each.number: each.margin for each in run.iterations if each.margin is not None}
    return {
        "row": row,
        "margins": {iteration: float(margin[row]) for iteration, margin in margins.items()},
        "selected": bool(one.selected[row]),
        "columns": {name: values[row] for name, values in run.scores.items()},
        **_label(run, row),
        **{name: column[row] for name, column in run.tokens.items()},
    }


def _label(run: Run, row: int) -> dict[str, str]:
    swapped = run.swapped is not None and run.swapped[row]
    return {"label": "swapped on purpose"} if swapped else {}


def _sampled(run: Run, one: Iteration, index: int) -> dict[str, Any]:
    """A bootstrapped pair, by its place in bootstrapped.parquet."""
    pairs, samples = one.bootstrapped, one.candidates
    assert pairs is not None
    assert samples is not None
    row, at = int(pairs["row"][index]), {side: int(one.sampled[side][index]) for side in SIDES}
    facts = {
        "cut at the longest length": [side for side in SIDES if samples.unfinished[at[side]]],
        "the dataset's": [side for side in SIDES if samples.from_dataset[at[side]]],
    }
    return {
        "row": row,
        "margins": {one.number: float(pairs["margin"][index])},
        "selected": bool(pairs["selected"][index]),
        "columns": {name: " and ".join(sides) for name, sides in facts.items() if sides},
        "prompt": run.tokens["prompt"][row],
        **{side: samples.tokens[at[side]] for side in SIDES},
    }


def _mislabelled(run: Run, most: int) -> tuple[Iteration, npt.NDArray[np.intp]]:
    """The newest iteration with margins, and its rows of negative margin, lowest first."""
    for one in reversed(run.iterations):
        if one.margin is not None:
            order = np.argsort(one.margin, kind="stable")
            return one, order[one.margin[order] < 0][:most]
    raise ValueError(
        f"{run.root} has no margins yet: they exist from iteration 2 on, once its offline pairs "
        "are scored."
    )


def _facts(columns: Mapping[str, Any]) -> dict[str, str]:
    """What is special about a pair, as it can be shown."""
    return {
        shown_name(name): shown_text(f"{v:.4g}" if isinstance(v, float) else str(v), 200)
        for name, v in columns.items()
    }


def examples(run: Run, texts: Texts) -> list[dict[str, Any]]:
    """The pairs of the newest iterations that say most about run and data, in groups by name."""

    def group(name: str, one: Iteration, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        for pair in pairs:
            label = {"label": pair["label"]} if "label" in pair else {}
            pair["facts"] = _facts(pair["columns"]) | label
            for text, most in _LONGEST.items():
                pair[text] = shown_text(texts.exact(pair[text]), most)
        by_margin = "priority" not in (one.offline or {})
        return {"name": name, "t": one.number, "by_margin": by_margin, "pairs": pairs}

    groups = []
    chosen = [one for one in run.iterations if one.margin is not None]
    if run.tokens and chosen:
        margin = chosen[-1].margin
        assert margin is not None
        kinds = {
            "mislabelled": _mislabelled(run, _SUSPECTS)[1],
            "decided": np.argsort(margin, kind="stable")[::-1][:_FEW],
            "undecided": np.argsort(np.abs(margin), kind="stable")[:_FEW],
        }
        for name, rows in kinds.items():
            pairs = [_offline(run, chosen[-1], row) for row in rows.tolist()]
            groups.append(group(name, chosen[-1], pairs))
    for one in reversed(run.iterations if run.tokens else []):
        made = one.bootstrapped
        if made is None or one.candidates is None or not len(one.candidates.row):
            continue
        kept = np.flatnonzero(made["selected"])
        order = kept[np.argsort(-made["margin"][kept], kind="stable")].tolist()
        worst = order[_FEW:][::-1][:_FEW]
        parts = {"best-bootstrapped": order[:_FEW], "worst-bootstrapped": worst}
        if LABELERS[run.labeler].adds_dataset_answer:
            parts = {"bootstrapped": order[:_FEW]}
        for name, places in parts.items():
            groups.append(group(name, one, [_sampled(run, one, index) for index in places]))
        break
    return [one for one in groups if one["pairs"]]


# ------------------------------------------------- for a terminal and for machines


def describe_pair(run: Run, row: int, texts: Texts) -> dict[str, Any]:
    """What each policy thought of a pair: log-probabilities, rewards, margin, its candidates."""
    total = run.total or 0
    if not 0 <= row < total:
        raise ValueError(f"--row: {row} is not in the run; it has rows 0 to {total - 1}")
    found: dict[str, Any] = {"row": row, "unit": run.unit, "labeler": run.labeler}
    if run.tokens:
        found |= {name: texts.exact(column[row]) for name, column in run.tokens.items()}
        found["tokens"] = {name: int(column.lengths[row]) for name, column in run.tokens.items()}
    found["text"] = texts.source if texts.tokenizer is not None else None
    found["columns"] = {name: values[row] for name, values in run.scores.items()}
    found |= _label(run, row)
    found["iterations"] = [_thought(one, row, texts) for one in run.iterations]
    return found


def _thought(one: Iteration, row: int, texts: Texts) -> dict[str, Any]:
    thought: dict[str, Any] = {"iteration": one.number}
    if one.offline is not None and one.selected is not None:
        for name in (f"{side}_{what}" for what in ("logp", "reward") for side in SIDES):
            if name in one.offline:
                thought[name] = float(one.offline[name][row])
        thought["margin"] = None if one.margin is None else float(one.margin[row])
        thought["selected"] = bool(one.selected[row])
    samples, pairs = one.candidates, one.bootstrapped
    if samples is not None:
        thought["candidates"] = [
            {
                "candidate": int(samples.candidate[index]),
                "text": texts.exact(samples.tokens[index]),
                "tokens": int(samples.lengths[index]),
                "unfinished": bool(samples.unfinished[index]),
                "from_dataset": bool(samples.from_dataset[index]),
                "logps": samples.logps[index].tolist(),
                "reward": float(samples.reward[index]),
            }
            for index in np.flatnonzero(samples.row == row).tolist()
        ]
    if samples is not None and pairs is not None:
        for place in np.flatnonzero(pairs["row"] == row):
            for side in SIDES:
                thought["candidates"][int(pairs[f"{side}_candidate"][place])] |= {
                    "paired_as": side,
                    "pair_margin": float(pairs["margin"][place]),
                    "pair_selected": bool(pairs["selected"][place]),
                }
    return thought


def show_pair(found: dict[str, Any], texts: Texts) -> str:
    """`describe_pair` for a terminal."""
    names = [f"{side} {what}" for what in ("logp", "reward") for side in SIDES] + ["margin"]
    rows = [
        [
            str(one["iteration"]),
            *(number(one.get(name.replace(" ", "_")), ".3f") for name in names),
            {True: "kept", False: "dropped", None: NOTHING}[one.get("selected")],
        ]
        for one in found["iterations"]
    ]
    table = plain_table(["iteration", *names, "pair"], rows)
    implicit = LABELERS[found["labeler"]].implicit
    return fill("pair.txt", pair=found, texts=texts, table=table, implicit=implicit).removesuffix(
        "\n"
    )


def suspects(run: Run, most: int, texts: Texts) -> list[dict[str, Any]]:
    """Pairs on which the newest policy disagrees with the label, the most negative margin first."""
    one, rows = _mislabelled(run, most)
    pairs = [_offline(run, one, row) for row in rows.tolist()]
    return [pair | {name: texts.exact(pair[name]) for name in run.tokens} for pair in pairs]


def show_suspects(run: Run, found: list[dict[str, Any]]) -> str:
    """`suspects` for a terminal."""
    if not found:
        return "No pair has a negative margin."
    head = ["row", *(f"margin t={iteration}" for iteration in found[0]["margins"]), "pair"]
    head += [*map(shown_name, run.scores), *([] if run.swapped is None else ["label"])]
    rows = [
        [
            str(one["row"]),
            *(f"{margin:+.3f}" for margin in one["margins"].values()),
            "kept" if one["selected"] else "dropped",
            *_facts(one["columns"]).values(),
            *([] if run.swapped is None else [one.get("label", "as given")]),
        ]
        for one in found
    ]
    lines = [plain_table(head, rows), f"margins in {run.unit}"]
    for one in found if run.tokens else ():
        lines += ["", f"row {one['row']}"]
        for name in TEXTS:
            beginning = shown_text(" ".join(one[name].split()), _GLANCE).replace("\n", " ")
            lines.append(f"  {name:8} {beginning}")
    return "\n".join(lines)


# ------------------------------------------------- as a dataset


def export(
    run: Run, texts: Texts, path: Path, which: str, iteration: int | None
) -> tuple[int, int]:
    """Write pairs with `prompt`, `chosen`, `rejected`, and `row` and `margin` for the curious.

    Of a run with `label_noise`, offline pairs have `swapped` too: their answers are as trained.
    Of the newest iteration that has such pairs unless one is given.

    Returns:
        (pairs written, iteration).

    Raises:
        ValueError: if there is nothing to write, or nowhere to write it.
        OSError: if the file cannot be written, with what to do about it.
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
    kinds = dict.fromkeys(TEXTS, pa.string()) | {"row": pa.int64(), "margin": pa.float64()}
    if run.swapped is not None and which != "bootstrapped":
        kinds["swapped"] = pa.bool_()
    rows = [
        {
            "prompt": texts.prompt(pair["prompt"]),
            **{side: texts.completion(pair[side]) for side in SIDES},
            "row": pair["row"],
            "margin": pair["margins"].get(one.number),
            "swapped": "label" in pair,
        }
        for pair in pairs
    ]
    if path.suffix == ".jsonl":
        kept = ({name: row[name] for name in kinds} for row in rows)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    else:
        table = pa.Table.from_pylist(rows, pa.schema(kinds))
        write_file(path, lambda partial: pq.write_table(table, partial))
    return len(rows), one.number


def _pairs(run: Run, which: str, iteration: int | None) -> tuple[Iteration, list[dict[str, Any]]]:
    """The pairs to export, and whose they are."""
    for one in reversed(run.iterations) if iteration is None else [run.iteration(iteration)]:
        if which == "bootstrapped":
            if one.bootstrapped is not None and one.candidates is not None:
                kept = np.flatnonzero(one.bootstrapped["selected"]).tolist()
                return one, [_sampled(run, one, index) for index in kept]
        elif one.selected is not None:
            rows = np.flatnonzero(one.selected == (which == "kept")).tolist()
            return one, [_offline(run, one, row) for row in rows]
    if iteration is None:
        raise ValueError(f"--which: {run.root} has no {which} pairs yet")
    what = "bootstrapped pairs" if which == "bootstrapped" else "whole offline.parquet"
    raise ValueError(f"--iteration: {iteration} has no {what}")
