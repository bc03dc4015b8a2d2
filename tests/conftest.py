"""Shared helpers: a small vector field, and the place of the real CIFAR data."""

import gc
import os
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
import torch._dynamo  # else the first training step imports it, after gc.freeze
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from anode_exp.config.schema import TASKS
from anode_exp.data import DATASETS
from anode_exp.gradient import GRADIENT_MODES, GradientMode
from anode_exp.models import OdeBlock, ode_blocks
from anode_exp.ode import TABLEAUX, Evaluations, ExplicitRungeKutta, ReversibleRungeKutta, Solver, TimeGrid
from anode_exp.records import environment
from anode_exp.records.checkpoints import Checkpoints
from anode_exp.training.graphed_step import WARM_UP_STEPS

# Tests run several processes at once: a thread per core in each of them would make all of them many times slower.
torch.set_num_threads(1)

LOADERS = {name: DATASETS[name] for name in ("digits", "fake")}
"""What makes the data sets without files, which tests share."""


def _made_once(name: str):
    load, classes = LOADERS[name]
    made = cache(lambda: load(Path(), False))
    return lambda root, download: made(), classes


DATASETS.update((name, _made_once(name)) for name in LOADERS)
environment.commit = cache(environment.commit)  # three processes of git for each run
os.fsync = lambda file: None  # no test is about a loss of power

IMAGE_MODELS = TASKS["classification"].model
IMAGE_MODES = [mode for mode in GRADIENT_MODES if mode != "batched_adjoint"]
"""Gradient modes that take states of any shape."""


class Field(nn.Module):
    """f(t, y) = tanh(W y + t v) + t y/2 on R^n: smooth, nonlinear, depends on time."""

    def __init__(self, n: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(n, n, dtype=dtype, generator=generator))
        self.v = nn.Parameter(torch.randn(n, dtype=dtype, generator=generator))

    def forward(self, t: float, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(y @ self.w.T + t * self.v) + 0.5 * t * y


def pytest_collection_finish() -> None:
    """What was imported stays: the collections that measurements of memory begin with need not check it again."""
    gc.freeze()


@pytest.fixture
def field_module() -> Field:
    return Field()


class Repeat:
    """Repeats the recorded work on the same memory, as a replay does, but by running it."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.replays = network, 0

    def warm_up(self, work):
        for _ in range(WARM_UP_STEPS):
            work()

    def record(self, work):
        self.work = work
        self.results = tree_map(torch.clone, work() or ())
        return self.results

    def replay(self):
        self.replays += 1
        counters = [block.field.evaluations for block in ode_blocks(self.network)]
        for block in ode_blocks(self.network):  # a replay does not run on the host, which counts evaluations
            block.field.evaluations = Evaluations()
        for kept, new in zip(tree_leaves(self.results), tree_leaves(self.work() or ()), strict=True):
            kept.copy_(new)
        for block, counter in zip(ode_blocks(self.network), counters, strict=True):
            block.field.evaluations = counter


def solver(name: str, mode: str | None = None) -> Solver:
    """The tableau's method, or the reversible method made from it for gradient mode ``reversible``."""
    return (ReversibleRungeKutta if mode == "reversible" else ExplicitRungeKutta)(TABLEAUX[name])


def make_ode_block(
    mode: str | GradientMode = "full_backprop", tableau: str = "rk2", n_steps: int = 2
) -> "type[OdeBlock] | object":
    gradient, name = (GRADIENT_MODES[mode](), mode) if isinstance(mode, str) else (mode, None)
    return lambda f: OdeBlock(f, solver(tableau, name), TimeGrid(n_steps), gradient)


def trained_to_the_end(trainer):
    while trainer.advance():
        pass
    return trainer


def interrupted_and_resumed(make, directory, advances: int):
    """A trainer stopped within an epoch, after so many advances, and another that continues from its checkpoint.

    Args:
        make: makes a trainer in a directory, which may continue what is there after (epochs, steps).
    """
    begun = make(directory)
    for _ in range(advances):
        assert begun.advance()
    begun.stop.signal = signal.SIGTERM
    trained_to_the_end(begun)
    begun.record.close()
    resumed = make(directory, resume_after=(begun.progress.epochs, begun.progress.steps))
    resumed.restore(Checkpoints(directory / "checkpoints").load())
    return begun, trained_to_the_end(resumed)


@pytest.fixture
def cifar_root() -> Path:
    root = os.environ.get("ANODE_DATA")
    if not root or not (Path(root) / "cifar-10-batches-py").is_dir() or not (Path(root) / "cifar-100-python").is_dir():
        pytest.skip("the real CIFAR-10 and CIFAR-100 are not under $ANODE_DATA")
    return Path(root)
