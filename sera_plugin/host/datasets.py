"""The run's pairs, for the public hook `load_datasets`: loaded, transformed, merged and kept.

The steps and their order are those of `axolotl.utils.data.rl` (axolotl 0.19), and each is the
host's own public function. What differs from the host's loading:

- A file that cannot be loaded is named, with the line.
- Rows are transformed by `GuardedTransform`, so that a bad one is named by its file and its place.
- Held-out rows are read as `test_datasets` says; the host reads the fields of `datasets` for them.
- Rows keep their length here. `sequence_len` is compared with the exact tokens, later and once.
- Two pairs are equal for `dataset_exact_deduplication` when they read the same.
- Prepared data is not taken for that of another `rl`, of a file edited since, or of an older guard.
"""

import inspect
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from axolotl.cli.args import PreprocessCliArgs
from axolotl.common.datasets import TrainDatasetMeta, sample_dataset
from axolotl.loaders import load_tokenizer
from axolotl.loaders.utils import load_model_config
from axolotl.prompt_strategies.dpo import load as load_strategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.data.lock import FileLockLoader
from axolotl.utils.data.shared import (
    create_train_validation_split,
    generate_dataset_hash_from_config,
    get_prepared_dataset_path,
    load_dataset_with_config,
    load_preprocessed_dataset,
    merge_datasets,
    save_preprocessed_dataset,
    try_load_from_hub,
)
from axolotl.utils.data.utils import deduplicate_and_log_datasets, md5, retry_on_request_exceptions
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.utils import handle_legacy_message_fields_logic
from axolotl.utils.tokenization import check_dataset_labels
from datasets import Dataset, Features, Value
from transformers import HfArgumentParser, PretrainedConfig

from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.conversations import ChatTemplate, MessageReader
from sera_plugin.data.dataset import check_rows
from sera_plugin.data.files import DataError, check_loaded, edited_since, source_name, while_loading
from sera_plugin.data.rows import (
    ASIDE,
    GUARD_VERSION,
    PROBLEM,
    ROW,
    SOURCE,
    SYSTEM,
    GuardedTransform,
    as_it_is,
)
from sera_plugin.data.text import TEXTS
from sera_plugin.host.keys import MESSAGE_TYPES

LOG = logging.getLogger("axolotl.sera")


def load_pairs(cfg: DictDefault) -> TrainDatasetMeta:
    """The pairs to train and to evaluate on, as text, in the order of training.

    Raises:
        DataError: for a file, a strategy or a column that cannot be used, naming it.
        ValueError: for rows none of which can be used, or must not be dropped, naming them.
    """
    _hold_to_positions(cfg)
    tokenizer = load_tokenizer(cfg)
    train, held_out = _load(cfg, tokenizer)
    for name, rows in (("train", train), ("eval", held_out)):
        if rows is not None:
            check_rows(rows, cfg, SeraConfig(**cfg.sera), name)
    if "--debug" in sys.argv:  # the hook is not given the command's arguments
        parser = HfArgumentParser(PreprocessCliArgs)
        args, _ = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        few, count = sample_dataset(train, args.debug_num_examples), args.debug_num_examples
        check_dataset_labels(few, tokenizer, count, args.debug_text_only, rl_mode=True)
    steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
    return TrainDatasetMeta(train_dataset=train, eval_dataset=held_out, total_num_steps=steps)


def _hold_to_positions(cfg: DictDefault) -> None:
    """`sequence_len` is no more than the positions that a model has a vector for.

    Rotary and other computed positions go on beyond those that a config names; that is only said.
    """
    config = load_model_config(cfg)
    text = config.get_text_config() if isinstance(config, PretrainedConfig) else None
    positions, asked = getattr(text, "max_position_embeddings", None), cfg.sequence_len
    if not isinstance(positions, int) or positions < 1 or (asked and asked <= positions):
        return
    above = f"SeRA: sequence_len: {asked} is above the {positions} positions that base_model"
    if not getattr(text, "rope_parameters", None):
        cfg.sequence_len = positions
        LOG.warning(
            f"{above} has: longer rows do not fit, and samples end there, as if sequence_len were "
            f"{positions}."
        )
    elif asked:
        LOG.warning(
            f"{above} was made for (max_position_embeddings in its config.json). Longer rows are "
            f"trained and sampled where it has seen no text; set sequence_len to {positions}, or "
            "rope_parameters in overrides_of_model_config."
        )


