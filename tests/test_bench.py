"""The verb bench: what it counts, what it compares, and what it refuses."""

import json
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command import command
from conftest import Field, solver

from anode_exp.build import build_data, build_model
from anode_exp.commands.bench import bench_entries
from anode_exp.data import Augmentation, Split
from anode_exp.data.torchvision_loader import torchvision_loader
from anode_exp.errors import UserError
from anode_exp.gradient import FullBackprop, ReverseAdjoint
from anode_exp.ode import TimeGrid, Tolerance, VectorField
from anode_exp.studies import bench, throughput
from anode_exp.studies.peers import TorchCheckpoint, TorchdiffeqAdjoint
from anode_exp.studies.throughput import Contestant, Traffic, time_in_turn
from anode_exp.training import graphed_step

CPU = torch.device("cpu")

SMALL = ["dataset=fake", "dataset.train_size=40", "model=squeezenext", "model.width=0.5", "recipe.batch_size=8"]


def test_traffic_in_closed_form():
    a, b = torch.randn(4, 8), torch.randn(8, 16)
    with Traffic() as traffic:
        (a @ b).t().add_(1.0)
    assert traffic.operators == 2, "a view is no operator"
    assert traffic.flops == 2 * 4 * 8 * 16
    product = 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert traffic.bytes == product + 4 * 2 * 4 * 16, "the sum reads and writes its one operand"


def test_contestants_take_turns_and_those_alone_come_last():
    order = []

    def contestant(label, alone=False):
        def step():
            order.append(label)
            torch.ones(10).sum()

        return Contestant(label, step, step, images=5, epoch_steps=3, own=list, alone=alone)

    rows, bandwidth, rates = time_in_turn(
        [contestant("a"), contestant("b", alone=True), contestant("c")],
        torch.device("cpu"), rounds=3, tick=lambda: None,
    )  # fmt: skip
    assert [r["label"] for r in rows] == ["a", "b", "c"] and rows[0]["ratio"] == 1.0
    assert "b" not in order[: order.index("c") + 1] and order.index("b") > max(
        i for i, label in enumerate(order) if label == "c"
    )
    for row in rows:
        assert row["images_per_s"] == pytest.approx(5 / row["step_s"]) and row["epoch_s"] == 3 * row["step_s"]
        assert row["peak_bytes"] >= 44 and row["kernels_per_step"] is None
    assert bandwidth > 1e8 and rates[torch.float32] > 1e8


def test_kernels_are_counted_after_all_that_is_timed(monkeypatch):
    order = []

    def contestant(label, alone=False):
        def step():
            order.append(label)

        return Contestant(label, step, step, images=1, epoch_steps=1, own=list, alone=alone)

    monkeypatch.setattr(throughput, "kernels_per_step", lambda c, device: order.append(f"count {c.label}") or 7)
    monkeypatch.setattr(throughput, "device_limits", lambda device, dtypes: (1.0, dict.fromkeys(dtypes, 1.0)))
    monkeypatch.setattr(throughput, "LEAST_ROUND_S", 1e-9)
    rows, *_ = time_in_turn([contestant("a"), contestant("b", True)], torch.device("cpu"), rounds=2, tick=lambda: None)
    assert order[-2:] == ["count a", "count b"] and not any("count" in entry for entry in order[:-2])
    assert [row["kernels_per_step"] for row in rows] == [7, 7]


def test_a_peak_counts_the_contestants_own_bytes_and_nothing_of_others(monkeypatch):
    """An allocator holds weights and gradients of one contestant, and bytes of others; a step adds activations."""
    own, others, activations = [torch.zeros(100), torch.zeros(100)], 10**6, 5000

    class Allocator:
        most = now = others + 800

        def allocated(self):
            return self.now

        def most_allocated(self):
            return self.most

        def reset_peaks(self):
            self.most = self.now

    allocator = Allocator()

    def step():
        allocator.most = allocator.now + activations

    monkeypatch.setattr(throughput, "allocator_of", lambda device: allocator)
    monkeypatch.setattr(throughput, "device_limits", lambda device, dtypes: (1.0, dict.fromkeys(dtypes, 1.0)))
    contestant = Contestant("a", step, step, images=1, epoch_steps=1, own=lambda: own)
    (row,), *_ = time_in_turn([contestant], torch.device("cpu"), rounds=1, tick=lambda: None)
    assert row["peak_bytes"] == 800 + activations


def test_what_a_contestant_holds_between_steps():
    """Weights, buffers, momentum, and gradients: on CUDA all of them are allocated before a step."""
    ((_, config, _),), _ = bench_entries([*SMALL, "compare=[seeds=1]"])
    contestant = bench._contestant("", config, None, build_data(config.dataset, CPU), CPU)
    before = sum(x.nbytes for x in contestant.own())
    contestant.step()
    weights = sum(p.nbytes for p in build_model(config.model, config.solver, config.gradient, 10).parameters())
    assert sum(x.nbytes for x in contestant.own()) == before + 2 * weights


