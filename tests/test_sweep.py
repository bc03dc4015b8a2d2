"""A sweep survives its worst job, and reports the outcome of each at the end."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from command import command
from torch.utils._pytree import tree_leaves

from anode_exp.commands.launch import run_by_hydra
from anode_exp.config.compose import compose_line
from anode_exp.errors import UserError
from anode_exp.report.sweep import over_seeds, runs_of_seeds, sweep_rows, sweep_table

SMALL = [
    "dataset=digits", "dataset.train_size=20", "dataset.test_size=10", "model=resnet4",
    "recipe.batch_size=10", "recipe.epochs=1", "hydra.sweep.dir=sweep",
]  # fmt: skip


def sweep(cwd: Path, *arguments: str, **options: str) -> subprocess.CompletedProcess:
    return command(cwd, "train", "-m", *SMALL, *arguments, **options)


def rows(cwd: Path) -> list[dict[str, str]]:
    with (cwd / "sweep" / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_failing_jobs_are_named_and_the_others_run(tmp_path):
    """One asks for more images than there are, one diverges, one breaks inside torch."""
    broken = (
        "import torch.nn.functional as F\n"
        "whole = F.cross_entropy\n"
        "def cross_entropy(logits, labels, **kw):\n"
        "    if len(labels) == 7: raise RuntimeError('broken on purpose')\n"
        "    return whole(logits, labels, **kw)\n"
        "F.cross_entropy = cross_entropy\n"
    )
    done = sweep(tmp_path, "dataset.test_size=10,400", "recipe.batch_size=10,7", "recipe.lr=0.1,1e30", first=broken)
    assert done.returncode == 1, done.stderr
    found = rows(tmp_path)
    assert len(found) == 8
    by_status = {s: [r for r in found if r["status"] == s] for s in ("completed", "diverged", "failed")}
    assert {k: len(v) for k, v in by_status.items()} == {"completed": 1, "diverged": 1, "failed": 6}
    assert {r["dataset.test_size"] for r in by_status["completed"]} == {"10"}
    assert "dataset.test_size=400: digits has 360" in "".join(r["error"] for r in by_status["failed"])
    failed = [r for r in by_status["failed"] if "broken on purpose" in r["error"]]
    assert len(failed) == 2
    log = next((tmp_path / "sweep").glob(f"{failed[0]['job']}_*/train.log")).read_text()
    assert "Traceback" in log and "broken on purpose" in log
    assert "Traceback" not in done.stdout + done.stderr
    assert "RuntimeError: broken on purpose" in done.stdout and "train.log" in done.stdout
    assert "6 of 8 jobs failed" in done.stderr


def test_mistakes_alone_exit_with_2(tmp_path):
    done = sweep(tmp_path, "dataset.test_size=10,400")
    assert done.returncode == 2
    assert [r["status"] for r in rows(tmp_path)] == ["completed", "failed"]


def test_seeds_give_mean_and_spread(tmp_path):
    done = sweep(tmp_path, "seed=0,1", "gradient=dto_checkpoint,reverse_adjoint")
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert [r["seed"] for r in found] == ["0", "0", "1", "1"]
    assert len({r["peak_memory_bytes"] for r in found}) == 2, "the same in every job of a mode"
    with (tmp_path / "sweep" / "sweep_over_seeds.csv").open() as file:
        means = list(csv.DictReader(file))
    assert [m["gradient"] for m in means] == ["dto_checkpoint", "reverse_adjoint"]
    losses = [float(r["train_loss"]) for r in found if r["gradient"] == "dto_checkpoint"]
    mean = sum(losses) / 2
    assert float(means[0]["train_loss_mean"]) == pytest.approx(mean)
    spread = (sum((x - mean) ** 2 for x in losses)) ** 0.5  # n − 1 = 1
    assert float(means[0]["train_loss_std"]) == pytest.approx(spread)
    assert "2 of 2" in done.stdout and "±" in done.stdout


def test_jobs_in_parallel_processes(tmp_path):
    asked = ["seed=0,1", "dataset.test_size=10,400", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    full = [sys.executable, "-m", "anode_exp", "train", "-m", *SMALL, *asked]  # not forked: its workers would hang
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(full, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert [(r["dataset.test_size"], r["status"]) for r in rows(tmp_path)] == [
        ("10", "completed"), ("10", "completed"), ("400", "failed"), ("400", "failed"),
    ]  # fmt: skip
    first, second = (r for r in rows(tmp_path) if r["status"] == "completed")
    assert first["train_loss"] != second["train_loss"]
    assert first["peak_memory_bytes"] == second["peak_memory_bytes"]
    names = sorted(f.name for f in (tmp_path / "sweep").iterdir() if f.is_dir())
    assert names[0] == "0_dataset.test_size-10_seed-0"


def test_the_slurm_launcher_is_configured(tmp_path):
    done = command(tmp_path, "train", "hydra/launcher=slurm", "--cfg", "hydra", "-p", "hydra.launcher")
    assert done.returncode == 0, done.stderr
    assert "SlurmLauncher" in done.stdout and "gres: gpu:1" in done.stdout


def test_a_cluster_that_is_not_there_gets_one_line(tmp_path, monkeypatch):
    done = command(tmp_path, "train", "-m", *SMALL, "hydra/launcher=slurm", PATH="/nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "launcher slurm: this machine has no Slurm (srun); use submitit_local to start" in done.stderr

    def unreachable(*_: object, **__: object) -> NoReturn:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("hydra.main", unreachable)
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match="launcher ray: no cluster answers; start it with ray start --head"):
        run_by_hydra(lambda config: None, "train", ["-m", "hydra/launcher=ray"])


def test_a_launcher_that_is_not_installed_gets_one_line(monkeypatch):
    monkeypatch.setattr("anode_exp.config.compose.find_spec", lambda name: None)
    for launcher, extra in (("ray", "ray"), ("slurm", "launchers"), ("joblib", "launchers")):
        with pytest.raises(UserError, match=rf"launcher {launcher}: .*pip install 'anode_exp\[{extra}\]'"):
            compose_line([f"hydra/launcher={launcher}"])


LAUNCHERS = {
    "submitit_local": (
        "hydra_plugins.hydra_submitit_launcher",
        "submitit.core._submit",
        "SIGUSR2",
        "hydra.launcher.timeout_min=5",
    ),
    "ray": ("hydra_plugins.hydra_ray_launcher", "default_worker", "SIGKILL", "hydra.launcher.ray.remote.num_gpus=0"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_of_a_cluster_fail_alone_and_go_on_after_a_kill(tmp_path, launcher):
    """One of two jobs fails, the other is killed and started again by its launcher: it continues and loses no epoch."""
    plugin, process, kill, setting = LAUNCHERS[launcher]
    pytest.importorskip(plugin)
    killer = tmp_path / "sitecustomize.py"
    killer.write_text(
        "import os, signal, sys\n"
        f"if {process!r} in ' '.join(sys.orig_argv):\n"
        "    import anode_exp.training.trainer as t\n"
        "    whole = t.Trainer._save\n"
        "    def save(self, line):\n"
        "        whole(self, line)\n"
        f"        killed = {str(tmp_path / 'killed')!r}\n"
        "        if line['epoch'] == 1 and not os.path.exists(killed):\n"
        "            open(killed, 'w').close()\n"
        f"            os.kill(os.getpid(), signal.{kill})\n"
        "    t.Trainer._save = save\n"
    )
    done = sweep(
        tmp_path, "seed=1", "dataset.test_size=10,400", "recipe.epochs=2", f"hydra/launcher={launcher}", setting,
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert [(r["dataset.test_size"], r["status"]) for r in rows(tmp_path)] == [
        ("10", "completed"), ("400", "failed"),
    ]  # fmt: skip
    assert (tmp_path / "killed").exists()
    logs = "".join(path.read_text() for path in (tmp_path / "sweep").glob("0_*/train.log"))
    assert "continuing after epoch 1" in logs


def test_the_ray_launcher_asks_for_a_part_of_a_gpu_at_most(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    shown = command(tmp_path, "train", "hydra/launcher=ray", "--cfg", "hydra", "-p", "hydra.launcher.ray", "--resolve")
    assert shown.returncode == 0, shown.stderr
    assert f"num_gpus: {min(1, torch.cuda.device_count())}" in shown.stdout
    done = command(tmp_path, "train", "-m", *SMALL, "hydra/launcher=ray", "hydra.launcher.ray.remote.num_gpus=2")
    assert done.returncode == 2
    assert "num_gpus=2: a job takes one GPU or a part of it" in done.stderr and not (tmp_path / "sweep").exists()


def job(directory: Path, number: int, overrides: list[str], results: dict | None) -> None:
    folder = directory / f"{number}_x"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))


def test_a_table_from_records_alone(tmp_path):
    good = {
        "status": "completed", "test_accuracy": 0.5, "best_test_accuracy": 0.6, "train_loss": 1.0,
        "peak_memory_bytes": 10**6, "wall_time_s": {"train": 2.0},
    }  # fmt: skip
    job(tmp_path, 10, ["seed=1", "solver=rk2", "recipe.epochs=3"], {**good, "test_accuracy": 0.7})
    job(tmp_path, 2, ["seed=0", "solver=rk2", "recipe.epochs=3"], good)
    job(tmp_path, 3, ["seed=0", "solver=rk4", "recipe.epochs=3"], None)
    found = sweep_rows(tmp_path)
    assert [(r["job"], r["seed"], r["solver"], r["status"]) for r in found] == [
        ("2", "0", "rk2", "completed"), ("3", "0", "rk4", "failed"), ("10", "1", "rk2", "completed"),
    ]  # fmt: skip
    assert "recipe.epochs" not in found[0]
    assert found[1]["error"] == "ended without results"
    rk2, rk4 = over_seeds(found)
    assert rk2["seeds"] == "2 of 2" and rk2["test_accuracy_mean"] == pytest.approx(0.6)
    assert rk2["test_accuracy_std"] == pytest.approx(0.1414, abs=1e-4)
    assert rk4["seeds"] == "0 of 1" and rk4["test_accuracy_mean"] is None
    assert "60.00% ± 14.14%" in sweep_table(tmp_path, found)


def test_seeds_at_once_are_the_seeds_alone(tmp_path):
    """Losses, weights, buffers, momentum and peak memory, bit for bit; one folder for each, and a table of all."""
    small = [a for a in SMALL if not a.startswith("hydra")] + ["recipe.epochs=2"]
    runs = [["seed=3", "seeds=2", "hydra.run.dir=both"], ["seed=3", "hydra.run.dir=a"], ["seed=4", "hydra.run.dir=b"]]
    for run in runs:
        done = command(tmp_path, "train", *small, *run)
        assert done.returncode == 0, done.stderr
        if "seeds=2" in run:
            assert "1 of 1" not in done.stdout and "2 of 2" in done.stdout
    for together, alone in (("both/0_seed-3", "a"), ("both/1_seed-4", "b")):
        ours, truth = (
            torch.load(tmp_path / d / "checkpoints" / "last.pt", weights_only=True) for d in (together, alone)
        )
        for part in ("network", "optimizer"):
            ours_leaves, true_leaves = (tree_leaves(x[part]) for x in (ours, truth))
            assert len(ours_leaves) > 10
            assert all(
                torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                for a, b in zip(ours_leaves, true_leaves, strict=True)
            )
        lines = [(tmp_path / d / "metrics.jsonl").read_text().splitlines() for d in (together, alone)]
        for mine, line in zip(*[map(json.loads, x) for x in lines], strict=True):
            assert {k: v for k, v in mine.items() if "time" not in k and "per_s" not in k} == {
                k: v for k, v in line.items() if "time" not in k and "per_s" not in k
            }
        assert (tmp_path / together / "config.yaml").read_text() == (tmp_path / alone / "config.yaml").read_text()
        log = (tmp_path / together / "train.log").read_text()
        assert log.count("epoch 2/2") == 1 and f"seed {together[-1]}" in log, "its own lines alone"
        results = json.loads((tmp_path / together / "results.json").read_text())
        assert results["runs_at_once"] == 2


def test_seeds_at_once_go_on_together(tmp_path):
    small = [a for a in SMALL if not a.startswith("hydra")]

    def train(*arguments):
        done = command(tmp_path, "train", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    train(*small, "seeds=2", "hydra.run.dir=both")
    train("resume=both/0_seed-0", "recipe.epochs=2")
    shutil.rmtree(tmp_path / "both" / "1_seed-1")  # as if the process had ended before this seed began
    (tmp_path / "both" / "1_seed-1").mkdir()
    train("resume=both", "recipe.epochs=2")
    for folder in ("both/0_seed-0", "both/1_seed-1"):
        assert len((tmp_path / folder / "metrics.jsonl").read_text().splitlines()) == 2
        assert f"\nseed: {folder[-1]}\n" in (tmp_path / folder / "config.yaml").read_text()


def test_a_sweep_over_seeds_is_no_run_of_several(tmp_path):
    job(tmp_path, 0, ["seed=0"], None)
    (tmp_path / "0_x").rename(tmp_path / "0_seed-0")
    assert runs_of_seeds(tmp_path) == []