@retry_on_request_exceptions(max_retries=3, delay=5)  # type: ignore[untyped-decorator]
def _load(cfg: DictDefault, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """Both sets; of several processes the first prepares them and the others read its files."""

    def load() -> Any:
        train = _prepared(cfg, "datasets", tokenizer)
        if cfg.test_datasets:
            return train, _prepared(cfg, "test_datasets", tokenizer)
        if cfg.val_set_size:
            return create_train_validation_split(train, cfg, cfg.val_set_size)
        return hold_out(train, SeraConfig(**cfg.sera).pairs_held_out(len(train)), cfg.seed)

    loader = FileLockLoader(cfg)
    try:
        train, held_out = loader.load(load)
    finally:
        loader.cleanup()
    return without_repeats(cfg, train, held_out)


def hold_out(train: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Set `count` rows aside, drawn by `seed`; both parts keep the dataset's order."""
    if not count:
        return train, None
    aside = np.random.default_rng((seed, len(train))).permutation(len(train)) < count
    return train.select(np.flatnonzero(~aside)), train.select(np.flatnonzero(aside))


def _prepared(cfg: DictDefault, key: str, tokenizer: Any) -> Dataset:
    """The merged rows of `datasets` or `test_datasets`, from disk where they are there already."""
    split = "train" if key == "datasets" else "test"
    name = prepared_name(cfg, cfg[key], tokenizer.name_or_path)
    prepared = try_load_from_hub(cfg, name, split) if cfg.push_dataset_to_hub else None
    if prepared is None:
        prepared = load_preprocessed_dataset(cfg, name)
    if prepared is not None:
        return prepared
    with while_loading(key):
        raw = []
        for index, entry in enumerate(cfg[key]):
            with while_loading(f"{key}[{index}]", entry.path):
                dataset = load_dataset_with_config(entry, cfg.hf_use_auth_token, streaming=False)
            raw.append(check_loaded(f"{key}[{index}]", entry.path, dataset))
        columns = {name for dataset in raw for name in dataset.column_names}
        missing = [name for name in cfg.sera["score_columns"] if name not in columns]
        if missing and key == "datasets":
            raise DataError(
                f"sera.score_columns: {', '.join(map(quoted, missing))} not in the data. It has "
                f"{', '.join(map(quoted, sorted(columns)))}."
            )
        rows = [_transformed(cfg, key, index, one, tokenizer) for index, one in enumerate(raw)]
        merged, _ = without_repeats(cfg, merge_datasets(rows, cfg))
        if not cfg.skip_prepare_dataset:
            _save(cfg, merged, name, split)
    return merged


def _save(cfg: DictDefault, dataset: Dataset, name: str, split: str) -> None:
    """Where the host would put it, and by itself: datasets 4.8 starts a process for each part, and
    each one imports all that this one has, which takes longer than writing."""
    if cfg.push_dataset_to_hub:
        return save_preprocessed_dataset(cfg, dataset, name, split)
    place, shards = get_prepared_dataset_path(cfg, name), cfg.num_dataset_shards_to_save
    return dataset.save_to_disk(str(place), num_shards=shards)


def prepared_name(cfg: DictDefault, entries: Sequence[Any], tokenizer: str) -> str:
    """The directory of prepared rows below `dataset_prepared_path`."""
    name = generate_dataset_hash_from_config(cfg, entries, tokenizer)
    files = {str(one.get("chat_template_jinja")) for one in (cfg, *entries)}
    templates = [Path(one).read_text("utf-8") for one in sorted(files) if os.path.isfile(one)]
    name = md5(f"{name} sera {GUARD_VERSION} {cfg.sera['score_columns']} {templates or ''}")
    place = Path(get_prepared_dataset_path(cfg, name))
    edited = edited_since(entries, place, Path(cfg.output_dir or ""))
    return md5(f"{name} {edited}") if edited else name


def _transformed(
    cfg: DictDefault, key: str, index: int, dataset: Dataset, tokenizer: Any
) -> Dataset:
    """A dataset's rows as text, each with its place and what is wrong with it."""
    entry = cfg[key][index]
    block = entry.type if isinstance(entry.type, dict) else {}
    transform, options = strategy(cfg, key, index)
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
    types = {name: Value("string") for name in (*TEXTS, PROBLEM, SOURCE, ASIDE)}
    types |= {ROW: Value("int64")} | {name: dataset.features[name] for name in kept}
    # Left to itself, `Dataset.map` keeps the type of a raw column of the same name, and text in
    # one of mixed types is read as JSON. Columns that nobody asked for could keep two datasets
    # from being merged.
    ours = {"with_indices": True, "remove_columns": "__all__", "features": Features(types)}
    return _mapped(cfg, dataset, guarded, tokenizer, {**options, **ours})


def strategy(cfg: DictDefault, key: str, index: int) -> tuple[Any, dict[str, Any]]:
    """What makes preference rows of a dataset's rows, and the options to map it with."""
    entry = cfg[key][index]
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
    # The strategy reads its fields from `datasets`.
    loaded = load_strategy(kind, DictDefault({**cfg, "datasets": cfg[key]}), dataset_idx=index)
    if loaded is None:
        raise DataError(
            f"{key}[{index}].type: {quoted(kind)} is not a strategy that the host can load for "
            "preference pairs; its log says why. Use chat_template.default, another one of "
            "axolotl.prompt_strategies.dpo, or a block of field names."
        )
    return loaded if isinstance(loaded, tuple) else (loaded, {})


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
    return kind in (None, "passthrough.default") and chosen in (
        Value("string"),
        Value("large_string"),
    )


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


def without_repeats(
    cfg: DictDefault, dataset: Dataset, held_out: Dataset | None = None
) -> tuple[Dataset, Dataset | None]:
    """Drop pairs that read like an earlier one, if `dataset_exact_deduplication` says so.

    Held-out pairs that read like one of the dataset's go as well.
    """
    if not cfg.dataset_exact_deduplication:
        return dataset, held_out
    other = None if held_out is None else _Pairs(held_out)
    return deduplicate_and_log_datasets(dataset=_Pairs(dataset), other_dataset=other)


class _Pairs:
    """A dataset as the host's deduplication should see it, which compares whole rows.

    Equal pairs stand in different places and may have different scores. Placeholders of bad rows
    stay whole: what is wrong with two rows may read the same, and both must be counted.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.select = dataset.select

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in self._dataset:
            yield row if row[PROBLEM] else {key: row[key] for key in TEXTS}