def test_every_network_of_a_contestant_stays_on_its_stream(monkeypatch):
    """Also while it is counted: the default stream and others do not wait for each other."""
    current, seen = [], []

    @contextmanager
    def stream(chosen):
        current.append(chosen)
        yield
        current.pop()

    def watched(function):
        def watches(*args, **kwargs):
            seen.append(current[-1] if current else None)
            return function(*args, **kwargs)

        return watches

    monkeypatch.setattr(bench, "run_streams", lambda device, count: [f"stream {i}" for i in range(count)])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(bench, "assemble", watched(bench.assemble))
    monkeypatch.setattr(bench, "train_step", watched(bench.train_step))
    monkeypatch.setattr(graphed_step, "train_step", watched(graphed_step.train_step))
    for seeds in (1, 2):
        ((_, config, _),), _ = bench_entries([*SMALL, f"compare=[seeds={seeds}]"])
        contestant = bench._contestant("", config, None, build_data(config.dataset, CPU), CPU)
        contestant.step()
        contestant.counted()
        assert seen == [f"stream {i}" for i in range(seeds)] * 3
        seen.clear()


def test_torch_checkpoint_is_exact():
    def gradient(mode):
        module = Field()
        field = VectorField(module)
        y0 = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64, requires_grad=True)
        mode.solve(field, y0, field.theta, TimeGrid(3), solver("rk4")).sum().backward()
        return [y0.grad, module.w.grad, module.v.grad], field.evaluations

    ours, evaluations = gradient(TorchCheckpoint())
    truth, _ = gradient(FullBackprop())
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert evaluations.forward == 2 * 12, "evaluated again"


