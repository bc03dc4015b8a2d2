"""Runs of task=density from the command line's settings to their records."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from anode_exp.budget.measure import Planner
from anode_exp.build import build_network, output_size
from anode_exp.commands import together
from anode_exp.commands.train import main
from anode_exp.config.compose import jobs
from anode_exp.errors import UserError
from anode_exp.models import count_parameters, ode_blocks

SMALL = [
    "task=density", "model.hidden=[6,6]", "solver.n_steps=2", "recipe.batch_size=16", "recipe.steps_per_epoch=3",
    "dataset.train_size=50", "dataset.validation_size=20", "dataset.test_size=30",
]  # fmt: skip


def metrics(directory: Path):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def train(directory: Path, *settings: str):
    main([*SMALL, *settings, f"hydra.run.dir={directory}"])
    return metrics(directory)


def test_a_run_without_improvement_lowers_its_rate_twice_and_stops(tmp_path):
    """The rate is so high that the first epoch is the best."""
    waiting = ["recipe.schedule=plateau", "recipe.patience=2", "recipe.stop_after=7", "recipe.warmup_epochs=0"]
    lines = train(tmp_path, "recipe.epochs=30", "recipe.lr=0.3", *waiting)
    best = min(range(len(lines)), key=lambda i: lines[i]["validation_nll"])
    assert len(lines) == best + 1 + 7 < 30
    rates = [line["lr"] / 0.3 for line in lines]
    assert rates == pytest.approx(sorted(rates, reverse=True))
    assert rates[best + 3] == pytest.approx(rates[best] if rates[best] < 0.05 else 0.1 * rates[best])
    assert min(rates) == pytest.approx(0.01)
    with pytest.raises(UserError, match=r"has ended after \d+ epochs; the last 7 gave no better score"):
        main([f"resume={tmp_path}"])
    assert len(metrics(tmp_path)) == best + 1 + 7


@pytest.mark.parametrize(
    ("preset", "size", "hidden", "blocks"),
    [("miniboone", 43, [860] * 2, 1), ("power", 6, [60] * 3, 5), ("bsds300", 63, [1260] * 3, 2)],
)
def test_the_papers_flows(preset, size, hidden, blocks):
    (config,) = jobs([f"experiment=pnode/{preset}"], multirun=False).configs
    assert output_size(config.dataset) == size and config.task.trace == "gaussian"
    assert (config.recipe.batch_size, config.recipe.lr, config.recipe.weight_decay) == (1000, 1e-3, 1e-6)
    network = build_network(config, size)
    widths = [size, *hidden, size]
    per_layer = sum(a * b + b + 3 * b for a, b in pairwise(widths))
    assert count_parameters(network)["total"] == blocks * per_layer and len(list(ode_blocks(network))) == blocks


@pytest.mark.parametrize(("trace", "state"), [("exact", 3), ("gaussian", 5)])
def test_a_budget_is_planned_for_the_state_of_training_steps(tmp_path, monkeypatch, trace, state):
    planners = []

    class Kept(Planner):
        def __init__(self, *args):
            super().__init__(*args)
            planners.append(self)

    monkeypatch.setattr(together, "Planner", Kept)
    settings = ["gradient=budget", "gradient.memory=1GiB", f"task.trace={trace}", "recipe.epochs=1"]
    train(tmp_path, *settings, "solver=rk2", "solver.n_steps=1")
    (planner,) = planners
    assert {shape for p in planner.profiles.values() for shape, _ in p.inputs} == {(state,)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("model.activation=relu", "model.activation=relu: .* choose softplus or gelu"),
        ("runtime.precision=bf16", "needs more digits; use fp32, tf32 or fp64"),
        ("model.blocks_per_stage=0", "model.blocks_per_stage=0: a density has no layers .* at least 1"),
        ("recipe.schedule=plateau", "needs recipe.patience"),
        ("recipe.patience=3", "recipe.patience: has no effect here; it needs recipe.schedule=plateau"),
        ("gradient=batched_adjoint", "use stage_checkpoint"),
        ("task.trace=sometimes", "choose one of exact, gaussian, rademacher"),
        ("task.trace=null", "task.trace=null: choose one of exact, gaussian, rademacher"),
        ("dataset=digits64 dataset.train_size=5", "dataset.train_size: there is no such setting"),
        ("dataset=cifar10", "not with task=density, which takes moons"),
    ],
)
def test_mistakes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        jobs(["task=density", *settings.split()], multirun=False)
