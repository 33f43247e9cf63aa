"""What is compared: policies of a run, other models, and answers from a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.rundir.checksums import SUMS, damage
from sera_plugin.rundir.journal import key_of
from sera_plugin.rundir.store import RunStore, read_json
from sera_plugin.tools.report.output import shown_name
from sera_plugin.tools.report.reading import find_run
from sera_plugin.tools.report.tokens import cached_file

#: Files that decide what a model answers.
_DECIDING = re.compile(r".*\.(safetensors|json|jinja|model)")


@dataclass(frozen=True)
class Model:
    """Something that answers prompts.

    Attributes:
        name: short, for people; no two that are compared have the same, nor the same `file`.
        source: what the command line calls it.
        weights: a directory with whole weights, or a model's name in the local hub cache.
        adapter: the directory of an adapter on these weights, or None.
        end_ids: tokens that end an answer beside the model's own, as the run knows them.
        answers: a file of answers, in place of all this.
    """

    name: str
    source: str
    weights: str = ""
    adapter: Path | None = None
    end_ids: tuple[int, ...] = ()
    answers: Path | None = None

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is: beside the adapter if it was saved there."""
        beside = self.adapter is not None and (self.adapter / "tokenizer.json").exists()
        return str(self.adapter) if beside else self.weights

    @property
    def file(self) -> str:
        """A file name for it: what its name has of letters, digits and `.@_-`."""
        return "".join(one if one.isalnum() or one in ".@_-" else "_" for one in self.name)

    @cached_property
    def identity(self) -> str:
        """A key that changes with the files that decide what it answers."""
        adapter = None if self.adapter is None else _state(self.adapter)
        return key_of(_state(Path(self.weights)), adapter)


def find_models(specs: Sequence[str], iterations: bool = False) -> list[Model]:
    """The models that the command line names, the baseline first.

    A run alone is compared with the policy it started from.

    Args:
        specs: `RUN` (a run's output_dir: its last policy), `RUN@t` (theta_t; 0 is what it started
            from), the directory of a model or of an adapter, a model's name in the local hub
            cache, or a .json or .jsonl file of answers.
        iterations: in place of a run's last policy all of its policies, the first of them first.

    Raises:
        ValueError: naming what is not there or damaged, or if fewer than two are left.
    """
    found: list[Model] = []
    for spec in specs:
        store = _run(Path(spec))
        if store is None:
            found.append(_other(spec))
        elif iterations:
            found += _policies(store, spec)
        else:
            alone = [0] if len(specs) == 1 else []
            found += [_policy(store, spec, number) for number in (*alone, _last(store))]
    distinct = list({(one.weights, one.adapter, one.answers): one for one in found}.values())
    if len(distinct) < 2:
        raise ValueError(
            f"{specs[0]} would be compared with itself alone. Give another model, run or file of "
            "answers to compare it with; the first one is the baseline."
        )
    return _named(distinct)


def _run(path: Path) -> RunStore | None:
    try:
        return find_run(path)
    except ValueError:
        return None


def _other(spec: str) -> Model:
    path = Path(spec)
    theta = re.fullmatch(r"(.+)@(\d+)", spec)
    if theta and not path.exists():
        store = find_run(Path(theta[1]))
        return _policy(store, theta[1], int(theta[2]))
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
        return Model(shown_name(path.stem), spec, answers=path)
    if path.is_dir():
        return _directory(path, spec)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith("."):
        return Model(spec.split("/")[-1], spec, weights=_cached(spec))
    raise ValueError(
        f"{quoted(spec)} is neither a run, a model directory, a file of answers nor the name of a "
        "model."
    )


def _cached(name: str) -> str:
    """The snapshot of a hub model in the local cache.

    Raises:
        ValueError: if it is not there.
    """
    config = cached_file(name, "config.json")
    if config is None:
        raise ValueError(
            f"{name} is neither a directory nor in the local hub cache, and nothing is downloaded "
            "here. Relative paths start in the working directory; a model of the hub is fetched "
            "with `hf download`."
        )
    return str(config.parent)


