"""``report DIR …``: any runs next to each other, from their records only."""

import csv
import json
import shutil
import statistics

import pytest
from command import command

from anode_exp.commands.together import train
from anode_exp.config.compose import jobs
from anode_exp.records.folders import grouped, read_runs

IMAGES = ["dataset=fake", "dataset.train_size=20", "dataset.test_size=10", "model=squeezenext", "model.width=0.25",
          "recipe.batch_size=10", "recipe.epochs=2"]  # fmt: skip
DENSITY = ["task=density", "dataset.train_size=64", "dataset.validation_size=32", "dataset.test_size=32",
           "model.hidden=[4]", "recipe.batch_size=32", "recipe.steps_per_epoch=1", "recipe.epochs=2",
           "recipe.warmup_epochs=1"]  # fmt: skip


def run(directory, *settings):
    (config,) = jobs(list(settings), multirun=False).configs
    return train(config, directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two modes of two seeds each, one of them in a sweep's folder, and a density; one run has not ended."""
    base = tmp_path_factory.mktemp("runs")
    for mode in ("dto_checkpoint", "revolve"):
        for seed in (0, 1):
            run(base / "images" / f"{mode}_{seed}", *IMAGES, f"gradient={mode}", f"seed={seed}")
    (base / "images" / "revolve_1" / "results.json").unlink()
    (base / "images" / "revolve_0" / ".hydra").mkdir()
    (base / "images" / "revolve_0" / ".hydra" / "overrides.yaml").write_text("- gradient=revolve\n- model.width=0.25\n")
    run(base / "density", *DENSITY)
    (base / "study").mkdir()
    (base / "study" / "config.yaml").write_text("study: {name: memory}\n")
    return base


def test_the_page(folder, tmp_path):
    done = command(tmp_path, "report", str(folder / "images"), str(folder / "density"), "to=page")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page" / "README.md").read_text()
    assert text in done.stdout and done.stdout.rstrip().endswith("index.html")
    assert text.count("## ") == 2 and "## Classification, fake" in text and "## Density, moons" in text
    with (tmp_path / "page" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["runs of"], r["runs"]) for r in rows] == [
        ("gradient=dto_checkpoint", "2 completed"), ("gradient=revolve", "1 completed, 1 unfinished (epoch 2)"),
        ("as set by default", "1 completed"),
    ]  # fmt: skip
    ends = [json.loads((folder / "images" / f"dto_checkpoint_{s}" / "results.json").read_text()) for s in (0, 1)]
    mean = 100 * statistics.fmean(e["test_accuracy"] for e in ends)
    assert rows[0]["accuracy, %, last epoch"].startswith(f"{mean:.2f}") and rows[0]["nll, last epoch"] == ""
    density = json.loads((folder / "density" / "results.json").read_text())
    assert rows[2]["nll, last epoch"] == f"{density['test_nll']:.4g}" and rows[2]["accuracy, %, last epoch"] == ""
    assert "python -m anode_exp train gradient=revolve model.width=0.25" in text
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<script" not in page and "http" not in page


def test_a_report_is_no_run_and_neither_are_its_copies(folder):
    before = {r.directory for r in read_runs([folder])}
    copies = folder / "report" / "records" / "images"
    shutil.copytree(folder / "images" / "revolve_0", copies)
    assert {r.directory for r in read_runs([folder])} == before and len(before) == 5
    assert len(read_runs([folder, folder / "images"])) == 5, "a folder within another is not counted twice"
    assert [r.directory for r in read_runs([copies.parent])] == [copies], "but a report's records are runs themselves"


def test_labels_name_the_least_that_sets_runs_apart(folder):
    (one, *_), (other, *_) = grouped(read_runs([folder / "images"])).values()
    assert one.config.gradient.slots is None and other.config.gradient.slots is not None, "which the mode brings"
    assert list(grouped([one, other])) == ["gradient=dto_checkpoint", "gradient=revolve"]
    assert list(grouped([one])) == ["as set by default"]
    other.config.recipe.lr, other.config.gradient = 0.5, one.config.gradient
    assert list(grouped([one, other])) == ["recipe.lr=0.1", "recipe.lr=0.5"]


def test_residual_blocks_are_not_labelled_by_a_gradient_mode_that_they_do_not_use(folder):
    (ode, *_), (other, *_) = grouped(read_runs([folder / "images"])).values()
    other.config.model.block, other.config.gradient.name = "residual", "full_backprop"
    assert list(grouped([ode, other])) == ["model.block=ode", "model.block=residual"]


def test_a_run_of_reproduce_shows_its_command(folder, tmp_path):
    shutil.copytree(folder / "images" / "dto_checkpoint_0", tmp_path / "run")
    (tmp_path / "run" / "cell.json").write_text('{"command": "python -m anode_exp train experiment=anode/fig1_fig7"}')
    (record,) = read_runs([tmp_path])
    assert record.cell["command"] == "python -m anode_exp train experiment=anode/fig1_fig7"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere: is not a paper or folder; give one of anode, anodev2"),
        (["."], ".: there are no runs"),
        ([".", "seeds=2"], "seeds=2: a report of folders takes only to="),
        ([".", "recipe.lr=1"], "recipe.lr=1: a report of folders takes only to="),
        ([".", "nowhere"], "nowhere: is not a paper or folder"),
        ([".", "anode"], "anode: a paper has its own page"),
    ],
)
def test_mistakes(tmp_path, arguments, says):
    done = command(tmp_path, "report", *arguments)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
