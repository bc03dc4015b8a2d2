"""A trained network evaluated again: from Python, and with other solvers."""

import json
import re
from pathlib import Path

import pytest
import torch
from command import command

import anode_exp
from anode_exp.build import autocast_for
from anode_exp.commands.evaluate import table
from anode_exp.commands.together import train
from anode_exp.config.change import evaluations
from anode_exp.config.compose import jobs
from anode_exp.config.describe import catalogue
from anode_exp.data import Normalisation, evaluation_batches, load
from anode_exp.errors import UserError
from anode_exp.models.calibrate import calibrate_norms
from anode_exp.runs import evaluate_run

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    (config,) = jobs(
        ["dataset=digits", "dataset.train_size=100", "dataset.test_size=100", "model=squeezenext", "model.width=0.5",
         "solver=rk2", "recipe.batch_size=20", "recipe.epochs=3", "recipe.lr=0.05", "runtime.device=cpu"],
        multirun=False,
    ).configs  # fmt: skip
    train(config, directory)
    return directory


def test_load_run_gives_the_model_and_its_records(trained):
    run = anode_exp.load_run(trained, "last")
    assert run.epoch == 3 and [m["epoch"] for m in run.metrics] == [1, 2, 3]
    assert run.results["status"] == "completed" and not run.network.training
    images = load("digits", Path("."), test_size=100)
    normalise = Normalisation(run.config.dataset.mean, run.config.dataset.std, torch.device("cpu"))
    (batch,) = evaluation_batches(images.test, 100, normalise)
    with torch.no_grad():
        accuracy = (run.network(batch[0]).argmax(1) == batch[1]).float().mean().item()
    assert accuracy == pytest.approx(run.results["test_accuracy"])
    best = anode_exp.load_run(str(trained))
    assert best.epoch == run.results["best_epoch"]


def test_evaluation_repeats_the_runs_own_accuracy(trained):
    (row,) = evaluate_run(trained, "last", evaluations(trained, []))
    assert row["test_accuracy"] == pytest.approx(anode_exp.load_run(trained).results["test_accuracy"])
    assert (row["solver"], row["n_steps"], row["nfe"], row["images"]) == ("rk2", 2, 16, 100)


def test_evaluation_under_other_solvers_and_steps(trained):
    configs = evaluations(trained, ["solver=euler,rk4", "solver.n_steps=1,8", "dataset.test_size=50"])
    rows = evaluate_run(trained, "best", configs)
    assert [(r["solver"], r["n_steps"], r["nfe"]) for r in rows] == [
        ("euler", 1, 4), ("euler", 8, 32), ("rk4", 1, 16), ("rk4", 8, 128),
    ]  # fmt: skip
    assert len({r["test_loss"] for r in rows}) == 4, "another discretisation is another function"
    text = table(rows)
    assert "euler" in text and "%" in text and text.count("\n") == 5
    recorded = [json.loads(line) for line in (trained / "evaluations.jsonl").read_text().splitlines()]
    assert recorded[-4:] == rows


def test_statistics_may_be_estimated_anew(trained):
    """From one batch they are that batch's own, at each time of the solve: the network then evaluates as it trains."""
    network = anode_exp.load_run(trained, "last", evaluations(trained, ["model.statistics=by_time"])[0]).network
    images, autocast = torch.randn(64, 3, 32, 32), autocast_for("fp32", torch.device("cpu"))
    calibrate_norms(network, autocast, [(torch.randn(64, 3, 32, 32), torch.zeros(64))])
    calibrate_norms(network, autocast, [(images, torch.zeros(64))])
    assert not network.training
    with torch.no_grad():
        evaluated = network(images)
        trained_output = network.train()(images)
    assert (evaluated - trained_output).norm() < 0.02 * trained_output.norm()  # variances over n or n − 1
    rows = evaluate_run(trained, "last", evaluations(trained, ["model.statistics=forward,by_time"]), calibrate=3)
    assert [r["statistics"] for r in rows] == ["forward, 3 batches anew", "by_time, 3 batches anew"]
    assert rows[0]["test_loss"] != rows[1]["test_loss"]


def test_a_run_with_statistics_by_time_has_no_single_set_but_one_can_be_estimated(trained):
    assert anode_exp.load_run(trained).config.model.statistics == "by_time"
    with pytest.raises(UserError, match="not a single set; estimate one from training batches with calibrate=50"):
        evaluate_run(trained, "last", evaluations(trained, ["model.statistics=forward"]))
    adaptive = ["solver=bosh3", "solver.adaptive=true", "solver.rtol=0.1", "solver.atol=0.1"]
    own, found = (evaluate_run(trained, "last", evaluations(trained, s))[0] for s in ([], adaptive))
    assert found["n_steps"] is None and found["test_accuracy"] == pytest.approx(own["test_accuracy"], abs=0.15)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.width=1"], r"model.width=1: this run has 0.5; an evaluation may change solver, dataset"),
        (["recipe.lr=1"], r"recipe.lr=1: this run has 0.05"),
        (["solver=rk5"], r"there is no such solver"),
        (["solver.n_steps=0"], r"at least 1"),
    ],
)
def test_what_an_evaluation_may_not_change(trained, overrides, message):
    with pytest.raises(UserError, match=message):
        evaluations(trained, overrides)


def test_another_data_set_must_have_as_many_classes(trained):
    with pytest.raises(UserError, match="has 100 classes, and this run's network has 10; choose a data set with 10"):
        evaluate_run(trained, "best", evaluations(trained, ["dataset=cifar100"]))
    (row,) = evaluate_run(trained, "best", evaluations(trained, ["dataset=fake", "dataset.test_size=20"]))
    assert row["dataset"] == "fake"


def test_a_checkpoint_that_is_not_there(trained, tmp_path):
    with pytest.raises(UserError, match="choose one of best, last"):
        anode_exp.load_run(trained, "first")
    with pytest.raises(UserError, match="holds no run"):
        anode_exp.load_run(tmp_path)


def test_the_command(trained, tmp_path):
    done = command(tmp_path, "evaluate", f"run={trained}", "solver=rk4", "solver.n_steps=1,2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rk4") == 2
    assert not list(tmp_path.iterdir())


def test_the_example_of_the_readme():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    names = {}
    exec(code, names)
    assert names["y1"].shape == names["y0"].shape and names["f"].weight.grad.abs().sum() > 0


def test_everything_promised_can_be_imported():
    for name in anode_exp.__all__:
        assert getattr(anode_exp, name) is not None
    with pytest.raises(AttributeError, match="OdeBlok"):
        _ = anode_exp.OdeBlok


def test_the_catalogue_has_a_line_for_every_choice():
    text = catalogue()
    for name in ("resnet18", "rk4", "reverse_adjoint", "cifar100", "paper", "digits"):
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE), name
