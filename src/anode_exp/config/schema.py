"""The configuration as types: every setting and its allowed values. Does not import torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


def _setting(default: Any = MISSING, **said: Any) -> Any:
    """A field with its limits (at_least, above, below, one_of) and, for a verb's own setting, its help."""
    return field(default=default, metadata=said)


NORM_NAMES = ("batch", "group", "layer", "none")
ACTIVATION_NAMES = ("relu", "leaky_relu", "softplus", "gelu")


@dataclass(kw_only=True)
class TaskConfig:
    """What is learned. Runs recorded before this setting existed are classifications."""

    name: str = "classification"
    loss: str | None = _setting(None, one_of=("mae", "mse"))
    trace: str | None = _setting(None, one_of=("exact", "gaussian", "rademacher"))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The options of each group that go with a task, and the settings that its models take."""

    model: tuple[str, ...]
    dataset: tuple[str, ...]
    recipe: tuple[str, ...]
    model_settings: tuple[str, ...]


TASKS = {
    "classification": Parts(
        model=("alexnet", "resnet4", "resnet10", "resnet18", "squeezenext"),
        dataset=("cifar10", "cifar100", "digits", "fake"),
        recipe=("modern", "paper"),
        model_settings=("blocks_per_stage", "norm", "field_norm", "activation", "width"),
    ),
    "trajectory": Parts(
        model=("mlp",),
        dataset=("robertson", "van_der_pol"),
        recipe=("adamw",),
        model_settings=("hidden", "activation", "bias", "weight_std"),
    ),
    "density": Parts(
        model=("flow",),
        dataset=("moons", "eight_gaussians", "checkerboard", "pinwheel", "digits64", "power", "miniboone", "bsds300"),
        recipe=("adam",),
        model_settings=("hidden", "activation", "blocks_per_stage"),
    ),
}
"""The tasks by name, and what goes with each."""


@dataclass(kw_only=True)
class ModelConfig:
    """Settings that a model does not have keep the values here."""

    name: str
    block: str = _setting("ode", one_of=("ode", "residual"))
    blocks_per_stage: int = _setting(1, at_least=0)
    norm: str = _setting("none", one_of=NORM_NAMES)
    field_norm: str = _setting("none", one_of=NORM_NAMES)
    activation: str = _setting("relu", one_of=ACTIVATION_NAMES)
    hidden: list[int] = field(default_factory=list, metadata={"at_least": 1})
    bias: bool = True
    weight_std: float | None = _setting(None, above=0)
    width: float | None = _setting(None, above=0)
    field_gain: float = 1.0
    # The default of new runs is in conf/model; this one is for runs recorded before the setting existed.
    statistics: str = _setting("forward", one_of=("forward", "every_evaluation", "by_time"))
    norm_affine: str = _setting("shared", one_of=("shared", "by_time"))
    norm_intervals: int = _setting(10, at_least=1)
    norm_sync: bool = True
    evolution: str = _setting("none", one_of=("none", "reaction_diffusion_advection"))
    evolution_coupling: str = _setting("joint", one_of=("joint", "first"))
    evolution_sharing: str = _setting("layer", one_of=("layer", "channel", "kernel"))
    evolution_activation: str = _setting("none", one_of=("none", "tanh"))
    evolution_steps: int = _setting(10, at_least=1)


@dataclass(kw_only=True)
class SolverConfig:
    name: str
    n_steps: int = _setting(at_least=1)
    adaptive: bool = False
    rtol: float = _setting(1e-3, above=0)
    atol: float = _setting(1e-3, above=0)
    max_evaluations: int = _setting(1000, at_least=1)
    min_step: float = _setting(1e-6, above=0)
    linear: str | None = _setting(None, one_of=("dense", "gmres"))
    newton_rtol: float | None = _setting(None, above=0)
    newton_max_iterations: int = _setting(50, at_least=1)
    damping: float = 1.0
    tableau: str = _setting("rk2", one_of=("euler", "rk2", "heun", "bosh3", "rk4", "dopri5"))
    coupling: float = 0.99

    def describe(self) -> str:
        if self.adaptive:
            return f"{self.name}, adaptive (rtol {self.rtol:g}, atol {self.atol:g})"
        of = {"alf": f" (damping {self.damping:g})", "reversible_rk": f" ({self.tableau}, coupling {self.coupling:g})"}
        return f"{self.name}{of.get(self.name, '')}, {self.n_steps} steps"


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a solver can do.

    Attributes:
        embedded: has an error estimate, and so can choose its steps.
        stages: has stage states with their own adjoint steps, for gradient modes with unit=stage.
        explicit: an explicit Runge–Kutta method, which also steps a continuous adjoint.
        implicit: solves its stages by Newton's method.
        static: performs the same operations in every step, for CUDA graphs and byte budgets.
        reversible: its step has an inverse in closed form.
    """

    embedded: bool = False
    stages: bool = True
    explicit: bool = True
    implicit: bool = False
    static: bool = True
    reversible: bool = False


