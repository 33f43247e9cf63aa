"""What stands where a file is to be written, or may stand: links and pipes of somebody else's."""

import ast
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from sera_plugin.cli import sera
from sera_plugin.rundir import writing
from sera_plugin.rundir.checksums import (
    SUMS,
    add_file,
    damage,
    is_named_right,
    is_whole,
    replace_directory,
    replace_file,
    seal,
)
from sera_plugin.rundir.journal import Journal
from sera_plugin.rundir.store import RunStore, make_table, write_json, write_table
from sera_plugin.rundir.writing import (
    COMMAND,
    beside,
    make_directory,
    open_own,
    tidy,
    write_text,
)
from sera_plugin.sampling.child import Child
from sera_plugin.tools.convert.convert import Converted
from sera_plugin.tools.demo.run import trained

PACKAGE = Path(__file__).parents[1] / "sera_plugin"
TABLE = make_table({"row": [1, 2]})
MINE = "a text of the user's\n"


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    """Opening a pipe without `O_NONBLOCK` waits for the other end for ever."""

    def over(*_: object) -> None:
        raise TimeoutError("something waits for a pipe")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def plant(kind: str, path: Path, target: Path) -> None:
    """Somebody has put this at a place where a file will be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "link":
            path.symlink_to(target)
        case "dangling link":
            path.symlink_to(target.parent / "nothing")
        case "link to a directory":
            path.symlink_to(target.parent)
        case "hard link":
            os.link(target, path)
        case "pipe":
            os.mkfifo(path)


KINDS = ["link", "dangling link", "link to a directory", "hard link", "pipe"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file of the user's in a directory of the user's."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_text(MINE)
    return tmp_path / "theirs/file"


def untouched(target: Path) -> bool:
    return target.read_text() == MINE and os.listdir(target.parent) == ["file"]


def into(path: Path) -> None:
    (path / "weights").write_text("w")


#: Each writer that renames into place, and what it writes.
WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file with a checksum": ("a.bin", lambda p: replace_file(p, lambda q: q.write_text("x"))),
    "JSON": ("run.json", lambda p: write_json(p, {"a": 1})),
    "a table": ("offline.parquet", lambda p: write_table(p, TABLE)),
    "a list of checksums": (SUMS, lambda p: replace_file(p.parent / "b", into_text)),
    "a list of a directory": (SUMS, lambda p: seal(p.parent)),
    "a directory": ("policy", lambda p: replace_directory(p, into)),
    "a report, an evaluation or an export": ("x.html", lambda p: write_text(p, "x")),
}


def into_text(path: Path) -> None:
    path.write_text("x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_stands_at_the_place_is_replaced_and_not_followed(
    tmp_path: Path, target: Path, writer: str, kind: str
) -> None:
    name, write = WRITERS[writer]
    place = tmp_path / "run" / name
    plant(kind, place, target)
    for guessed in {f".{name}.partial", f".{SUMS}.partial", f".{name}.sera-aaaaaaaa.partial"}:
        plant(kind, place.with_name(guessed), target)
    write(place)
    assert untouched(target)
    assert not place.is_symlink()
    assert place.is_dir() if name == "policy" else place.is_file()
    assert name != "policy" or damage(place) is None
    assert name in (SUMS, "policy", "x.html") or is_whole(place)


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_a_chunk_follows_nothing_and_a_pipe_among_them_is_no_chunk(
    tmp_path: Path, target: Path, kind: str
) -> None:
    add_file(tmp_path / "first", "000-000000.parquet", lambda path: path.write_text("x"))
    (name,) = os.listdir(tmp_path / "first")
    store = RunStore(tmp_path)
    plant(kind, store.samples(2) / name, target)
    add_file(store.samples(2), "000-000000.parquet", lambda path: path.write_text("x"))
    assert (store.samples(2) / name).read_text() == "x"
    plant(kind, planted := store.samples(3) / "000-000001-0123456789abcdef.parquet", target)
    assert not is_named_right(planted)
    assert list(store.chunks(3)) == []
    assert untouched(target)


@pytest.mark.parametrize("kind", KINDS)
def test_what_grows_in_its_place_is_refused_where_it_is_not_ours(
    tmp_path: Path, target: Path, kind: str
) -> None:
    run = tmp_path / "run"
    places = ("judge.jsonl", "sera/lock", "vllm.log", "plain-dpo.log", "late.jsonl")
    late = Journal(run / "late.jsonl")  # planted after it was looked for
    for name in places:
        plant(kind, run / name, target)
    (run / "plain-dpo.yaml").symlink_to(target)

    def demo() -> None:
        with trained([{"output_dir": str(run / "plain-dpo")}]):
            pytest.fail("it has started")

    for name, opens in {
        "judge.jsonl": lambda: Journal(run / "judge.jsonl"),
        "late.jsonl": lambda: late.add("key", {}),
        "lock": RunStore(run).lock,
        "vllm.log": lambda: Child([sys.executable, "-c", ""], {}, run / "vllm.log"),
        "plain-dpo.log": demo,
    }.items():
        with pytest.raises(ValueError, match=rf"{name} is not opened: it is .*Move it away"):
            opens()
    assert untouched(target)
    assert not (run / "plain-dpo.yaml").is_symlink()


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "a directory"])
def test_a_directory_in_the_way_of_a_file_is_named_and_kept(tmp_path: Path, writer: str) -> None:
    name, write = WRITERS[writer]
    mine = tmp_path / "run" / name / "mine"
    mine.mkdir(parents=True)
    then = "same command again" if name == "x.html" else "auto_resume_from_checkpoints"
    said = rf"run/{name} is not what belongs there: Is a directory. Move it away, then .*{then}"
    with pytest.raises(OSError, match=said):
        write(tmp_path / "run" / name)
    assert mine.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_of_ours_is_none_of_somebodys_and_its_place_is_named(
    tmp_path: Path, target: Path, kind: str
) -> None:
    store = RunStore(tmp_path)
    ways: dict[Path, list[Callable[[], object]]] = {
        store.samples(2): [
            lambda: store.set_aside_samples(2, lambda _: None),
            lambda: store.append_samples(2, TABLE),
        ],
        store.iteration(3): [
            lambda: store.write(3, "offline", TABLE),
            lambda: replace_directory(store.policy(3), into),
        ],
        tmp_path / "outputs": [lambda: make_directory(tmp_path / "outputs", COMMAND)],
    }
    for place, writes in ways.items():
        plant(kind, place, target)
        for write in writes:
            with pytest.raises(OSError, match=rf"{place} is not what belongs there.*Move it away"):
                write()
    assert untouched(target)
    store.remove_samples(2)
    assert not os.path.lexists(store.samples(2))
    assert untouched(target)


def test_a_file_of_ours_is_opened_and_keeps_what_is_in_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.add("a", {"x": 1})
    assert Journal(tmp_path / "j").get("a") == {"x": 1}
    with pytest.raises(ValueError, match="no regular file"):
        open_own(tmp_path, os.O_RDWR)
    with pytest.raises(FileNotFoundError):
        open_own(tmp_path / "missing", os.O_RDONLY)


@pytest.mark.parametrize("kind", KINDS)
def test_commands_that_overwrite_nothing_say_so_of_a_link(
    tmp_path: Path, target: Path, kind: str
) -> None:
    place = tmp_path / "out/x.yaml"
    plant(kind, place, target)
    experiment = ["paper", "ultrafeedback", "tinyllama-1.1b", "sera-dpo", "--output", str(place)]
    for command in (experiment, ["schema", "--output", str(place)]):
        done = CliRunner().invoke(sera, command)
        assert done.exit_code == 2, done.output
        assert "exist" in done.output or "is a directory" in done.output
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        Converted("a: 1\n", {}, "").write(place)
    assert untouched(target)


def test_nobody_else_can_prepare_or_guess_where_a_file_is_written(tmp_path: Path) -> None:
    rooms = set()
    for _ in range(20):
        with beside(tmp_path / "file") as partial:
            assert partial.parent.stat().st_mode & 0o077 == 0
            assert not list(partial.parent.iterdir())
            rooms.add(partial.parent)
    assert len(rooms) == 20
    assert not list(tmp_path.iterdir())
    with beside(tmp_path / ("ä" * 120)) as partial:  # as long as a name may be
        partial.write_text("x")
        partial.replace(tmp_path / ("ä" * 120))
    os.umask(old := os.umask(0o022))
    assert (tmp_path / ("ä" * 120)).stat().st_mode & 0o777 == 0o666 & ~old


def left(path: Path, old: bool = True, empty: bool = False) -> Path:
    """What a killed process leaves."""
    path.mkdir(parents=True)
    if not empty:
        (path / "half").write_text("x")
    if old:
        os.utime(path, (0, 0))
    return path


def test_remains_are_removed_and_nothing_else(tmp_path: Path, target: Path) -> None:
    run = tmp_path / "run"
    gone = [
        left(run / ".a.json.sera-abcdefg0.partial"),
        left(run / ".b.sera-0_234567.partial", False),
    ]
    gone.append(left(run / ".c.sera-01234567.partial", empty=True))
    (gone[0] / "inner").symlink_to(target.parent)
    stays = [
        left(run / ".a.partial"),
        left(run / "a.sera-01234567.partial"),
        left(run / ".d.sera-0123456.partial"),
        left(run / ".e.sera-01234567.partial", old=False, empty=True),  # has only begun
    ]
    stays.append(run / ".f.sera-01234567.partial")
    stays[-1].symlink_to(target.parent)
    stays.append(run / ".g.sera-01234567.partial")
    stays[-1].write_text(MINE)
    stays.append(run / ".h.sera-01234567.partial")
    os.mkfifo(stays[-1])
    with beside(run / "working") as partial:  # somebody is at work
        partial.write_text("x")
        os.utime(partial.parent, (0, 0))
        tidy(run)
        assert partial.read_text() == "x"
    assert not [path for path in gone if path.exists()]
    assert sorted(run.iterdir()) == sorted(stays)
    assert untouched(target)
    tidy(tmp_path / "missing")


def test_a_run_that_is_continued_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed = """
import os, signal, sys
from pathlib import Path
from sera_plugin.rundir.checksums import replace_directory, replace_file
def die(path):
    (path / "half" if path.is_dir() else path).write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
