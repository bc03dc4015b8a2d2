"""The studies as a user types them, and what they must find."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from command import command
from conftest import Repeat, make_ode_block

from anode_exp.budget.measure import Planner
from anode_exp.build import build_model
from anode_exp.commands.together import train
from anode_exp.config.compose import composed, jobs
from anode_exp.config.studies import study
from anode_exp.errors import UserError
from anode_exp.models import MODELS, ode_blocks
from anode_exp.records.reading import read_lines
from anode_exp.report.gradient_error import order_in_dt
from anode_exp.report.memory import growth
from anode_exp.report.memory import report as memory_report
from anode_exp.studies.evolution import kernels_over_time
from anode_exp.studies.gradient_error import rows as gradient_error_rows
from anode_exp.studies.memory import peaks_and_times
from anode_exp.studies.reversibility import Flow, fixed, steps_for, to_tolerance
from anode_exp.studies.study import run_study


def run(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    return command(cwd, "study", *arguments)


def rows(cwd: Path) -> list[dict]:
    (file,) = cwd.glob("outputs/*/*/study.jsonl")
    assert (file.parent / "study.png").stat().st_size > 10_000
    assert {"config.yaml", "environment.json", "table.txt"} <= {f.name for f in file.parent.iterdir()}
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_memory(tmp_path):
    small = ["model.width=0.25", "study.repeats=1", "study.batch_size=4"]
    done = run(
        tmp_path, "memory", *small, "study.n_steps=[3,6]", "study.blocks_per_stage=[]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = rows(tmp_path)
    assert len(steps) == 2 * 12
    per_step = {label: b for label, (_, b) in growth([{**r, "cuda_bytes": None} for r in steps], "n_steps").items()}
    full = per_step["full_backprop"]
    assert per_step["dto_checkpoint"] < 0.7 * full, "one block of four at a time"
    assert per_step["step_checkpoint keep"] < per_step["stage_checkpoint keep"] < 0.35 * full
    assert per_step["step_checkpoint rebuild"] < per_step["step_checkpoint keep"]
    for flat in (
        "revolve stage 3",
        "equispaced stage 3",
        "reverse_adjoint",
        "alf reversible",
        "reversible_rk reversible",
    ):
        assert per_step[flat] < 0.02 * full, flat
    modes = "study.modes=[full_backprop,dto_checkpoint,reverse_adjoint]"
    varied = [*small, "study.n_steps=[]", "study.blocks_per_stage=[1,2]", "solver.n_steps=2", modes]
    (tmp_path / "blocks").mkdir()
    run_study(*study("memory", varied), tmp_path / "blocks")
    blocks = read_lines(tmp_path / "blocks" / "study.jsonl")
    assert len(blocks) == 2 * 3
    found = steps + blocks
    per_block = {label: b for label, (_, b) in growth(blocks, "blocks_per_stage").items()}
    assert per_block["dto_checkpoint"] == pytest.approx(per_block["reverse_adjoint"], rel=0.1), "a block's input each"
    assert per_block["full_backprop"] > 10 * per_block["dto_checkpoint"]
    assert all(r["step_time_s"] > 0 and r["nfe_forward"] > 0 for r in found)
    assert {r["time_ratio"] for r in found if r["gradient"] == "full_backprop"} == {1.0}
    assert "O(L N)" in done.stdout and "fit, MB" in done.stdout
    assert "n_steps" not in memory_report(blocks, tmp_path), "of one grid alone"


def test_gradient_error_at_initialisation_and_for_a_trained_run(tmp_path):
    small = ["study.n_steps=[1,2]", "study.solvers=[euler,rk2,alf]", "study.batch_size=4",
             "study.adaptive_solvers=[bosh3]", "study.tolerances=[1e-1,1e-3]"]  # fmt: skip
    trained = tmp_path / "trained"
    settings = ["dataset=digits", "dataset.train_size=16", "dataset.test_size=10", "model=resnet4",
                "recipe.epochs=2", "recipe.batch_size=8", "runtime.keep_every=1"]  # fmt: skip
    train(jobs(settings, multirun=False).configs[0], trained)
    for folder, extra in (
        ("a", ["model=resnet4", "study.n_steps=[2]", "study.tolerances=[1e-3]", "study.batch_size=2"]),
        ("b", [f"run={trained}", "study.precisions=[fp64]", "study.n_steps=[1]", "study.tolerances=[1e-1]"]),
    ):
        (tmp_path / folder).mkdir()
        done = run(tmp_path / folder, "gradient_error", *small, *extra)
        assert done.returncode == 0, done.stderr
        found = rows(tmp_path / folder)
        if folder == "a":
            low = [r for r in found if r["precision"] != "fp64"]
            assert len(found) == 3 * (7 + 8 + 1) + (3 + 4 + 1), "three solvers with all modes but one, and alf"
            errors = {(r["solver"], r["tolerance"], r["precision"], r["gradient"]): r["relative_error"] for r in low}
            for solver, tolerance in (("euler", None), ("rk2", None), ("bosh3", 1e-3), ("alf", None)):
                of_float32, of_bfloat16 = (errors[solver, tolerance, p, "full_backprop"] for p in ("fp32", "bf16"))
                assert 1e-7 < of_float32 < 0.2 * of_bfloat16, solver
            (drift,) = [r["drift"] for r in low if "drift" in r]
            assert 0 < drift < 0.01
            for shown in ("full_backprop, bf16", "reversible, fp32: drift"):
                assert shown in done.stdout
        else:
            assert len(found) == (2 * 1 + 1) * 7 + 3
        for row in (r for r in found if r["precision"] == "fp64"):
            if row["gradient"] in ("reverse_adjoint", "stored_adjoint"):
                assert row["relative_error"] > 1e-4
            else:
                assert row["relative_error"] <= (1e-12 if row["gradient"] == "reversible" else 1e-14), row
            if row["gradient"] == "reverse_adjoint":
                parts = row["reversal_error"], row["inconsistency_error"]
                assert abs(parts[0] - parts[1]) <= row["relative_error"] <= parts[0] + parts[1]
                same = ("solver", "n_steps", "tolerance", "precision")
                (stored,) = [
                    r for r in found if r["gradient"] == "stored_adjoint" and all(r[k] == row[k] for k in same)
                ]
                assert stored["relative_error"] == parts[1]
        assert "reverse_adjoint: reversal" in done.stdout
    first, second = ({json.dumps(r) for r in rows(tmp_path / f) if "reverse_" in r["gradient"]} for f in "ab")
    assert first != second, "the trained weights were used"

    (tmp_path / "c").mkdir()
    done = run(tmp_path / "c", "gradient_error", f"run={trained}", "checkpoint=every", "study.batch_size=4",
               "study.precisions=[fp64]")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "c")
    assert [r["epoch"] for r in found if r["gradient"] == "reverse_adjoint"] == [0, 1, 2]
    assert {(r["solver"], r["n_steps"]) for r in found} == {("euler", 2)}, "the run's own"
    assert len({r["relative_error"] for r in found if r["gradient"] == "reverse_adjoint"}) == 3


def test_order_in_dt():
    rows = [{"n_steps": n, "relative_error": 5 / n**3} for n in (2, 4, 8, 16)] + [
        {"n_steps": 32, "relative_error": 1e-16}
    ]
    assert order_in_dt(rows) == pytest.approx(3)
    assert order_in_dt([{"n_steps": None, "relative_error": 1.0}]) is None


def test_an_adaptive_solve_that_fails_is_a_row():
    table = ["study.solvers=[]", "study.tolerances=[1e-3]", "solver.max_evaluations=3", "model.width=0.25"]
    config, settings = study("gradient_error", table)
    batch = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    (row,) = list(gradient_error_rows(config, settings, 10, batch, Path(".")))
    assert row["relative_error"] is None and "max_evaluations = 3" in row["reason"]


def test_weights_of_their_own_in_every_step_have_fixed_steps_alone():
    settings = ["study.solvers=[rk2]", "study.n_steps=[2]", "study.precisions=[fp64]", "model=resnet4"]
    evolving = ["model.evolution=reaction_diffusion_advection", "model.evolution_coupling=joint"]
    config, asked = study("gradient_error", settings + evolving)
    found = list(gradient_error_rows(config, asked, 10, (torch.randn(2, 3, 32, 32), torch.tensor([1, 2])), Path(".")))
    assert {r["tolerance"] for r in found} == {None} and len(found) == len(asked.gradients)
    for row in found:
        wrong = row["gradient"] in ("reverse_adjoint", "stored_adjoint")
        assert row["relative_error"] > 1e-4 if wrong else row["relative_error"] <= 1e-14


def test_reversibility(tmp_path):
    done = run(tmp_path, "reversibility", "study.cases=false", "study.tolerances=[1e-5]")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert len(found) == 4 * 3
    undone = [r["rho"] for r in found if r["solver"].endswith("undone")]
    assert len(undone) == 4 and all(r["rho"] > 0.1 for r in found if r["rho"] not in undone), (
        "a field this strong cannot be gone back"
    )
    assert sorted(undone)[2] < 0.01 < max(undone) < 0.2, "but undone: three activations, and none"
    mild = run(tmp_path / "outputs", "reversibility", "study.cases=false", "study.weight_std=0.1")
    assert mild.returncode == 0, mild.stderr
    assert all(r["rho"] < 1e-3 for r in rows(tmp_path / "outputs"))


def test_reversals_in_closed_form():
    """Euler there and back multiplies by (1 + h)ⁿ(1 − h)ⁿ for dz/dt = z; one step of a·max(0, z) loses a² z0."""
    one = torch.ones(1, dtype=torch.float64)
    for n in (1, 4, 10):
        assert fixed(Flow(lambda y: y), one, n, "euler") == pytest.approx(1 - (1 - 1 / n**2) ** n, rel=1e-10)
    assert fixed(Flow(lambda y: 0.3 * y.relu()), one, 1, "euler") == pytest.approx(0.09)
    assert steps_for(Flow(lambda y: y), one, 0.1, "euler", 64) == 16, "1/n for large n"
    assert steps_for(Flow(lambda y: y), one, 0.1, "euler", 8) is None
    r, there, back = to_tolerance(Flow(lambda y: -y), one, 1e-8)
    assert r < 1e-7 and there > 3 and back > 3


def test_budget(tmp_path):
    done = run(tmp_path, "budget", "model=resnet10", "solver.n_steps=2", "study.batch_size=2", "study.repeats=1")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert len(found) == 8
    for row in found:
        assert row["counted_bytes"] <= row["budget_bytes"]
        assert row["counted_bytes"] == pytest.approx(row["predicted_bytes"], rel=0.1)
    assert found[0]["counted_bytes"] < found[-1]["counted_bytes"]


def test_default_budgets_fit_whatever_an_allocator_adds(tmp_path, monkeypatch):
    counted = Planner.measure
    monkeypatch.setattr(Planner, "measure", lambda p, plan: counted(p, plan) + 512 * sum(map(len, plan.policies)))
    settings = ["model=resnet4", "solver.n_steps=2", "study.batch_size=4", "study.repeats=1"]
    run_study(*study("budget", settings), tmp_path)
    found = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert len(found) == 8 and all(row["dry_step_bytes"] <= row["budget_bytes"] for row in found)


def test_recorded_steps_are_timed_where_runs_replay_theirs():
    networks = {m: MODELS["resnet4"](10, make_ode_block(m)) for m in ("full_backprop", "dto_checkpoint")}
    captures = []

    def capture():
        captures.append(Repeat(list(networks.values())[len(captures)]))
        return captures[-1]

    batch = torch.randn(2, 3, 32, 32), torch.arange(2)
    found = list(peaks_and_times(networks, batch, "fp32", 3, lambda: None, capture))
    assert [c.replays for c in captures] == [1 + 3] * 2
    assert [row["nfe_backward"] for row in found] == [0, 4] and all(row["step_time_s"] > 0 for row in found)


def test_turns_that_take_too_long_are_left_out():
    networks = {m: MODELS["resnet4"](10, make_ode_block(m)) for m in ("full_backprop", "dto_checkpoint")}
    batch = torch.randn(2, 3, 32, 32), torch.arange(2)
    for longest, turns in ((1e-9, 3), (1e9, 5)):
        found = list(peaks_and_times(networks, batch, "fp32", 5, lambda: None, longest=longest))
        assert [row["turns"] for row in found] == [turns] * 2


def test_some_of_the_modes():
    _, settings = study("memory", ["study.modes=[alf reversible,full_backprop]"])
    assert list(settings.gradients) == ["full_backprop", "alf reversible"], "the first is what times are over"


def test_a_gradient_mode_of_ones_own():
    _, settings = study("memory", ["+study.gradients.mine={name: revolve, unit: step, slots: 7}"])
    assert settings.gradients["mine"].slots == 7 and len(settings.gradients) == 13


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "memry",
            [],
            "choose one of batchnorm, budget, density, evolution, gradient_error, memory, reversibility, stiff; "
            "did you mean memory?",
        ),
        ("memory", ["study.n_steps=[0]"], "study.n_steps=[0]: give a list of whole numbers, at least 1"),
        ("memory", ["study.n_steps=[a]"], "study.n_steps[0]=a: give a list of whole numbers"),
        ("memory", ["study.step=[1]"], "study.step: there is no such setting"),
        ("memory", ["solver=rk5"], "solver=rk5: there is no such solver"),
        ("memory", ["solver=rk2,rk4"], "a study takes one"),
        (
            "budget",
            ["study.budgets=[2G]"],
            "study.budgets=2G: give a number of bytes above 0 with a unit, such as 2GiB",
        ),
        ("gradient_error", ["+study.gradients.a={name: budget, memory: 1GiB}"], "see study budget"),
        ("gradient_error", ["+study.gradients.a={name: revolve, baseline: torch_checkpoint}"], "does not use it"),
        (
            "memory",
            ["+study.gradients.a={name: revolve, baseline: torch}"],
            "baseline=torch: choose one of torch_checkpoint",
        ),
        ("memory", ["study.longest=0"], "study.longest=0"),
        (
            "gradient_error",
            ["study.adaptive_solvers=[rk4]"],
            "rk4 has no error estimate; choose from heun, bosh3, dopri5",
        ),
        ("gradient_error", ["study.checkpoint=first"], "choose best, last, the number of an epoch, or every"),
        ("gradient_error", ["study.solvers=[rk5]"], "rk5 is not a solver; choose from alf, backward_euler, bosh3"),
        ("gradient_error", ["+study.gradients.a={name: sorcery}"], "sorcery is not a gradient"),
        ("memory", ["study.modes=[alf reversibel]"], "choose from full_backprop, dto_checkpoint, step_checkpoint keep"),
        ("memory", ["study.modes=[alf reversibel]"], "did you mean alf reversible?"),
        (
            "gradient_error",
            ["study.modes=[dto_checkpoint,reversible]", "study.solvers=[rk2]", "study.adaptive_solvers=[]"],
            "study.gradients.reversible: ",
        ),
    ],
)
def test_mistakes(name, overrides, message):
    with pytest.raises(UserError) as raised:
        study(name, overrides)
    assert message in str(raised.value)


def test_kernels_over_time():
    """A diffusing kernel by hand: a delta spreads, its sum stays; advection by one spacing shifts it."""
    config = composed(["model=resnet4", "model.evolution=reaction_diffusion_advection"])
    network = build_model(config.model, config.solver, config.gradient, 10)
    (block,) = ode_blocks(network)
    for i, flow in zip(block.evolution.places, block.evolution.flows, strict=True):
        weight = list(block.f.parameters())[i]
        weight.data.zero_()
        weight.data[3, 5, 1, 1] = 1.0
        (flow.tau if i == 0 else flow.upsilon).data[0] = 1.0
    (spread, first), (shifted, second) = kernels_over_time(network)
    assert first.shape == second.shape == (6, 3, 3)
    torch.testing.assert_close(first.sum((1, 2)), torch.ones(6))
    assert (first[:, 1, 1].diff() < 0).all() and spread["moved"][0] == 0 and spread["tau"] == 1.0
    expected = torch.zeros(3, 3)
    expected[0, 1] = 1.0
    torch.testing.assert_close(second[-1], expected, atol=1e-6, rtol=0)
    assert shifted["cosine"][-1] == pytest.approx(0, abs=1e-6)


def test_study_evolution(tmp_path):
    settings = ["dataset=digits", "dataset.train_size=32", "dataset.test_size=16", "recipe.batch_size=16",
                "recipe.epochs=1", "model=resnet4"]  # fmt: skip
    evolving = ["model.evolution=reaction_diffusion_advection", "model.evolution_sharing=channel"]
    train(jobs([*settings, *evolving], multirun=False).configs[0], tmp_path / "run")
    directory = run_study(*study("evolution", [f"study.run={tmp_path / 'run'}"]), tmp_path / "study")
    assert (directory / "study.png").stat().st_size > 1000
    assert "cosine" in (directory / "table.txt").read_text()
    train(jobs(settings, multirun=False).configs[0], tmp_path / "constant")
    with pytest.raises(UserError, match="needs run=DIR, a run with"):
        run_study(*study("evolution", [f"study.run={tmp_path / 'constant'}"]), tmp_path / "none")


def test_study_batchnorm(tmp_path):
    """A run with one set and one with statistics by time of the same weights: the same accuracies from both."""
    settings = ["dataset=digits", "dataset.train_size=64", "dataset.test_size=64", "recipe.batch_size=32",
                "recipe.epochs=2", "model=resnet4"]  # fmt: skip
    for name in ("forward", "by_time"):
        chosen = [*settings, f"model.statistics={name}", "runtime.keep_every=1"]
        train(jobs(chosen, multirun=False).configs[0], tmp_path / name)
    runs = f"study.run='{tmp_path / 'forward'},{tmp_path / 'by_time'}'"
    directory = run_study(*study("batchnorm", [runs, "study.calibrate=2"]), tmp_path / "study")
    found = [json.loads(line) for line in (directory / "study.jsonl").read_text().splitlines()]
    assert [(r["run"], r["epoch"]) for r in found] == [("forward", 1), ("forward", 2), ("by_time", 1), ("by_time", 2)]
    for mine, theirs in zip(found[:2], found[2:], strict=True):
        assert mine["train_loss"] == theirs["train_loss"], "training is the same"
        assert mine["one_set_anew"] == theirs["one_set_anew"]
        assert mine["one_set_kept"] is not None and theirs["one_set_kept"] is None
    assert not (tmp_path / "forward" / "evaluations.jsonl").exists(), "the run is left as it was"
    text = (directory / "table.txt").read_text()
    assert f"{100 * found[1]['by_time']:.2f}" in text and f"{100 * found[3]['one_set_anew']:.2f}" in text
    assert (directory / "study.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="needs run=DIR"):
        run_study(*study("batchnorm", []), tmp_path / "none")
    train(jobs([*settings, "recipe.epochs=1"], multirun=False).configs[0], tmp_path / "unkept")
    with pytest.raises(UserError, match=r"kept no epochs; train with runtime\.keep_every=1"):
        run_study(*study("batchnorm", [f"study.run={tmp_path / 'unkept'}"]), tmp_path / "none")
