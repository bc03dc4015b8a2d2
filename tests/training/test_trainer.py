"""Whole runs on small data: records, schedule, divergence, signals."""

import json
import math
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anode_exp.build import evaluation_batch_size
from anode_exp.commands.together import train, train_together
from anode_exp.config.change import evaluations, resumed
from anode_exp.config.compose import jobs
from anode_exp.errors import UserError
from anode_exp.records.run_record import RunRecord
from anode_exp.runs import evaluate_run, load_run
from anode_exp.training import graphed_step as step_module
from anode_exp.training import trainer as fit

SMALL = [
    "dataset=fake", "dataset.train_size=10", "dataset.test_size=20", "model=resnet4",
    "recipe.batch_size=4", "recipe.epochs=2", "runtime.device=cpu",
]  # fmt: skip


def run(directory: Path, *overrides: str) -> dict:
    (config,) = jobs([*SMALL, *overrides], multirun=False).configs
    return train(config, directory)


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_records(tmp_path):
    run(tmp_path / "run", "solver=rk2", "recipe.milestones=[1]", "seed=3", "dataset.validation_size=20")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "completed"
    assert (results["epochs"], results["steps"], results["seed"]) == (2, 6, 3)
    assert set(results["wall_time_s"]) == {"train", "evaluation", "total", "first_step"}
    assert (
        results["wall_time_s"]["total"] >= results["wall_time_s"]["train"] >= results["wall_time_s"]["first_step"] > 0
    )
    block = {"forward": 4, "backward": 4}  # 2 steps of 2 stages
    assert results["nfe"] == {"forward": 4, "backward": 4, "blocks": [block]}
    assert results["peak_memory_bytes"] > 10**6 and results["peak_memory_kind"] == "live_tensor_bytes"
    assert results["parameters"]["ode_blocks"] > 0
    assert results["images_per_s"] > 0
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"device", "commit", "dataset_bytes", "best_epoch"} <= set(results)

    epochs = lines(tmp_path / "run")
    assert [e["epoch"] for e in epochs] == [1, 2]
    assert [e["lr"] for e in epochs] == pytest.approx([0.1, 0.01])
    assert [len(e["step_losses"]) for e in epochs] == [3, 3]
    weighted = sum(w * x for w, x in zip((4, 4, 2), epochs[1]["step_losses"], strict=True)) / 10
    assert results["train_loss"] == pytest.approx(weighted) == epochs[1]["train_loss"]
    assert results["test_accuracy"] == epochs[1]["test_accuracy"]
    assert results["best_test_accuracy"] == max(e["test_accuracy"] for e in epochs)
    assert results["validation_accuracy"] == epochs[1]["validation_accuracy"]

    assert "name: resnet4" in (tmp_path / "run" / "config.yaml").read_text()
    for name in ("last", "best"):
        state = torch.load(tmp_path / "run" / "checkpoints" / f"{name}.pt", weights_only=True)
        assert {"network", "optimizer", "progress", "random_state"} <= set(state)
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_tensorboard_shows_curves_and_hyperparameters(tmp_path):
    run(tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Tags()["scalars"]
    for tag in (
        "loss/train", "accuracy/test", "learning_rate", "peak_memory_bytes", "epoch_time_s/train",
        "nfe_per_step/forward", "hparam/test_accuracy",
    ):  # fmt: skip
        assert tag in scalars, tag
    assert [e.step for e in events.Scalars("accuracy/test")] == [3, 6]
    assert [e.value for e in events.Scalars("epoch")] == [1, 2]
    assert [e.step for e in events.Scalars("train_step/loss")] == [1, 2, 3, 4, 5, 6]
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    first, second, other = (run(tmp_path / n, f"seed={s}") for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert first["train_loss"] == second["train_loss"] != other["train_loss"]


def test_a_narrow_network_and_an_odd_batch(tmp_path):
    """A case that crashes oneDNN in channels-last layout, in a process with two threads."""
    of_resnet4 = [*SMALL, "dataset.train_size=40", "recipe.batch_size=25"]
    asked = [*(s for s in of_resnet4 if "model" not in s), "model=squeezenext", "model.width=0.25"]
    done = command(tmp_path, "train", *asked, first="import torch; torch.set_num_threads(2)")
    assert done.returncode == 0, done.stderr


def test_max_steps_ends_the_run_early(tmp_path):
    results = run(tmp_path, "recipe.max_steps=4")
    assert (results["steps"], results["epochs"], results["status"]) == (4, 2, "completed")
    assert [e["steps"] for e in lines(tmp_path)] == [3, 4]


def test_divergence_is_a_result(tmp_path):
    results = run(tmp_path, "recipe.lr=1e30", "runtime.check_every=2", "dataset.train_size=40", "recipe.epochs=5")
    assert results["status"] == "diverged" and results["signal"] is None
    recorded = lines(tmp_path)
    assert len(recorded) == 1, "it ended in the first epoch"
    first_bad = next(i for i, loss in enumerate(recorded[0]["step_losses"]) if loss is None or not math.isfinite(loss))
    assert len(recorded[0]["step_losses"]) - first_bad <= 2, "at most check_every steps late"
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["train_loss"] is None and written["status"] == "diverged"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(tmp_path, monkeypatch, number):
    whole_step = step_module.train_step
    taken = []

    def step(*args, **kwargs):
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), number)
        return whole_step(*args, **kwargs)

    monkeypatch.setattr(step_module, "train_step", step)
    before = signal.getsignal(number)
    results = run(tmp_path)
    monkeypatch.undo()
    assert results["status"] == "interrupted" and results["signal"] == number
    assert len(taken) == results["steps"] == 2
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "interrupted"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("train_step", r"a training step: out of memory \(CUDA out of memory.*\); .*recipe.batch_size.*budget"),
        ("evaluate", r"evaluation: out of memory \(CUDA out of memory.*\); give a smaller recipe.test_batch_size"),
    ],
)
def test_running_out_of_memory_names_the_remedies(tmp_path, monkeypatch, where, message):
    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has …")

    monkeypatch.setattr(step_module if where == "train_step" else fit, where, short)
    with pytest.raises(UserError, match=message) as raised:
        run(tmp_path)
    assert "\n" not in str(raised.value)


