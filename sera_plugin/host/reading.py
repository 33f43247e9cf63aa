"""A dataset's raw rows as text: by the strategy that its entry names, under `GuardedTransform`."""

import inspect
import logging
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from axolotl.prompt_strategies.dpo import load as load_strategy
from axolotl.prompt_strategies.kto import load as load_single
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.utils import handle_legacy_message_fields_logic
from datasets import Dataset, Features, Value
from datasets.table import InMemoryTable

from sera_plugin.config.kinds import SELECTIONS
from sera_plugin.config.quoting import quoted
from sera_plugin.data.conversations import ChatTemplate, MessageReader
from sera_plugin.data.files import DataError, source_name
from sera_plugin.data.prompts import GuardedPrompt
from sera_plugin.data.rows import (
    ASIDE,
    LABELLED,
    PROBLEM,
    ROW,
    SOURCE,
    SYSTEM,
    GuardedTransform,
    as_it_is,
)
from sera_plugin.data.text import TEXTS
from sera_plugin.data.unpaired import ALONE, BothAnswers, PairedUp, pair_up
from sera_plugin.host.keys import MESSAGE_TYPES

LOG = logging.getLogger("axolotl.sera")
#: What `sera.prompts` is called where entries of datasets are.
PROMPTS = "sera.prompts"
#: The host's types of single answers with a label that write the text themselves.
SINGLE_TYPES = ("chatml", "llama3")
#: Types of a column of text.
TEXT = (Value("string"), Value("large_string"))


def transformed(
    cfg: DictDefault, key: str, index: int, dataset: Dataset, tokenizer: Any
) -> Dataset:
    """A dataset's rows as text, each with its place and what is wrong with it."""
    paired = None
    if key != PROMPTS and is_unpaired(cfg[key][index], dataset):
        cfg, dataset, paired = _paired(cfg, key, index, dataset)
    entry = cfg[key][index]
    block = entry.type if isinstance(entry.type, dict) else {}
    column = ""
    if key == PROMPTS:
        column, dataset = _prompt_column(cfg, index, dataset)
    transform, options = strategy(cfg, key, index, single=paired is not None)
    # With one of these a strategy maps its rows in a way of its own.
    if options.keys() & {"batched", "with_indices", "with_rank", "input_columns"}:
        dataset = _mapped(cfg, dataset, transform, tokenizer, options)
        transform, options = as_it_is, {}
    kept = tuple(name for name in cfg.sera["score_columns"] if name in dataset.features)
    source = source_name(key, index, str(entry.path))
    optional = (*SYSTEM, *filter(None, [block.get("field_system")]))
    template = chat_template(cfg, entry, tokenizer)
    _say_unread(f"{key}[{index}]", entry, dataset, template, tokenizer)
    guarded = GuardedTransform(transform, source, kept, optional, template)
    if key == PROMPTS:
        answers = (block.get("field_chosen") or "chosen", block.get("field_rejected") or "rejected")
        guarded = GuardedPrompt(**vars(guarded), column=column, answers=answers)
    types = {name: Value("string") for name in (*TEXTS, PROBLEM, SOURCE, ASIDE)}
    types |= dict.fromkeys((ROW, LABELLED), Value("int64"))
    types |= {name: dataset.features[name] for name in kept}
    # Left to itself, `Dataset.map` keeps the type of a raw column of the same name, and text in
    # one of mixed types is read as JSON. Columns that nobody asked for could keep two datasets
    # from being merged.
    ours = {"with_indices": True, "remove_columns": "__all__", "features": Features(types)}
    made = _mapped(cfg, dataset, guarded, tokenizer, {**options, **ours})
    return made if paired is None else _placed(made, paired)


def is_unpaired(entry: DictDefault, dataset: Dataset) -> bool:
    """Whether a dataset has single answers with a label, as for the host's `rl: kto`."""
    if isinstance(entry.type, dict):
        return bool(entry.type.get("field_completion") or entry.type.get("field_label"))
    names = dataset.column_names
    return {"completion", "label"} <= set(names) and (entry.field_chosen or "chosen") not in names


