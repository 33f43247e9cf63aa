"""A room imports only rooms above it (docs/architecture.md), and the pure ones no heavy library."""

import ast
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sera_plugin"
ROOMS = ["config", "rundir", "algorithm", "data", "model", "sampling", "labeling", "host", "tools"]
HEAVY = {"axolotl", "trl", "vllm", "transformers", "torch", "peft", "datasets", "accelerate"}
#: Rooms that load neither torch nor the host when they are imported.
PURE = ("config", "rundir", "algorithm")
#: Card, report and push at the end of training: the one arrow that goes down.
EXCEPTIONS = {("host/plugin.py", "tools")}


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return found | {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room):
    below = ROOMS[ROOMS.index(room) + 1 :]
    for path in (PACKAGE / room).rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for module in imports(path):
            top, _, rest = module.partition(".")
            if top == "sera_plugin" and rest.split(".")[0] in below:
                assert (name, rest.split(".")[0]) in EXCEPTIONS, f"{name} imports {module}"
            assert top not in HEAVY or room not in PURE or name == "rundir/ranks.py"


def test_everything_that_is_imported_is_declared():
    setup = ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    declared = re.findall(r"^[\w-]+", setup["options"]["install_requires"], re.MULTILINE)
    extras = {"vllm", "deepspeed"}
    assert extras < set(setup["options.extras_require"])
    known = {*sys.stdlib_module_names, "sera_plugin", "yaml", *extras, *declared}
    found = {module.split(".")[0] for path in PACKAGE.rglob("*.py") for module in imports(path)}
    assert found <= known
