"""Fitting a trajectory: from settings to records, resumed, swept, evaluated."""

import json
import signal
from itertools import pairwise

import pytest
import torch

from anode_exp.build import assemble, build_data
from anode_exp.commands.evaluate import table
from anode_exp.commands.together import train, train_together
from anode_exp.config.change import evaluations
from anode_exp.config.compose import composed
from anode_exp.config.studies import study
from anode_exp.errors import UserError
from anode_exp.records.reading import read_lines
from anode_exp.runs import evaluate_run, load_run
from anode_exp.studies.bench import run_bench
from anode_exp.studies.stiff import Subject
from anode_exp.studies.study import run_study
from anode_exp.tasks.trajectory import TrajectoryFit
from anode_exp.training.signals import StopRequest

CPU = torch.device("cpu")
SMALL = ("task=trajectory", "dataset.points=6", "model.hidden=[8]", "recipe.steps_per_epoch=5", "recipe.epochs=3",
         "recipe.lr=0.02", "model.weight_std=0.1", "runtime.precision=fp64", "solver.n_steps=2", "runtime.device=cpu",
         "runtime.keep_every=1")  # fmt: skip


def config(*overrides):
    return composed([*SMALL, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "run"
    train(config(), directory)
    return directory


def test_the_loss_and_the_metrics_are_means_over_times_and_components():
    def network(y0, times):
        assert times.tolist() == [0, 1, 2]
        return torch.stack([y0 + 1, y0 + 2], 1)

    batch = (torch.zeros(2, 1), torch.tensor([[[1.0], [1.0]], [[2.0], [5.0]]]), torch.arange(3.0).expand(2, 3))
    loss, output = TrajectoryFit("mae").loss(network, batch)
    assert float(loss) == (0 + 1 + 1 + 3) / 4
    assert float(TrajectoryFit("mse").loss(network, batch)[0]) == (0 + 1 + 1 + 9) / 4
    task = TrajectoryFit("mse")
    sums = {name: float(x) for name, x in task.evaluation_sums(network, batch).items()}
    assert task.metrics(sums, 2) == {"loss": 11 / 4, "mae": 5 / 4, "mse": 11 / 4}
    assert task.zeros(CPU).keys() == task.sums(output, batch).keys()


def test_a_run_and_its_records(trained):
    results = json.loads((trained / "results.json").read_text())
    lines = read_lines(trained / "metrics.jsonl")
    assert results["status"] == "completed" and (results["epochs"], results["steps"]) == (3, 15)
    assert [line["steps"] for line in lines] == [5, 10, 15] and all(len(line["step_losses"]) == 5 for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] and results["test_mae"] == lines[-1]["test_mae"]
    assert lines[1]["train_mae"] == pytest.approx(lines[1]["train_loss"], rel=1e-6)
    assert lines[-1]["nfe_newton"] < 10 and lines[-1]["nfe_backward"] == 6 * 2 * 2, "stages of steps of intervals"
    assert results["trajectories_per_s"] > 0 and results["parameters"]["total"] == 2 * 3 * 8


def test_the_loss_is_that_of_the_steps_one_by_one():
    """Crank–Nicolson by its own equation, and the data at the ends of intervals."""
    assembly = assemble(config(), build_data(config().dataset, CPU))
    (batch,) = assembly.data.evaluation("train", 1)
    with torch.no_grad():
        states = assembly.network(batch[0], batch[2][0])
    f = assembly.network.block.f
    y, errors = batch[0], []
    times = batch[2][0].tolist()
    for i, (t0, t1) in enumerate(pairwise(times)):
        h = (t1 - t0) / 2
        for _ in range(2):
            z = y
            for _ in range(60):  # a contraction, as h |∂f/∂y| is small at first
                z = y + h / 2 * (f(0.0, y) + f(0.0, z)) if t1 < 1 else z
            y = z
        if t1 < 1:
            errors.append(float((states[:, i] - y).detach().abs().max()))
    assert len(errors) >= 3 and max(errors) < 1e-12


@pytest.mark.parametrize("mode", ["batched_adjoint", "stage_checkpoint"])
def test_a_resumed_run_continues_to_the_same_bits(tmp_path, mode):
    """The trajectory that the next solve begins from is part of the run's state."""
    asked, stop = config(f"gradient={mode}", "recipe.epochs=2"), StopRequest()
    train(asked, tmp_path / "whole")
    (result,) = train_together(
        [(asked, tmp_path / "parts")], tick=lambda: setattr(stop, "signal", signal.SIGTERM), stop=stop
    )
    assert (result["status"], result["epochs"]) == ("interrupted", 1)
    train(asked, tmp_path / "parts", resume=True)
    whole, parts = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for ours, theirs in zip(parts, whole, strict=True):
        assert (ours["step_losses"], ours["test_mae"]) == (theirs["step_losses"], theirs["test_mae"])


def test_exact_modes_take_the_same_steps(tmp_path):
    losses = []
    for mode in ("batched_adjoint", "stage_checkpoint", "full_backprop"):
        train(config(f"gradient={mode}", "recipe.epochs=1"), tmp_path / mode)
        losses.append(read_lines(tmp_path / mode / "metrics.jsonl")[0]["step_losses"])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-9)


def test_evaluation_under_other_solvers(trained):
    rows = evaluate_run(trained, "last", evaluations(trained, ["solver=crank_nicolson,rk4", "solver.n_steps=2,32"]))
    own, fine, _, explicit = rows
    assert own["test_mae"] == load_run(trained).results["test_mae"] and own["trajectories"] == 1
    assert fine["test_mae"] == pytest.approx(explicit["test_mae"], rel=1e-2)
    assert f"{fine['test_mae']:.4f}" in table(rows) or f"{fine['test_mae']:.3e}" in table(rows)
    with pytest.raises(UserError, match="has 2 components, and this run's network has 3; choose a data set with 3"):
        evaluate_run(trained, "last", evaluations(trained, ["dataset=van_der_pol"]))
    with pytest.raises(UserError, match="no BatchNorm to estimate; leave it out"):
        evaluate_run(trained, "last", evaluations(trained, []), calibrate=5)


def test_the_study_of_stiff_trajectories(trained, tmp_path):
    settings = [
        f"study.run={trained}",
        "study.solvers=[backward_euler,rk4]",
        "study.n_steps=[1,4]",
        "study.adaptive_solvers=[dopri5]",
    ]
    run_study(*study("stiff", settings), tmp_path)
    rows = read_lines(tmp_path / "study.jsonl")
    kinds = [row["kind"] for row in rows]
    assert kinds == ["run"] + ["steps"] * 4 + ["epoch"] * 3
    assert rows[0]["mae"] == pytest.approx(rows[0]["exact_mae"], rel=0.2) and rows[0]["iterations"] == 15
    errors = {(row["solver"], row["n_steps"]): row["error"] for row in rows[1:5]}
    assert errors["backward_euler", 4] < 0.5 * errors["backward_euler", 1], "of first order"
    assert errors["rk4", 4] < 0.05 * errors["rk4", 1], "of fourth"
    for row in rows[5:]:
        assert row["mae"] == pytest.approx(row["own_mae"], rel=0.2) and row["gradient"] > 0 and row["fastest"] > 0
        assert row["forward"] == 6 * row["steps"] + 2 * 6, "none is rejected; two more for each of six solves"
    assert "Fixed steps between two points" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_the_study_solves_a_run_with_the_settings_of_its_own_solver(tmp_path):
    own = ["solver=reversible_rk", "solver.tableau=rk4", "gradient=step_checkpoint", "recipe.epochs=1"]
    train(config(*own), tmp_path / "run")
    settings = [
        f"study.run={tmp_path / 'run'}",
        "study.solvers=[rk4]",
        "study.n_steps=[1]",
        "study.adaptive_solvers=[dopri5]",
    ]
    run_study(*study("stiff", settings), tmp_path / "study")
    row = read_lines(tmp_path / "study" / "study.jsonl")[0]
    run, data = load_run(tmp_path / "run"), build_data(config(*own).dataset, CPU)
    states = run.network(data.train[:, 0], data.times)
    assert row["mae"] == pytest.approx(float((states - data.train[:, 1:]).abs().mean()), rel=1e-9)


def test_the_study_goes_on_after_a_solve_that_failed(trained, tmp_path, monkeypatch):
    solve = Subject.solve

    def failing(self, name, grid, solver=None):
        states, row = solve(self, name, grid, solver)
        return (states, row) if solver is None else (torch.full_like(states, torch.nan), row | {"mae": None})

    monkeypatch.setattr(Subject, "solve", failing)
    settings = [f"study.run={trained}", "study.solvers=[rk4]", "study.n_steps=[1]", "study.adaptive_solvers=[dopri5]"]
    run_study(*study("stiff", settings), tmp_path)
    rows = read_lines(tmp_path / "study.jsonl")
    assert len(rows) == 1 + 1 + 3 and rows[-1]["fastest"] is rows[-1]["most_unstable"] is None


def test_what_the_study_does_not_take(trained, tmp_path):
    with pytest.raises(UserError, match="study stiff: needs run=DIR"):
        study("stiff", [])
    with pytest.raises(UserError, match=r"is for runs of task=classification, .* is of task=trajectory"):
        study("evolution", [f"study.run={trained}"])
    with pytest.raises(UserError, match=r"solver\.n_steps: study stiff with run=DIR does not use it"):
        study("stiff", [f"study.run={trained}", "solver.n_steps=3"])


def test_bench_times_compositions(tmp_path, capsys):
    entries = [(mode, config(f"gradient={mode}"), None) for mode in ("batched_adjoint", "stage_checkpoint")]
    run_bench(entries, 2, tmp_path)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["batched_adjoint", "stage_checkpoint"] and rows[1]["ratio"] > 1
    assert "stage_checkpoint" in capsys.readouterr().out
