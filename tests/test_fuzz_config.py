"""Malformed configurations by the thousand: each is refused in words of ours, or understood.

What is accepted must be what an oracle allows; nothing but our `ValueError` may escape.
"""

import copy
import datetime
import json
import math
from collections.abc import Callable
from operator import not_
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_plugin import SeraPlugin
from sera_plugin.config.sera import SeraConfig
from tests.test_fuzz import nested, put
from tests.test_plugin_config import config

NUMBERS = [math.nan, math.inf, -math.inf, -1, -0.5, 0, 10**400, 1e300, True, False]
TEXTS = ["", " ", "three", "nan", "\ud800", "a\0b", "\u202eabc\ufeff", "x" * 5000, b"\xff\xfe"]
DATES = [datetime.date(2025, 1, 1), datetime.datetime(2025, 1, 1, 12)]
LISTS: list[Any] = [[], [None], [[]], ["x", 1], {"x", "y"}, (1, 2), nested(150), object()]
BLOCKS: list[Any] = [{}, {"a": {"b": []}}, {1: 2}, {None: None}, {b"k": 1}]
JUNK: list[Any] = [*NUMBERS, *TEXTS, *DATES, *LISTS, *BLOCKS]


def _between(low: float, high: float, above: bool = False) -> Callable[[Any], bool]:
    def inside(value: Any) -> bool:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            return False
        return (low < number if above else low <= number) and number <= high

    return inside


def _switch(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))


def _path(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


#: Strings among the junk that can name a directory.
DIRECTORIES = ("", " ", "three", "nan", "\u202eabc\ufeff")
#: Where junk goes -> which of it is no junk there.
PLACES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("sera", "vllm"), lambda v: v == {}),
    **dict.fromkeys(("sera.selection_ratio", "sera.gamma"), _between(0, 1)),
    "sera.bootstrap_ratio": _between(0, 32),
    "sera.temperature": _between(0, 10, above=True),
    "sera.top_p": _between(0, 1, above=True),
    **dict.fromkeys(("sera.restart_optimizer", "sera.keep_policies"), _switch),
    "sera.score_columns": lambda v: v == [] or isinstance(v, set),
    "sera.servers": lambda v: v == [],
    "output_dir": lambda v: v is None or (isinstance(v, str) and v in DIRECTORIES),
    **dict.fromkeys(("rl_beta", "trl.beta"), lambda v: v == 1e300),
    "trl": lambda v: isinstance(v, dict),
    **dict.fromkeys(("dpo_label_smoothing", "context_parallel_size"), not_),
    **dict.fromkeys(("max_steps", "streaming", "relora"), not_),
    **dict.fromkeys(("datasets.0.path", "test_datasets.0.path"), _path),
    "datasets.0.type": lambda v: (isinstance(v, str) and bool(v.strip())) or v == {},
    "datasets.0.type.field_prompt": lambda v: isinstance(v, str),
    "datasets.0.name": lambda v: not isinstance(v, (list, tuple)),
}
#: Where none of it is.
NEVER = """
    sera.loss sera.ipo_reduction sera.candidates sera.max_new_tokens sera.sampler
    sera.vllm_python sera.bad_rows sera.unknown rl num_epochs dpo_loss_type simpo_gamma
    cpo_alpha trainer_cls vllm.unknown datasets test_datasets datasets.0
"""
PLACES |= dict.fromkeys(NEVER.split(), lambda v: False)


def misplaced(place: str, value: Any) -> dict[str, Any]:
    """A configuration with this value there, everything else in order."""
    cfg = config(sera={}, trl={}, vllm={})
    cfg["test_datasets"] = copy.deepcopy(cfg["datasets"])
    if place.startswith("datasets.0.type."):
        cfg["datasets"][0]["type"] = {}
    path = tuple(int(key) if key.isdigit() else key for key in place.split("."))
    return put(cfg, path, value)


def refused(cfg: dict[str, Any]) -> str | None:
    """What `register` says, or None where it accepts; anything but a ValueError escapes."""
    try:
        SeraPlugin().register(cfg)
    except ValueError as error:
        if type(error) is not ValueError:
            raise  # one of somebody else's
        return str(error)
    if cfg.get("inference"):
        return None  # nothing is trained, and the block is not looked at
    resolved = SeraConfig(**cfg["sera"])
    json.dumps(resolved.model_dump(mode="json"), allow_nan=False)
    return None


def readable(message: str, *parts: str) -> None:
    """A message is one short line of plain characters that names what it is about."""
    assert message.isascii()
    assert message.isprintable()
    assert 20 < len(message) < 1000, message
    for part in parts:
        assert part in message, (part, message)


@pytest.mark.parametrize("place", PLACES)
def test_junk_anywhere_in_a_configuration_is_refused_in_words(place: str) -> None:
    for value in JUNK:
        message = refused(misplaced(place, value))
        if PLACES[place](value):
            assert message is None, (place, value, message)
            continue
        assert message is not None, (place, value)
        named = place if place.startswith(("sera.", "vllm.")) else place.split(".")[-1]
        readable(message, "datasets" if named == "0" else named)


plain_values = st.none() | st.booleans() | st.integers() | st.floats() | st.dates()
names = st.text(max_size=6) | st.integers() | st.none()
yaml_values = st.recursive(
    plain_values | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
TOP = ["dpo_loss_type", "num_epochs", "gamma", "serra", "vllm", "trl", "datasets", "rl_beta"]


def block_of(keys: list[str]) -> st.SearchStrategy[dict[Any, Any]]:
    """Some of these keys, and some that nobody has."""
    key = st.sampled_from(keys) | st.text(max_size=12) | st.integers()
    return st.dictionaries(key, yaml_values, max_size=4)


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(keys=block_of(TOP), block=block_of(sorted(SeraConfig.model_fields)))
def test_any_block_and_any_keys_are_understood_or_refused_in_words(keys: Any, block: Any) -> None:
    message = refused({**config(), **keys, "sera": block})
    if message is not None:
        readable(message)
