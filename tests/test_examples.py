"""The scripts of examples/ run, and show what they say they show."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from anode_exp.commands.together import train
from anode_exp.config.compose import jobs
from anode_exp.records.checkpoints import Checkpoints

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(name, capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_a_network_of_ones_own_learns(capsys, monkeypatch):
    lines = output_of("own_network.py", capsys, monkeypatch).splitlines()
    accuracies = [float(re.search(r"accuracy ([\d.]+)%", line)[1]) for line in lines]
    assert len(accuracies) == 5 and accuracies[-1] > 85


def test_gradient_errors_tell_exact_modes_from_others(capsys, monkeypatch):
    _, *rows = (line.split() for line in output_of("gradient_errors.py", capsys, monkeypatch).splitlines())
    errors = {name: [float(x) for x in values] for name, *values in rows}
    assert len(errors) == 6
    for mode, found in errors.items():
        if mode in ("stored_adjoint", "reverse_adjoint"):
            assert found[0] > 0.3 and found == sorted(found, reverse=True) and 0 < found[-1] < 1e-3
        else:
            assert max(found) < 1e-14


def test_a_recorded_run_is_solved_with_other_steps(tmp_path, capfd, monkeypatch):
    shown = output_of("recorded_run.py", capfd, monkeypatch, str(tmp_path))  # also by the process that it starts
    found = dict(re.findall(r"^(\d) steps: test accuracy ([\d.]+)%$", shown, re.MULTILINE))
    assert list(found) == ["1", "2", "4", "8"]
    trained_with = re.search(r"test accuracy +([\d.]+)% \(best", shown)[1]
    assert float(found["2"]) == pytest.approx(float(trained_with), abs=0.06)


def test_live_channels_are_those_that_are_not_dead(tmp_path, capsys, monkeypatch):
    (config,) = jobs(
        ["dataset=digits", "dataset.train_size=100", "dataset.test_size=100", "model=resnet4", "recipe.epochs=1",
         "recipe.batch_size=50", "runtime.device=cpu", "runtime.keep_every=1"], multirun=False,
    ).configs  # fmt: skip
    train(config, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = checkpoints.load("epoch-1")
    capsys.readouterr()
    for stem, field, expected in ((0, 0, "16 enter, 16"), (3, 5, "13 enter, 11"), (3, 16, "13 enter, 0")):
        for norm, dead in (("1", stem), ("3.f.4", field)):  # the BatchNorms before the ReLUs that end the stem and f
            state["network"][f"{norm}.weight"][:dead], state["network"][f"{norm}.bias"][:dead] = 0, -1
        torch.save(state, checkpoints.path("epoch-1"))
        _, line = output_of("live_channels.py", capsys, monkeypatch, str(tmp_path)).splitlines()
        assert f"epoch   1, block 1: of 16 channels {expected} change" in line
        assert line.endswith("= 0.000") == (field == 16)


def test_no_example_is_left_out():
    tested = Path(__file__).read_text()
    assert all(file.name in tested for file in EXAMPLES.glob("*.py"))
