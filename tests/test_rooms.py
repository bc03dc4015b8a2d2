"""Imports run one way: commands → studies → budget → runs → training → build → tasks, models → gradient → ode."""

import ast
from pathlib import Path

import pytest

import anode_exp

ROOT = Path(anode_exp.__file__).parent
MAY_IMPORT = {
    "ode": set(),
    "gradient": {"ode"},
    "models": {"ode", "gradient.base"},
    "data": {"errors"},
    "tasks": {"data"},
    "config": {"errors"},
    "records": {"config", "errors"},
    "records.reading": set(),
    "report": {"records"},
    "build": {"config", "data", "errors", "gradient", "models", "ode", "tasks"},
    "training": {"build", "config", "errors", "models", "ode", "records", "tasks"},
    "training.progress": set(),
    "training.signals": set(),
    "training.world": {"errors", "ode"},
    "training.step": {"tasks"},
    "runs": {"build", "config", "data", "errors", "models", "ode", "records", "training"},
    "budget": {"errors", "gradient", "models", "ode", "tasks", "training"},
    "budget.plan": {"gradient", "ode"},
    "studies": {
        "budget",
        "build",
        "config",
        "data",
        "errors",
        "gradient",
        "models",
        "ode",
        "records",
        "runs",
        "tasks",
        "training",
    },
    "commands": {
        "budget",
        "build",
        "config",
        "data",
        "errors",
        "models",
        "records",
        "report",
        "runs",
        "studies",
        "training",
    },
    "errors": set(),
    "__main__": {"commands", "config", "errors"},
    "__init__": set(),
}
"""Files of a room may import each other; a file with its own entry may import only what the entry lists."""

CORE = ("ode", "gradient", "models")


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: imports are absolute"
            found.add(node.module)
            if node.module == "anode_exp":
                found |= {f"anode_exp.{alias.name}" for alias in node.names}
    return found


def files():
    return [pytest.param(f, id=str(f.relative_to(ROOT))) for f in sorted(ROOT.rglob("*.py"))]


@pytest.mark.parametrize("file", files())
def test_a_room_imports_only_the_rooms_below_it(file):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    room = name if name in MAY_IMPORT else name.split(".")[0]
    assert room in MAY_IMPORT, f"{name}: say in this test what it may import"
    for module in imports(file):
        inside = module.removeprefix("anode_exp.")
        if inside == module or inside == "anode_exp" or inside.split(".")[0] == name.split(".")[0]:
            continue
        allowed = MAY_IMPORT[room]
        assert any(inside == a or inside.startswith(a + ".") for a in allowed), f"{name} imports {module}"


def test_rooms_form_no_circle():
    below = {room: {a.split(".")[0] for a in allowed} for room, allowed in MAY_IMPORT.items() if "." not in room}
    order: list[str] = []
    while below.keys() - set(order):
        free = [room for room in below if room not in order and below[room] <= set(order)]
        assert free, f"a circle among {sorted(below.keys() - set(order))}"
        order += free


@pytest.mark.parametrize("file", [p for p in files() if p.id.split("/")[0] in CORE])
def test_the_numerical_core_knows_torch_alone(file):
    outside = {m.split(".")[0] for m in imports(file)} - {"torch", "anode_exp", "checkpoint_schedules"}
    standard = {
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "functools",
        "itertools",
        "math",
        "types",
        "typing",
    }
    assert outside <= standard
