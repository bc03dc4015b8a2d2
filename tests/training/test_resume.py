"""A run that is stopped in any way and resumed ends as a run that was never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import Begun, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from anode_exp.commands.together import train
from anode_exp.config.change import resumed
from anode_exp.config.compose import jobs
from anode_exp.errors import UserError
from anode_exp.records import run_record
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.records.reading import append_line, read_lines, read_metrics
from anode_exp.records.run_record import RunRecord
from anode_exp.training import graphed_step as step_module

SMALL = [
    "dataset=digits", "dataset.train_size=10", "dataset.test_size=10", "model=resnet4",
    "solver=rk2", "recipe.batch_size=4", "recipe.epochs=3", "recipe.milestones=[1,2]", "runtime.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_second_is_waited_for(monkeypatch):
    """A record waits for the next second if it has events of this one: here the clock of both is put forward."""
    clock = SimpleNamespace(ahead=0.0, time=lambda: time.time() + clock.ahead)
    clock.sleep = lambda seconds: setattr(clock, "ahead", clock.ahead + seconds)
    monkeypatch.setattr(run_record, "time", clock)
    monkeypatch.setattr(event_file_writer, "time", clock)


def config_of(*overrides: str):
    (config,) = jobs([*SMALL, *overrides], multirun=False).configs
    return config


def go_on(directory: Path, *overrides: str) -> dict:
    return train(resumed(directory, list(overrides)), directory, resume=True)


def end_state(directory: Path) -> list[torch.Tensor]:
    state = torch.load(directory / "checkpoints" / "last.pt", weights_only=True)
    momentum = [s["momentum_buffer"] for _, s in sorted(state["optimizer"]["state"].items())]
    return [*state["network"].values(), *momentum]


def assert_same_end(directory: Path, truth: Path, also: tuple[str, ...] = ()) -> None:
    """``also``: values of an epoch that may differ, besides times and memory."""
    ours, theirs = end_state(directory), end_state(truth)
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    curves = []
    for d in (directory, truth):
        lines = [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]
        measured = ("images_per_s", "train_time_s", "evaluation_time_s", "peak_memory_bytes", *also)
        curves.append([{k: v for k, v in line.items() if k not in measured} for line in lines])
    assert curves[0] == curves[1]
    events = [EventAccumulator(str(d), size_guidance={"scalars": 0}).Reload() for d in (directory, truth)]
    for tag in ("accuracy/test", "train_step/loss", "learning_rate"):
        ours, theirs = ([(e.step, e.value) for e in accumulator.Scalars(tag)] for accumulator in events)
        assert ours == theirs, tag


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("truth")
    train(config_of(), directory)
    return directory


def interrupted(directory: Path, monkeypatch, at_step: int) -> None:
    whole_step, taken = step_module.train_step, []

    def step(*args, **kwargs):
        taken.append(1)
        if len(taken) == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_step(*args, **kwargs)

    monkeypatch.setattr(step_module, "train_step", step)
    results = train(config_of(), directory)
    monkeypatch.undo()
    assert (results["status"], results["steps"], results["signal"]) == ("interrupted", at_step, signal.SIGTERM)


@pytest.mark.parametrize("at_step", [1, 3, 5])
def test_a_run_stopped_within_an_epoch_goes_on_from_its_step(tmp_path, monkeypatch, truth, at_step):
    interrupted(tmp_path, monkeypatch, at_step)
    results = go_on(tmp_path)
    assert (results["status"], results["epochs"], results["steps"]) == ("completed", 3, 9)
    assert_same_end(tmp_path, truth)


def test_a_run_stopped_and_resumed_at_every_step(tmp_path, monkeypatch, truth):
    interrupted(tmp_path, monkeypatch, 1)
    whole_step = step_module.train_step
    for _ in range(20):
        taken = []

        def step(*args, taken=taken, **kwargs):
            taken.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            return whole_step(*args, **kwargs)

        monkeypatch.setattr(step_module, "train_step", step)
        results = go_on(tmp_path)
        if results["status"] == "completed":
            break
        assert len(taken) <= 1
    assert results["status"] == "completed"
    assert_same_end(tmp_path, truth)


def test_a_killed_process_goes_on(tmp_path, truth):
    """SIGKILL at random moments, again and again, until the run is done."""
    arguments = [*SMALL, f"hydra.run.dir={tmp_path / 'run'}"]
    chance = random.Random(0)
    for attempt in range(30):
        begun = Begun(tmp_path, "train", *arguments)
        if attempt < 3:
            deadline = time.monotonic() + 60
            checkpoint = tmp_path / "run" / "checkpoints"
            while not checkpoint.exists() and begun.process.exitcode is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.35))
            begun.process.kill()
        done = begun.end(timeout=120)
        ended = done.returncode == 2 and "has ended" in done.stderr  # it was killed after its results were written
        if done.returncode == 0 or ended:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        arguments = [f"resume={tmp_path / 'run'}"]
    assert done.returncode == 0 or ended
    assert_same_end(tmp_path / "run", truth)


def test_what_was_recorded_beyond_the_checkpoint_is_done_again_once(tmp_path, truth):
    """Killed between the epoch's record and its checkpoint, and in the middle of writing a line."""
    train(config_of("recipe.epochs=2"), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 3, "steps": 9}) + '\n{"epoch": 4, "st')
    go_on(tmp_path, "recipe.epochs=3")
    assert_same_end(tmp_path, truth)


