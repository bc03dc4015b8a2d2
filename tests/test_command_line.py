"""The command as a user types it: in other processes and folders, installed and editable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import command

from anode_exp.config.describe import CONF

ROOT = Path(__file__).parents[1]
SMALL = [
    "dataset=fake", "dataset.train_size=20", "dataset.test_size=10", "model=squeezenext", "model.width=0.25",
    "recipe.batch_size=10", "recipe.epochs=1",
]  # fmt: skip


def anode_exp(cwd, *arguments, program=(sys.executable, "-m", "anode_exp"), **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return subprocess.run([*program, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_a_run_from_any_folder(tmp_path):
    done = anode_exp(tmp_path, "train", *SMALL)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("outputs/*/*/results.json")
    assert json.loads(results.read_text())["status"] == "completed"
    assert "epoch 1/1  loss" in done.stdout, "a line an epoch when there is no terminal"
    assert "peak memory" in done.stdout and "test accuracy" in done.stdout
    assert (results.parent / ".hydra" / "overrides.yaml").exists()
    assert "epoch 1/1" in (results.parent / "train.log").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]


def test_a_sweep_puts_its_jobs_side_by_side_named_by_what_varies(tmp_path):
    done = command(tmp_path, "train", "-m", *SMALL, "gradient=full_backprop,dto_checkpoint,reverse_adjoint")
    assert done.returncode == 0, done.stderr
    found = sorted(p.parent for p in tmp_path.glob("outputs/*/*/*/results.json"))
    assert [p.name for p in found] == [
        "0_gradient-full_backprop", "1_gradient-dto_checkpoint", "2_gradient-reverse_adjoint",
    ]  # fmt: skip
    assert len({p.parent for p in found}) == 1
    full, checkpointed, reverse = (json.loads((p / "results.json").read_text()) for p in found)
    assert full["train_loss"] == checkpointed["train_loss"] != reverse["train_loss"]
    assert full["peak_memory_bytes"] > checkpointed["peak_memory_bytes"] > reverse["peak_memory_bytes"]
    assert full["nfe"]["backward"] == 0 < checkpointed["nfe"]["backward"]


def test_a_given_run_directory_is_used_once(tmp_path):
    first = command(tmp_path, "train", *SMALL, "hydra.run.dir=here")
    assert first.returncode == 0 and (tmp_path / "here" / "results.json").exists()
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    second = command(tmp_path, "train", *SMALL, "hydra.run.dir=here")
    assert second.returncode == 2 and "nothing is overwritten" in second.stderr
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "text"),
    [
        (["--help"], 0, "stdout", "train -m"),
        (["train", "--help"], 0, "stdout", "  solver:      alf, backward_euler, bosh3, crank_nicolson, dopri5, euler"),
        (["train", "--cfg", "job"], 0, "stdout", "n_steps: 2"),
        ([], 2, "stderr", "no verb given; verbs are train"),
        (["model=squeezenext"], 2, "stderr", "did you mean: python -m anode_exp train model=squeezenext"),
        (["trian"], 2, "stderr", "trian: no such verb"),
        (["train", "solver=rk5"], 2, "stderr", "choose one of alf, backward_euler, bosh3, crank_nicolson, dopri5"),
        (["train", "solver.n_steps=0"], 2, "stderr", "solver.n_steps=0: give a whole number, at least 1"),
        (["train", "-m", "solver=rk2,rk5"], 2, "stderr", "solver=rk5"),
        (["train", "--flag"], 2, "stderr", "unrecognized arguments: --flag"),
        (["train", "dataset=cifar10", "dataset.root=none", "dataset.download=false"], 2, "stderr", "CIFAR-10 under"),
        (["train", "runtime.device=cuda", *SMALL], 2, "stderr", "no CUDA device is visible"),
        (["train", "runtime.precision=tf32", *SMALL], 2, "stderr", "tf32: only CUDA devices have it"),
        (["train", "hydra.run.dir=/dev/null/x", *SMALL], 2, "stderr", "/dev/null"),
    ],
)
def test_answers(tmp_path, arguments, code, stream, text):
    done = command(tmp_path, *arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == code, done.stderr
    assert text in getattr(done, stream)
    assert "Traceback" not in done.stdout + done.stderr
    if code == 2:
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.cifar
def test_the_main_command_on_real_cifar100(tmp_path, cifar_root):
    done = command(
        tmp_path, "train", "model=squeezenext", "solver=rk2", "dataset=cifar100", "dataset.download=false",
        "recipe.max_steps=2", "recipe.batch_size=16", "dataset.test_size=100", "hydra.run.dir=run",
        ANODE_DATA=str(cifar_root),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 2
    assert 4 < results["train_loss"] < 6, "ln 100 is 4.6"


def test_the_wheel_carries_its_configuration_and_runs_from_any_folder(tmp_path):
    """Built and unpacked as an installer would, and run where the repository is not on the path."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    shipped = {f.relative_to(site / "anode_exp" / "conf") for f in (site / "anode_exp" / "conf").rglob("*.yaml")}
    assert shipped == {f.relative_to(CONF) for f in CONF.rglob("*.yaml")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = (str(site / "bin" / "anode-exp"),)
    for program in ((sys.executable, "-m", "anode_exp"), (sys.executable, *script)):
        done = anode_exp(elsewhere, "train", *SMALL, program=program, PYTHONPATH=str(site))
        assert done.returncode == 0, done.stderr
    assert len(list(elsewhere.glob("outputs/*/*/results.json"))) == 2
    where = [sys.executable, "-c", "import anode_exp; print(anode_exp.__file__)"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    assert str(site) in subprocess.run(where, env=env, cwd=elsewhere, capture_output=True, text=True).stdout
