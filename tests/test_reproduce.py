"""Reproducing a paper: which runs it has, which are skipped or continued, and the report of their records."""

import csv
import json
import os
import shutil
import signal
import time
from functools import cache, partial

import pytest
from command import Begun
from command import command as run_command

from anode_exp.commands import report
from anode_exp.commands.reproduce import _make_study, is_done, recorded_config, reproduce, run_group
from anode_exp.commands.together import train_together
from anode_exp.config.change import differing, resumed
from anode_exp.config.check import read_config, typed
from anode_exp.config.compose import composed
from anode_exp.config.describe import CONF, options
from anode_exp.config.reproduction import cells, specification
from anode_exp.config.studies import study
from anode_exp.errors import UserError
from anode_exp.records.cells import Record, copy_records, is_calibrated, read_records
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.claim import claim
from anode_exp.records.reading import read_metrics
from anode_exp.report.page import Reproduction, write_report
from anode_exp.report.statistics import Group, accuracy_rows, cost_rows, kept_epochs
from anode_exp.training.signals import StopRequest

SMALL = ["recipe.epochs=1", "dataset=digits", "dataset.train_size=16", "dataset.test_size=10", "recipe.batch_size=8"]


command = partial(run_command, CUDA_VISIBLE_DEVICES="")


@cache
def with_a_seed_each(paper):
    return cells(paper, ["seeds=1"])


@pytest.mark.parametrize("paper", options("reproduce"))
def test_every_cell_composes_and_has_a_preset_that_tells_its_command(paper):
    spec = specification(paper)
    for name, figure in spec["figures"].items():
        if "study" in figure:
            assert figure["study"] in options("study")
        if "methods" not in figure:
            continue
        header = (CONF / "experiment" / paper / f"{name}.yaml").read_text().splitlines()[1]
        assert header == f"#   python -m anode_exp reproduce {paper} figure={name}"
        assert set(figure["methods"]) <= set(spec["methods"])
        assert set(figure.get("published", {})) <= set(figure["methods"])
    found = with_a_seed_each(paper)
    assert {c.shown_in or c.figure for c in found} == set(spec["figures"])
    epochs = {("anodev2", "table_alexnet"): 120, ("pnode", "curves"): 200, ("pnode", "robertson"): 100}
    epochs |= {("pnode", name): 1000 for name in ("power", "miniboone", "bsds300")}
    epochs |= {("pnode", name): 10 for name in ("moons", "eight_gaussians", "checkerboard", "digits64")}
    for cell in found:
        if cell.study is not None and not cell.of_runs:
            study(cell.study, cell.settings)  # checked
        if cell.config is not None:
            assert cell.config.recipe.epochs == epochs.get((paper, cell.figure), 350)
            overrides = cell.command.split(" train ")[1].split()
            assert not differing(composed(overrides), cell.config), "the command is that of the run"


def test_methods_of_the_table():
    found = {c.method: c.config for c in cells("anode", ["figure=table_resnet4", "seeds=1", "length=short"])}
    assert found["residual"].model.block == "residual" and found["residual"].gradient.name == "full_backprop"
    assert found["anode"].gradient.name == "dto_checkpoint" and found["anode"].solver.n_steps == 2
    assert found["reverse_adjoint"].gradient.name == "reverse_adjoint"
    assert found["anode"].recipe.epochs == 10 and found["anode"].recipe.milestones == [4, 7]
    rk45 = cells("anode", ["figure=fig3_rk2", "method=reverse_adjoint_rk45", "seeds=[5]"])
    assert [c.seed for c in rk45] == [5]
    assert rk45[0].config.solver.adaptive and rk45[0].config.solver.name == "dopri5"


def test_runs_that_two_papers_share_are_the_same(tmp_path):
    """Runs that ANODEV2's figures take from ANODE's have the same settings and place, so none is run twice."""
    ours = {c.directory: c for c in with_a_seed_each("anodev2")}
    theirs = {c.directory: c for c in with_a_seed_each("anode")}
    rk45 = [c for c in with_a_seed_each("anode") if c.method == "reverse_adjoint_rk45" and "fig3" in c.shown_in]
    assert len(rk45) == 2 and len({c.directory for c in rk45}) == 1
    both = ours.keys() & theirs.keys()
    assert len(both) == 3 + 3 + 2 + 2
    assert all(ours[d].command == theirs[d].command for d in both)
    for figure in ("table_resnet4", "table_resnet10", "squeezenext", "resnet18"):
        configs = [c.config for c in ours.values() if c.shown_in == figure and c.method != "residual"]
        for config in configs:
            changed = {
                "gradient.name",
                "gradient.unit",
                "gradient.states",
                "model.evolution",
                "model.evolution_coupling",
                "model.evolution_sharing",
                "recipe.evolution_lr",
            }
            assert set(differing(config, configs[0])) <= changed, "methods differ in nothing else"


