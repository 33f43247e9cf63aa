"""Every learning-rate schedule of the host's follows iterations of any length, or is refused."""

from types import SimpleNamespace

import pytest
import torch
from axolotl.core.builders.base import TrainerBuilderBase
from transformers import SchedulerType

from sera_plugin.host.epochs import UnequalEpochs
from sera_plugin.host.schedules import LOG
from sera_plugin.rundir.checksums import recorded_pairs
from sera_plugin.rundir.store import write_json
from tests.test_plugin_config import register

ASKED = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 1},
}
REFUSED = ("reduce_lr_on_plateau", "greedy")
NAMES = [*(one.value for one in SchedulerType if one.value not in REFUSED), "one_cycle", "rex"]
PEAK = 1e-3


class Args(SimpleNamespace):
    """The host's training arguments, as far as a schedule reads them."""

    def get_warmup_steps(self, steps):
        from transformers import TrainingArguments

        return TrainingArguments.get_warmup_steps(self, steps)


class Epochs(UnequalEpochs):
    """A trainer that has an optimizer and one iteration, and nothing else."""

    def __init__(self, args, steps):
        self.args, self.lr_scheduler = args, None
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=PEAK)
        self.config = SimpleNamespace(restart_optimizer=False)
        self.loop = SimpleNamespace(planned_steps=steps)


def rates(name, steps, warmup, **keys):
    """The learning rate of each step."""
    args = {"learning_rate": PEAK}
    cfg = SimpleNamespace(lr_scheduler=name, lr_scheduler_kwargs=ASKED.get(name))
    TrainerBuilderBase._configure_scheduler(SimpleNamespace(cfg=cfg), args)
    unset = ("alternate_lr_scheduler_type", "lr_quadratic_warmup", "cosine_min_lr_ratio")
    unset += ("cosine_constant_lr_ratio", "jagged_restart_steps")
    args = dict.fromkeys(unset) | args | {"warmup_steps": warmup} | keys
    trainer, found = Epochs(Args(**args), steps), []
    schedule = trainer.create_scheduler(99)
    assert trainer.args.warmup_steps == warmup
    for _ in range(steps):
        found.append(float(trainer.optimizer.param_groups[0]["lr"]))
        trainer.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_follows_an_iteration_of_any_length_with_any_warm_up(name):
    register(lr_scheduler=name, lr_scheduler_kwargs=ASKED.get(name))
    for steps in (1, 2, 3, 6):
        for warmup in (0, 0.03, 0.5, 0.9, 1.0, 2, 10):
            for ratio in {"cosine": (None, 0.1), "rex": (None, 0.1)}.get(name, (None,)):
                found = rates(name, steps, warmup, cosine_min_lr_ratio=ratio)
                assert len(found) == steps
                assert all(0 <= rate <= PEAK * 1.001 for rate in found)
                assert max(found) > PEAK / 30  # one-cycle begins at a 25th of it
                assert steps > 1 or found == [PEAK]


def test_warm_ups_that_do_not_fit_are_said(monkeypatch):
    said = []
    monkeypatch.setattr(LOG, "warning", said.append)
    assert rates("linear", 4, 2) == pytest.approx([0, PEAK / 2, PEAK, PEAK / 2])
    assert said == []
    assert rates("linear", 4, 9) == pytest.approx([0, PEAK / 3, 2 * PEAK / 3, PEAK])
    assert said == [
        "SeRA: warmup_steps: 9 leaves nothing of a schedule of 4 steps; it warms up in 3."
    ]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"lr_scheduler": "greedy"},
            "greedy does not work here: it follows the loss",
        ),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "whose reference is another one in each"),
        (
            {"lr_scheduler": "cosin"},
            "cosin is not a schedule. Set it to one of linear",
        ),
        ({"lr_scheduler": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler": "warmup_stable_decay"}, "'num_decay_steps'"),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-5"}},
            "cannot be made with lr_scheduler_kwargs",
        ),
        (
            {"lr_scheduler": "one_cycle", "lr_scheduler_kwargs": {"pct_start": 3}},
            "Expected float between 0 and 1 pct_start",
        ),
        ({"lr_scheduler": "one_cycle", "lr_scheduler_kwargs": {"max_lr": 3}}, "max_lr"),
        ({"lr_scheduler": "rex", "lr_scheduler_kwargs": {"min_lr": 3}}, "it takes none"),
        ({"lr_scheduler_kwargs": {"num_cycle": 3}}, "lr_scheduler: cosine cannot be made"),
        ({"cosine_min_lr_ratio": 1.5}, "cosine_min_lr_ratio: 1.5 is not a share"),
        (
            {"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1},
            "cosine_min_lr_ratio: 0.1 has no effect beside lr_scheduler: linear",
        ),
        (
            {"lr_scheduler": "rex", "cosine_constant_lr_ratio": 0.1},
            "cosine_constant_lr_ratio: 0.1 has no effect beside lr_scheduler: rex",
        ),
        ({"lr_quadratic_warmup": True}, "lr_quadratic_warmup: true does not work here"),
        ({"jagged_restart_steps": 5}, "jagged_restart_steps: 5 does not work here"),
    ],
)
def test_a_schedule_that_would_fail_or_do_nothing_is_refused(keys, words):
    with pytest.raises(ValueError, match=r"^(lr_|cosine_|jagged_)") as error:
        register(**keys)
    assert words in str(error.value)


@pytest.mark.parametrize("pairs", [[], 5, [None], [-1], "x"])
def test_a_checkpoint_that_does_not_say_how_long_iterations_are_is_named(tmp_path, pairs):
    write_json(tmp_path / "sera.json", {"pairs": [3, 4]})
    assert recorded_pairs(tmp_path) == (3, 4)
    write_json(tmp_path / "sera.json", {"pairs": pairs})
    with pytest.raises(ValueError, match=r"sera\.json cannot be used: pairs.* another checkpoint"):
        recorded_pairs(tmp_path)
