"""Several processes that train one network, over gloo: same as one process, stopped, killed, resumed, refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from command import command

from anode_exp.build import build_data
from anode_exp.commands.together import _check_parts
from anode_exp.config.change import evaluations
from anode_exp.config.check import check_shared
from anode_exp.config.compose import composed
from anode_exp.data import WHOLE, Part
from anode_exp.errors import UserError
from anode_exp.runs import evaluate_run

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["model=resnet4", "dataset=fake", "dataset.train_size=22", "dataset.test_size=20",
         "recipe.batch_size=8", "runtime.precision=fp64", "recipe.lr=3e-2", "runtime.check_every=1"]  # fmt: skip
"""An epoch of three steps, the last of 6 images."""


def torchrun(cwd, *settings):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "anode_exp"]
    settings = ["train", *settings]
    return subprocess.Popen(
        [*words, *settings], cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def train(cwd, *settings, processes=2):
    """``train`` in one process, or in several with torchrun's environment; (exit codes, outputs, errors) of all."""
    if processes == 1:
        done = [command(cwd, "train", *settings)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        told = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with ThreadPoolExecutor(processes) as pool:
            started = [pool.submit(command, cwd, "train", *settings, **told, RANK=str(r)) for r in range(processes)]
            done = [each.result() for each in started]
    return sum(d.returncode for d in done), "".join(d.stdout for d in done), "".join(d.stderr for d in done)


def network_of(folder):
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["network"]


def distance(a, b):
    x, y = (torch.cat([v.double().reshape(-1) for v in network_of(f).values()]) for f in (a, b))
    return float((x - y).norm() / y.norm())


def losses(folder):
    return [x for line in (folder / "metrics.jsonl").read_text().splitlines() for x in json.loads(line)["step_losses"]]


def test_parts_are_disjoint_and_nearly_equal():
    for n in (1, 7, 16, 255):
        for size in (1, 2, 3, 5):
            parts = [list(range(n))[Part(rank, size).of(n)] for rank in range(size)]
            assert [i for part in parts for i in part] == list(range(n)) and max(map(len, parts)) - min(
                map(len, parts)
            ) <= 1
            assert [Part(rank, size).count(n) for rank in range(size)] == list(map(len, parts))
    assert WHOLE.of(5) == slice(0, 5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two epochs in one process, in two, and in three, whose parts are of unequal size."""
    place = tmp_path_factory.mktemp("processes")
    asked = [*SMALL, "recipe.epochs=2"]
    for n in (1, 2, 3):
        code, out, err = train(place, *asked, f"hydra.run.dir={n}", processes=n)
        assert code == 0, err
        assert out.count("epoch 2/2") == 1, "one process shows it"
    return place


@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_train_as_one_does(runs, n):
    """Weights, running statistics and losses: BatchNorm by the whole batch's statistics."""
    assert distance(runs / str(n), runs / "1") < 1e-12
    for ours, theirs in zip(losses(runs / str(n)), losses(runs / "1"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    several, alone = (json.loads((runs / d / "results.json").read_text()) for d in (str(n), "1"))
    assert several["test_accuracy"] == alone["test_accuracy"] and several["nfe"] == alone["nfe"]
    assert several["processes"] == n and len(several["peak_memory_bytes_by_process"]) == n
    assert len(several["images_per_s_by_process"]) == n
    assert several["peak_memory_bytes"] < alone["peak_memory_bytes"]
    assert len(list((runs / str(n)).glob("events.out.*"))) == 1, "one process records"


def test_each_one_s_own_statistics_are_others(runs):
    own = ["model.norm_sync=false", "recipe.moving_average=0.5", "hydra.run.dir=own"]
    code, _, err = train(runs, *SMALL, "recipe.epochs=2", *own)
    assert code == 0, err
    assert distance(runs / "own", runs / "1") > 1e-3
    tested = json.loads((runs / "own" / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"]
    assert evaluate_run(runs / "own", "last", evaluations(runs / "own", []))[0]["test_loss"] == pytest.approx(
        tested, rel=1e-12
    )


@pytest.mark.parametrize("mode", ["reversible", "evolving"])
def test_other_modes(tmp_path, mode):
    """Group norm, a last batch of unequal parts; a reversible method, and weights that evolve with the activations."""
    own = {
        "reversible": ["solver=alf", "gradient=reversible"],
        "evolving": ["model.evolution=reaction_diffusion_advection", "gradient=revolve", "solver.n_steps=3"],
    }[mode]
    asked = [*SMALL, "model.norm=group", "dataset.train_size=13", "recipe.epochs=1", *own]
    for n in (1, 2):
        code, _, err = train(tmp_path, *asked, f"hydra.run.dir={n}", processes=n)
        assert code == 0, err
    assert distance(tmp_path / "2", tmp_path / "1") < 1e-12


def test_resumed_on_another_number_of_processes(runs):
    """torchrun is asked to stop, within the second epoch; then one process continues."""
    asked = [*SMALL, "dataset.train_size=80", "recipe.epochs=3", "recipe.lr=1e-6"]  # at a larger one, rounding grows
    process = torchrun(runs, *asked, "hydra.run.dir=stopped")
    folder, deadline = runs / "stopped", time.monotonic() + 200
    while not (folder / "checkpoints" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0, err
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "interrupted" and 10 <= results["steps"] < 30
    assert train(runs, f"resume={folder}", processes=1)[0] == 0
    code, _, err = train(runs, *asked, "hydra.run.dir=whole", processes=1)
    assert code == 0, err
    assert distance(folder, runs / "whole") < 1e-11
    assert losses(folder) == pytest.approx(losses(runs / "whole"), rel=1e-10)
    ours, theirs = (json.loads((f / "results.json").read_text()) for f in (folder, runs / "whole"))
    assert ours["steps"] == theirs["steps"] == 30 and ours["test_accuracy"] == theirs["test_accuracy"]
    accuracies = [[json.loads(line)["train_accuracy"] for line in (f / "metrics.jsonl").read_text().splitlines()]
                  for f in (folder, runs / "whole")]  # fmt: skip
    assert accuracies[0] == accuracies[1], "sums of an epoch begun by two processes are counted once"


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def test_a_process_that_is_killed_ends_the_others(runs):
    process = torchrun(runs, *SMALL, "dataset.train_size=32", "recipe.epochs=1000", "hydra.run.dir=killed")
    folder, deadline = runs / "killed", time.monotonic() + 200
    while not (folder / "checkpoints" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and time.monotonic() - killed < 30
    assert "another process has ended" in err and "train resume=" in err
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    code, out, err = train(runs, f"resume={folder}", f"recipe.epochs={done + 1}")
    assert code == 0, err
    assert f"continuing after epoch {done}" in out or f"continuing after epoch {done - 1}" in out


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["seeds=2"], "seeds=2: run them without torchrun"),
        (["gradient=budget", "gradient.memory=1GiB"], "gradient=budget: its plan is for one process"),
        (["task=trajectory"], "task=trajectory: a batch is one trajectory"),
        (["solver=dopri5", "solver.adaptive=true"], "solver.adaptive=true: steps are chosen for a whole batch"),
        (["recipe.batch_size=2"], "recipe.batch_size=2: give at least one sample to each process"),
        (["model=resnet4", "solver=crank_nicolson", "gradient=stage_checkpoint"], "use model.norm_sync=false"),
        (["runtime.compile=true"], "runtime.compile=true: f exchanges BatchNorm's statistics"),
    ],
)
def test_what_several_processes_cannot_share(settings, says):
    with pytest.raises(UserError, match=says):
        check_shared(composed(settings), 3)
    check_shared(composed(["model.norm=group", "runtime.compile=true"]), 3)


def test_a_mistake_is_told_once(runs):
    code, _, err = train(runs, *SMALL, "hydra.run.dir=1")
    assert code != 0 and err.count("already holds files") == 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("recipe.batch_size=21", "2 processes need as many samples, and the last batch of an epoch has 1"),
        ("dataset.test_size=1", "the test split has 1"),
        ("dataset.validation_size=1", "the validation split has 1"),
        ("dataset.test_size=2", None),
    ],
)
def test_every_process_has_a_sample(changed, says):
    config = composed([*SMALL, changed])
    data = build_data(config.dataset, torch.device("cpu"))
    with nullcontext() if says is None else pytest.raises(UserError, match=says):
        _check_parts(config, data, 2)