def _paired(
    cfg: DictDefault, key: str, index: int, dataset: Dataset
) -> tuple[DictDefault, Dataset, PairedUp]:
    """A dataset of single answers as one of pairs, and the configuration that reads it."""
    entry, where = DictDefault({**cfg[key][index]}), f"{key}[{index}]"
    block = entry.type if isinstance(entry.type, dict) else {}
    completion = block.get("field_completion") or "completion"
    label, prompt = block.get("field_label") or "label", block.get("field_prompt")
    named = filter(None, (prompt, block.get("field_system"), entry.field_messages))
    for name in (completion, label):
        if name not in dataset.column_names:
            raise DataError(
                f"{where}.type: {quoted(name)} is not in the data. It has "
                f"{', '.join(map(quoted, sorted(dataset.column_names)))}."
            )
    table = dataset.with_format("arrow")[:]
    found = pair_up(table, completion, label, {*named, entry.field_tools or "tools"})
    if not found.pairs:
        reasons = Counter(one for one in found.problems if one != ALONE).most_common(3)
        others = "".join(f"; {count} row(s): {why}" for why, count in reasons)
        raise DataError(
            f"{where}.path: {quoted(str(entry.path), 200)} has single answers, and no prompt has "
            f"both one with {label}: true and one with {label}: false, so there is no pair{others}."
            " Train such data with the host's rl: kto, or add the other answers."
        )
    if SELECTIONS[selection := cfg.sera["selection"]].reads_scores:
        raise DataError(
            f"sera.selection: {selection} ranks pairs by scores of theirs, and {where} has single "
            "answers: a pair has the columns of its chosen one. Set selection: irm, or make pairs."
        )
    LOG.info(
        f"SeRA: {where}: of {len(table)} answers with a label {2 * found.pairs} became "
        f"{found.pairs} pairs"
    )
    others = pa.array(found.rejected, mask=found.rejected < 0)
    places = {"chosen": found.rows, "rejected": others}
    answers = {name: table[completion].take(one) for name, one in places.items()}
    kept = [name for name in table.column_names if name not in (completion, label, *answers)]
    pairs = pa.table({name: table[name].take(found.rows) for name in kept} | answers)
    entry.update({f"field_{name}": name for name in answers})
    if "messages" not in kept and "prompt" in kept:
        entry.field_messages = entry.field_messages or "prompt"
    if block:
        form = block.get("completion_format") or "{completion}"
        known = ("field_prompt", "field_system", "prompt_format")
        entry.type = {name: block[name] for name in known if block.get(name)}
        for name in answers:
            entry.type[f"field_{name}"] = name
            entry.type[f"{name}_format"] = form.replace("{completion}", f"{{{name}}}")
    entries = [*cfg[key][:index], entry, *cfg[key][index + 1 :]]
    return DictDefault({**cfg, key: entries}), Dataset(InMemoryTable(pairs)), found


def _placed(made: Dataset, paired: PairedUp) -> Dataset:
    """Rows that name the user's rows they are from, and why those that are no pair are none."""
    names = made.column_names
    problems = [one or own for one, own in zip(paired.problems, made[PROBLEM], strict=True)]
    of_rejected = ["'rejected'" in one and "'chosen'" not in one for one in problems]
    rows = np.where(of_rejected, paired.rejected, paired.rows)
    ours = {ROW: rows, LABELLED: np.where(paired.rejected < 0, 1, 2)}
    made = made.remove_columns([*ours, PROBLEM])
    for name, values in {**ours, PROBLEM: problems}.items():
        made = made.add_column(name, values)
    return made.select_columns(names)


def _prompt_column(cfg: DictDefault, index: int, dataset: Dataset) -> tuple[str, Dataset]:
    """Which column has the prompt, and the dataset as the entry's strategy reads it."""
    entry, where = cfg[PROMPTS][index], f"{PROMPTS}[{index}]"
    names, kind = dataset.column_names, entry.type
    likely = next((one for one in ("prompt", "messages") if one in names), "prompt")
    column = str(entry.field_messages or likely)
    if isinstance(kind, dict):
        column = str(entry.field_messages or kind.get("field_prompt") or likely)
        entry.type = {**kind, "field_prompt": column}
    elif kind in MESSAGE_TYPES:
        entry.update({"type": "chat_template.default", "field_messages": column})
    elif kind not in (None, "passthrough.default"):
        return column, dataset  # whatever fields its strategy reads
    if column not in names:
        raise DataError(
            f"{where}.field_messages: {quoted(column)} is not in the data. It has "
            f"{', '.join(map(quoted, sorted(names)))}. Set field_messages to the prompt's column."
        )
    if isinstance(kind, dict) or kind in MESSAGE_TYPES:
        return column, dataset
    if kind is None and dataset.features[column] in TEXT:
        raise DataError(
            f"{where}.type: {quoted(column)} is text, and the first of `datasets` has no type "
            "that says how it is asked. Set type: chat_template.default to ask it as a message, or "
            "passthrough.default if it is rendered already."
        )
    entry.type = "passthrough.default"
    if column != "prompt" and "prompt" in names:
        dataset = dataset.remove_columns("prompt")
    return "prompt", dataset.rename_columns({column: "prompt"})


