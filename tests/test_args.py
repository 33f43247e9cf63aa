"""The `sera:` block."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product

import pytest
from pydantic import ValidationError

from sera_plugin.config.kinds import LABELERS, LOSSES, SELECTIONS
from sera_plugin.config.sera import SeraArgs, SeraConfig

NAN = math.nan


def test_defaults_are_the_papers():
    config = SeraConfig()
    assert (config.selection_ratio, config.bootstrap_ratio, config.gamma) == (0.7, 0.3, 0.3)
    assert (config.candidates, config.temperature, config.top_p) == (4, 0.7, 0.95)
    assert config.loss == "dpo"
    assert (LOSSES["dpo"].beta, LOSSES["slic"].beta, LOSSES["ipo"].beta) == (0.2, 0.2, 1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("selection_ratio", 1.1),
        ("selection_ratio", -0.1),
        ("bootstrap_ratio", -1),
        ("gamma", 2),
        ("candidates", 1),
        ("temperature", 0),
        ("top_p", 0),
        ("max_new_tokens", 0),
        ("loss", "kto"),
        ("sampler", "magic"),
        ("selecton_ratio", 0.7),
        ("ipo_reduction", "sum"),  # of another loss
        *product(["selection_ratio", "bootstrap_ratio", "gamma", "temperature"], [NAN, math.inf]),
    ],
)
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ValidationError, match=key):
        SeraConfig(**{key: value})
    assert SeraArgs().sera is None
    with pytest.raises(ValidationError, match=key):
        SeraArgs(sera={key: value})


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValidationError, match="nothing to train on"):
        SeraConfig(selection_ratio=0, bootstrap_ratio=0)


@pytest.mark.parametrize(("ratio", "pairs"), [(0, 1), (1.0, 1), (1.1, 2), (2.0, 2)])
def test_pairs_per_prompt_follow_the_ratio(ratio, pairs):
    assert SeraConfig(bootstrap_ratio=ratio).pairs_per_prompt == pairs


@pytest.mark.parametrize(("ratio", "candidates", "needed"), [(3.0, 4, 3), (2.1, 4, 3), (1.5, 3, 2)])
def test_too_few_candidates_say_which_number_to_raise(ratio, candidates, needed):
    said = (
        f"bootstrap_ratio: {ratio} needs {needed} pairs per prompt.*Raise candidates to "
        f"{2 * needed}.*lower bootstrap_ratio to {candidates // 2}"
    )
    with pytest.raises(ValidationError, match=f"(?s){said}"):
        SeraConfig(bootstrap_ratio=ratio, candidates=candidates)
    # Both remedies work.
    assert SeraConfig(bootstrap_ratio=ratio, candidates=2 * needed).pairs_per_prompt == needed
    assert SeraConfig(bootstrap_ratio=candidates // 2, candidates=candidates)


def test_the_block_cannot_change_after_parsing():
    with pytest.raises(ValidationError, match="frozen"):
        SeraConfig().gamma = 0.5


@pytest.mark.parametrize("kinds", [LOSSES, SELECTIONS, LABELERS])
def test_every_kind_has_an_implementation(kinds):
    assert all(callable(kind.load()) for kind in kinds.values())


def test_dumping_and_parsing_again_changes_nothing():
    config = SeraConfig(bootstrap_ratio=2, score_columns=["score"], loss="simpo")
    assert SeraConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    "name", ["row", "prompt", "chosen", "rejected", "chosen_ids", "sera_row", "sera_problem"]
)
def test_score_columns_are_none_of_the_pairs_own(name):
    with pytest.raises(ValueError, match=rf"score_columns: '{name}' is what the pairs"):
        SeraConfig(score_columns=["score", name])


@pytest.mark.parametrize(
    "modules",
    ["config.sera, sera_plugin.cli, sera_plugin.tools.demo", "rundir.store", "algorithm.algorithm"],
)
def test_configuration_files_and_method_load_no_heavy_library(modules):
    code = (
        f"import sys, sera_plugin.{modules}\n"
        "print(sorted({'torch', 'trl', 'transformers', 'axolotl', 'vllm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.decode().strip() == "[]"