SOLVERS = {
    "euler": Method(),
    "rk2": Method(),
    "heun": Method(embedded=True),
    "bosh3": Method(embedded=True),
    "rk4": Method(),
    "dopri5": Method(embedded=True),
    "backward_euler": Method(explicit=False, implicit=True, static=False),
    "crank_nicolson": Method(explicit=False, implicit=True, static=False),
    "sdirk2": Method(explicit=False, implicit=True, static=False),
    "tr_bdf2": Method(explicit=False, implicit=True, static=False),
    "kvaerno3": Method(embedded=True, explicit=False, implicit=True, static=False),
    "alf": Method(stages=False, explicit=False, reversible=True),
    "reversible_rk": Method(stages=False, explicit=False, reversible=True),
}
"""The solvers by name, without torch; ``ode.SOLVERS`` makes them."""

TORCHDIFFEQ_METHODS = {
    False: {"euler": "euler", "rk2": "midpoint", "heun": "heun2", "rk4": "rk4"},
    True: {"heun": "adaptive_heun", "bosh3": "bosh3", "dopri5": "dopri5"},
}
"""torchdiffeq's names of the solvers that it has, on fixed steps (False) and on adaptive ones (True)."""


@dataclass(kw_only=True)
class GradientConfig:
    name: str
    unit: str | None = _setting(None, one_of=("block", "step", "stage"))
    states: str | None = _setting(None, one_of=("input", "keep", "rebuild"))
    slots: int | None = _setting(None, at_least=1)
    memory: str | None = None
    passes: int | None = _setting(None, one_of=(1, 2))


@dataclass(kw_only=True)
class DatasetConfig:
    """Settings that a data set does not have keep the values here."""

    name: str
    root: str = "data"
    download: bool = True
    train_size: int | None = _setting(None, at_least=1)
    test_size: int | None = _setting(None, at_least=1)
    validation_size: int = _setting(0, at_least=0)
    split: int = _setting(0, at_least=0)
    crop_padding: int = _setting(0, at_least=0)
    flip: bool = False
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    points: int | None = _setting(None, at_least=2)
    stiffness: float | None = _setting(None, above=0)


TEST_BATCH_SIZE = 128
"""The batch size of evaluations in ANODE's published code."""


@dataclass(kw_only=True)
class RecipeConfig:
    name: str
    epochs: int = _setting(at_least=1)
    steps_per_epoch: int | None = _setting(None, at_least=1)
    max_steps: int | None = _setting(at_least=1)
    batch_size: int = _setting(1, at_least=1)
    test_batch_size: int | None = _setting(None, at_least=1)
    optimizer: str = _setting("sgd", one_of=("sgd", "adam", "adamw"))
    lr: float = _setting(at_least=0)
    momentum: float = _setting(0.0, at_least=0)
    weight_decay: float = _setting(at_least=0)
    clip_norm: float | None = _setting(None, above=0)
    milestones: list[int]
    gamma: float = _setting(above=0)
    nesterov: bool = False
    restart_momentum: bool = False
    decay_all: bool = True
    schedule: str = _setting("steps", one_of=("steps", "cosine", "plateau"))
    patience: int | None = _setting(None, at_least=1)
    stop_after: int | None = _setting(None, at_least=1)
    warmup_epochs: int = _setting(0, at_least=0)
    label_smoothing: float = _setting(0.0, at_least=0, below=1)
    moving_average: float = _setting(0.0, at_least=0, below=1)
    evolution_lr: float = _setting(1.0, above=0)


@dataclass(kw_only=True)
class RuntimeConfig:
    device: str = _setting(one_of=("auto", "cuda", "cpu"))
    precision: str = _setting(one_of=("fp32", "tf32", "bf16", "fp64"))
    channels_last: bool = True
    check_every: int = _setting(at_least=1)
    compile: bool = False
    cudnn_benchmark: bool = False
    cuda_graph: bool = True
    sync_debug: bool = False
    keep_every: int | None = _setting(None, at_least=1)


