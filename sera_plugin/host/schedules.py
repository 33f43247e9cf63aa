"""Learning-rate schedules of few steps: an iteration has its own, and may be a single step long.

Facts are of axolotl 0.19, transformers 5.16 and torch 2.13.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sera_plugin.config.quoting import as_written, plain
from sera_plugin.host.given import number

LOG = logging.getLogger("axolotl.sera")

#: Those that transformers has no name for: torch's and the host's own.
ONE_CYCLE, REX = "one_cycle", "rex"
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
#: Shares of the peak and of the steps, and which schedules read them.
_RATIOS = {"cosine_min_lr_ratio": ("cosine", REX), "cosine_constant_lr_ratio": ("cosine",)}


def check_schedule(cfg: Mapping[str, Any]) -> None:
    """Make and follow the schedule of a YAML, for ten steps of nothing.

    Raises:
        ValueError: for a schedule that would fail once a model is loaded, or do nothing.
    """
    name, given = cfg.get("lr_scheduler") or "cosine", cfg.get("lr_scheduler_kwargs") or {}
    for key, readers in _RATIOS.items():
        value = cfg.get(key)
        if value is None:
            continue
        share = number(value)
        if share is None or not 0 <= share <= 1:
            raise ValueError(f"{key}: {as_written(value)} is not a share: set it from 0 to 1.")
        if name not in readers:
            raise ValueError(
                f"{key}: {as_written(value)} has no effect beside lr_scheduler: "
                f"{as_written(name)}. Remove it, or set lr_scheduler: cosine."
            )
    if not isinstance(name, str) or not isinstance(given, Mapping):
        return  # the host says so
    from transformers import SchedulerType

    names = [*(one.value for one in SchedulerType if one.value not in _BY_METRIC), ONE_CYCLE, REX]
    if name in _BY_METRIC:
        raise ValueError(
            f"lr_scheduler: {name} does not work here: it follows the loss on held-out pairs, "
            "whose reference is another one in each iteration. Set lr_scheduler to one of "
            f"{', '.join(names)}."
        )
    if name not in names:
        raise ValueError(
            f"lr_scheduler: {as_written(name)} is not a schedule. Set it to one of "
            f"{', '.join(names)}."
        )
    try:
        _follow(name, given)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler: {name} cannot be made with lr_scheduler_kwargs: {as_written(given)}: "
            f"{plain(str(error), 200)}. Set in lr_scheduler_kwargs what {name} takes."
        ) from error


def _follow(name: str, given: Mapping[str, Any]) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule: Any
    if name == REX:
        if given:
            raise TypeError("it takes none")
        return
    if name == ONE_CYCLE:
        keys: dict[str, Any] = {"pct_start": 0.3, "anneal_strategy": "cos", **given}
        make = torch.optim.lr_scheduler.OneCycleLR
        schedule = make(optimizer, max_lr=1e-4, total_steps=10, **keys)
    else:
        schedule = get_scheduler(name, optimizer, 1, 10, dict(given))
    for _ in range(10):
        optimizer.step()
        schedule.step()


@contextmanager
def room_to_warm_up(args: Any, steps: int) -> Iterator[None]:
    """Inside, the host's `args` warm up in fewer steps than a schedule has.

    Schedules divide by the steps that are left after it, torch's one-cycle also by those before
    the last of it: two are the fewest it takes.
    """
    asked = args.warmup_steps
    planned = args.get_warmup_steps(steps)
    warmup = min(planned, steps - 1)
    if args.alternate_lr_scheduler_type == ONE_CYCLE and warmup == 1:
        warmup = 2 if steps > 2 else 0
    if asked > 1 and warmup < planned:
        LOG.warning(
            f"SeRA: warmup_steps: {planned} leaves nothing of a schedule of {steps} steps; it "
            f"warms up in {warmup}."
        )
    args.warmup_steps = warmup
    try:
        yield
    finally:
        args.warmup_steps = asked
