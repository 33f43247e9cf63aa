"""Answers as the judges of benchmarks read them, beside AlpacaEval's form."""

from collections.abc import Iterator, Sequence
from typing import Any

from sera_plugin.tools.evaluation.answers import Prompt
from sera_plugin.tools.evaluation.results import Entry


def benchmark_answers(entry: Entry, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """Lines of `model_answer/NAME.jsonl`, for prompts whose rows are of a benchmark that has one.

    Rows with `uid` are Arena-Hard's since version 2.0 of its code (its `gen_judgment.py`); those
    with `question_id` and `turns` its older ones, where a turn is a block with `content`, or
    MT-Bench's (FastChat's `llm_judge`), where a turn is a text.
    """
    if entry.model.answers is not None:
        return
    name = entry.model.file  # by which the judges look for the file
    for prompt, answer in zip(prompts, entry.answers, strict=True):
        row = prompt.content
        if answer is None:
            continue
        if "uid" in row and len(prompt.turns) == 1:
            said = {"role": "assistant", "content": {"answer": answer.text}}
            asked = {"role": "user", "content": prompt.question}
            yield {"uid": row["uid"], "model": name, "messages": [asked, said]}
        elif "question_id" in row and isinstance(row.get("turns"), list):
            of_blocks = isinstance(row["turns"][0], dict)
            texts = [turn.text for turn in answer.turns]
            turns = [{"content": text} for text in texts] if of_blocks else texts
            choices = [{"index": 0, "turns": turns}]
            yield {"question_id": row["question_id"], "model_id": name, "choices": choices}
