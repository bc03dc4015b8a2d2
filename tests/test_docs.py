"""The documents: names exist, links have a target, code blocks run."""

import ast
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_rooms import MAY_IMPORT

import anode_exp
from anode_exp.config.compose import compose_line, jobs
from anode_exp.config.reproduction import cells, specification
from anode_exp.config.studies import study

SOURCE = Path(anode_exp.__file__).parent
TOP = Path(__file__).parents[1]
ARCHITECTURE, EXTENDING, README = TOP / "docs/architecture.md", TOP / "docs/extending.md", TOP / "README.md"


def names_in(file):
    """Names that a file defines or imports at its top, and those of classes as Class.member, attributes included."""
    found = set()

    def visit(body, prefix=""):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                found.update(prefix + x.id for x in ast.walk(target or ast.Pass()) if isinstance(x, ast.Name))

    visit(ast.parse(file.read_text()).body)
    return found


def prose(document):
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def code_spans(text):
    return re.findall(r"`([^`]+)`", text)


def exists(path):
    return (SOURCE / path).exists() or (TOP / path).exists()


def wrong_names(text):
    """Paths, ``path: name`` and names in backticks that are not in the code."""
    everything = set().union(*(names_in(file) for file in SOURCE.rglob("*.py")))
    everything |= {name.rpartition(".")[2] for name in everything}
    other = {"anode_exp", "checkpoint_schedules", "loss.backward", "torch.utils.checkpoint", "ValueError"}
    other |= {m for allowed in MAY_IMPORT.values() for m in allowed}
    # Settings and words of YAML files are checked where they are read; new files are those of the examples.
    made_up = {"rule38", "ab2", "every_second_state", "one_scale"}
    for span in code_spans(text):
        path, _, name = span.partition(": ")
        if re.fullmatch(r"[\w/.]*(\.py|/)", path):
            file = SOURCE / path if (SOURCE / path).exists() else TOP / path
            if not file.exists() or (name and name not in names_in(file)):
                yield span
        elif re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", span):
            name = span.removesuffix("()")
            if not (name in everything | other or exists(name)):
                yield span
        elif re.fullmatch(r"[\w/]+\.\w+", span) and not (exists(span) or Path(span).stem in made_up):
            yield span


@pytest.mark.parametrize("document", [ARCHITECTURE, EXTENDING], ids=lambda path: path.name)
def test_every_name_exists(document):
    text = prose(document)
    assert len([span for span in code_spans(text) if ".py: " in span]) > 15
    assert list(wrong_names(text)) == []


@pytest.mark.parametrize(
    "wrong",
    ["ode/solvers.py", "ode/solver.py: Slover", "ode/solver.py: Solver.stop", "Trainer.advances", "Slover", "rooms/",
     "conf/solver/no.yaml"],
)  # fmt: skip
def test_a_wrong_name_is_found(wrong):
    assert list(wrong_names(f"A line with `ode/solver.py: Solver.step`, `ode/` and `{wrong}`.")) == [wrong]


def test_the_rooms_are_those_of_the_code_with_their_imports():
    rows = re.findall(r"^\| `([\w/.]+)` \|.+\| (.*)\|$", ARCHITECTURE.read_text(), re.MULTILINE)
    said = {
        room.removesuffix("/").removesuffix(".py").replace("/", "."): set(re.findall(r"`([\w.]+)`", imports))
        for room, imports in rows
    }
    assert said == MAY_IMPORT
    assert len(rows) == len(said)
    folders = {f.parent for f in SOURCE.rglob("*.py")} - {SOURCE}
    rooms = {f"{f.relative_to(SOURCE)}/" for f in folders} | {f.name for f in SOURCE.glob("*.py")}
    assert rooms <= {room for room, _ in rows}


def test_the_map_stays_short():
    assert len(ARCHITECTURE.read_text().splitlines()) <= 120


@pytest.mark.parametrize("document", [README, *sorted((TOP / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]+)", prose(document))
    missing = [x for x in links if "://" not in x and not (document.parent / x).exists()]
    assert missing == []


def programs(document):
    """The Python of each section: (heading, code with the line numbers of the document)."""
    found, heading, inside = {}, "", False
    for number, line in enumerate(document.read_text().splitlines()):
        if not inside and line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("```"):
            inside = line == "```python"
        elif inside:
            code = found.setdefault(heading, [])
            code += [""] * (number - len(code)) + [line]
    return [pytest.param(document, "\n".join(code), id=heading) for heading, code in found.items()]


def run(document, code):
    names = {"__name__": document.name}
    with torch.random.fork_rng():
        exec(compile(code, str(document), "exec"), names)
    return names


@pytest.mark.parametrize(("document", "code"), programs(EXTENDING))
def test_examples_of_extending_run(document, code):
    assert "assert" in code
    run(document, code)


def test_no_example_is_left_out():
    headings = [p.id for p in programs(EXTENDING)]
    assert headings == re.findall(r"^## (.+)$", EXTENDING.read_text(), re.MULTILINE) and len(headings) == 5


def test_the_readme_example_runs():
    (program,) = programs(README)
    names = run(*program.values)
    block, y0 = names["block"], names["y0"]
    found = [p.grad for p in block.parameters()]
    truth = torch.autograd.grad(
        anode_exp.FullBackprop().solve(block.field, y0, block.field.theta, block.grid, block.solver).square().sum(),
        block.field.theta,
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, truth, strict=True))


RAY = "launcher=ray"


def commands(document):
    """The words after ``-m anode_exp`` of each command in a document's blocks."""
    blocks = re.findall(r"^```\n(.*?)^```$", document.read_text().replace("\\\n", ""), re.DOTALL | re.MULTILINE)
    lines = [line.partition("-m anode_exp ")[2] for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


@pytest.mark.parametrize("document", [README, *sorted((TOP / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_the_commands_of_the_documents_are_right(document):
    """They compose, with settings that are used; what names a run that is not here is left to tests of those verbs."""
    for verb, *words in commands(document):
        if RAY in " ".join(words) and find_spec("hydra_plugins.hydra_ray_launcher") is None:
            continue  # an extra
        settings = [word for word in words if "=" in word]
        if verb == "train" and not any(word.startswith("resume=") for word in settings):
            assert jobs(settings, "-m" in words).configs
        elif verb == "reproduce":
            of_launcher = [s for s in settings if s.startswith(("launcher=", "hydra.launcher."))]
            figure = (
                [] if "figure=" in " ".join(words) else [f"figure={next(iter(specification(words[0])['figures']))}"]
            )
            assert cells(words[0], [*figure, *(s for s in settings if s not in of_launcher)])
            compose_line([f"hydra/{s}" if s.startswith("launcher=") else s for s in of_launcher])
        elif verb == "study":
            if not any(s.startswith("run=") for s in settings):
                study(words[0], settings)
        else:
            assert verb in ("train", "evaluate", "bench", "report", "list"), verb


def test_the_readme_shows_the_verbs():
    assert {verb for verb, *_ in commands(README)} == {"train", "evaluate", "bench", "study", "reproduce", "report"}
