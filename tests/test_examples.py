"""The scripts of examples/ run, and show what they say they show."""

import re
import runpy
from pathlib import Path

import pytest
import torch

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


def test_no_example_is_left_out():
    tested = Path(__file__).read_text()
    assert all(file.name in tested for file in EXAMPLES.glob("*.py"))
