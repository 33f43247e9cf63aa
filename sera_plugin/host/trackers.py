"""Samples to read in the trackers that the host logs to: a table for each iteration.

Into the run that the host has opened there, and never into a new one. A tracker that is not here
gets the figures alone, which the host logs.
"""

import logging
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from sera_plugin.algorithm.trust import SIDES
from sera_plugin.config.quoting import in_markdown, plain, printable
from sera_plugin.labeling.labelers import Conversation
from sera_plugin.rundir.tables import candidate_places, candidates_of
from sera_plugin.rundir.tokens import TokenColumn

LOG = logging.getLogger("axolotl.sera")

#: Pairs in a table, and characters of each text.
ROWS, CHARACTERS = 24, 2_000
HEAD = ["prompt", "best sample", "worst sample", "margin", "kept"]


class Sampled(NamedTuple):
    """A pair that was made of samples, as text."""

    prompt: str
    best: str
    worst: str
    margin: float
    kept: bool

    def shown(self, how: Callable[[str], str]) -> list[Any]:
        """A row of the table."""
        return [*map(how, self[:3]), round(self.margin, 4), "yes" if self.kept else "no"]


def sampled_pairs(trainer: Any, iteration: int) -> list[Sampled]:
    """`ROWS` of the iteration's sampled pairs, from the largest margin to the smallest."""
    store, loop = trainer.store, trainer.loop
    pairs, samples = store.read(iteration, "bootstrapped"), store.read(iteration, "candidates")
    if pairs is None or samples is None:
        return []
    prompts = loop.pairs.prompt_ids
    if loop.more_prompts is not None:  # rows go on from those of the pairs
        prompts = prompts.joined(TokenColumn(loop.more_prompts["prompt_ids"]))
    margin, kept = pairs["margin"].to_numpy(), pairs["selected"].to_numpy(zero_copy_only=False)
    order = np.argsort(-margin, kind="stable")
    few = order[np.linspace(0, len(order) - 1, min(ROWS, len(order))).round().astype(int)]
    places, answers = candidate_places(pairs, candidates_of(samples)), samples["token_ids"]
    tokens = TokenColumn(answers)
    talk, rows = Conversation(trainer.processing_class), pairs["row"].to_numpy()
    found = []
    for one in few:
        best, worst = (talk.answer(tokens[places[side][one]]) for side in SIDES)
        prompt = talk.question(prompts[rows[one]])
        found.append(Sampled(prompt, best, worst, float(margin[one]), bool(kept[one])))
    return found


def _as_text(text: str) -> str:
    lines = [printable(line) for line in text[:CHARACTERS].split("\n")]
    return "\n".join(lines) + (" [...]" if len(text) > CHARACTERS else "")


def _as_markdown(text: str) -> str:
    return in_markdown(text, CHARACTERS)


def _to_wandb(callback: Any, key: str, pairs: Sequence[Sampled], step: int) -> None:
    wandb = callback._wandb
    if wandb is not None and wandb.run is not None:
        table = wandb.Table(columns=HEAD, data=[pair.shown(_as_text) for pair in pairs])
        wandb.run.log({key: table, "train/global_step": step})


def _to_tensorboard(callback: Any, key: str, pairs: Sequence[Sampled], step: int) -> None:
    """Its text is Markdown."""
    if callback.tb_writer is not None:
        rows = [HEAD, ["---"] * len(HEAD), *(pair.shown(_as_markdown) for pair in pairs)]
        lines = (f"| {' | '.join(map(str, row))} |" for row in rows)
        callback.tb_writer.add_text(key, "\n".join(lines), step)


def _to_trackio(callback: Any, key: str, pairs: Sequence[Sampled], step: int) -> None:
    """A cell is Markdown."""
    trackio = callback._trackio
    if trackio.context_vars.current_run.get() is not None:
        table = trackio.Table(columns=HEAD, data=[pair.shown(_as_markdown) for pair in pairs])
        if hasattr(table.data, "columns"):  # trackio 0.19 has a frame, and ignores the argument
            table.data.columns = HEAD
        trackio.log({key: table, "train/global_step": step})


def _to_swanlab(callback: Any, key: str, pairs: Sequence[Sampled], step: int) -> None:
    swanlab = getattr(callback, "_swanlab", None) or getattr(callback, "swanlab", None)
    if swanlab is not None and swanlab.get_run() is not None:
        # What stands between these marks pyecharts writes as code.
        rows = [pair.shown(lambda text: _as_text(text).replace("--x", "-- x")) for pair in pairs]
        swanlab.log({key: swanlab.echarts.Table().add(HEAD, rows)}, step=step)


def _to_mlflow(callback: Any, key: str, pairs: Sequence[Sampled], step: int) -> None:
    mlflow = callback._ml_flow
    if mlflow.active_run() is not None:
        columns = zip(*(pair.shown(_as_text) for pair in pairs), strict=True)
        table = {name: list(values) for name, values in zip(HEAD, columns, strict=True)}
        mlflow.log_table(table, f"{key}.json")


#: By the callbacks that the host logs with.
_TRACKERS = {
    "WandbCallback": _to_wandb,
    "TensorBoardCallback": _to_tensorboard,
    "TrackioCallback": _to_trackio,
    "SwanLabCallback": _to_swanlab,
    "CustomSwanLabCallback": _to_swanlab,  # axolotl's own
    "MLflowCallback": _to_mlflow,
}


class SampleTables:
    """Logs an iteration's table to the trackers of a trainer; what fails is left out then."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._failed = trainer, set[str]()

    def log(self, iteration: int) -> None:
        """Log iteration t's; rank 0 does it, and nobody where no tracker is told."""
        callbacks = {type(one).__name__: one for one in self._trainer.callback_handler.callbacks}
        told = callbacks.keys() & _TRACKERS.keys() - self._failed
        if not told or not self._trainer.store.ranks.main:
            return
        key, step = f"sera/samples/iteration_{iteration}", self._trainer.state.global_step
        try:
            pairs = sampled_pairs(self._trainer, iteration)
        except Exception as error:  # a chat template may raise anything: training goes on
            self._fail(told, "the table of samples could not be made", error)
            return
        for name in sorted(told) if pairs else ():
            try:
                _TRACKERS[name](callbacks[name], key, pairs, step)
            except Exception as error:  # whatever a tracker raises: training goes on
                self._fail({name}, f"{name} has not taken the table of samples", error)

    def _fail(self, names: Set[str], what: str, error: Exception) -> None:
        self._failed |= names
        LOG.warning(
            f"SeRA: {what} ({type(error).__name__}: {plain(str(error), 200)}). Training goes on, "
            f"and no more of them are sent to {', '.join(sorted(names))}."
        )
