"""What is compared: policies of a run, other models, and answers from a file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.rundir.checksums import SUMS, damage
from sera_plugin.rundir.format import AdapterConfig, BaseModelFile, Invalid, Keys, read_json
from sera_plugin.rundir.journal import key_of
from sera_plugin.rundir.store import RunStore
from sera_plugin.tools.report.output import shown_name
from sera_plugin.tools.report.reading import cached_file, find_run

#: Files that decide what a model answers.
_DECIDING = re.compile(r".*\.(safetensors|json|jinja|model)")


@dataclass(frozen=True)
class Model:
    """Something that answers prompts: weights, perhaps with an adapter, or a file of answers."""

    name: str  # for people; no two that are compared have the same, nor the same `file`
    source: str  # what the command line calls it
    weights: str = ""  # a directory
    adapter: Path | None = None
    end_ids: tuple[int, ...] = ()  # end an answer beside the model's own, as the run knows them
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of the run's YAML
    answers: Path | None = None
    policy: "tuple[RunStore, int] | None" = field(default=None, compare=False)  # theta_p of a run

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
        asked: list[Any] = [dict(self.template_kwargs)] if self.template_kwargs else []
        asked += [list(self.end_ids)] if self.end_ids else []
        return key_of(_state(Path(self.weights)), self.adapter and _state(self.adapter), *asked)


def _state(directory: Path) -> Any:
    """What is in a directory: by its checksums where it has them, else by sizes and times."""
    if (directory / SUMS).is_file():
        return (directory / SUMS).read_text(encoding="utf-8")
    files = [path for path in sorted(directory.iterdir()) if _DECIDING.fullmatch(path.name)]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def find_models(specs: Sequence[str], iterations: bool = False) -> list[Model]:
    """The models that the command line names (docs/eval.md), the baseline first.

    A run alone is compared with the policy it started from; with `iterations`, every run has all
    of its policies, the first of them first. A ValueError names what is not there or damaged, or
    says that fewer than two are left.
    """
    found: list[Model] = []
    for spec in specs:
        try:
            store = find_run(Path(spec))
        except ValueError:
            found.append(_other(spec))
            continue
        places = store.policies()
        kept = places.index(store.root.parent)
        numbers = [kept] if len(specs) > 1 else [0, kept]
        if iterations:
            numbers = [0, *(p for p, place in enumerate(places) if p and place.exists())]
        found += [policy_of(store, spec, number) for number in numbers]
    distinct = {(one.weights, one.adapter, one.answers): one for one in found}.values()
    if len(distinct) < 2:
        raise ValueError(
            f"{specs[0]} would be compared with itself alone. Give another model, run or file of "
            "answers to compare it with; the first one is the baseline."
        )
    # Each has a name and a file of its own: numbered where they would be the same.
    named: dict[str, Model] = {}
    for model in distinct:
        unique, number = model, 2
        while unique.file in named:
            unique, number = replace(model, name=f"{model.name}-{number}"), number + 1
        named[unique.file] = unique
    return list(named.values())


def _other(spec: str) -> Model:
    path = Path(spec)
    theta = re.fullmatch(r"(.+)@(\d+)", spec)
    if theta and not path.exists():
        return policy_of(find_run(Path(theta[1])), theta[1], int(theta[2]))
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
        return Model(shown_name(path.stem), spec, answers=path)
    if path.is_dir():
        place = path.resolve()
        name = place.parent.name if place.name == "policy" else place.name
        return _directory(path, shown_name(name), spec)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith("."):
        return Model(spec.split("/")[-1], spec, weights=_cached(spec))
    raise ValueError(
        f"{quoted(spec)} is neither a run, a model directory, a file of answers nor the name of a "
        "model."
    )


def _cached(name: str) -> str:
    """The snapshot of a hub model in the local cache."""
    config = cached_file(name, "config.json")
    if config is None:
        raise ValueError(
            f"{name} is neither a directory nor in the local hub cache, and nothing is downloaded "
            "here. Relative paths start in the working directory; a model of the hub is fetched "
            "with `hf download`."
        )
    return str(config.parent)


def _directory(path: Path, name: str, spec: str, base: str | None = None) -> Model:
    """A model or an adapter on disk; the run may say what its adapter's base model is."""
    adapter = None
    if (path / "adapter_config.json").is_file():
        if not (path / "adapter_model.safetensors").is_file():
            raise ValueError(f"{path} has no adapter_model.safetensors. Restore it from a copy.")
        adapter = path
        base = base or _base_in(
            path / "adapter_config.json", AdapterConfig, "base_model_name_or_path"
        )
    elif (path / "base_model.json").is_file():
        base = _base_in(path / "base_model.json", BaseModelFile, "base_model")
    elif (path / "config.json").is_file() and list(path.glob("*.safetensors")):
        return Model(name, spec, str(path))
    else:
        raise ValueError(
            f"{path} holds no model: neither config.json with *.safetensors, nor "
            "adapter_config.json with adapter_model.safetensors."
        )
    try:
        weights = str(base) if Path(str(base)).is_dir() else _cached(str(base))
    except ValueError as error:
        raise ValueError(f"{path} stands on {base}: {error}") from None
    return Model(name, spec, weights, adapter)


def _base_in(path: Path, kind: type[Keys], key: str) -> str:
    """The base model that a file of a policy names; ValueError if it names none."""
    try:
        return str(read_json(path, kind)[key])
    except Invalid as error:
        raise ValueError(f"{path} cannot be used: {error}.") from None


def policy_of(store: RunStore, spec: str, number: int) -> Model:
    """theta_number of a run, whose output_dir is `spec`; a ValueError if it is not there."""
    description, places = store.description() or {}, store.policies()
    output_dir, last = store.root.parent, len(places) - 1
    if not 0 <= number <= last:
        raise ValueError(f"{spec}@{number}: the run has the policies 0 to {last}.")
    name, directory = shown_name(output_dir.resolve().name), places[number]
    if directory == output_dir:
        # Ctrl-C has the host save a policy that is still in training.
        begun = max((t for t in range(1, last + 1) if store.iteration(t).is_dir()), default=1)
        trained = "train" in store.summary(begun).get("seconds", {})
        if not trained or not any(directory.glob("*.safetensors")):
            raise ValueError(
                f"{spec} has not finished: iteration {begun} is not trained to its end, or "
                f"{directory} has no weights. {spec}@t is its policy after t iterations."
            )
    else:
        name = f"{name}@{number}"
        problem = damage(directory)
        if problem is not None:
            raise ValueError(
                f"{spec}@{number} is in {directory}, but {problem}. Whole weights of earlier "
                "iterations are kept with sera.keep_policies: true."
            )
    config = description["config"]
    model = _directory(directory, name, f"{spec}@{number}", config["base_model"])
    kwargs = config.get("chat_template_kwargs") or {}
    ends = tuple(description.get("end_ids", ()))
    return replace(model, end_ids=ends, template_kwargs=kwargs, policy=(store, number))
