"""The pairs that a run ranked and made, as a dataset: a parquet file per iteration, and a card."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value
from datasets.info import DatasetInfo, DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from sera_plugin.algorithm.trust import SIDES
from sera_plugin.config.kinds import SELECTIONS, labeler_kind, labeler_name
from sera_plugin.config.quoting import in_markdown
from sera_plugin.rundir.tokens import TokenColumn
from sera_plugin.tools.report.reading import TEXTS, Iteration, Run, Texts
from sera_plugin.tools.sharing.card import RUN_KEY, TAGS, policies_of
from sera_plugin.tools.sharing.messages import Chat
from sera_plugin.tools.sharing.names import datasets_of, run_id

_NUMBERS = ("chosen_reward", "rejected_reward", "margin")
_MEANING = {
    "prompt, chosen, rejected": "{texts}",
    "chosen_reward, rejected_reward, margin": "of `offline` pairs the implicit reward, in {unit}"
    "{selection}; of `sampled` ones {labeler}",
    "iteration": "the one that ranked it, before its training",
    "source": "`offline`: of the dataset; `sampled`: both answers are the policy's own{spin}",
    "selected": "whether the iteration was trained on it",
    "label_in_doubt": "`offline` pairs: the newest policy prefers the rejected answer; null for "
    "`sampled` ones",
    "row": "the prompt, the same in all iterations{prompts}",
    "swapped": "chosen and rejected were exchanged on purpose (`sera.label_noise`)",
}
_MESSAGES = "conversations, as the chat template was given them; in `chosen` and `rejected` the "
_MESSAGES += "answer alone"
_STRINGS = "text as the policy was given it, an answer without its end token"


class Pairs:
    """A run's ranked pairs as parquet files, for the repository `name`.

    ValueError if there are none, or their texts or the tokenizer to write them with are missing.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self._texts = run, name, Texts(run)
        _, last = policies_of(run)
        self.iterations = [
            one
            for one in run.iterations
            # Of one that is under way nothing has been trained on yet.
            if one.number <= last
            and (one.margin is not None or (one.bootstrapped and one.candidates))
        ]
        if not self.iterations or not run.tokens:
            raise ValueError("the run has ranked no pairs")
        if self._texts.tokenizer is None:
            raise ValueError(f"the texts cannot be written, because there is {self._texts.source}")
        made = [one.bootstrapped["row"] for one in self.iterations if one.bootstrapped]
        if any((rows >= len(run.prompts)).any() for rows in made):
            raise ValueError("the texts of sera.prompts are missing")
        self._chat = Chat(run, self._texts)
        prompts: list[Any] = [self._chat.prompt(ids) for ids in _each(run.prompts)]
        #: Whether texts are lists of messages.
        self.messages = None not in prompts
        if not self.messages:
            prompts = [self._texts.prompt(ids) for ids in _each(run.prompts)]
        self._prompts = prompts
        self._answers = {
            side: [self._answer(ids) for ids in _each(run.tokens[side])] for side in SIDES
        }
        newest = run.with_margins
        margin = None if newest is None else newest.margin
        self._doubted = None if margin is None else (margin < 0).tolist()

    @property
    def features(self) -> Features:
        """The columns and their types."""
        text: Any = Value("string")
        if self.messages:
            text = [{"role": Value("string"), "content": Value("string")}]
        columns = dict.fromkeys(TEXTS, text) | dict.fromkeys(_NUMBERS, Value("float64"))
        columns |= {"iteration": Value("int32"), "source": Value("string")}
        columns |= {"selected": Value("bool"), "label_in_doubt": Value("bool")}
        columns |= {"row": Value("int64")}
        if self.run.swapped is not None:
            columns |= {"swapped": Value("bool")}
        return Features(columns)

    def files(self) -> dict[str, bytes]:
        """By path in the repository: the data, and the card as README.md."""
        found = {}
        for one in self.iterations:
            rows: dict[str, list[Any]] = {name: [] for name in self.features}
            for part in (self._offline(one), self._sampled(one)):
                for name in rows:
                    rows[name].extend(part[name] if part else ())
            table = pa.Table.from_pydict(rows, schema=self.features.arrow_schema)
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            found[f"data/iteration-{one.number:02d}.parquet"] = buffer.getvalue()
        return found | {"README.md": str(self.card()).encode()}

    def _answer(self, ids: Sequence[int]) -> Any:
        return self._chat.completion(ids) if self.messages else self._texts.completion(ids)

    def _offline(self, one: Iteration) -> dict[str, Sequence[Any]]:
        """Where the iteration ranked them."""
        if one.margin is None:
            return {}
        columns, total = one.offline, len(one.margin)
        return {
            "prompt": self._prompts[:total],
            **self._answers,
            **{name: columns[name].tolist() for name in _NUMBERS},
            "iteration": [one.number] * total,
            "source": ["offline"] * total,
            "selected": columns["selected"].tolist(),
            "label_in_doubt": self._doubted or [None] * total,
            "row": columns["row"].tolist(),
            "swapped": [None] * total if self.run.swapped is None else self.run.swapped.tolist(),
        }

    def _sampled(self, one: Iteration) -> dict[str, Sequence[Any]]:
        if not (one.bootstrapped and one.candidates):
            return {}
        pairs, samples, tokens, places = (
            one.bootstrapped,
            one.candidates,
            one.tokens(),
            one.places(),
        )
        rows, total = pairs["row"].tolist(), len(pairs["row"])
        rewards = {side: samples["reward"][places[side]].tolist() for side in SIDES}
        return {
            "prompt": [self._prompts[row] for row in rows],
            **{side: [self._answer(tokens[at]) for at in places[side]] for side in SIDES},
            **{f"{side}_reward": values for side, values in rewards.items()},
            "margin": pairs["margin"].tolist(),
            "iteration": [one.number] * total,
            "source": ["sampled"] * total,
            "selected": pairs["selected"].tolist(),
            "label_in_doubt": [None] * total,
            "row": rows,
            "swapped": [None] * total,
        }

    def card(self) -> DatasetCard:
        """README.md: what the columns are, and how they are read without any code."""
        run, labeler = self.run, labeler_kind(self.run.labeler)
        selection = str(run.settings.get("selection", "irm"))
        hub, local = datasets_of(run)
        marked: dict[str, Any] = {RUN_KEY: run_id(run)}
        data = DatasetCardData(
            task_categories=["text-generation"],
            tags=[*TAGS, "preference"],
            source_datasets=hub or None,
            configs=[
                {
                    "config_name": "default",
                    "data_files": [{"split": "train", "path": "data/*.parquet"}],
                }
            ],
            **marked,
        )
        info = DatasetInfo(features=self.features)
        DatasetInfosDict({"default": info}).to_dataset_card_data(data)
        told = {
            "texts": _MESSAGES if self.messages else _STRINGS,
            "unit": run.unit,
            "prompts": f"; from {run.total} on they are prompts without answers (`sera.prompts`)"
            if run.description.get("prompts")
            else "",
            "selection": ""
            if SELECTIONS[selection].by_margin
            else f", which did not select them (`sera.selection: {selection}` did)",
            "labeler": f"what `{labeler_name(run.labeler)}` ranked them by"
            + ("" if labeler.implicit else ", in its own unit"),
            "spin": ", but for the chosen one, which is the dataset's"
            if labeler.adds_dataset_answer
            else "",
        }
        lines = [
            f"- {', '.join(f'`{one}`' for one in names.split(', '))}: {what.format(**told)}"
            for names, what in _MEANING.items()
            if names != "swapped" or run.swapped is not None
        ]
        counts = [
            f"| {one.number} | {0 if one.margin is None else len(one.margin):,} | "
            f"{len(one.bootstrapped['row']) if one.bootstrapped else 0:,} |"
            for one in self.iterations
        ]
        names = ", ".join(in_markdown(one, 120) for one in (*hub, *local)) or "unknown"
        body = [
            "# Pairs of a SeRA run",
            "Preference pairs as [SeRA](https://arxiv.org/abs/2410.09362) ranked them in each "
            f"iteration: those of the data it was trained on ({names}), with the rewards of "
            "the policy of that time, and those that it made of the policy's own answers. The "
            "texts of both are under the terms of where they come from.",
            "\n".join(lines),
            "\n".join(["| iteration | offline | sampled |", "| --- | --- | --- |", *counts]),
            "The pairs that iteration t was trained on are its rows with `selected`:",
            "```python\nfrom datasets import load_dataset\n\n"
            f'pairs = load_dataset("{self.name}", split="train")\n'
            'made = pairs.filter(lambda row: row["source"] == "sampled" and row["selected"])\n```',
        ]
        return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def _each(column: TokenColumn) -> Iterator[Any]:
    return (column[row] for row in range(len(column)))
