"""A run is continued with the base model it began with, and with no other."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sera_plugin.host.base import describe_base, require_same_base
from sera_plugin.rundir import checksums
from sera_plugin.rundir.store import RunStore, read_json, write_json
from tests.conftest import adapter, make_config, train_config

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"
FILES = (*SHARDS, INDEX, PICKLED)
CASES = 1250


def make_base(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for number, name in enumerate(FILES):
        (directory / name).write_bytes(random.Random(number).randbytes(200 + number))
    (directory / "config.json").write_text("{}")
    return directory


def content(directory: Path) -> dict[str, object]:
    """What makes the base what it is, found in another way than the code does."""
    found: dict[str, object] = {}
    for path in directory.iterdir():
        if path.name.endswith((".safetensors", ".json", ".bin")):
            found[path.name] = path.read_bytes() if path.is_file() else "no file"
    return found


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def swap(path: Path, rng: random.Random) -> None:
    other = path.with_name(rng.choice(FILES))
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def in_place_of(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def replaced(path: Path, _: random.Random) -> None:
        path.unlink()
        make(path)

    return replaced


def moved(path: Path) -> None:
    """A link to the same file elsewhere, as caches have them."""
    away = path.parent.parent / f"{path.parent.name}-{path.name}"
    shutil.copy(path.parent.parent / "base" / path.name, away)
    path.symlink_to(away)


def linked(path: Path) -> None:
    path.symlink_to(path.with_name("config.json"))


CHANGES: dict[str, Callable[[Path, random.Random], object]] = {
    "a bit": flip,
    "cut off": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "longer": lambda path, rng: path.write_bytes(path.read_bytes() + rng.randbytes(3)),
    "empty": lambda path, _: path.write_bytes(b""),
    "other content": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
    "swapped": swap,
    "missing": lambda path, _: path.unlink(),
    "renamed": lambda path, rng: path.rename(path.with_name(rng.choice(["x.safetensors", "y"]))),
    "one more": lambda path, rng: path.with_name(
        rng.choice(["z.safetensors", "z.bin", "z"])
    ).touch(),
    "written anew": lambda path, _: path.write_bytes(path.read_bytes()),
    "another time": lambda path, _: os.utime(path, (0, 0)),
    "a directory": in_place_of(Path.mkdir),
    "a pipe": in_place_of(os.mkfifo),
    "a link to itself": in_place_of(lambda path: path.symlink_to(path)),
    "a dangling link": in_place_of(lambda path: path.symlink_to("nowhere")),
    "a link to another file": in_place_of(linked),
    "a link to the same": in_place_of(moved),
    "not readable": lambda path, _: path.chmod(0),
}


@pytest.mark.parametrize("first", range(0, CASES, 250))
def test_each_change_is_noticed_by_name_or_is_none(tmp_path: Path, first: int) -> None:
    base = make_base(tmp_path / "base")
    earlier = json.loads(json.dumps(describe_base(str(base))))
    seen = set()
    for number in range(first, first + 250):
        rng, copy = random.Random(number), tmp_path / f"copy-{number}"
        shutil.copytree(base, copy)
        kinds = [list(CHANGES)[number % len(CHANGES)]]
        kinds += rng.sample(list(CHANGES), rng.choice([0, 0, 1]))
        touched = rng.sample(FILES, len(kinds))
        for kind, name in zip(kinds, touched, strict=True):
            if (copy / name).is_file():
                CHANGES[kind](copy / name, rng)
        before, after = content(base), {}
        refused = None
        try:
            require_same_base(earlier, str(copy), None, tmp_path / "run")
        except ValueError as error:
            refused = str(error)
        for path in copy.iterdir():
            if path.is_file():
                path.chmod(0o644)
        after = content(copy)
        differ = {
            name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
        }
        if refused is None:
            assert not differ, (number, kinds, touched)
            continue
        seen |= set(kinds)
        assert refused.startswith("base_model: "), number
        unreadable = "cannot be read: Permission denied" in refused
        assert "not readable" in kinds if unreadable else "another output_dir" in refused, number
        assert unreadable or any(name in refused for name in differ), (number, refused)
        shutil.rmtree(copy)
    assert len(seen) > 12


def test_what_is_kept_and_that_hashing_much_is_shown(tmp_path, monkeypatch, caplog) -> None:
    base = make_base(tmp_path / "base")
    found = describe_base(str(base))
    sizes = {**{name: 200 + number for number, name in enumerate(FILES)}, "config.json": 2}
    assert found == {
        "files": sizes,
        "sha256": {name: hashlib.sha256((base / name).read_bytes()).hexdigest() for name in sizes},
    }
    monkeypatch.setattr(checksums, "_MUCH", 201)
    with caplog.at_level("INFO", "axolotl.sera"):
        assert describe_base(str(base)) == found
    said = [record.getMessage() for record in caplog.records]
    large = [name for name, size in sorted(sizes.items()) if size > 200]
    assert said == [f"SeRA: checksum of {name}: {sizes[name]} bytes" for name in large]
    (empty := tmp_path / "empty").mkdir()
    assert describe_base(str(empty)) == {"files": {}, "sha256": {}}


DEEP = "shards/part-1.weights"


@pytest.mark.parametrize("name", [DEEP, PICKLED, INDEX, "config.json", "adapter_config.json"])
def test_whatever_makes_the_model_is_compared_byte_by_byte(tmp_path: Path, name: str) -> None:
    base = make_base(tmp_path / "base")
    (base / "shards").mkdir()
    (base / DEEP).write_bytes(b"weights")
    (base / "adapter_config.json").write_text('{"r": 8}')
    parts = {"a": DEEP, "b": "../outside", "c": "/etc/hostname", "d": SHARDS[0]}
    (base / INDEX).write_text(json.dumps({"weight_map": parts}))
    found = describe_base(str(base))
    assert found is not None
    assert {*found["files"]} == {*FILES, DEEP, "config.json", "adapter_config.json"}
    require_same_base(found, str(base), None, tmp_path / "run")
    content = (base / name).read_bytes()
    (base / name).write_bytes(content[:-2] + b"~}")
    with pytest.raises(ValueError, match=f"the checksum of {name} differs"):
        require_same_base(found, str(base), None, tmp_path / "run")
    (base / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        require_same_base(found, str(base), None, tmp_path / "run")


SUM = "0" * 64
MADE_UP: list[Any] = [
    *(5, [1], "x", {}, {"files": None, "sha256": {}}, {"files": {"a": "12"}, "sha256": {"a": SUM}}),
    *({"files": {"a": 1}, "sha256": {}}, {"files": {"a": 1}}, {"files": {"a": 1}, "sha256": 5}),
    {"files": {"a": 1}, "sha256": {"a": SUM, "b": SUM}},
    {"files": {"a": [1]}, "sha256": {"a": SUM}},
    {"files": {}, "revision": 5},
]


@pytest.mark.parametrize("weights", MADE_UP)
def test_what_could_not_be_compared_is_not_taken_for_the_same(tmp_path: Path, weights: Any) -> None:
    store = RunStore(tmp_path)
    content = {"format_version": 1, "config": {"num_epochs": 2}, "base_weights": weights}
    write_json(store.run_file, content)
    with pytest.raises(ValueError, match=r"run\.json is not what .* reads: base_weights"):
        store.description()


def test_of_a_model_of_the_hub_the_commit_counts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--model"

    def pull(commit: str, name: str = "main") -> Path:
        snapshot = cached / "snapshots" / commit
        if not snapshot.exists():
            make_base(snapshot)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / name).write_text(commit)
        return snapshot

    assert describe_base("org/model") is None
    assert describe_base("no name: of the hub") is None
    first, second = "1" * 40, "2" * 40
    snapshot = pull(first)
    earlier = describe_base("org/model")
    assert earlier is not None
    assert earlier["revision"] == first
    assert set(earlier["files"]) == {*FILES, "config.json"}
    require_same_base(earlier, "org/model", None, tmp_path / "run")
    (snapshot / "more.bin").write_bytes(b"1")  # which something else has fetched since
    require_same_base(earlier, "org/model", None, tmp_path / "run")
    pull(second)
    with pytest.raises(ValueError, match=f"revision is {second}.* set revision_of_model: {first}"):
        require_same_base(earlier, "org/model", None, tmp_path / "run")
    require_same_base(earlier, "org/model", first, tmp_path / "run")
    (snapshot / SHARDS[1]).write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} has 4 bytes, and had 201 bytes"):
        require_same_base(earlier, "org/model", first, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        pytest.param({}, 1e-3, id="full", marks=pytest.mark.nightly),
        pytest.param(adapter(), 1e-3, id="lora", marks=pytest.mark.nightly),
        pytest.param(adapter() | {"adapter": "qlora", "load_in_4bit": True}, 0.05, id="qlora"),
    ],
)
def test_noise_on_the_base_stops_a_run_that_is_continued(world, tmp_path, kind, noise) -> None:
    """Of log-probabilities it moves those of a 4-bit model by less than its kernels may."""
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    config = make_config(world.directory, tmp_path) | kind
    config |= {"base_model": str(base), "num_epochs": 1}
    train_config(config, tmp_path)
    [weights] = base.glob("*.safetensors")
    clean = weights.read_bytes()
    random_ = np.random.default_rng(0)
    noisy = {
        name: (one * (1 + noise * random_.standard_normal(one.shape))).astype(one.dtype)
        for name, one in load_file(weights).items()
    }
    save_file(noisy, weights, metadata={"format": "pt"})
    again = config | {"auto_resume_from_checkpoints": True}
    said = (
        r"is not the model that the run in .* began with: .*model\.safetensors.*another output_dir"
    )
    with pytest.raises(ValueError, match=said):
        train_config(again, tmp_path)
    run = Path(config["output_dir"]) / "sera/run.json"
    content = read_json(run)
    weights.write_bytes(clean)
    train_config(again, tmp_path)
    assert read_json(run) == content
    # A run of an earlier version is continued by what it has kept.
    new = ("base_weights", "run_id")
    write_json(run, {key: value for key, value in content.items() if key not in new})
    train_config(again, tmp_path)
    assert not {*new} & {*read_json(run)}
