"""Imports run one way: commands → build → training, studies → models → gradient → ode."""

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
    "training": {"config", "errors", "data", "json_lines", "models", "ode"},
    "training.records": {"config", "errors", "json_lines"},
    "training.peak_memory": set(),
    "training.progress": set(),
    "config": {"errors"},
    "errors": set(),
    "json_lines": set(),
    "report": {"config", "errors", "json_lines", "reproduction"},
    "studies": {"models", "ode", "training"},
    "bench": {"build", "config", "data", "models", "ode", "studies", "training"},
    "budget": {"errors", "gradient", "models", "ode", "training"},
    "study": {
        "budget",
        "build",
        "config",
        "data",
        "errors",
        "evaluate",
        "models",
        "ode",
        "report",
        "runs",
        "studies",
        "training",
    },
    "composition": {"config", "errors"},
    "build": {"config", "errors", "data", "models", "gradient", "ode"},
    "runs": {"build", "config", "data", "errors", "training"},
    "reproduction": {"composition", "config", "errors"},
    "reproduce": {
        "composition",
        "config",
        "errors",
        "evaluate",
        "json_lines",
        "reproduction",
        "study",
        "train",
        "training",
    },
    "train": {"budget", "build", "config", "data", "errors", "models", "training"},
    "evaluate": {"build", "config", "data", "errors", "json_lines", "models", "ode", "runs", "training"},
    "job": {"composition", "config", "errors", "train"},
    "commands": {
        "bench",
        "composition",
        "config",
        "errors",
        "evaluate",
        "job",
        "report",
        "reproduce",
        "reproduction",
        "study",
        "train",
    },
    "__main__": {"commands", "composition", "errors"},
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