(replace_directory if sys.argv[2] == "policy" else replace_file)(Path(*sys.argv[1:]), die)
"""
    store = RunStore(tmp_path)
    for directory, name in ((store.root, "run.json"), (store.iteration(1), "policy")):
        command = [sys.executable, "-c", killed, str(directory), name]
        assert subprocess.run(command).returncode == -signal.SIGKILL
        assert len(list(directory.glob(".*.partial"))) == 1
    store.lock()
    assert [path.name for path in store.root.rglob("*") if path.name != "iteration-01"] == ["lock"]
    # A second process that waits for the lock does not take the owner's name out of the file.
    with (store.root / "lock").open("rb") as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_nothing_in_the_package_writes_in_another_way() -> None:
    """Only `writing` opens files to write them; callbacks write where `beside` tells them to."""
    ways = re.compile(
        r"(?<!partial)\.write_(text|bytes)\(|\bos\.open\(|\bmkstemp\(|\bmkdtemp\(|TemporaryFile\("
        r"|\bopen\([^)\n]*[\"'][rb]*[wax+]|shutil\.(copy|move)|\.(symlink|hardlink)_to\("
    )
    for planted in ("path.write_text(x)", "os.open(path, 1)", "path.open('wb')", 'open(p, "a")'):
        assert ways.search(planted)
    for planted in ("partial.write_text(x)", "path.open('rb')", "path.open(encoding='utf-8')"):
        assert not ways.search(planted)
    found = {}
    for path in PACKAGE.rglob("*.py"):
        lines = ast.unparse(ast.parse(path.read_text())).splitlines()
        if here := [line.strip() for line in lines if ways.search(line)]:
            found[path.relative_to(PACKAGE).as_posix()] = here
    assert list(found) == ["rundir/writing.py"], found
    assert writing._ROOM.fullmatch(".x.sera-01_34abc.partial")
