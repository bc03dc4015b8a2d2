"""The one place where configuration becomes objects."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anode_exp.config import schema
from anode_exp.config.schema import SOLVERS as METHODS
from anode_exp.config.schema import (
    TASKS,
    DatasetConfig,
    GradientConfig,
    RecipeConfig,
    RuntimeConfig,
    StudyGradient,
    TrainConfig,
)
from anode_exp.data import (
    DATASETS,
    DENSITIES,
    TRAJECTORIES,
    WHOLE,
    Augmentation,
    DataSet,
    DensityData,
    ImageData,
    Normalisation,
    Part,
    load,
    load_density,
    load_trajectory,
)
from anode_exp.errors import UserError
from anode_exp.gradient import GRADIENT_MODES
from anode_exp.models import MODELS, Autonomous, Evolution, OdeBlock, TimedBatchNorm, ode_blocks
from anode_exp.ode import SOLVERS, TABLEAUX, NewtonKrylov, Solver, TimeGrid, Tolerance
from anode_exp.tasks.classification import Classification, ImageBatches
from anode_exp.tasks.density import Density, DensityBatches
from anode_exp.tasks.task import Data, Task
from anode_exp.tasks.trajectory import TrajectoryBatches, TrajectoryFit


def build_device(runtime: RuntimeConfig) -> torch.device:
    """The device of a run; UserError if CUDA was requested, or is needed by the precision, and is not available."""
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise UserError("runtime.device=cuda: no CUDA device is visible; use runtime.device=cpu, or auto")
    device = torch.device("cuda" if available and runtime.device != "cpu" else "cpu")
    if runtime.precision == "tf32" and device.type != "cuda":
        raise UserError("runtime.precision=tf32: only CUDA devices have it, and this run is on a CPU; use fp32 or bf16")
    return device


def build_memory_format(runtime: RuntimeConfig, network: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout of images and weights in memory: channels last if it is requested and safe.

    On CPUs oneDNN's gradient of a strided 1×1 convolution with fewer input channels than a vector register holds (16
    with AVX-512) writes out of bounds in channels-last layout: wrong gradients or a crash (oneDNN issue 6035). Networks
    with such a convolution keep the contiguous layout on CPUs.
    """
    if not runtime.channels_last:
        return torch.contiguous_format
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    unsafe = any(m.kernel_size == (1, 1) and max(m.stride) > 1 and m.in_channels < 16 for m in convs)
    return torch.contiguous_format if device.type == "cpu" and unsafe else torch.channels_last


def build_data(dataset: DatasetConfig, device: torch.device) -> DataSet:
    """The data set on the device; UserError if it is missing or cannot be generated."""
    if dataset.name in TRAJECTORIES:
        assert dataset.points is not None
        return load_trajectory(dataset.name, dataset.points, dataset.stiffness or 1.0).to(device)
    if dataset.name in DENSITIES:
        sizes = {name: size for name in SIZES if (size := getattr(dataset, name)) is not None}
        return load_density(dataset.name, Path(dataset.root).expanduser(), **sizes, split=dataset.split).to(device)
    return build_images(dataset, device)


SIZES = ("train_size", "validation_size", "test_size")


def build_images(dataset: DatasetConfig, device: torch.device) -> ImageData:
    sizes = {name: getattr(dataset, name) for name in SIZES}
    return load(dataset.name, Path(dataset.root).expanduser(), dataset.download, **sizes).to(device)


def output_size(dataset: DatasetConfig) -> int:
    """The size of a network's output for one sample: the number of classes, or of components of a state."""
    if dataset.name in DENSITIES:
        return DENSITIES[dataset.name]
    return TRAJECTORIES[dataset.name].size if dataset.name in TRAJECTORIES else DATASETS[dataset.name][1]


def build_solver(solver: schema.SolverConfig) -> Solver:
    make = SOLVERS[solver.name]
    if METHODS[solver.name].implicit:
        return make(NewtonKrylov(solver.linear, solver.newton_rtol, solver.newton_max_iterations))
    if solver.name == "alf":
        return make(solver.damping)
    if solver.name == "reversible_rk":
        return make(TABLEAUX[solver.tableau], solver.coupling)
    return make()


NOT_OF_MODES = ("name", "memory", "solver", "baseline")
"""Settings of a gradient mode that its class does not take."""