@dataclass(kw_only=True)
class TrainConfig:
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig
    solver: SolverConfig
    gradient: GradientConfig
    dataset: DatasetConfig
    recipe: RecipeConfig
    runtime: RuntimeConfig
    seed: int = _setting(at_least=0)
    seeds: int = _setting(1, at_least=1)


@dataclass(kw_only=True)
class StudyGradient(GradientConfig):
    """A gradient mode that a study compares, with its own solver or the study's; or a baseline of another library."""

    solver: str | None = None
    baseline: str | None = _setting(None, one_of=("torch_checkpoint", "torchdiffeq_adjoint"))


@dataclass(kw_only=True)
class StudyConfig:
    """A study's own settings; its file lists those that it has."""

    name: str
    batch_size: int | None = _setting(None, at_least=1)
    n_steps: list[int] = field(default_factory=list, metadata={"at_least": 1})
    gradients: dict[str, StudyGradient] = field(default_factory=dict)
    modes: list[str] = field(default_factory=list)
    blocks_per_stage: list[int] = field(default_factory=list, metadata={"at_least": 1})
    repeats: int = _setting(0, at_least=0)
    longest: float | None = _setting(None, above=0)
    solvers: list[str] = field(default_factory=list)
    adaptive_solvers: list[str] = field(default_factory=list)
    tolerances: list[float] = field(default_factory=list, metadata={"at_least": 1e-14})
    precisions: list[str] = field(default_factory=list)
    cases: bool = True
    budgets: list[str] = field(default_factory=list)
    weight_std: float = _setting(1.0, above=0)
    run: str | None = None
    checkpoint: str = "best"
    calibrate: int = _setting(50, at_least=1)
    samples: int | None = _setting(None, at_least=1)


@dataclass(kw_only=True)
class ResumeSettings:
    """Settings of ``train resume=DIR``."""

    resume: str | None = _setting(
        None,
        help="folder of a run to continue; more epochs, another exact gradient mode or another precision are allowed",
    )


@dataclass(kw_only=True)
class EvaluateSettings:
    """Settings of ``evaluate``."""

    run: str | None = _setting(None, help="folder of a trained run, such as outputs/DATE/TIME")
    checkpoint: str = _setting("best", help="best | last | the number of a kept epoch | 0, the untrained network")
    calibrate: int = _setting(
        0,
        help="training batches from which BatchNorm's running statistics are estimated again; 0 keeps the run's",
        at_least=0,
    )


@dataclass(kw_only=True)
class StudySettings:
    """Settings of every ``study``; ``run`` and ``checkpoint`` only of studies of recorded runs."""

    thorough: bool = _setting(False, help="the fine grid of the documented tables; without it a study takes minutes")
    run: str | None = _setting(None, help="folder of a trained run: its weights, model, data set and seed")
    checkpoint: str | None = _setting(None, help="best | last | the number of a kept epoch | 0, the untrained network")


@dataclass(kw_only=True)
class BenchSettings:
    """Settings of ``bench``."""

    compare: str = _setting(
        "[]", help="list of entries, each with settings separated by spaces; baseline=NAME may be one of them"
    )
    rounds: int = _setting(15, help="how often each entry is timed", at_least=1)


@dataclass(kw_only=True)
class PaperSettings:
    """Settings of ``reproduce`` and ``report``."""

    length: str = _setting("paper", help="paper | short: the length of the training runs")
    seeds: str = _setting("3", help="number of seeds, from 0 on, or a list such as [0,7]")
    directory: str = _setting("outputs", help="runs are in DIRECTORY/PAPER/LENGTH")


@dataclass(kw_only=True)
class ReportSettings(PaperSettings):
    """Settings of ``report``: which runs it reads, and where it writes the page."""

    length: str = _setting(
        "paper", help="paper | short | short,paper: the length of the runs; with both, sections for each"
    )
    seeds: str = _setting("3", help="expected seeds, a number or a list; the page shows the commands of missing runs")
    to: str | None = _setting(None, help="folder of the page and of copies of its records; by default next to the runs")


@dataclass(kw_only=True)
class ReproduceSettings(PaperSettings):
    """Settings of ``reproduce``: which cells it runs."""

    figure: str | None = _setting(None, help="figures of the paper, separated by commas; by default all")
    method: str | None = _setting(None, help="methods, separated by commas; by default all")
    launcher: str | None = _setting(
        None, help="joblib | slurm | submitit_local | ray: the runs as jobs in parallel; settings: hydra.launcher.KEY="
    )