def strategy(
    cfg: DictDefault, key: str, index: int, single: bool = False
) -> tuple[Any, dict[str, Any]]:
    """What makes preference rows of a dataset's rows, and the options to map it with.

    `single` is of rows that have been single answers with a label.
    """
    entry = cfg[key][index]
    if single and str(entry.type).split(".")[0] in SINGLE_TYPES:
        return BothAnswers(_loaded(load_single, cfg, key, index)), {}
    kind = "user_defined.default" if isinstance(entry.type, dict) else entry.type
    if kind in MESSAGE_TYPES:
        names = handle_legacy_message_fields_logic(entry)["message_property_mappings"]
        known = entry.roles or {role: [role] for role in ("user", "assistant", "system", "tool")}
        reader = MessageReader(
            messages=MESSAGE_TYPES[kind] and (entry.field_messages or MESSAGE_TYPES[kind]),
            chosen=entry.field_chosen or "chosen",
            rejected=entry.field_rejected or "rejected",
            tools=entry.field_tools or "tools",
            names={"role": "role", "content": "content", **names},
            roles={source: role for role, sources in known.items() for source in sources},
        )
        return reader, {}
    loaded = _loaded(load_strategy, cfg, key, index)
    return loaded if isinstance(loaded, tuple) else (loaded, {})


def _loaded(load: Any, cfg: DictDefault, key: str, index: int) -> Any:
    """A strategy of the host, which reads its fields from `datasets`."""
    kind = cfg[key][index].type
    kind = "user_defined.default" if isinstance(kind, dict) else kind
    loaded = load(kind, DictDefault({**cfg, "datasets": cfg[key]}), dataset_idx=index)
    if loaded is None:
        raise DataError(
            f"{key}[{index}].type: {quoted(kind)} is not a strategy that the host can load for "
            "preference pairs; its log says why. Use chat_template.default, another one of "
            "axolotl.prompt_strategies.dpo, or a block of field names."
        )
    return loaded


def chat_template(cfg: DictDefault, entry: DictDefault, tokenizer: Any) -> ChatTemplate:
    """How a dataset's messages become text; its own `chat_template` goes before the run's."""
    text = None
    if entry.chat_template_jinja and not entry.chat_template:
        entry = DictDefault({**entry, "chat_template": "jinja"})
    if entry.chat_template or cfg.chat_template:
        text = get_chat_template_from_config(cfg, entry, tokenizer)
    return ChatTemplate(text, dict(cfg.chat_template_kwargs or {}))


def _say_unread(
    where: str, entry: DictDefault, dataset: Dataset, template: ChatTemplate, tokenizer: Any
) -> None:
    """Name keys of chat templates that do nothing for a dataset; DataError for its tools' column
    if that is not there."""
    if (tools := entry.field_tools) and tools not in dataset.column_names:
        names = ", ".join(map(quoted, sorted(dataset.column_names)))
        raise DataError(f"{where}.field_tools: {quoted(tools)} is not in the data. It has {names}.")
    if _is_text(entry.type, dataset):
        unread = [
            f"{where}.{key}" for key in ("chat_template", "chat_template_jinja") if entry[key]
        ]
        unread += [f"chat_template_kwargs.{key} for {where}" for key in template.kwargs]
        why = "its rows are text already, or its type writes the text"
    else:
        unread = [
            f"chat_template_kwargs.{key} for {where}"
            for key in template.kwargs
            if not template.reads(key, tokenizer)
        ]
        why = "the chat template has no such variable"
    if unread:
        LOG.warning(f"SeRA: no effect has {', '.join(unread)}: {why}.")


def _is_text(kind: Any, dataset: Dataset) -> bool:
    """Whether a dataset's rows become text without a chat template."""
    if isinstance(kind, dict) or str(kind).split(".")[0] in ("chatml", "llama3", "zephyr"):
        return True
    chosen = dataset.features.get("chosen")
    return kind in (None, "passthrough.default") and chosen in TEXT


def _mapped(
    cfg: DictDefault, dataset: Dataset, transform: Any, tokenizer: Any, options: Mapping[str, Any]
) -> Dataset:
    """`Dataset.map` with the options of a strategy, as the host understands them."""
    if "tokenizer" in inspect.signature(transform).parameters:
        transform = partial(transform, tokenizer=tokenizer)
    removed = options.get("remove_columns") or ()
    columns = [name for name in dataset.column_names if removed == "__all__" or name in removed]
    return dataset.map(
        transform,
        num_proc=cfg.dataset_num_proc,
        load_from_cache_file=not cfg.is_preprocess,
        desc="Mapping RL Dataset",
        **{**options, "remove_columns": columns},
    )