def test_a_run_killed_before_its_results_gets_them(tmp_path, truth):
    train(config_of(), tmp_path)
    (tmp_path / "results.json").unlink()
    results = go_on(tmp_path)
    assert (results["status"], results["epochs"], results["nfe"]["backward"]) == ("completed", 3, 4)
    assert (tmp_path / "results.json").exists()
    assert_same_end(tmp_path, truth)


def test_more_epochs(tmp_path, truth):
    train(config_of("recipe.epochs=1"), tmp_path)
    results = go_on(tmp_path, "recipe.epochs=3", "runtime.check_every=7")
    assert results["epochs"] == 3
    assert "epochs: 3" in (tmp_path / "config.yaml").read_text()
    assert_same_end(tmp_path, truth)


def test_another_exact_gradient_mode(tmp_path, truth):
    train(config_of("recipe.epochs=1", "gradient=full_backprop"), tmp_path)
    results = go_on(tmp_path, "recipe.epochs=3", "gradient=dto_checkpoint")
    assert "name: dto_checkpoint" in (tmp_path / "config.yaml").read_text()
    assert results["nfe"]["backward"] == 4
    assert_same_end(tmp_path, truth, also=("gradient", "nfe_backward"))  # full_backprop evaluates nothing again
    assert [line["gradient"] for line in read_metrics(tmp_path)] == ["full_backprop", *["dto_checkpoint"] * 2]


def test_peak_memory_is_that_of_the_gradient_mode(tmp_path):
    train(config_of("recipe.epochs=1", "gradient=full_backprop", "solver.n_steps=8"), tmp_path)
    results = go_on(tmp_path, "recipe.epochs=2", "gradient=stage_checkpoint")
    first, second = (line["peak_memory_bytes"] for line in read_metrics(tmp_path))
    assert results["peak_memory_bytes"] == second < 0.5 * first


def test_epochs_without_gradient_and_precision_get_those_the_run_had(tmp_path):
    """Older records have both only in their configuration, which a change on resume replaces."""
    train(config_of("recipe.epochs=1"), tmp_path)
    (line,) = read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({k: v for k, v in line.items() if k not in ("gradient", "precision")}) + "\n"
    )
    go_on(tmp_path, "recipe.epochs=2", "gradient=full_backprop", "runtime.precision=bf16")
    found = [(line["gradient"], line["precision"]) for line in read_metrics(tmp_path)]
    assert found == [("dto_checkpoint", "fp32"), ("full_backprop", "bf16")]


def test_another_precision_of_the_epochs_to_come(tmp_path, truth):
    train(config_of("recipe.epochs=1"), tmp_path)
    go_on(tmp_path, "recipe.epochs=3", "runtime.precision=bf16")
    ours, theirs = read_metrics(tmp_path), read_metrics(truth)
    assert [line["precision"] for line in ours] == ["fp32", "bf16", "bf16"]
    assert ours[0]["step_losses"] == theirs[0]["step_losses"]
    assert ours[1]["step_losses"][0] == pytest.approx(theirs[1]["step_losses"][0], rel=0.05)
    assert ours[1]["step_losses"] != theirs[1]["step_losses"]


def test_a_truncated_checkpoint_is_named_and_the_one_before_used(tmp_path, truth):
    train(config_of("recipe.epochs=2"), tmp_path)
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    go_on(tmp_path, "recipe.epochs=3")
    log = (tmp_path / "train.log").read_text()
    assert f"{last}: truncated" in log and "previous.pt instead" in log
    assert_same_end(tmp_path, truth)


