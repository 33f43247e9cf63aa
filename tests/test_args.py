"""The `sera:` block."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from sera_plugin.config.kinds import LABELERS, LOSSES, SELECTIONS
from sera_plugin.config.sera import SeraConfig


def test_defaults_are_the_papers():
    config = SeraConfig()
    assert (config.selection_ratio, config.bootstrap_ratio, config.gamma) == (0.7, 0.3, 0.3)
    assert (config.candidates, config.temperature, config.top_p) == (4, 0.7, 0.95)
    assert config.loss == "dpo"
    assert (LOSSES["dpo"].beta, LOSSES["slic"].beta, LOSSES["ipo"].beta) == (0.2, 0.2, 1.0)


@pytest.mark.parametrize(
    ("ratio", "candidates", "needed"),
    [(0, 4, 1), (1.1, 4, 2), (3.0, 4, 3), (2.1, 4, 3), (1.5, 3, 2)],
)
def test_too_few_candidates_say_which_number_to_raise(ratio, candidates, needed):
    assert SeraConfig(bootstrap_ratio=ratio, candidates=2 * needed).pairs_per_prompt == needed
    if candidates < 2 * needed:
        said = (
            f"bootstrap_ratio: {ratio} needs {needed} pairs per prompt.*Raise candidates to "
            f"{2 * needed}.*lower bootstrap_ratio to {candidates // 2}"
        )
        with pytest.raises(ValidationError, match=f"(?s){said}"):
            SeraConfig(bootstrap_ratio=ratio, candidates=candidates)
    assert SeraConfig(bootstrap_ratio=candidates // 2, candidates=candidates)


@pytest.mark.parametrize("kinds", [LOSSES, SELECTIONS, LABELERS])
def test_every_kind_has_an_implementation(kinds):
    assert all(callable(kind.load()) for kind in kinds.values())


def test_a_block_is_frozen_and_dumping_and_parsing_it_again_changes_nothing():
    config = SeraConfig(bootstrap_ratio=2, score_columns=["score"], loss="simpo")
    assert SeraConfig(**config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.gamma = 0.5


@pytest.mark.parametrize("name", ["row", "prompt", "chosen", "rejected", "chosen_ids", "sera_row"])
def test_score_columns_are_none_of_the_pairs_own(name):
    with pytest.raises(ValueError, match=rf"score_columns: '{name}' is what the pairs"):
        SeraConfig(score_columns=["score", name])


def test_configuration_files_and_method_load_no_heavy_library():
    modules = "config.sera, sera_plugin.cli, sera_plugin.tools.demo, sera_plugin.rundir.store"
    code = (
        f"import sys, sera_plugin.{modules}, sera_plugin.algorithm.algorithm\n"
        "print(sorted({'torch', 'trl', 'transformers', 'axolotl', 'vllm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.decode().strip() == "[]"