def test_evaluation_batches_of_fixed_steps_change_no_accuracy(tmp_path):
    """Nor anything else, except the loss by the order in which it is summed."""
    small, large = (run(tmp_path / n, f"recipe.test_batch_size={n}", "solver=rk2") for n in ("3", "1000"))
    assert small["train_loss"] == large["train_loss"] and small["test_accuracy"] == large["test_accuracy"]
    ours, theirs = (lines(tmp_path / n) for n in ("3", "1000"))
    assert [e["test_loss"] for e in ours] == pytest.approx([e["test_loss"] for e in theirs], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "on_cuda", "on_cpu"),
    [
        ([], 1000, 128),
        (["solver=dopri5", "solver.adaptive=true"], 128, 128),  # part of the result
        (["gradient=budget", "gradient.memory=1GiB"], 256, 128),
        (["recipe.test_batch_size=77"], 77, 77),
    ],
    ids=str,
)
def test_how_many_images_are_evaluated_at_once(settings, on_cuda, on_cpu):
    (config,) = jobs(settings, multirun=False).configs
    assert evaluation_batch_size(config, torch.device("cuda")) == on_cuda
    assert evaluation_batch_size(config, torch.device("cpu")) == on_cpu


def test_the_speed_is_that_of_settled_steps(tmp_path, monkeypatch):
    """The first two steps of each process, warm-up and recording on CUDA, are left out: here they take 10 s each."""
    clock = [0.0]

    def timed(network, *args, **kwargs):
        steps.append(1)
        clock[0] += 10.0 if len(steps) <= 2 else 0.5
        return whole(network, *args, **kwargs)

    whole, steps = step_module.train_step, []
    monkeypatch.setattr(step_module, "train_step", timed)
    monkeypatch.setattr(fit.time, "perf_counter", lambda: clock[0])
    results = run(tmp_path / "run", "dataset.train_size=24")  # six steps of 4 images an epoch
    assert results["images_per_s"] == pytest.approx(4 / 0.5)
    assert results["wall_time_s"]["first_step"] == 10.0
    steps.clear()  # another process
    (config,) = jobs([*SMALL, "dataset.train_size=24", "recipe.epochs=3"], multirun=False).configs
    assert train(config, tmp_path / "run", resume=True)["images_per_s"] == pytest.approx(4 / 0.5)


