"""One pair under every policy of a run, and the pairs whose labels look wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from sera_plugin.config.kinds import LABELERS
from sera_plugin.tools.report.blocks import NOTHING, number
from sera_plugin.tools.report.data import SIDES, Iteration, Run
from sera_plugin.tools.report.examples import printable_facts
from sera_plugin.tools.report.pairs import mislabelled, offline_pair, swapped
from sera_plugin.tools.report.terminal import plain_table
from sera_plugin.tools.report.tokens import Texts, shown_name, shown_text

_WHOLE = 100_000
_GLANCE = 120


def describe_pair(run: Run, row: int, texts: Texts) -> dict[str, Any]:
    """What each policy thought of a pair: log-probabilities, rewards, margin, its candidates.

    Raises:
        ValueError: if there is no such row, saying which there are.
    """
    total = run.total or 0
    if not 0 <= row < total:
        raise ValueError(f"--row: {row} is not in the run; it has rows 0 to {total - 1}")
    found: dict[str, Any] = {"row": row, "unit": run.unit, "labeler": run.labeler}
    if run.tokens is not None:
        found |= {name: texts.exact(run.tokens[f"{name}_ids"][row]) for name in ("prompt", *SIDES)}
        found["tokens"] = {
            name: int(run.tokens[f"{name}_ids"].lengths[row]) for name in ("prompt", *SIDES)
        }
    found["text"] = texts.source if texts.tokenizer is not None else None
    found["columns"] = {name: values[row] for name, values in run.scores.items()}
    found |= swapped(run, row)
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
    if one.candidates is not None:
        thought["candidates"] = _candidates(one, row, texts)
    return thought


def _candidates(one: Iteration, row: int, texts: Texts) -> list[dict[str, Any]]:
    candidates, pairs = one.candidates, one.bootstrapped
    assert candidates is not None
    found = []
    for index in np.flatnonzero(candidates.row == row):
        number = int(candidates.candidate[index])
        entry: dict[str, Any] = {
            "candidate": number,
            "text": texts.exact(candidates.tokens[int(index)]),
            "tokens": int(candidates.lengths[index]),
            "unfinished": bool(candidates.unfinished[index]),
            "from_dataset": bool(candidates.from_dataset[index]),
            "logps": candidates.logps[index].tolist(),
            "reward": float(candidates.reward[index]),
        }
        for side in SIDES if pairs is not None else ():
            assert pairs is not None
            at = np.flatnonzero((pairs["row"] == row) & (pairs[f"{side}_candidate"] == number))
            if len(at):
                entry |= {
                    "paired_as": side,
                    "pair_margin": float(pairs["margin"][at[0]]),
                    "pair_selected": bool(pairs["selected"][at[0]]),
                }
        found.append(entry)
    return found


def show_pair(found: dict[str, Any], texts: Texts) -> str:
    """`describe_pair` for a terminal."""
    lines = [f"row {found['row']}"]
    if texts.tokenizer is None:
        lines.append(f"token ids, not text: {texts.source}")
    lines += [
        f"  {shown_name(name)}: {shown_text(str(value), 200)}"
        for name, value in found["columns"].items()
    ]
    if "label" in found:
        lines.append(f"  label: {found['label']}")
    for name in ("prompt", *SIDES):
        if name in found:
            lines += ["", f"{name} ({found['tokens'][name]} tokens)", _indented(found[name])]
    rows = [
        [
            str(one["iteration"]),
            *(
                number(one.get(f"{side}_{what}"), ".3f")
                for what in ("logp", "reward")
                for side in SIDES
            ),
            number(one.get("margin"), ".3f"),
            {True: "kept", False: "dropped", None: NOTHING}[one.get("selected")],
        ]
        for one in found["iterations"]
    ]
    head = ["iteration", "chosen logp", "rejected logp", "chosen reward", "rejected reward"]
    lines += ["", plain_table([*head, "margin", "pair"], rows)]
    lines.append(f"logps in nats, rewards and margins in {found['unit']}")
    if not LABELERS[found["labeler"]].implicit:
        lines.append(f"candidates have rewards of labeler: {found['labeler']}, in its own unit")
    for one in found["iterations"]:
        for each in one.get("candidates", ()):
            paired = (
                f", {each['paired_as']} in a pair of margin {each['pair_margin']:+.3f} "
                f"({'kept' if each['pair_selected'] else 'dropped'})"
                if "paired_as" in each
                else ""
            )
            lines += [
                "",
                f"iteration {one['iteration']}, candidate {each['candidate']}: reward "
                f"{number(each['reward'], '+.3f')}, {each['tokens']} tokens"
                f"{', cut at the longest length' if each['unfinished'] else ''}"
                f"{', from the dataset' if each['from_dataset'] else ''}{paired}",
                _indented(each["text"]),
            ]
    return "\n".join(lines)


def suspects(run: Run, most: int, texts: Texts) -> list[dict[str, Any]]:
    """Pairs on which the newest policy disagrees with the label, the most negative margin first.

    Raises:
        ValueError: if no iteration has margins yet.
    """
    one, rows = mislabelled(run, most)
    pairs = [offline_pair(run, one, row) for row in rows.tolist()]
    return [
        {
            "row": pair.row,
            "margins": {str(number): margin for number, margin in pair.margins.items()},
            "selected": pair.kept,
            "columns": pair.facts,
            **swapped(run, pair.row),
            **{name: texts.exact(ids) for name, ids in pair.ids.items()},
        }
        for pair in pairs
    ]


def show_suspects(run: Run, found: list[dict[str, Any]]) -> str:
    """`suspects` for a terminal."""
    if not found:
        return "No pair has a negative margin."
    numbers = list(found[0]["margins"])
    names = ("prompt", *SIDES) if "prompt" in found[0] else ()
    head = ["row", *(f"margin t={number}" for number in numbers), "pair"]
    head += map(shown_name, run.scores)
    head += [] if run.swapped is None else ["label"]
    rows = [
        [
            str(one["row"]),
            *(f"{one['margins'][number]:+.3f}" for number in numbers),
            "kept" if one["selected"] else "dropped",
            *printable_facts(one["columns"]).values(),
            *([] if run.swapped is None else [one.get("label", "as given")]),
        ]
        for one in found
    ]
    lines = [plain_table(head, rows), f"margins in {run.unit}"]
    for one in found if names else ():
        lines += ["", f"row {one['row']}"]
        lines += [f"  {name:8} {_glance(one[name])}" for name in names]
    return "\n".join(lines)


def _glance(text: str) -> str:
    """The beginning of a text on one line."""
    return shown_text(" ".join(text.split()), _GLANCE).replace("\n", " ")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in shown_text(text, _WHOLE).split("\n"))
