"""The density study's measurements of flows whose densities are known, and its report."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import solver

from anode_exp.config.compose import composed
from anode_exp.config.schema import StudyConfig
from anode_exp.data.densities import load_density
from anode_exp.errors import UserError
from anode_exp.gradient import GRADIENT_MODES
from anode_exp.models import OdeBlock
from anode_exp.models.normalizing_flow import FlowField, NormalizingFlow
from anode_exp.ode import TimeGrid
from anode_exp.report.density import report
from anode_exp.studies.density import gradient_rows, grid_of, likelihood, rows


def flow(mode="full_backprop", tableau="rk4", n_steps=4, factor=1.0):
    torch.manual_seed(0)
    field = FlowField(2, (8, 8))
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(factor)
    return NormalizingFlow([OdeBlock(field, solver(tableau), TimeGrid(n_steps), GRADIENT_MODES[mode]())])


def data(name="moons"):
    made = load_density(name, train_size=300, validation_size=20, test_size=200).to(torch.device("cpu"), torch.float32)
    return replace(made, offset=1.5)


def test_likelihood_integrals_and_round_trip(monkeypatch):
    monkeypatch.setattr("anode_exp.studies.density.RESOLUTION", 120)
    row, pictures = likelihood(flow(factor=2.0), data(), samples=50)
    assert row["nll"] == pytest.approx(1.5 - float(flow(factor=2.0).log_prob(data().test).mean()), abs=1e-4)
    assert row["nll_by_steps"] == pytest.approx(row["nll"], abs=1e-3)
    assert row["integral"] == pytest.approx(1, abs=5e-3) and row["round_trip"] < 1e-4
    assert not row["exploits_steps"]
    assert pictures["samples"].shape == (50, 2) and pictures["density"].shape == (120**2,)
    points, area = grid_of(data().train)
    assert points.min() == -points.max() and points.max() == pytest.approx(float(data().train.abs().max()) + 3)
    assert area == pytest.approx(float(points[1, 1] - points[0, 1]) ** 2, rel=1e-4)


def test_a_density_of_coarse_steps_does_not_integrate_to_one(monkeypatch):
    monkeypatch.setattr("anode_exp.studies.density.RESOLUTION", 120)
    row, _ = likelihood(flow(tableau="euler", n_steps=1, factor=6.0), data(), samples=50)
    assert row["integral"] == pytest.approx(1, abs=5e-3)
    assert abs(row["integral_by_steps"] - 1) > 0.02
    assert abs(row["nll_by_steps"] - row["nll"]) > 0.05 and row["exploits_steps"]


def test_rows_of_gradient_modes():
    modes = ("full_backprop", "stage_checkpoint", "reverse_adjoint")
    x = data().train[:64]
    rows = {row["gradient"]: row for row in gradient_rows({m: flow(m, factor=3.0) for m in modes}, (x,), 1, int)}
    assert list(rows) == list(modes)
    assert rows["full_backprop"]["relative_error"] == 0.0 < rows["stage_checkpoint"]["relative_error"] < 1e-14
    assert rows["reverse_adjoint"]["relative_error"] > 1e-7
    assert rows["stage_checkpoint"]["counted_bytes"] < 0.5 * rows["full_backprop"]["counted_bytes"]
    assert rows["stage_checkpoint"]["nfe_backward"] == 16


def rows_of(**flow_row):
    yield {"kind": "density", "name": "the true density", "nll": 2.39}
    yield {"kind": "density", "name": "mixture", "chosen": "20 components", "nll": 2.4}
    found = {"nll": 2.45, "nll_by_steps": 2.45, "round_trip": 1e-5, "chosen": "rk4, 4 steps", "exploits_steps": False}
    found |= flow_row
    yield {"kind": "density", "name": "run", "epoch": 3, **found}
    for i, mode in enumerate(("full_backprop", "stage_checkpoint")):
        sizes = {"counted_bytes": 4_000_000 >> i, "cuda_bytes": None}
        yield {"kind": "gradient", "name": "run", "gradient": mode, "relative_error": 0.0, **sizes,
               "time_ratio": 1.0 + i, "nfe_forward": 16, "nfe_backward": 16 * i}  # fmt: skip


def test_the_report_of_densities_in_the_plane(tmp_path):
    axis = np.linspace(-1, 1, 5)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    of_run = {f"run|{key}": np.ones(25) for key in ("density", "density_by_steps")}
    np.savez(
        tmp_path / "pictures.npz", points=points, data=points, truth=np.ones(25), **{"run|samples": points}, **of_run
    )
    text = report(list(rows_of(integral=1.00002, integral_by_steps=19.9)), tmp_path)
    assert "2.4500" in text and "19.90000" in text and "×2.00" in text and "0.500" in text
    assert "has learned the errors" not in text
    assert (tmp_path / "study.png").stat().st_size > 5000


def test_the_report_of_other_densities_warns_of_coarse_steps(tmp_path):
    rows = [json.loads(json.dumps(row)) for row in rows_of(nll_by_steps=2.35, exploits_steps=True)]
    text = report(rows, tmp_path)
    assert "run: the flow has learned the errors of its steps (rk4, 4 steps); −log p by them is off by -0.100" in text
    assert (tmp_path / "study.png").stat().st_size > 5000


def test_too_few_samples_for_the_baselines(monkeypatch, tmp_path):
    config = composed(["task=density", "dataset=moons", "dataset.validation_size=0", "runtime.device=cpu"])
    monkeypatch.setattr("anode_exp.studies.density.load_run", lambda *_: SimpleNamespace(config=config, directory="x"))
    for samples, says in ((40, "40 training samples and 0 for validation"), (60, "60 training samples and 0 for")):
        with pytest.raises(UserError, match=says):
            next(rows(config, StudyConfig(name="density", run="x", samples=samples), 2, None, tmp_path))
