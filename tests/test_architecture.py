"""Arrows between modules go one way (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sera_plugin"
HEAVY = {"axolotl", "trl", "vllm", "transformers", "torch", "peft", "datasets", "accelerate"}
PURE = HEAVY
TORCH = HEAVY - {"torch"}

#: What each module may not import, anywhere in its file.
FORBIDDEN = {
    "__init__": PURE,
    "__main__": PURE,
    "alarms": PURE,
    "args": PURE,
    "bootstrap": PURE,
    "checkpoints": PURE,
    "checksums": PURE,
    "cli": PURE,
    "commands": PURE,
    "convert/__init__": PURE,
    "convert/convert": PURE,
    "convert/data": PURE,
    "convert/keys": PURE,
    "convert/left_out": PURE,
    "convert/model": PURE,
    "convert/rows": PURE,
    "convert/settings": PURE,
    "convert/templates": PURE,
    "convert/training": PURE,
    "data_config": PURE,
    "dataset": PURE,
    "encoding": PURE,
    "features": PURE,
    "fields": PURE,
    "host_keys": PURE,
    "iteration": PURE,
    "journal": PURE,
    "json_rows": PURE,
    "limits": PURE,
    "method": PURE,
    "offline": PURE,
    "loading": PURE,
    "facts": PURE,
    "label_noise": PURE,
    "labelers": TORCH,
    "labeling/__init__": PURE,
    "labeling/conversation": PURE,
    "labeling/implicit": PURE,
    "labeling/judged": PURE,
    "labeling/self_judge": PURE,
    "labeling/spin": PURE,
    "length_control": PURE,
    "parallel_config": PURE,
    "progress": PURE,
    "ranks": PURE,
    "rewards": PURE,
    "rows": PURE,
    "run": PURE,
    "schedule": PURE,
    "selection": PURE,
    "shown": PURE,
    "store": PURE,
    "summary": PURE,
    "templates": PURE,
    "texts": PURE,
    "tokens": PURE,
    "sampling/__init__": PURE,
    "sampling/child": PURE,
    "sampling/choose": PURE,
    "sampling/vllm": PURE,
    "sampling/vllm_server": PURE,
    "sampling/vllm_worker": HEAVY - {"vllm"},
    "evaluation/__init__": PURE,
    "evaluation/answers": PURE,
    "evaluation/command": PURE,
    "evaluation/engine": TORCH - {"transformers", "peft"},
    "evaluation/length": PURE,
    "evaluation/models": PURE,
    "evaluation/page": PURE,
    "evaluation/prompts": PURE,
    "evaluation/results": PURE,
    "evaluation/run": PURE,
    "evaluation/verdicts": PURE,
    "evaluation/winrate": PURE,
    "judging/__init__": PURE,
    "judging/api": PURE,
    "judging/choose": PURE,
    "judging/client": PURE,
    "judging/config": PURE,
    "judging/function": PURE,
    "judging/prompts": PURE,
    "judging/reward_model": TORCH - {"transformers"},
    "report/__init__": PURE,
    "report/about_data": PURE,
    "report/about_training": PURE,
    "report/agreement": PURE,
    "report/blocks": PURE,
    "report/charts": PURE,
    "report/commands": PURE,
    "report/compare": PURE,
    "report/data": PURE,
    "report/ensemble": PURE,
    "report/examples": PURE,
    "report/export": PURE,
    "report/figures": PURE,
    "report/html": PURE,
    "report/page": PURE,
    "report/pair": PURE,
    "report/reading": PURE,
    "report/terminal": PURE,
    "report/tokens": PURE,
    "planning/__init__": PURE,
    "planning/activations": PURE,
    "planning/advice": PURE,
    "planning/commands": HEAVY - {"axolotl"},
    "planning/compute": PURE,
    "planning/counts": PURE,
    "planning/disk": PURE,
    "planning/keys": PURE,
    "planning/memory": PURE,
    "planning/optimizers": PURE,
    "planning/plan": PURE,
    "planning/setting": PURE,
    "planning/shape": PURE,
    "planning/show": PURE,
    "planning/empty_model": HEAVY - {"axolotl", "transformers", "torch", "peft"},
    "planning/inputs": TORCH,
    "planning/measure": HEAVY - {"axolotl", "transformers", "torch"},
    "planning/prepare": HEAVY - {"axolotl", "transformers"},
    "demo/__init__": PURE,
    "demo/world": PURE,
    "demo/run": PURE,
    "adapters": TORCH - {"peft"},
    "budget": TORCH - {"accelerate"},
    "distributed": TORCH,
    "forward": TORCH - {"accelerate"},
    "gate": TORCH,
    "loop": TORCH,
    "offload": TORCH,
    "logprobs": TORCH,
    "losses": TORCH,
    "objective": TORCH,
    "packing": TORCH,
    "samplers": TORCH,
    "scoring": TORCH,
    "policies": TORCH - {"peft"},
    "sharding": TORCH,
    "sampling/transformers": TORCH - {"transformers"},
    "demo/base_model": TORCH - {"transformers", "peft"},
    "plugin": HEAVY - {"axolotl"},
    "schema": HEAVY - {"axolotl"},
    "trainer": {"vllm"},
}
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")
)


def imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_rule():
    assert set(MODULES) == FORBIDDEN.keys()


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_nothing_it_must_not_know(module):
    assert {name.split(".")[0] for name in imports(module)} & FORBIDDEN[module] == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("__init__", "plugin")])
def test_nothing_imports_the_plugin_and_only_the_plugin_the_trainer(module):
    names = imports(module)
    assert not any(name.startswith("sera_plugin.plugin") for name in names)
    assert not any(name.startswith("sera_plugin.trainer") for name in names)


#: These import heavy modules inside a function.
LAZY = ("__init__", "cli", "demo/run", "evaluation/run", "judging/choose")


@pytest.mark.parametrize("module", [m for m in MODULES if FORBIDDEN[m] == PURE and m not in LAZY])
def test_pure_modules_import_only_pure_ones(module):
    pure = {m.replace("/__init__", "").replace("/", ".") for m in FORBIDDEN if FORBIDDEN[m] == PURE}
    ours = {n.removeprefix("sera_plugin.") for n in imports(module) if n.startswith("sera_plugin.")}
    known = {m.replace("/__init__", "").replace("/", ".") for m in MODULES}
    assert (ours & known) <= pure