@pytest.mark.parametrize("name", ["euler", "rk2", "heun"])
def test_torchdiffeq_adjoint_is_the_reverse_time_adjoint(name):
    def gradient(mode, grid):
        module = Field()
        field = VectorField(module)
        y0 = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64, requires_grad=True)
        mode.solve(field, y0, field.theta, grid, solver(name)).square().sum().backward()
        return [y0.grad, module.w.grad, module.v.grad], field.evaluations

    theirs, evaluations = gradient(TorchdiffeqAdjoint(), TimeGrid(3))
    ours, same = gradient(ReverseAdjoint(), TimeGrid(3))
    exact, _ = gradient(FullBackprop(), TimeGrid(3))
    for a, b, c in zip(theirs, ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(a, c, rtol=1e-6), "it is the wrong gradient of these steps"
    assert (evaluations.forward, evaluations.backward) == (same.forward, same.backward)
    if name == "heun":
        (theirs, _), (exact, _) = (
            gradient(mode, Tolerance(1e-6, 1e-6, max_evaluations=100_000))
            for mode in (TorchdiffeqAdjoint(), FullBackprop())
        )
        for a, b in zip(theirs, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_torchvision_loader_gives_the_images():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 32, 32, 3).contiguous()
    loader = torchvision_loader(Split(images, torch.arange(20)), 6, Augmentation(0, True), [0.0] * 3, [1.0] * 3, 0)
    batches = list(loader)
    assert len(batches) == 3, "the last is dropped"
    for batch, labels in batches:
        torch.testing.assert_close(batch[:, 0, 5, 5] * 255, labels.float())


def test_the_command(tmp_path):
    compare = "compare=[gradient=full_backprop, gradient=dto_checkpoint solver=rk2, baseline=dataloader]"
    done = command(tmp_path, "bench", *SMALL, compare, "rounds=2")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("outputs/*/*/bench.json")
    rows = json.loads(file.read_text())["rows"]
    assert [r["label"] for r in rows] == compare[9:-1].split(", ")
    assert rows[1]["flops_per_step"] > rows[0]["flops_per_step"] > 10**6
    assert all(r["peak_bytes"] > 10**6 and r["step_s"] > 0 and r["of_floor"] > 0 for r in rows)
    assert "ms per step" in done.stdout and "copy rate" in (file.parent / "table.txt").read_text()


def test_what_is_compared_by_default():
    entries, rounds = bench_entries([*SMALL, "rounds=3"])
    assert [baseline for *_, baseline in entries] == [None, "eager", "dataloader", "torch_checkpoint"] and rounds == 3
    assert {config.model.width for _, config, _ in entries} == {0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare=gradient=full_backprop"], "compare=gradient=full_backprop: give a list of settings"),
        (["compare=[{a: 1}]"], "give a list of settings"),
        (
            ["compare=[baseline=eger]"],
            "baseline=eger: choose one of eager, dataloader, torch_checkpoint, torchdiffeq_adjoint; did",
        ),
        (["compare=[solver=rk5]"], "solver=rk5: there is no such solver"),
        (["compare=[solver=rk2, solver=rk2]"], "names the same entry twice"),
        (["compare=[runtime.precision=tf32, runtime.precision=fp32]"], "compare them in two runs"),
        (["compare=[seed=0, runtime.cudnn_benchmark=true]"], "compare them in two runs"),
        (["gradient=budget"], "use study budget"),
        (["compare=[baseline=torchdiffeq_adjoint solver=bosh3]"], "torchdiffeq has no bosh3 on fixed steps; choose"),
        (
            ["compare=[baseline=torchdiffeq_adjoint gradient=revolve]"],
            "gradient: baseline=torchdiffeq_adjoint does not",
        ),
        (["solver=rk2,rk4"], "list them in compare"),
        (["rounds=0"], "rounds=0: give a whole number, at least 1"),
        (["--fast"], "--fast: bench takes no flags"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError) as raised:
        bench_entries(arguments)
    assert message in str(raised.value)


def test_several_seeds_are_one_contestant(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "device_limits", lambda device, dtypes: (1.0, dict.fromkeys(dtypes, 1.0)))
    bench.run_bench(*bench_entries([*SMALL, "compare=[seeds=1, seeds=2]", "rounds=1"]), tmp_path)
    one, two = json.loads(next(tmp_path.rglob("bench.json")).read_text())["rows"]
    assert two["operators_per_step"] == 2 * one["operators_per_step"]
    assert two["images_per_s"] * two["step_s"] == pytest.approx(2 * one["images_per_s"] * one["step_s"])
    assert two["peak_bytes"] > 1.01 * one["peak_bytes"], "the weights of both"


def test_the_script_for_a_gpu_composes_its_entries():
    script = runpy.run_path("scripts/speed_on_a_gpu.py")
    labels = []
    for words in (part.command for part in script["parts"](["model.field_gain=0.5"]) if "bench" in part.command):
        entries, _ = bench_entries(words[words.index("bench") + 1 :])
        labels += [label for label, *_ in entries]
        assert {config.model.field_gain for _, config, _ in entries} == {0.5}
    assert len(set(labels)) == len(labels) == sum(map(len, script["ENTRIES"].values()))
    row = {"step_s": 1 / script["EPOCH_STEPS"], "bytes_per_step": 1e9, "operators_per_step": 1, "of_floor": 0.5}
    table = script["figures"](dict.fromkeys(labels, row))
    assert [what for what, *_, reached in table if reached == "NO"] == [
        "speedup over the DataLoader loop",
        "speedup over the eager loop on device",
        "fp32: step time over its floor",
    ]
    assert all(measured == "1.00" for what, goal, measured, _ in table if not goal), "choices, each over the default"
    some = script["figures"]({label: row for label in labels if "fp32" not in label})
    assert {what for what, _, measured, _ in some if measured == "not measured"} == {
        what for what, *_ in table if "fp32" in what
    }


def test_the_script_for_a_gpu_reports_every_part(tmp_path, capsys, monkeypatch):
    """One part fails, one hangs with its own process, and for one there is no time; the others are complete."""
    script = runpy.run_path("scripts/speed_on_a_gpu.py")
    monkeypatch.chdir(tmp_path)
    row = {"label": script["BF16"], "step_s": 0.01, "bytes_per_step": 1, "operators_per_step": 1, "of_floor": 0.5}

    def writes(name, file, text):
        code = (
            "import pathlib; d = pathlib.Path('outputs/day', {!r}); d.mkdir(parents=True); (d / {!r}).write_text({!r})"
        )
        return code.format(name, file, text) + "\n"

    bench = writes("bench", "bench.json", json.dumps({"rows": [row]}))
    hangs = writes("memory", "study.jsonl", "a row")
    hangs += "import subprocess; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True); p.wait()"
    todo = [
        script["Part"](name, [sys.executable, "-c", code], limit)
        for name, code, limit in (
            ("tests", "raise SystemExit('two failed')", 60),
            ("memory", hangs, 3),
            ("step", bench, 60),
        )
    ]  # fmt: skip
    folder = tmp_path / "gpu"
    folder.mkdir()
    assert not script["examine"](folder, todo)
    text = (folder / "summary.txt").read_text()
    outcomes = {line.split()[0]: " ".join(line.split()[1:-1]) for line in text.splitlines()[2:5]}
    assert outcomes == {"tests": "failed, exit code 1", "memory": "stopped after 3 s", "step": "passed"}
    assert "two failed" in (folder / "tests.log").read_text() and (folder / "step" / "bench.json").exists()
    assert (folder / "memory" / "study.jsonl").read_text() == "a row", "what there was when it was stopped"
    assert "1.96" in text and "not measured" in text and text.strip() in capsys.readouterr().out
    pid = int((folder / "memory.log").read_text())
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    script["examine"](folder, todo[:1], total_s=1)
    assert "no time left" in (folder / "summary.txt").read_text()
