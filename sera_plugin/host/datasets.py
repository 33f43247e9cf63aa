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

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from axolotl.cli.args import PreprocessCliArgs
from axolotl.common.datasets import TrainDatasetMeta, sample_dataset
from axolotl.loaders import load_tokenizer
from axolotl.loaders.utils import load_model_config
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
from axolotl.utils.tokenization import check_dataset_labels
from datasets import Dataset
from transformers import HfArgumentParser, PretrainedConfig

from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import check_rows
from sera_plugin.data.files import DataError, check_loaded, edited_since, while_loading
from sera_plugin.data.rows import GUARD_VERSION, PROBLEM
from sera_plugin.data.text import TEXTS
from sera_plugin.host.reading import PROMPTS, transformed

LOG = logging.getLogger("axolotl.sera")


@dataclass
class Loaded(TrainDatasetMeta):
    """What the hook gives the host, and the prompts without answers, which it has no place for."""

    prompts: Dataset | None = None


def load_pairs(cfg: DictDefault) -> Loaded:
    """The pairs to train and to evaluate on, as text, in the order of training, and prompts.

    Raises:
        DataError: for a file, a strategy or a column that cannot be used, naming it.
        ValueError: for rows none of which can be used, or must not be dropped, naming them.
    """
    _hold_to_positions(cfg)
    tokenizer = load_tokenizer(cfg)
    train, held_out, prompts = _load(cfg, tokenizer)
    for name, rows in (("train", train), ("eval", held_out), ("prompt", prompts)):
        if rows is not None:
            check_rows(rows, cfg, SeraConfig(**cfg.sera), name)
    if "--debug" in sys.argv:  # the hook is not given the command's arguments
        parser = HfArgumentParser(PreprocessCliArgs)
        args, _ = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        few, count = sample_dataset(train, args.debug_num_examples), args.debug_num_examples
        check_dataset_labels(few, tokenizer, count, args.debug_text_only, rl_mode=True)
    steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
    return Loaded(train, held_out, steps, prompts)


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
def _load(cfg: DictDefault, tokenizer: Any) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """All sets; of several processes the first prepares them and the others read its files."""

    def pairs() -> Any:
        train = _prepared(cfg, "datasets", tokenizer)
        if cfg.test_datasets:
            return train, _prepared(cfg, "test_datasets", tokenizer)
        if cfg.val_set_size:
            return create_train_validation_split(train, cfg, cfg.val_set_size)
        return hold_out(train, SeraConfig(**cfg.sera).pairs_held_out(len(train)), cfg.seed)

    def load() -> Any:
        named = with_prompts(cfg)
        return *pairs(), _prepared(named, PROMPTS, tokenizer) if named[PROMPTS] else None

    loader = FileLockLoader(cfg)
    try:
        train, held_out, prompts = loader.load(load)
    finally:
        loader.cleanup()
    return (*without_repeats(cfg, train, held_out), prompts)


#: What says how rows are read, which prompts have from the first of `datasets`.
_READING = ("roles", "message_property_mappings", "message_field_role", "message_field_content")
_TEMPLATE = ("chat_template", "chat_template_jinja")


def with_prompts(cfg: DictDefault) -> DictDefault:
    """The configuration with the entries of `sera.prompts` as it has others, each complete."""
    first, entries = cfg.datasets[0], []
    for entry in cfg.sera.get("prompts") or ():
        taken = [] if entry.get("type") else ["type", *_READING]
        taken += [] if any(map(entry.get, _TEMPLATE)) else _TEMPLATE
        found = {key: first[key] for key in taken if first[key]}
        if found.get("type") == "passthrough.default":
            del found["type"]  # says nothing of how text is asked
        entries.append(DictDefault({**found, **entry}))
    return DictDefault({**cfg, PROMPTS: entries})


def hold_out(train: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Set rows aside, drawn by `seed` until they are `count`; both keep the dataset's order.

    With a row go all others of its prompt, so that no prompt is in both parts; of pairs that all
    have one prompt rows are drawn.
    """
    if not count:
        return train, None
    drawn = np.random.default_rng((seed, len(train))).permutation(len(train))
    prompt = _prompts(train)
    first, sizes = np.full(prompt.max() + 1, len(train)), np.bincount(prompt)
    np.minimum.at(first, prompt, drawn)
    order = np.argsort(first)
    before = np.cumsum(sizes[order]) - sizes[order]
    aside = np.isin(prompt, order[before < count])
    return train.select(np.flatnonzero(~aside)), train.select(np.flatnonzero(aside))


def _prompts(rows: Dataset) -> npt.NDArray[np.int64]:
    """(N,) a number for each row that is that of its prompt; rows with a problem have their own."""
    numbers: dict[Any, int] = {}
    found: list[int] = []
    for batch in rows.select_columns(["prompt", PROBLEM]).with_format("arrow").iter(4_096):
        for text, problem in zip(*(one.to_pylist() for one in batch.columns), strict=True):
            digest = blake2b(text.encode(), digest_size=16).digest()
            found.append(numbers.setdefault(len(found) if problem else digest, len(numbers)))
    return np.array(found) if len(numbers) > 1 else np.arange(len(found))


def _prepared(cfg: DictDefault, key: str, tokenizer: Any) -> Dataset:
    """The merged rows of `datasets` or `test_datasets`, from disk where they are there already."""
    split = {"datasets": "train", "test_datasets": "test", PROMPTS: "prompts"}[key]
    # Prompts may be rows of a dataset whose pairs are prepared too.
    made_of = PROMPTS if key == PROMPTS else ""
    name = prepared_name(cfg, cfg[key], tokenizer.name_or_path, made_of)
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
        rows = [transformed(cfg, key, index, one, tokenizer) for index, one in enumerate(raw)]
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


def prepared_name(
    cfg: DictDefault, entries: Sequence[Any], tokenizer: str, made_of: str = ""
) -> str:
    """The directory of prepared rows below `dataset_prepared_path`."""
    name = generate_dataset_hash_from_config(cfg, entries, tokenizer)
    files = {str(one.get("chat_template_jinja")) for one in (cfg, *entries)}
    templates = [Path(one).read_text("utf-8") for one in sorted(files) if os.path.isfile(one)]
    name = md5(
        f"{name} sera {GUARD_VERSION} {cfg.sera['score_columns']} {templates or ''}{made_of}"
    )
    place = Path(get_prepared_dataset_path(cfg, name))
    edited = edited_since(entries, place, Path(cfg.output_dir or ""))
    return md5(f"{name} {edited}") if edited else name


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