def build_model(
    model: schema.ModelConfig, solver: schema.SolverConfig, gradient: GradientConfig, outputs: int
) -> nn.Module:
    """The network, with parameters drawn from torch's global generator."""
    grid: TimeGrid | Tolerance = TimeGrid(solver.n_steps)
    if solver.adaptive:
        grid = Tolerance(solver.rtol, solver.atol, max_evaluations=solver.max_evaluations, min_step=solver.min_step)
    chosen = {k: v for k, v in asdict(gradient).items() if k not in NOT_OF_MODES and v is not None}
    # A budget is planned when the network exists; the plan then replaces the modes of its blocks.
    mode = GRADIENT_MODES["dto_checkpoint" if gradient.name == "budget" else gradient.name](**chosen)
    method, by_time = build_solver(solver), model.statistics == "by_time"

    def make_ode_block(f: nn.Module) -> OdeBlock:
        if isinstance(f, Autonomous) and (by_time or model.norm_affine == "by_time"):
            n, intervals = solver.n_steps, model.norm_intervals
            times = [0.0]
            if by_time and solver.adaptive:
                times = [m / intervals for m in range(intervals + 1)]
            elif by_time:
                times = sorted(
                    {(i + c) / n for i in range(n) for c in method.nodes} | {c / n for c in method.start_nodes}
                )
            f.time_norms(times, by_time and solver.adaptive, intervals if model.norm_affine == "by_time" else None)
        evolution = None
        if model.evolution != "none":
            names = ("coupling", "sharing", "activation", "steps")
            evolution = Evolution(f, *(getattr(model, f"evolution_{name}") for name in names))
        block = OdeBlock(f, method, grid, mode, evolution)
        block.field.leaves_trace = model.statistics == "every_evaluation"
        return block

    (takes,) = (parts.model_settings for parts in TASKS.values() if model.name in parts.model)
    settings = {name: value for name in takes if (value := getattr(model, name)) is not None}
    network = MODELS[model.name](outputs, make_ode_block, **settings)
    for block in ode_blocks(network):
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        if norms:
            last = norms[-1]
            offset = last.weight_offset if isinstance(last, TimedBatchNorm) else None
            nn.init.constant_(last.weight if offset is None else offset, model.field_gain - (offset is not None))
    return network


def build_optimizer(network: nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW. On CUDA it is fused, and its learning rate is a device tensor that captured steps read.

    With ``clip_norm``, each step first scales a gradient with a larger norm down to that norm, without a host
    synchronisation.
    """
    device = next(network.parameters()).device
    on_cuda = device.type == "cuda"
    evolution = {p for m in network.modules() if isinstance(m, Evolution) for p in m.parameters()}
    others = [p for p in network.parameters() if p not in evolution]
    free = [] if recipe.decay_all else [p for p in others if p.ndim < 2]  # norms and biases
    groups: list[dict[str, Any]] = [{"params": [p for p in others if recipe.decay_all or p.ndim > 1]}]
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    if evolution:  # no weight decay, which would slow down the evolution of the weights
        moving = [p for p in network.parameters() if p in evolution]
        groups.append({"params": moving, "weight_decay": 0.0, "lr_factor": recipe.evolution_lr})
    for group in groups:  # one tensor per group: a shared one would hold the value of the last group
        group["lr"] = torch.tensor(recipe.lr, device=device) if on_cuda else recipe.lr
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        settings = {name: getattr(recipe, name) for name in ("momentum", "weight_decay", "nesterov")}
        optimizer = torch.optim.SGD(groups, **settings, fused=on_cuda or None)
    else:
        adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
        optimizer = adam(groups, weight_decay=recipe.weight_decay, fused=on_cuda, capturable=on_cuda)
    if recipe.clip_norm is not None:
        parameters, most = list(network.parameters()), recipe.clip_norm

        def clip(*_: object) -> None:
            nn.utils.clip_grad_norm_(parameters, most)

        optimizer.register_step_pre_hook(clip)
    return optimizer


def build_schedule(recipe: RecipeConfig) -> Callable[[int], float]:
    """The learning rate as a function of the completed epochs.

    ``steps``: lr·gamma for every milestone passed. ``cosine``: lr·(1 + cos(π·epochs/recipe.epochs))/2. ``plateau``: lr,
    which the trainer multiplies by gamma. During the first ``warmup_epochs`` it rises in equal steps instead.
    """

    def rate(epochs: int) -> float:
        if epochs < recipe.warmup_epochs:
            return recipe.lr * (epochs + 1) / (recipe.warmup_epochs + 1)
        if recipe.schedule == "cosine":
            return recipe.lr * (1 + math.cos(math.pi * epochs / recipe.epochs)) / 2
        milestones = recipe.milestones if recipe.schedule == "steps" else []
        return recipe.lr * recipe.gamma ** sum(epochs >= m for m in milestones)

    return rate


def evaluation_batch_size(config: TrainConfig, device: torch.device) -> int:
    """The batch size of evaluations: ``recipe.test_batch_size``, or a default for the run if that is null.

    Adaptive steps depend on the whole batch, so the default is then that of ANODE's published code, as on CPUs. With
    fixed steps an image has the same output in any batch: the default is 1,000 on CUDA, where kernel launches dominate
    the time of small batches. With a byte budget it is at most the training batch, whose step needs at least as much
    memory.
    """
    if config.recipe.test_batch_size is not None:
        return config.recipe.test_batch_size
    if config.solver.adaptive or device.type != "cuda":
        return schema.TEST_BATCH_SIZE
    return min(1000, config.recipe.batch_size) if config.gradient.name == "budget" else 1000


def build_network(config: TrainConfig, outputs: int) -> nn.Module:
    """The untrained network of a run, on the CPU, with weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    return build_model(config.model, config.solver, config.gradient, outputs).to(dtype_of(config.runtime.precision))


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of weights and states: float64 for ``fp64``, else float32, which autocast or CUDA may round."""
    return torch.float64 if precision == "fp64" else torch.float32


def varied(config: TrainConfig, gradient: GradientConfig, outputs: int, **changes: Any) -> nn.Module:
    """The untrained network with a gradient mode; ``changes``: solver (a name), its settings, blocks_per_stage."""
    blocks = changes.pop("blocks_per_stage", config.model.blocks_per_stage)
    own = gradient.solver if isinstance(gradient, StudyGradient) else None
    name = changes.pop("solver", own or config.solver.name)
    solver = replace(config.solver, name=name, **{"adaptive": False, **changes})
    model = replace(config.model, blocks_per_stage=blocks)
    return build_network(replace(config, model=model, solver=solver, gradient=gradient), outputs)


def autocast_for(precision: str, device: torch.device) -> Callable[[], torch.autocast]:
    """A factory of forward contexts: bfloat16 autocast for ``bf16``, nothing for ``fp32`` and ``tf32``."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def set_backends(runtime: RuntimeConfig) -> None:
    """Set the options of CUDA's libraries for this process.

    Precision ``tf32`` lets CUDA round float32 factors to TF32; ``fp32`` and ``bf16`` keep float32 operations exact.
    ``cudnn_benchmark`` lets cuDNN time its algorithms for each new shape, in eager steps before any capture. The
    process keeps its choices, even if the setting changes later.
    """
    allow = runtime.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
    torch.backends.cudnn.benchmark = runtime.cudnn_benchmark


@dataclass
class Assembly:
    """The objects of a configuration: the network, its data, and how it is trained.

    Attributes:
        network: on its device, in its layout, before training.
        data: batches on the device, in the same layout.
        autocast: makes the contexts of forward passes.
        part: this process's part of every batch.
    """

    config: TrainConfig
    device: torch.device
    layout: torch.memory_format
    task: Task
    data: Data
    network: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], torch.autocast]
    part: Part = WHOLE

    @property
    def stepped(self) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.autocast], Task]:
        """The arguments of ``train_step`` before the batch."""
        return self.network, self.optimizer, self.autocast, self.task

    @property
    def batch_size(self) -> int:
        """Samples of a full training batch in this process's part."""
        return self.part.count(min(self.config.recipe.batch_size, self.data.size("train")))