def _directory(path: Path, spec: str, base_model: str | None = None) -> Model:
    """A model or an adapter on disk.

    Args:
        path: the directory.
        spec: what the command line calls it.
        base_model: of an adapter, where the run says so.
    """
    place = path.resolve()
    name = shown_name(place.parent.name if place.name == "policy" else place.name)
    if (path / "adapter_config.json").is_file():
        if not (path / "adapter_model.safetensors").is_file():
            raise ValueError(f"{path} has no adapter_model.safetensors. Restore it from a copy.")
        base = base_model or read_json(path / "adapter_config.json")["base_model_name_or_path"]
        return Model(name, spec, _weights(str(base), path), adapter=path)
    pointer = path / "base_model.json"
    if pointer.is_file():
        return Model(name, spec, _weights(str(read_json(pointer)["base_model"]), path))
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise ValueError(
            f"{path} holds no model: neither config.json with *.safetensors, nor "
            "adapter_config.json with adapter_model.safetensors."
        )
    return Model(name, spec, str(path))


def _weights(base: str, named_by: Path) -> str:
    if Path(base).is_dir():
        return base
    try:
        return _cached(base)
    except ValueError as error:
        raise ValueError(f"{named_by} stands on {base}: {error}") from None


def _last(store: RunStore) -> int:
    return int(_config(store)["num_epochs"])


def _config(store: RunStore) -> dict[str, Any]:
    config: dict[str, Any] = (store.description() or {})["config"]
    return config


def _policies(store: RunStore, spec: str) -> list[Model]:
    """theta_0 and all later ones that are there."""
    numbers = [0]
    for number in range(1, _last(store) + 1):
        last = number == _last(store)
        if last or store.policy(number + 1).exists():
            numbers.append(number)
    return [_policy(store, spec, number) for number in numbers]


def _policy(store: RunStore, spec: str, number: int) -> Model:
    """theta_number of a run."""
    last, config = _last(store), _config(store)
    if not 0 <= number <= last:
        raise ValueError(f"{spec}@{number}: the run has the policies 0 to {last}.")
    if number == last:
        directory = store.root.parent
        # Ctrl-C has the host save a policy that is still in training; early stopping ends it before
        # the last iteration.
        begun = max((t for t in range(1, last + 1) if store.iteration(t).is_dir()), default=1)
        trained = "train" in store.summary(begun).get("seconds", {})
        if not trained or not any(directory.glob("*.safetensors")):
            raise ValueError(
                f"{spec} has not finished: iteration {begun} is not trained to its end, or "
                f"{directory} has no weights. {spec}@t is its policy after t iterations."
            )
    else:
        directory = store.policy(number + 1)
        problem = damage(directory)
        if problem is not None:
            raise ValueError(
                f"{spec}@{number} is in {directory}, but {problem}. Whole weights of earlier "
                "iterations are kept with sera.keep_policies: true."
            )
    model = _directory(directory, spec, config["base_model"])
    end_ids = tuple((store.description() or {}).get("end_ids") or ())
    name = shown_name(store.root.parent.resolve().name)
    label = name if number == last else f"{name}@{number}"
    return replace(model, name=label, source=f"{spec}@{number}", end_ids=end_ids)


def _named(models: Iterable[Model]) -> list[Model]:
    """Each with a name and a file of its own: numbered where they would be the same."""
    taken: set[str] = set()
    named = []
    for model in models:
        unique, number = model, 2
        while unique.file in taken:
            unique, number = replace(model, name=f"{model.name}-{number}"), number + 1
        taken.add(unique.file)
        named.append(unique)
    return named


def _state(directory: Path) -> Any:
    """What is in a directory: by its checksums where it has them, else by sizes and times."""
    if (directory / SUMS).is_file():
        return (directory / SUMS).read_text(encoding="utf-8")
    files = [path for path in sorted(directory.iterdir()) if _DECIDING.fullmatch(path.name)]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
