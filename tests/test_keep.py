"""The policy that training leaves: which one is best, and that it is the one in output_dir."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from sera_plugin.algorithm.best import best_policy, held_out_figure
from sera_plugin.rundir.store import RunStore, read_json
from sera_plugin.tools.evaluation.models import find_models
from sera_plugin.tools.report.page import write_report
from tests.conftest import make_config, table, train_config


def scores(chosen, rejected, chosen_length=(2, 4), rejected_length=(1, 2)):
    logps = {"chosen_logp": np.array(chosen), "rejected_logp": np.array(rejected)}
    return logps | {"chosen_length": chosen_length, "rejected_length": rejected_length}


def test_the_figure_by_hand():
    """Margins 4 - (-2) = 6 and -8 - 4 = -12, times beta 1/2: 3 and -6."""
    initial, policy = scores([-10.0, -10.0], [-8.0, -8.0]), scores([-6.0, -18.0], [-10.0, -4.0])
    expected = -(math.log1p(math.exp(-3)) + math.log1p(math.exp(6))) / 2
    assert held_out_figure(initial, policy, 0.5) == pytest.approx(expected)
    assert held_out_figure(initial, initial, 0.5) == pytest.approx(-math.log(2))
    # 4 / 2 - (-2) / 1 = 4 and -8 / 4 - 4 / 2 = -4 per token.
    expected = -(math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    assert held_out_figure(initial, policy, 0.5, per_token=True) == pytest.approx(expected)
    # Without a reference -6 / 2 - (-10) / 1 = 7 and -18 / 4 - (-4) / 2 = -2.5.
    expected = -(math.log1p(math.exp(-3.5)) + math.log1p(math.exp(1.25))) / 2
    found = held_out_figure(initial, policy, 0.5, per_token=True, reference_free=True)
    assert found == pytest.approx(expected)
    # A margin whose exponential is no float.
    assert held_out_figure(initial, scores([-9e4] * 2, [0.0] * 2), 1.0) == pytest.approx(-89998.0)


def test_the_best_policy_is_a_trained_one_and_of_equal_ones_the_earliest():
    assert best_policy({0: -0.1, 1: -0.6, 2: -0.5, 3: -0.5}) == 2
    assert best_policy({3: -0.5, 1: -0.5}) == 1


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Five iterations of full fine-tuning in which theta_1 is the best."""
    directory = tmp_path_factory.mktemp("keep")
    config = make_config(world.directory, directory)
    config |= {"num_epochs": 5, "save_total_limit": 1, "early_stopping_patience": 4}
    config |= {"evals_per_epoch": None, "eval_steps": 3, "saves_per_epoch": None, "save_steps": 3}
    config["sera"] |= {"gamma": 0.0, "label_noise": 1.0}
    return config, train_config(config, directory)


def weights(directory: Path):
    return load_file(directory / "model.safetensors")


@pytest.mark.slow
def test_the_best_policy_is_left_and_all_can_be_found(whole):
    _, result = whole
    ending = read_json(result.run / "last/summary.json")
    assert (ending["policies"], ending["kept"]) == (5, 1)
    assert ending["figures"][0] == pytest.approx(-math.log(2))
    assert ending["figures"][1] == max(ending["figures"][1:])
    first = table(result.run, 1, "evaluation")
    assert ending["figures"][2] == held_out_figure(first, table(result.run, 3, "evaluation"), 0.2)
    assert ending["forwarded"]["score_evaluation"]["sequences"] == 2 * len(first["row"])
    # theta_3 and theta_4 are what a run cut off in iteration 5 needs; theta_2 is neither.
    kept = sorted(path.parent.name for path in result.run.glob("*/policy"))
    assert kept == ["iteration-01", "iteration-02", "iteration-04", "iteration-05", "last"]
    places = RunStore(result.output).policies()
    assert [path.parent.name for path in places[2:]] == ["iteration-03", "iteration-04",
                                                         "iteration-05", "last"]  # fmt: skip
    assert places[1] == result.output
    best = weights(result.run / "iteration-02/policy")
    assert_close(weights(result.output), best, rtol=0, atol=0)
    last = weights(result.output / "checkpoint-15")
    assert_close(weights(result.run / "last/policy"), last, rtol=0, atol=0)
    models = find_models([str(result.output)], iterations=True)
    assert [one.name for one in models] == ["out@0", "out", "out@3", "out@4", "out@5"]
    page = write_report(result.output).read_text()
    assert "theta_5" in page
    assert page.count("(kept)") == 1


@pytest.mark.slow
def test_a_finished_run_that_begins_again_keeps_what_the_key_says(whole, train, tmp_path):
    config, result = whole
    output = Path(shutil.copytree(result.output, tmp_path / "again"))
    (output / "model.safetensors").unlink()
    again = config | {"output_dir": str(output), "auto_resume_from_checkpoints": True}
    train(again)
    assert_close(weights(output), weights(result.output), rtol=0, atol=0)
    del again["early_stopping_patience"]
    train(again)
    assert_close(weights(output), weights(output / "checkpoint-15"), rtol=0, atol=0)
    assert not (output / "sera/last").exists()
    assert RunStore(output).policies()[5] == output


@pytest.mark.slow
def test_without_held_out_pairs_the_last_policy_is_kept(base_config, train, caplog):
    base_config |= {"num_epochs": 1, "test_datasets": None, "evals_per_epoch": None}
    base_config["sera"]["keep"] = "best"
    result = train(base_config)
    assert "best needs held-out pairs: set val_set_size or test_datasets" in caplog.text
    assert not (result.run / "last").exists()
