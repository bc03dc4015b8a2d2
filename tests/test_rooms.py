"""Imports run one way: commands → studies → budget → training, build, runs → models → gradient → ode."""

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
    "config": {"errors"},
    "records": {"config", "errors"},
    "records.reading": set(),
    "report": {"config", "errors", "records"},
    "training": {"config", "data", "errors", "models", "ode", "records"},
    "training.peak_memory": set(),
    "training.progress": set(),
    "training.signals": set(),
    "build": {"config", "data", "errors", "gradient", "models", "ode"},
    "runs": {"build", "config", "data", "errors", "models", "ode", "records", "training"},
    "budget": {"errors", "gradient", "models", "ode", "training"},
    "budget.plan": {"gradient"},
    "studies": {
        "budget",
        "build",
        "config",
        "data",
        "errors",
        "models",
        "ode",
        "records",
        "report",
        "runs",
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