def test_every_method_has_a_seed_before_one_has_two():
    order = [c.seed for c in cells("anode", ["figure=table_resnet4,table_resnet10", "seeds=2"])]
    assert order == [0] * 6 + [1] * 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["figure=fig9"], "choose from table_resnet4"),
        (["figure=fig3_rk2", "method=residual"], "none of the chosen figures"),
        (["seeds=0"], "give how many"),
        (["seeds=1,2"], "list them"),
        (["length=long"], "choose from paper, short"),
        (["length=short,paper"], "has one"),
        (["seed=3"], "seeds="),
        (["recipe.epoch=3"], "did you mean recipe.epochs"),
    ],
)
def test_mistakes(arguments, says):
    with pytest.raises(UserError, match=says):
        cells("anode", arguments)


def test_the_published_quirks_are_switches():
    config = composed(["compat=published_code", "model=squeezenext"])
    assert config.recipe.restart_momentum and config.gradient.passes == 2
    assert config.model.statistics == "every_evaluation"
    assert composed(["compat=published_code", "gradient=reverse_adjoint"]).gradient.passes is None


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A reproduction that was interrupted in the middle, and run again; one run diverges."""
    cwd = tmp_path_factory.mktemp("reproduce")
    asked = ["anode", "figure=table_resnet4", "length=short", "seeds=2", *SMALL]
    begun = Begun(cwd, "reproduce", *asked, CUDA_VISIBLE_DEVICES="")
    deadline = time.monotonic() + 200
    while len(list(cwd.rglob("results.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(begun.process.pid, signal.SIGINT)
    code = begun.end(timeout=200).returncode
    early = {path.parent: path.stat().st_mtime_ns for path in cwd.rglob("results.json")}
    finished = {p: t for p, t in early.items() if json.loads((p / "results.json").read_text())["status"] == "completed"}
    again = command(cwd, "reproduce", *asked)
    return cwd, asked, code, finished, again


def test_goes_on_where_it_stopped(reproduced):
    cwd, asked, code, finished, again = reproduced
    assert code == 130 and 1 <= len(finished) < 6
    assert again.returncode == 0, again.stderr
    assert " of 6 runs are recorded" in again.stdout
    assert all((p / "results.json").stat().st_mtime_ns == t for p, t in finished.items()), "skipped, not run again"
    assert len(list(cwd.rglob("results.json"))) == 6
    assert "6 of 6 runs are recorded, 0 to go" in command(cwd, "reproduce", *asked).stdout


def test_runs_are_evaluated_with_one_set_of_statistics_too(reproduced):
    cwd, *_ = reproduced
    rows = {
        p.parent.name: [json.loads(line) for line in p.read_text().splitlines()] for p in cwd.rglob("evaluations.jsonl")
    }
    assert set(rows) == {f"{m}_seed-{s}" for m in ("anode", "reverse_adjoint") for s in (0, 1)}
    assert all([r["statistics"] for r in lines] == ["forward, 50 batches anew"] for lines in rows.values())


def test_other_settings_are_refused(reproduced):
    cwd, asked, *_ = reproduced
    done = command(cwd, "reproduce", *asked, "recipe.lr=0.2")
    assert done.returncode == 2 and "another recipe.lr" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_report_beside_the_paper(reproduced):
    """A diverged run stays in the curves and out of the mean; a missing one names its command."""
    cwd, *_ = reproduced
    folders = {p.parent.name: p.parent for p in (cwd / "outputs").rglob("cell.json")}
    results = folders["reverse_adjoint_seed-1"] / "results.json"
    results.write_text(json.dumps(json.loads(results.read_text()) | {"status": "diverged"}))
    for name, accuracy in (("anode_seed-0", 0.75), ("anode_seed-1", 0.77)):
        line = json.loads((folders[name] / "metrics.jsonl").read_text())
        (folders[name] / "metrics.jsonl").write_text(json.dumps(line | {"test_accuracy": accuracy}) + "\n")
    done = command(cwd, "report", "anode", "length=short", "to=page")
    assert done.returncode == 0, done.stderr
    text = (cwd / "page" / "README.md").read_text()
    assert "75.00 / 77.00 / 76.00" in text and "76.92 / 77.45 / 77.30" in text and "-1.30" in text
    assert "76.00 (paper 77.30)" in text
    assert "1 completed, 1 diverged, 1 not run" in text
    missing = "reproduce anode figure=table_resnet4 method=anode 'seeds=[2]' length=short"
    assert f"# ANODE: not run\npython -m anode_exp {missing}\n" in text
    page = (cwd / "page" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "<script" not in page and "http" not in page
    with (cwd / "page" / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    (row,) = [r for r in rows if r["figure"] == "Table, ResNet-4" and r["method"] == "ANODE"]
    assert row["last epoch, statistics by time"] == "75.00 / 77.00 / 76.00"
    assert row["published"] == "76.92 / 77.45 / 77.30" and row["statistics in training"] == "by time"
    one_set = sum(
        json.loads((folders[f"anode_seed-{s}"] / "evaluations.jsonl").read_text())["test_accuracy"] for s in (0, 1)
    )
    assert row["last epoch, one set"].endswith(f"{100 * one_set / 2:.2f}")
    copied = list((cwd / "page" / "records").rglob("metrics.jsonl"))
    assert len(copied) == 6 and not any("step_losses" in path.read_text() for path in copied)
    again = command(cwd, "report", "anode", "length=short", "directory=page/records", "to=again")
    assert again.returncode == 0, again.stderr
    remade = (cwd / "again" / "README.md").read_text().replace(" directory=page/records", "")
    assert remade == text, "the records kept are enough"


def test_runs_recorded_with_one_set_are_recognised_and_keep_it(tmp_path):
    """Training is the same: a run from before statistics by time were the default is not made again, but continued."""
    asked = ["figure=table_resnet4", "method=anode", "length=short", "seeds=1", f"directory={tmp_path}", *SMALL]
    (one_set,) = cells("anode", [*asked, "model.statistics=forward"])
    (cell,) = cells("anode", asked)
    assert one_set.config.model.statistics == "forward" and cell.config.model.statistics == "by_time"
    train_together([(one_set.config, cell.directory)], stop=StopRequest(signal.SIGTERM))  # after its first step
    text = (cell.directory / "config.yaml").read_text().splitlines(keepends=True)
    (cell.directory / "config.yaml").write_text("".join(x for x in text if "statistics:" not in x and "norm_" not in x))
    assert not is_done(cell)
    assert reproduce([cell]) == 0
    assert is_done(cell) and recorded_config(cell).model.statistics == "forward"
    state = Checkpoints(cell.directory / "checkpoints").load()
    assert not any("row_times" in key for key in state["network"]), "resumed with what it had"
    evaluated = (cell.directory / "evaluations.jsonl").read_text()
    assert json.loads(evaluated)["statistics"] == "by_time, 50 batches anew"
    assert reproduce([cell]) == 0 and (cell.directory / "evaluations.jsonl").read_text() == evaluated
    (record,) = read_records(tmp_path)
    (row,) = accuracy_rows([Group("table_resnet4", "anode", "ANODE", None, [record], [])])
    assert row["last epoch, statistics by time"].startswith(f"{100 * json.loads(evaluated)['test_accuracy']:.2f}")
    assert row["last epoch, one set"].startswith(f"{100 * record.results['test_accuracy']:.2f}")
    assert row["statistics in training"] == "one set"


def test_a_cell_that_was_resumed_with_another_gradient_mode_is_still_the_cell(tmp_path):
    """It continues with what it has, and is shown with both; what was asked is compared with what it began with."""
    asked = [f"directory={tmp_path}", "figure=table_resnet4", "method=anode", "length=short", "seeds=1", *SMALL]
    (cell,) = cells("anode", [*asked, "recipe.epochs=2", "recipe.milestones=[]"])
    (short,) = cells("anode", [*asked, "recipe.milestones=[]"])
    cell.directory.mkdir(parents=True)
    train_together([(short.config, cell.directory)])
    (cell.directory / "cell.json").write_text(cell.describe())
    changes = ["recipe.epochs=2", "gradient=full_backprop", "runtime.precision=bf16"]
    train_together([(resumed(cell.directory, changes), cell.directory)], resume=True)
    assert is_done(cell) and recorded_config(cell).gradient.name == "full_backprop"
    (record,) = read_records(tmp_path)
    (row,) = cost_rows([Group("table_resnet4", "anode", "ANODE", None, [record], [])])
    assert (row["gradient"], row["precision"]) == ("dto_checkpoint, full_backprop", "fp32, bf16")
    (other,) = cells("anode", [*asked, "recipe.epochs=2", "recipe.milestones=[]", "runtime.precision=bf16"])
    with pytest.raises(UserError, match=r"holds a run with another runtime.precision; give directory="):
        is_done(other)


def test_what_another_process_makes_is_left_to_it(tmp_path, capsys, monkeypatch):
    asked = ["figure=table_resnet4", "method=residual", "seeds=1", "length=short", f"directory={tmp_path}", *SMALL]
    (run,) = cells("anode", asked)
    of = ["figure=fig1_fig7", "length=short", f"directory={tmp_path}"]
    (picture,) = cells("anode", of)
    for cell, what in ((run, "run"), (picture, "study")):
        cell.directory.mkdir(parents=True)
        with claim(cell.directory, what):
            assert reproduce([cell]) == 0
        assert f"another process is writing this {what}" in capsys.readouterr().out
        assert not [f for f in cell.directory.glob("*.json*") if f.name != "cell.json"]
    (picture.directory / "cell.json").write_text(picture.describe())  # it has ended between a look and the claim
    _make_study(picture)
    assert not (picture.directory / "study.jsonl").exists()
    assert reproduce([run]) == 0
    monkeypatch.setattr("anode_exp.commands.reproduce.is_done", lambda cell: False)  # the run ended just after a look
    run_group([run], failed := [], lambda: None, StopRequest())
    assert not failed and "has ended after 1 epochs" in capsys.readouterr().out


def test_other_evaluations_of_a_run_are_not_its_own(reproduced):
    """With other steps, at an earlier epoch, or with unchanged running statistics."""
    cwd, *_ = reproduced
    own = json.loads(next((cwd / "outputs").rglob("anode_seed-0/evaluations.jsonl")).read_text())
    config = typed(read_config(next((cwd / "outputs").rglob("anode_seed-0"))))
    assert is_calibrated(own, config, 1)
    for other in ({"n_steps": 8}, {"solver": "rk2"}, {"epoch": 0}, {"statistics": "by_time"}, {"checkpoint": "best"}):
        assert not is_calibrated(own | other, config, 1)
    kept = [own | {"checkpoint": str(n), "epoch": n, "test_accuracy": x} for n, x in ((20, 0.3), (10, 0.2), (10, 0.4))]
    rows = [own, *kept, kept[0] | {"n_steps": 8, "test_accuracy": 1.0}]
    runs = [Record(cwd, {}, [], None, evaluations, config) for evaluations in (rows, [kept[1]])]
    points = kept_epochs(Group("table_resnet4", "anode", "ANODE", None, runs, []))
    assert points == {"one set": {10: pytest.approx(30.0), 20: pytest.approx(30.0)}}
    assert list(points["one set"]) == [10, 20]


def test_copies_beside_a_report_are_no_records(reproduced):
    cwd, *_ = reproduced
    before = len(read_records(cwd / "outputs" / "anode" / "short"))
    copy_records(read_records(cwd / "outputs" / "anode" / "short"), cwd / "outputs/anode/short/report/records")
    assert len(read_records(cwd / "outputs" / "anode" / "short")) == before == 6


def test_a_report_needs_records(tmp_path):
    done = command(tmp_path, "report", "anode", "directory=nowhere")
    assert done.returncode == 2 and "make some with" in done.stderr


def test_a_study_of_the_paper_is_in_the_page(tmp_path):
    folder = tmp_path / "fig1_fig7"
    folder.mkdir()
    cell = {"paper": "anode", "length": "short", "figure": "fig1_fig7", "method": None, "seed": None, "command": "x"}
    (folder / "cell.json").write_text(json.dumps(cell))
    (folder / "table.txt").write_text("rho < 1")
    (folder / "study.png").write_bytes(b"picture")
    page = write_report(
        specification("anode"), [Reproduction("short", "10 epochs", read_records(tmp_path), {})], tmp_path / "page"
    )
    assert "rho &lt; 1" in page.read_text() and "cGljdHVyZQ==" in page.read_text()


def test_two_lengths_on_one_page(reproduced, tmp_path, capsys):
    """Each has its own column, section, plot and command; an unfinished run says how far it is."""
    cwd, *_ = reproduced
    copy_records(read_records(cwd / "outputs" / "anode" / "short"), tmp_path)
    longer = tmp_path / "anode" / "paper" / "table_resnet4" / "anode_seed-0"
    shutil.copytree(tmp_path / "anode" / "short" / "table_resnet4" / "anode_seed-0", longer)
    (longer / "results.json").unlink()
    recorded = json.loads((longer / "cell.json").read_text())
    (longer / "cell.json").write_text(json.dumps(recorded | {"length": "paper"}))
    report.main(["anode", "length=short,paper", "seeds=1", f"directory={tmp_path}", f"to={tmp_path / 'page'}"])
    text = capsys.readouterr().out
    header = next(line for line in text.splitlines() if "ResNet-10, length=short" in line)
    columns = ["ResNet-4, length=short", "ResNet-4, length=paper", "ResNet-10, length=short", "AlexNet, length=short"]
    assert [c.strip() for c in header.split("|")][1:-1] == ["method", *columns]
    assert "# ANODE reproduced: short, 10 epochs; paper, every" in text and "1 unfinished (epoch 1)" in text
    assert [text.count(f"## Table, ResNet-{n}, length={length}") for n in (4, 10) for length in ("short", "paper")] == [
        1,
        1,
        1,
        0,
    ]
    assert f"method=residual 'seeds=[0]' length=paper directory={tmp_path}" in text
    drawn = {file.name for file in (tmp_path / "page").glob("*.png")}
    assert drawn == {"table_resnet4.png", "table_resnet4_paper.png"}
    for length, answer in {"short,long": "choose one of paper, short, or both", "": "choose one of"}.items():
        with pytest.raises(UserError, match=answer):
            report.main(["anode", f"length={length}", f"directory={tmp_path}"])
    shutil.rmtree(tmp_path / "anode" / "paper")
    with pytest.raises(UserError, match="holds no runs of anode at length=paper"):
        report.main(["anode", "length=short,paper", f"directory={tmp_path}"])


def test_recorded_settings_count_but_not_where_the_data_lie(reproduced):
    cwd, *_ = reproduced
    recorded = typed(read_config(next((cwd / "outputs").rglob("config.yaml")).parent))
    assert differing(recorded, recorded) == []
    moved = typed(read_config(next((cwd / "outputs").rglob("config.yaml")).parent))
    moved.dataset.root, moved.runtime.device, moved.recipe.lr = "elsewhere", "cpu", 0.3
    assert differing(recorded, moved) == ["recipe.lr"]


def test_the_evaluation_batch_counts_where_it_is_part_of_the_result():
    fixed = [composed(["model=resnet4", f"recipe.test_batch_size={n}"]) for n in ("null", "128", "64")]
    assert all(differing(fixed[0], other) == [] for other in fixed[1:])
    adaptive = ["model=resnet4", "solver=dopri5", "solver.adaptive=true"]
    null, same, other = (composed([*adaptive, f"recipe.test_batch_size={n}"]) for n in ("null", "128", "64"))
    assert differing(null, same) == [] and differing(null, other) == ["recipe.test_batch_size"]


def test_runs_as_jobs_of_a_launcher(tmp_path):
    """They are those of one process, and what fails in one is named; a second command finds them recorded."""
    asked = ["reproduce", "anode", "length=short", "figure=table_resnet4", *SMALL, "recipe.milestones=[]"]
    both = [*asked, "method=residual,anode", "seeds=1"]
    folder = tmp_path / "outputs" / "anode" / "short" / "table_resnet4"
    folder.mkdir(parents=True)
    (folder / "residual_seed-0").touch()  # where a folder should be
    done = command(tmp_path, *both, "launcher=submitit_local", "hydra.launcher.timeout_min=5")
    assert done.returncode == 2, done.stderr
    assert "0 of 2 runs are recorded, 2 to go" in done.stdout and "1 of 2 runs are recorded\n" in done.stdout
    assert "residual_seed-0: File exists" in done.stderr
    (folder / "residual_seed-0").unlink()
    again = command(tmp_path, *both)
    assert again.returncode == 0 and "1 of 2 runs are recorded, 1 to go" in again.stdout

    assert command(tmp_path, *asked, "method=anode", "seeds=1", "directory=alone").returncode == 0
    places = (folder, tmp_path / "alone" / "anode" / "short" / "table_resnet4")
    in_a_job, by_itself = ([line["step_losses"] for line in read_metrics(place / "anode_seed-0")] for place in places)
    assert in_a_job == by_itself and in_a_job


def test_launchers_that_are_not_there(tmp_path):
    for asked, answer in {
        "launcher=rays": "Could not find 'hydra/launcher/rays' Available options",
        "hydra.launcher.n_jobs=2": "hydra.launcher.n_jobs=2: is for jobs in parallel; add launcher=NAME",
    }.items():
        done = command(tmp_path, "reproduce", "anode", "length=short", "figure=table_resnet4", asked)
        assert done.returncode == 2 and answer in done.stderr, done.stderr
