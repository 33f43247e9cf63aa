"""The policy that training leaves: which one is best, and that it is the one in output_dir."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from sera_plugin.algorithm.best import best_policy, held_out_losses
from sera_plugin.host.ends import describe_done
from sera_plugin.rundir.format import read_json
from sera_plugin.rundir.store import RunStore
from sera_plugin.tools.evaluation.models import find_models
from sera_plugin.tools.report.page import write_report
from tests.conftest import make_config, table, train_config, with_an_early_best


def scores(chosen, rejected, chosen_length=(2, 4), rejected_length=(1, 2)):
    logps = {"chosen_logp": np.array(chosen), "rejected_logp": np.array(rejected)}
    return logps | {"chosen_length": chosen_length, "rejected_length": rejected_length}


def test_the_losses_by_hand():
    """Margins 4 - (-2) = 6 and -8 - 4 = -12, times beta 1/2: 3 and -6."""
    initial, policy = scores([-10.0, -10.0], [-8.0, -8.0]), scores([-6.0, -18.0], [-10.0, -4.0])

    def losses(*margins):
        return pytest.approx([math.log1p(math.exp(-margin)) for margin in margins])

    assert held_out_losses(initial, policy, 0.5) == losses(3, -6)
    assert held_out_losses(initial, initial, 0.5) == losses(0, 0)
    # 4 / 2 - (-2) / 1 = 4 and -8 / 4 - 4 / 2 = -4 per token.
    assert held_out_losses(initial, policy, 0.5, per_token=True) == losses(2, -2)
    # Without a reference -6 / 2 - (-10) / 1 = 7 and -18 / 4 - (-4) / 2 = -2.5.
    found = held_out_losses(initial, policy, 0.5, per_token=True, reference_free=True)
    assert found == losses(3.5, -1.25)
    # A margin whose exponential is no float.
    found = held_out_losses(initial, scores([-9e4] * 2, [0.0] * 2), 1.0)
    assert found == pytest.approx([89998.0] * 2)


def test_an_earlier_policy_is_kept_only_if_it_is_clearly_better():
    """Of four pairs, the last policy is worse by 1, 1, 1 and g: with g = 0 the mean 3/4 is 3
    standard errors of 1/4, with g = -5 the mean -1/2 is none, with g = 9 the mean 3 is 1.5 of 2."""
    first = np.zeros(4)

    def last(g):
        return np.array([1.0, 1.0, 1.0, g])

    assert best_policy({0: first, 1: first, 2: last(0)}) == 1
    assert best_policy({1: first, 2: last(-5)}) == 2
    assert best_policy({1: first, 2: last(9)}) == 2
    # Mean 1 of 0, 0, 2, 2 is 1.73 standard errors: beyond 95 %, and not beyond 99 %.
    assert best_policy({1: first, 2: np.array([0.0, 0.0, 2.0, 2.0])}) == 2
    # A policy that has diverged is not kept if there is another.
    assert best_policy({1: last(0), 2: first + np.nan, 3: first + np.inf}) == 1
    assert best_policy({1: first + np.nan}) == 1
    # theta_0 is never kept, and one pair shows nothing.
    assert best_policy({0: first, 1: last(0)}) == 1
    assert best_policy({1: first[:1], 2: last(0)[:1]}) == 2
    # Beaten by the first one, not by the second: whose turn it is, the first one beats it too.
    assert best_policy({1: first, 2: last(0), 3: last(0)}) == 1
    assert best_policy({1: last(0), 2: first, 3: first}) == 3


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Five iterations of full fine-tuning in which theta_1 is the best."""
    directory = tmp_path_factory.mktemp("keep")
    config = make_config(world.directory, directory)
    config |= {"num_epochs": 5, "save_total_limit": 1, "early_stopping_patience": 4}
    config |= {"evals_per_epoch": None, "eval_steps": 3, "saves_per_epoch": None, "save_steps": 3}
    config["sera"]["gamma"] = 0.0
    config = with_an_early_best(config)
    del config["sera"]["keep"]  # which the patience implies
    return config, train_config(config, directory)


def weights(directory: Path):
    return load_file(directory / "model.safetensors")


@pytest.mark.slow
def test_the_best_policy_is_left_and_all_can_be_found(whole):
    _, result = whole
    ending = read_json(result.run / "last/summary.json")
    assert (ending["policies"], ending["kept"]) == (5, 1)
    means = ending["held_out_losses"]
    assert means[0] == pytest.approx(math.log(2))
    assert means[1] == min(means[1:])
    first = table(result.run, 1, "evaluation")
    assert means[2] == held_out_losses(first, table(result.run, 3, "evaluation"), 0.2).mean()
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
    assert '<th scope="row">after 5</th>' in page
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
    again["sera"] = config["sera"] | {"keep": "last"}
    train(again)
    assert_close(weights(output), weights(output / "checkpoint-15"), rtol=0, atol=0)
    assert not (output / "sera/last").exists()
    assert RunStore(output).policies()[5] == output


@pytest.mark.slow
def test_without_held_out_pairs_the_last_policy_is_kept(base_config, train):
    base_config |= {"num_epochs": 1, "test_datasets": None, "evals_per_epoch": None}
    base_config["sera"] |= {"keep": "best", "held_out": 0}
    result = train(base_config)
    said = "best needs held-out pairs: set val_set_size, test_datasets or sera.held_out"
    assert said in describe_done(result.output, "sera.yaml", None)
    assert not (result.run / "last").exists()