def placed(network: nn.Module, config: TrainConfig, device: torch.device) -> tuple[nn.Module, torch.memory_format]:
    """The network on the device, and its memory layout."""
    layout = build_memory_format(config.runtime, network, device)
    return network.to(device, memory_format=layout), layout  # type: ignore[call-overload]


def assemble(config: TrainConfig, data: DataSet, part: Part = WHOLE) -> Assembly:
    """The assembly of a configuration; its device is that of the data."""
    device = data.device
    network, layout = placed(build_network(config, output_size(config.dataset)), config, device)
    task, batches = build_task(config, data, layout, part)
    autocast, optimizer = autocast_for(config.runtime.precision, device), build_optimizer(network, config.recipe)
    return Assembly(config, device, layout, task, batches, network, optimizer, autocast, part)


def build_task(
    config: TrainConfig, data: DataSet, layout: torch.memory_format, part: Part = WHOLE
) -> tuple[Task, Data]:
    """The task, and its batches of the data."""
    recipe, dataset, task, device = config.recipe, config.dataset, config.task, data.device
    if isinstance(data, ImageData):
        augment = Augmentation(dataset.crop_padding, dataset.flip)
        normalise = Normalisation(dataset.mean, dataset.std, device, layout, dtype_of(config.runtime.precision))
        batches = ImageBatches(data, recipe.batch_size, augment, normalise, config.seed, part)
        return Classification(recipe.label_smoothing), batches
    data = data.to(device, dtype_of(config.runtime.precision))
    if isinstance(data, DensityData):
        assert task.trace is not None
        of_density = DensityBatches(data, recipe.batch_size, task.trace, config.seed, recipe.steps_per_epoch, part)
        return Density(data.offset), of_density
    assert task.loss is not None and recipe.steps_per_epoch is not None
    return TrajectoryFit(task.loss), TrajectoryBatches(data, recipe.steps_per_epoch)