def test_two_runs_never_share_a_directory(tmp_path):
    run(tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        run(tmp_path)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_the_residual_baseline_is_one_euler_step(tmp_path):
    results = run(tmp_path, "model.block=residual", "experiment=anode/fig3_rk2")
    assert (results["nfe"]["forward"], results["nfe"]["backward"]) == (1, 0)
    assert "n_steps: 1" in (tmp_path / "config.yaml").read_text()


@pytest.mark.cifar
def test_real_cifar_images_are_trained_on(cifar_root, tmp_path):
    """A few steps on real images: the loss of the first ten classes starts at ln 10 and falls."""
    (config,) = jobs(
        ["model=squeezenext", "model.width=0.25", "recipe.batch_size=16", "runtime.device=cpu",
         "dataset=cifar10", f"dataset.root={cifar_root}", "dataset.download=false",
         "dataset.train_size=200", "dataset.test_size=100", "recipe.epochs=6", "recipe.lr=0.1"],
        multirun=False,
    ).configs  # fmt: skip
    results = train(config, tmp_path)
    assert lines(tmp_path)[0]["step_losses"][0] == pytest.approx(math.log(10), abs=0.5)
    assert results["train_loss"] < lines(tmp_path)[0]["train_loss"] - 0.1


def test_adaptive_steps_are_in_the_records(tmp_path):
    adaptive = ["solver=bosh3", "solver.adaptive=true", "recipe.max_steps=2", "gradient=reverse_adjoint"]
    results = run(tmp_path / "run", *adaptive)
    nfe = results["nfe"]
    assert results["status"] == "completed" and results["reason"] is None
    assert nfe["accepted"] > 0 and nfe["backward_accepted"] > 0
    assert nfe["forward"] == 3 * (nfe["accepted"] + nfe["rejected"]) + 2, "two more a solve"
    assert nfe["backward"] == 3 * (nfe["backward_accepted"] + nfe["backward_rejected"]) + 1
    (line,) = lines(tmp_path / "run")
    assert line["nfe_accepted"] == nfe["accepted"]


@pytest.mark.parametrize("limit", ["solver.max_evaluations=4", "solver.min_step=0.9"])
def test_a_solve_that_does_not_end_is_a_divergence(tmp_path, limit):
    results = run(tmp_path / "run", "solver=dopri5", "solver.adaptive=true", "solver.rtol=1e-6", limit)
    assert results["status"] == "diverged" and results["steps"] == 1
    assert limit.split(".")[1].partition("=")[0] in results["reason"]
    assert results["peak_memory_bytes"] > 0


def test_epochs_can_be_kept(tmp_path):
    run(tmp_path / "run", "runtime.keep_every=1")
    untrained, first, second = (load_run(tmp_path / "run", name) for name in ("0", "1", "2"))
    last = load_run(tmp_path / "run", "last")
    weights = [torch.cat([p.detach().flatten() for p in r.network.parameters()]) for r in (untrained, first, second)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    for a, b in zip(second.network.parameters(), last.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (untrained.epoch, first.epoch, second.epoch) == (0, 1, 2)
    with pytest.raises(UserError, match=r"checkpoint=3: choose one of best, last, 0, 1, 2"):
        load_run(tmp_path / "run", "3")


def test_averaged_weights_are_evaluated(tmp_path):
    """The average of the weights after every step, decay 0.5, by hand; a recorded run returns the same."""
    seen = []
    settings = ["recipe.moving_average=0.5", "recipe.epochs=1", "seed=1"]

    def watch(network, *arguments, **kwargs):
        result = step_module_train_step(network, *arguments, **kwargs)
        seen.append({k: v.clone() for k, v in network.state_dict().items()})
        return result

    step_module_train_step = step_module.train_step
    step_module.train_step = watch
    try:
        results = run(tmp_path / "run", *settings)
    finally:
        step_module.train_step = step_module_train_step
    expected = seen[0]
    for state in seen[1:]:
        expected = {k: 0.5 * v + 0.5 * state[k] for k, v in expected.items()}
    loaded = load_run(tmp_path / "run", "last")
    found = loaded.network.state_dict()
    assert len(seen) == 3 and found.keys() == expected.keys()
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in found)
    assert not all(torch.allclose(found[k], seen[-1][k], atol=1e-4) for k in found)
    assert 0 <= results["test_accuracy"] <= 1


def test_an_averaged_run_goes_on(tmp_path):
    settings = ["recipe.moving_average=0.9"]
    run(tmp_path / "whole", *settings)
    run(tmp_path / "parts", *settings, "recipe.epochs=1")
    (config,) = jobs([*SMALL, *settings], multirun=False).configs
    train(config, tmp_path / "parts", resume=True)
    ours, truth = (load_run(tmp_path / d, "last").network.state_dict() for d in ("parts", "whole"))
    assert all(torch.equal(ours[k], truth[k]) for k in truth)


def test_momentum_restarts_with_every_epoch(tmp_path):
    """As with a new optimiser: the first update of an epoch is lr times the gradient."""
    settings = ["recipe.restart_momentum=true", "recipe.weight_decay=0", "runtime.check_every=1"]
    moved = []

    def watch(network, optimizer, *arguments, **kwargs):
        before = [p.detach().clone() for p in network.parameters()]
        result = whole(network, optimizer, *arguments, **kwargs)
        pairs = zip(before, network.parameters(), strict=True)
        moved.append(max(float((b - p.detach() - 0.1 * p.grad).abs().max()) for b, p in pairs))
        return result

    whole = step_module.train_step
    step_module.train_step = watch
    try:
        run(tmp_path / "run", *settings)
    finally:
        step_module.train_step = whole
    assert len(moved) == 6
    assert moved[0] < 1e-6 and moved[3] < 1e-6 and moved[1] > 1e-4 and moved[4] > 1e-4


def test_smoothed_labels_are_the_loss_trained_on(tmp_path):
    plain, smooth = (run(tmp_path / n, f"recipe.label_smoothing={n}", "recipe.max_steps=1") for n in ("0", "0.5"))
    assert plain["train_loss"] != smooth["train_loss"]


def test_averaging_leaves_indices_alone(tmp_path):
    """With evolving weights: a recorded run returns what was recorded."""
    results = run(tmp_path / "run", "model.evolution=reaction_diffusion_advection", "recipe.moving_average=0.9")
    (row,) = evaluate_run(tmp_path / "run", "last", evaluations(tmp_path / "run", []))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["test_accuracy"] == results["test_accuracy"]
    assert row["test_loss"] == pytest.approx(last["test_loss"], rel=1e-5)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    """Several at once: one in use, one that has ended; an error is raised after the others have ended."""
    configs = [jobs([*SMALL, f"seed={seed}"], multirun=False).configs[0] for seed in range(3)]
    train(configs[0], tmp_path / "0")
    with record_of(tmp_path / "1", configs[1]):
        results = train_together([(c, tmp_path / str(c.seed)) for c in configs], resume=True)
    assert [r.get("status") for r in results] == ["completed", None, "completed"]
    with pytest.raises(UserError, match="has ended"):
        train_together([(configs[0], tmp_path / "0"), (configs[2], tmp_path / "2")], resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        train_together([(configs[0], tmp_path / "0"), (configs[1], tmp_path / "new")])
    assert json.loads((tmp_path / "new" / "results.json").read_text())["status"] == "completed"


@contextmanager
def record_of(directory, config):
    record = RunRecord(directory, config)
    try:
        yield
    finally:
        record.close()


def test_a_cosine_schedule_ends_where_it_ends(tmp_path):
    run(tmp_path / "run", "recipe.schedule=cosine")
    with pytest.raises(UserError, match="start a new run for another length"):
        resumed(tmp_path / "run", ["recipe.epochs=4"])


def test_an_implicit_solver_trains_and_counts(tmp_path):
    """Images by GMRES: evaluations, Newton and linear iterations of each step are recorded; divergence is a result."""
    small = ["recipe.max_steps=1", "recipe.epochs=1", "recipe.batch_size=2", "dataset.train_size=2"]
    small += ["dataset.test_size=1", "solver=backward_euler", "solver.n_steps=1", "solver.newton_rtol=1e-2"]
    small += ["model.field_gain=0.2"]  # a mild field, for few iterations
    (config,) = jobs([*SMALL, *small], False).configs
    results = train(config, tmp_path / "run")
    nfe = results["nfe"]
    assert results["status"] == "completed" and results["steps"] == 1
    assert nfe["newton"] >= 1 and nfe["linear"] >= nfe["newton"] and "jacobians" not in nfe and "accepted" not in nfe
    assert nfe["forward"] > nfe["newton"] and lines(tmp_path / "run")[0]["nfe_newton"] == nfe["newton"]
    config.solver.newton_max_iterations, config.solver.newton_rtol = 1, 1e-12
    results = train(config, tmp_path / "failed")
    assert results["status"] == "diverged" and "Newton's method at t = " in results["reason"]


@pytest.mark.parametrize("higher", [True, False])
def test_a_score_that_is_no_number_is_not_the_best(higher):
    trainer = SimpleNamespace(task=SimpleNamespace(higher_is_better=higher))
    best = None
    for score in (math.nan, 0.5, math.nan, 0.7, math.nan):
        best = fit.Trainer._better(trainer, score, best)
    assert best == (0.7 if higher else 0.5)