def test_no_checkpoint_can_be_read(tmp_path):
    train(config_of("recipe.epochs=1"), tmp_path)
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"")
    with pytest.raises(UserError, match="nothing to continue from"):
        go_on(tmp_path, "recipe.epochs=2")
    torch.save({"weights": 1}, tmp_path / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match="nothing to continue from"):
        go_on(tmp_path, "recipe.epochs=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"has ended after 3 epochs; to continue, give more epochs, such as recipe.epochs=6"),
        (["seed=1"], r"seed=1: this run has 0; a resumed run may change recipe.epochs, dataset.root"),
        (["solver=rk4"], r"solver.name=rk4: this run has rk2"),
        (["solver.n_steps=4"], r"solver.n_steps=4: this run has 2"),
        (["recipe.lr=0.2"], r"recipe.lr=0.2: this run has 0.1"),
        (["gradient=reverse_adjoint"], r"gradient=reverse_adjoint: this run has dto_checkpoint; a resumed"),
        (["gradient=budget"], r"gradient=budget: this run has dto_checkpoint; a resumed run may change it between"),
        (["gradient=revolve", "gradient.name=step"], r"gradient.name=step: give gradient=step"),
        (["gradient.slots=3"], r"gradient.slots: give gradient=NAME with it"),
        (["gradient=full_backprop", "gradient.slots=3"], r"gradient.slots"),
        (["runtime.precision=fp64"], r"runtime.precision=fp64: this run has fp32; a resumed run may change it between"),
        (["model=resnet18"], r"model.name=resnet18: this run has resnet4"),
        (["recipe.epoch=9"], r"did you mean recipe.epochs\?"),
        (["recipe.epochs=4,5"], r"names several values"),
        (["recipe.epochs=zero"], r"recipe.epochs=zero: give a whole number"),
    ],
)
def test_what_may_not_change(truth, overrides, message):
    before = {f: f.read_bytes() for f in truth.rglob("*") if f.is_file() and f.name != "train.log"}
    with pytest.raises(UserError, match=message):
        go_on(truth, *overrides)
    assert {f: f.read_bytes() for f in truth.rglob("*") if f.is_file() and f.name != "train.log"} == before


def test_fewer_epochs_than_a_run_has_begun(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch, 8)  # in its third epoch, of three steps
    for epochs in (1, 2):
        with pytest.raises(UserError, match=r"and this run has taken 8; give at least recipe.epochs=3"):
            go_on(tmp_path, f"recipe.epochs={epochs}")
    assert go_on(tmp_path)["steps"] == 9


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        resumed(tmp_path, [])


def test_a_diverged_run_would_diverge_again(tmp_path):
    train(config_of("recipe.lr=1e30", "recipe.epochs=5"), tmp_path)
    with pytest.raises(UserError, match=r"diverged after .* would diverge again"):
        go_on(tmp_path, "recipe.epochs=6")


def test_a_run_in_use_is_refused(tmp_path, truth):
    train(config_of("recipe.epochs=1"), tmp_path)
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is writing this run"):
            go_on(tmp_path, "recipe.epochs=3")
    finally:
        process.kill()
        process.wait()
    go_on(tmp_path, "recipe.epochs=3")
    assert_same_end(tmp_path, truth)


def test_a_full_disk_under_the_records(tmp_path):
    """For metrics and results: one line that says what to do; a line that was cut off does not hide later lines."""
    record = RunRecord(tmp_path, config_of())
    record._metrics.close()
    record._metrics = open("/dev/full", "w")  # noqa: SIM115  (the record closes it)
    with pytest.raises(UserError, match=r"No space left .* make room, then continue with train resume="):
        record.epoch({"epoch": 1, "steps": 1, "step_losses": []})
    record.close()
    lines = tmp_path / "evaluations.jsonl"
    lines.write_text('{"a": 1}\n{"a": ')
    append_line(lines, {"a": 3})
    assert read_lines(lines) == [{"a": 1}, {"a": 3}]


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path):
    """A limit on file sizes acts as the full disk: the checkpoint of the first epoch fits, a larger one does not."""
    train(config_of("recipe.epochs=1"), tmp_path)
    checkpoint = tmp_path / "checkpoints" / "last.pt"
    before, size = checkpoint.read_bytes(), checkpoint.stat().st_size
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2)"
    )
    done = command(tmp_path, "train", f"resume={tmp_path}", "recipe.epochs=2", first=limit)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (File too large)" in done.stderr and "resume=" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    survivors = [checkpoint.with_name(n) for n in ("last.pt", "previous.pt") if checkpoint.with_name(n).exists()]
    assert before in [f.read_bytes() for f in survivors]
    assert Checkpoints(tmp_path / "checkpoints").load()["progress"]["epochs"] == 1
    assert not list(tmp_path.rglob("*.partial"))
    go_on(tmp_path, "recipe.epochs=2")


def test_a_killed_save_leaves_a_readable_checkpoint(tmp_path):
    """Whichever of the three moves was made last."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"progress": {}, "n": 1})
    checkpoints.save({"progress": {}, "n": 2}, best=True)
    assert [checkpoints.load(n)["n"] for n in ("last", "previous", "best")] == [2, 1, 2]
    (tmp_path / "last.pt.partial").write_bytes(b"half")
    assert checkpoints.load()["n"] == 2
    (tmp_path / "last.pt").unlink()  # between the two moves
    assert checkpoints.load()["n"] == 1
    assert Checkpoints(tmp_path / "none").load() is None
