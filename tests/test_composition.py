"""Every configuration composes and builds; every mistake gets one clear line."""

import pytest
import torch

from anode_exp.build import build_memory_format, build_model, build_optimizer, build_schedule, build_solver
from anode_exp.config.compose import jobs, path_safe
from anode_exp.config.describe import CONF, groups, options
from anode_exp.config.schema import ACTIVATION_NAMES, NORM_NAMES, TASKS, Method
from anode_exp.config.schema import SOLVERS as METHODS
from anode_exp.errors import UserError
from anode_exp.gradient import GRADIENT_MODES
from anode_exp.models import ACTIVATIONS, MODELS, NORMS, TimedBatchNorm, ode_blocks
from anode_exp.ode import (
    SOLVERS,
    TABLEAUX,
    DiagonallyImplicitRungeKutta,
    EmbeddedSolver,
    ExplicitRungeKutta,
    ReversibleSolver,
    StageSolver,
)


def one(*overrides):
    (config,) = jobs(list(overrides), multirun=False).configs
    return config


def with_task(setting):
    """A choice, after the task that it belongs to."""
    group, _, name = setting.partition("=")
    fitting = [f"task={task}" for task, parts in TASKS.items() if name in getattr(parts, group, ())]
    fitting += {"gradient=batched_adjoint": ["task=trajectory"], "gradient=reversible": ["solver=alf"]}.get(setting, [])
    return [*fitting, setting]


def test_defaults():
    config = one()
    assert config.model.name == "resnet18" and config.model.block == "ode" and config.model.blocks_per_stage == 1
    assert (config.solver.name, config.solver.n_steps) == ("euler", 2)
    assert config.gradient.name == "dto_checkpoint"
    assert config.dataset.name == "cifar10" and config.dataset.validation_size == 0 and config.dataset.download
    recipe = config.recipe
    assert (recipe.name, recipe.epochs, recipe.batch_size, recipe.test_batch_size) == ("paper", 350, 256, None)
    assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 5e-4)
    assert (recipe.milestones, recipe.gamma) == ([150, 250], 0.1)
    assert config.seed == 0


@pytest.mark.parametrize(
    ("group", "name"), [(g, n) for g in groups() for n in options(g)], ids=lambda value: str(value).replace("/", "-")
)
def test_every_option_composes_and_builds(group, name):
    settings = with_task(f"{group}={name}")
    if group not in ("experiment", "model", "task") and not {"task=trajectory", "task=density"} & set(settings):
        settings = ["model=resnet4", *settings]  # the default takes longest to make
    config = one(*settings)
    network = build_model(config.model, config.solver, config.gradient, outputs=10)
    blocks = {"alexnet": 1, "resnet4": 1, "resnet10": 2, "mlp": 1, "flow": 1}.get(config.model.name, 4)
    assert len(list(ode_blocks(network))) == blocks * config.model.blocks_per_stage
    build_optimizer(network, config.recipe)


def test_every_name_in_code_has_its_configuration_and_the_other_way_round():
    assert set(options("solver")) == set(SOLVERS) >= set(TABLEAUX)
    assert set(options("gradient")) - {"budget"} == set(GRADIENT_MODES), "a budget chooses among them"
    assert set(options("model")) == set(MODELS)
    from anode_exp.data import DATASETS, DENSITIES, TRAJECTORIES

    assert set(options("dataset")) == {*DATASETS, *TRAJECTORIES, *DENSITIES}
    assert set(options("task")) == set(TASKS)
    for group in ("model", "dataset", "recipe"):
        goes_with = [name for parts in TASKS.values() for name in getattr(parts, group)]
        assert sorted(goes_with) == options(group), f"every {group} goes with one task"


@pytest.mark.parametrize("name", SOLVERS)
def test_what_the_configuration_says_of_a_solver_is_so(name):
    """The configuration lists what solvers can do itself, so that it needs no torch."""
    solver, said = SOLVERS[name](), METHODS[name]
    assert list(SOLVERS) == list(METHODS)
    assert said.embedded == (isinstance(solver, EmbeddedSolver) and solver.error_order is not None)
    assert said.stages == isinstance(solver, StageSolver)
    assert said.explicit == isinstance(solver, ExplicitRungeKutta)
    assert said.static == solver.static and solver.name == name
    assert said.reversible == isinstance(solver, ReversibleSolver)
    assert said.implicit == isinstance(solver, DiagonallyImplicitRungeKutta)


def test_settings_of_reversible_solvers_reach_them():
    assert (solver := build_solver(one("solver=alf", "solver.damping=0.8").solver)).damping == 0.8 and solver.order == 1
    solver = build_solver(one("solver=reversible_rk", "solver.tableau=rk4", "solver.coupling=0.9").solver)
    assert solver.method.tableau is TABLEAUX["rk4"] and solver.coupling == 0.9 and solver.order == 4


@pytest.mark.parametrize("name", ["alf", "reversible_rk"])
def test_what_reversible_solvers_can_and_cannot_do(name):
    config = one(f"solver={name}", "gradient=reversible", "runtime.precision=bf16", "model=squeezenext")
    assert next(ode_blocks(build_model(config.model, config.solver, config.gradient, 10))).solver.name == name
    assert one(f"solver={name}", "gradient=budget", "gradient.memory=1GB").gradient.name == "budget"
    for setting, message in (
        ("gradient=stage_checkpoint", f"{name} has no stages with an adjoint"),
        ("gradient=reverse_adjoint", f"{name} is not one"),
        ("solver.adaptive=true", f"{name} has no error estimate"),
    ):
        with pytest.raises(UserError, match=message):
            one(f"solver={name}", setting)


def test_norms_by_time_know_when_alf_begins():
    config = one("solver=alf", "solver.n_steps=2", "model=resnet4")
    assert config.model.statistics == "by_time"
    (block,) = ode_blocks(build_model(config.model, config.solver, config.gradient, 10))
    assert {m.times for m in block.modules() if isinstance(m, TimedBatchNorm)} == {(0.0, 0.25, 0.75)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["gradient=stage_checkpoint"], "euler has no stages with an adjoint .* gradient.unit=step.* solver=rk2"),
        (["gradient=revolve", "gradient.unit=stage"], "euler has no stages"),
        (["gradient=stored_adjoint"], "only explicit Runge–Kutta methods step a continuous adjoint, euler"),
        (["gradient=budget", "gradient.memory=1GB"], "euler does not perform the same operations .* solver=rk2"),
    ],
)
def test_what_a_solver_cannot_do_is_refused_with_the_remedy(monkeypatch, settings, message):
    monkeypatch.setitem(METHODS, "euler", Method(stages=False, explicit=False, static=False))
    with pytest.raises(UserError, match=message):
        one(*settings)
    one("gradient=step_checkpoint")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("gradient=reverse_adjoint", "only explicit Runge–Kutta methods step a continuous adjoint, sdirk2 is not one"),
        ("runtime.precision=bf16", "runtime.precision=bf16: Newton's method in sdirk2 needs fp32"),
        ("runtime.compile=true", "runtime.compile=true: not with sdirk2"),
        ("solver.adaptive=true", "sdirk2 has no error estimate; choose solver=.*kvaerno3"),
    ],
)
def test_what_an_implicit_solver_cannot_do_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        one("solver=sdirk2", settings)
    assert one("solver=kvaerno3", "solver.adaptive=true", "solver.linear=gmres").solver.linear == "gmres"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "model=mlp",
            "not with task=classification, which takes alexnet, .*; choose one, or task=trajectory",
        ),
        ("dataset=robertson", "dataset=robertson: not with task=classification, .* or task=trajectory"),
        ("recipe=adamw", "recipe=adamw: not with task=classification, which takes modern, paper"),
        ("gradient=batched_adjoint", "for the small states of task=trajectory; .* use stage_checkpoint"),
        ("recipe.steps_per_epoch=5", "recipe.steps_per_epoch: there is no such setting"),
        (
            "task.name=regression",
            "task.name=regression: choose one of classification, trajectory, density, as task=NAME",
        ),
        ("task=trajectory model=resnet4", "model=resnet4: not with task=trajectory, which takes mlp"),
        ("task=trajectory recipe=paper", "recipe=paper: not with task=trajectory, which takes adamw"),
        ("task=trajectory gradient=budget", "gradient=budget: does not plan for task=trajectory"),
        ("task=trajectory gradient=reverse_adjoint", "crank_nicolson is not one; choose solver=euler"),
        ("task=trajectory runtime.compile=true solver=rk4", "runtime.compile=true: not with task=trajectory"),
        ("task=trajectory runtime.precision=bf16", "Newton's method in crank_nicolson needs fp32 or fp64"),
        ("task=trajectory runtime.precision=bf16 solver=rk4", "bf16: batched_adjoint .* or gradient=stage_checkpoint"),
        ("task=trajectory recipe.steps_per_epoch=null", "give the training steps that are recorded together"),
        ("task=trajectory recipe.batch_size=4", "recipe.batch_size: there is no such setting"),
        ("task=trajectory runtime.channels_last=false", "it needs task=classification"),
        ("task=trajectory model.evolution=none", "model.evolution: there is no such setting"),
        ("task=trajectory task.loss=l3", "task.loss=l3: choose one of mae, mse"),
        ("task=trajectory task.loss=null", "task.loss=null: choose one of mae, mse"),
        ("task=trajectory dataset.points=null", "dataset.points=null: give a whole number, at least 2"),
        ("task=trajectory dataset=van_der_pol dataset.stiffness=null", "dataset.stiffness=null: give a number"),
        ("recipe.optimizer=adamw recipe.nesterov=true", "recipe.nesterov: .* it needs recipe.optimizer=sgd"),
    ],
)
def test_what_does_not_go_with_a_task_is_refused_with_the_remedy(settings, message):
    with pytest.raises(UserError, match=message):
        one(*settings.split())


def test_a_task_brings_what_goes_with_it_and_settings_win():
    config = one("task=trajectory")
    assert (config.model.name, config.dataset.name, config.recipe.name) == ("mlp", "robertson", "adamw")
    assert (config.solver.name, config.gradient.name, config.task.loss) == ("crank_nicolson", "batched_adjoint", "mae")
    config = one("task=trajectory", "dataset=van_der_pol", "solver=dopri5", "gradient=stored_adjoint", "task.loss=mse")
    assert (config.dataset.name, config.solver.name, config.gradient.name) == (
        "van_der_pol",
        "dopri5",
        "stored_adjoint",
    )
    paper = one("experiment=pnode/robertson", "seed=3")
    assert (paper.solver.n_steps, paper.runtime.precision, paper.model.hidden) == (1, "fp64", [5] * 6)


def test_adamw_and_a_clipped_gradient():
    config = one("task=trajectory", "recipe.clip_norm=0.5")
    network = build_model(config.model, config.solver, config.gradient, 3)
    optimizer = build_optimizer(network, config.recipe)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and (group["lr"], group["weight_decay"]) == (5e-3, 1e-2)
    for size, clipped in ((10.0, 0.5), (0.1, 0.1)):
        for p in network.parameters():
            p.grad = torch.full_like(p, size / sum(p.numel() for p in network.parameters()) ** 0.5)
        optimizer.step()
        norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
        assert float(norm) == pytest.approx(clipped, rel=1e-4)


def test_norms_and_activations_are_named_alike():
    """The configuration lists their names itself, so that it needs no torch."""
    assert set(NORM_NAMES) == set(NORMS) and set(ACTIVATION_NAMES) == set(ACTIVATIONS)


def test_every_configuration_file_says_what_it_is():
    for file in CONF.rglob("[!_]*.yaml"):
        if "hydra/help" not in file.as_posix():
            assert file.read_text().startswith("# "), file


def test_the_model_gets_what_the_configuration_says():
    config = one("model=squeezenext", "solver=rk4", "solver.n_steps=3", "gradient=reverse_adjoint", "model.width=2")
    block = next(ode_blocks(build_model(config.model, config.solver, config.gradient, 10)))
    assert block.solver.tableau.name == "rk4" and block.grid.n_steps == 3
    assert isinstance(block.gradient, GRADIENT_MODES["reverse_adjoint"])
    with torch.no_grad():
        assert block.f[0].in_channels == 64


@pytest.mark.parametrize(("width", "safe"), [("0.25", False), ("0.375", False), ("0.5", True), ("1", True)])
def test_channels_last_only_where_the_cpu_kernels_are_sound(width, safe):
    config = one("model=squeezenext", f"model.width={width}")
    network = build_model(config.model, config.solver, config.gradient, 10)
    layouts = {d: build_memory_format(config.runtime, network, torch.device(d)) for d in ("cpu", "cuda")}
    assert layouts["cuda"] is torch.channels_last
    assert layouts["cpu"] is (torch.channels_last if safe else torch.contiguous_format)
    config.runtime.channels_last = False
    assert build_memory_format(config.runtime, network, torch.device("cuda")) is torch.contiguous_format


def test_a_residual_block_says_that_it_is_one_euler_step():
    config = one("model.block=residual", "experiment=anode/fig3_rk2")
    assert (config.solver.name, config.solver.n_steps, config.gradient.name) == ("euler", 1, "full_backprop")


def test_the_cosine_schedule_after_a_warm_up():
    schedule = build_schedule(
        one("recipe=modern", "recipe.epochs=20", "recipe.warmup_epochs=3", "recipe.lr=0.4").recipe
    )
    assert [schedule(e) for e in (0, 1, 2, 10, 15)] == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.2 - 0.2 * 2**-0.5])


def test_norms_and_biases_may_go_without_decay():
    config = one("model=squeezenext", "recipe=modern")
    network = build_model(config.model, config.solver, config.gradient, 10)
    decayed, free = build_optimizer(network, config.recipe).param_groups
    assert decayed["weight_decay"] == 5e-4 and free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(network.parameters()))
    assert len(build_optimizer(network, one("model=squeezenext").recipe).param_groups) == 1


def test_the_gain_of_f():
    config = one("model=resnet10", "model.field_gain=0.25")
    for block in ode_blocks(build_model(config.model, config.solver, config.gradient, 10)):
        first, last = (m for m in block.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert (first.weight == 1).all() and (last.weight == 0.25).all()


def test_the_papers_schedule():
    schedule = build_schedule(one().recipe)
    assert [schedule(e) for e in (0, 149, 150, 249, 250, 349)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_plateau_has_no_milestones():
    waiting = ["task=density", "recipe.schedule=plateau", "recipe.patience=3", "recipe.warmup_epochs=0"]
    recipe = one(*waiting, "recipe.lr=0.4", "length=short").recipe
    assert recipe.milestones and build_schedule(recipe)(9) == 0.4


def test_data_root_from_the_environment(monkeypatch):
    monkeypatch.setenv("ANODE_DATA", "/somewhere/else")
    assert one().dataset.root == "/somewhere/else"
    assert one("dataset.root=here").dataset.root == "here"
    monkeypatch.delenv("ANODE_DATA")
    assert one().dataset.root == "data"


def test_a_sweep_is_the_product_of_its_values():
    asked = jobs(["model=resnet18,squeezenext", "solver.n_steps=1,2,4", "seed=1"], multirun=True)
    configs = asked.configs
    assert asked.fixed == ["seed"] and not asked.given
    assert [(c.model.name, c.solver.n_steps) for c in configs] == [
        (m, n) for m in ("resnet18", "squeezenext") for n in (1, 2, 4)
    ]
    assert all(c.seed == 1 for c in configs)


WRONG = {
    "model=resnet19": "resnet4, squeezenext; did you mean resnet18?",
    "solver=rk5": "choose one of alf, backward_euler, bosh3, crank_nicolson, dopri5, euler, heun, kvaerno3",
    "solver.linear=gmres": "solver.linear: has no effect here; it needs an implicit solver, such as",
    "solver.damping=0.8": "solver.damping: has no effect here; it needs solver=alf",
    "solver.tableau=rk4": "solver.tableau: has no effect here; it needs solver=reversible_rk",
    "solver.tableau=sdirk2": "solver.tableau=sdirk2: choose one of euler, rk2, heun, bosh3, rk4, dopri5",
    "solver.damping=0.5": "solver.damping=0.5: give a number above 0.5, at most 1",
    "solver.coupling=0": "solver.coupling=0: give a number above 0, at most 1",
    "gradient=reversible": "gradient=reversible: a step of euler has no inverse; choose solver=alf, reversible_rk",
    "solver.linear=lu": "solver.linear=lu: choose one of dense, gmres",
    "gradient.memory=1GiB": "gradient.memory: there is no such setting",
    "solver.adaptive=true": "solver.adaptive=true: euler has no error estimate; choose solver=heun",
    "gradient=adjoint": "step_checkpoint, stored_adjoint; did you mean stored_adjoint?",
    "dataset=cifar": "robertson, van_der_pol; did you mean cifar10",
    "recipe=": "recipe=: there is no such recipe; choose one of adam, adamw, modern, paper",
    "experiment=digit": "there is no such experiment; choose one of anode/fig3_euler, ",
    "solver.n_steps=abc": "solver.n_steps=abc: give a whole number",
    "solver.n_steps=2.5": "solver.n_steps=2.5: give a whole number",
    "solver.n_steps=0": "solver.n_steps=0: give a whole number, at least 1",
    "solver.n_steps=-1": "solver.n_steps=-1: give a whole number, at least 1",
    "solver.n_steps=null": "solver.n_steps=null: give a whole number",
    "solver.n_steps=1,2": "solver.n_steps=1,2: names several values; add -m for a sweep over them",
    "solver.nsteps=4": "solver.coupling, solver.name; did you mean solver.n_steps?",
    "+solver.nsteps=4": "solver.nsteps: there is no such setting",
    "+solver.n_steps=4": "settings can be changed, not added or removed; write solver.n_steps=VALUE",
    "~solver.n_steps": "settings can be changed, not added or removed",
    "+model.width=2": "model.width: there is no such setting",
    "~model": "~model: a run needs a model; choose one of alexnet, flow, mlp, resnet10",
    "model=null": "model=None: there is no such model",
    "model.norm=${nowhere}": "model.norm: Interpolation key 'nowhere' not found",
    "hydra/launcher=none": "Could not find 'hydra/launcher/none'",
    "lr=0.1": "runtime; did you mean recipe.lr?",
    "recipe.lr=fast": "recipe.lr=fast: give a number",
    "recipe.lr=-1": "recipe.lr=-1.0: give a number, at least 0",
    "recipe.lr=nan": "recipe.lr=nan: give a finite number",
    "recipe.milestones=[a]": "recipe.milestones[0]=a: give a list of whole numbers",
    "recipe.epochs=0": "recipe.epochs=0: give a whole number, at least 1",
    "recipe.max_steps=0": "recipe.max_steps=0: give a whole number or null, at least 1",
    "model.block=odd": "model.block=odd: choose one of ode, residual",
    "model.norm=instance": "model.norm=instance: choose one of batch, group, layer, none",
    "model.activation=tanh": "choose one of relu, leaky_relu, softplus, gelu",
    "model.width=2": "model.width: there is no such setting",
    "model.name=vgg": (
        "model.name=vgg: choose one of alexnet, flow, mlp, resnet10, resnet18, resnet4, squeezenext, as model=NAME"
    ),
    "runtime.device=tpu": "runtime.device=tpu: choose one of auto, cuda, cpu",
    "runtime.precision=fp16": "choose one of fp32, tf32, bf16, fp64",
    "dataset.train_size=-5": "dataset.train_size=-5: give a whole number or null, at least 1",
    "dataset.download=maybe": "dataset.download=maybe: give true or false",
    "dataset.std=[0,1,1]": "dataset.mean and dataset.std: give three numbers each",
    "seed=-1": "seed=-1: give a whole number, at least 0",
    "seed=99999999999": "seed=99999999999: give a whole number below",
    "banana": "banana: not a setting; settings are key=value",
    "model=[": "cannot be read as key=value",
    "dataset=": "dataset=: there is no such dataset",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_mistake_gets_one_clear_line(override):
    with pytest.raises(UserError) as raised:
        jobs([override], multirun=False)
    message = str(raised.value)
    assert WRONG[override] in message
    assert "\n" not in message


def test_a_mistake_in_any_job_of_a_sweep_is_found_before_the_first_runs():
    with pytest.raises(UserError, match="solver=rk5"):
        jobs(["solver=rk2,rk5"], multirun=True)
    with pytest.raises(UserError, match=r"solver\.n_steps=0"):
        jobs(["solver.n_steps=1,0"], multirun=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gradient=dto_checkpoint", "gradient.unit=step"], "gradient.unit=step: dto_checkpoint takes block"),
        (["gradient=step_checkpoint", "gradient.unit=block"], "takes step or stage; unit block is for dto_checkpoint"),
        (["gradient=dto_checkpoint", "gradient.states=keep"], "gradient.states=keep: dto_checkpoint takes input"),
        (["gradient=stage_checkpoint", "gradient.states=input"], "stage_checkpoint takes keep or rebuild"),
        (["gradient=revolve", "gradient.slots=0"], "gradient.slots=0: give a whole number or null, at least 1"),
        (["gradient=revolve", "gradient.unit=layer"], "choose one of block, step, stage"),
        (["compat=published_code", "gradient.passes=3"], "gradient.passes=3: choose one of 1, 2"),
        (["gradient=full_backprop", "gradient.slots=2"], "gradient.slots: there is no such setting"),
    ],
)
def test_gradient_settings_that_do_not_go_together(overrides, message):
    with pytest.raises(UserError, match=message):
        jobs(overrides, multirun=False)


def test_gradient_settings_reach_the_mode():
    for overrides, expected in (
        (["gradient=stage_checkpoint", "gradient.states=rebuild"], ("stage", "rebuild", None)),
        (["gradient=revolve", "gradient.unit=stage", "gradient.slots=5"], ("stage", "revolve", 5)),
        (["gradient=equispaced"], ("step", "equispaced", 3)),
    ):
        config = one("model=resnet4", *overrides)
        mode = next(ode_blocks(build_model(config.model, config.solver, config.gradient, 10))).gradient
        assert (mode.unit, mode.states, mode.slots) == expected


def test_a_width_between_eighths():
    with pytest.raises(UserError, match=r"model.width=0.3: give a multiple of 1/8"):
        jobs(["model=squeezenext", "model.width=0.3"], multirun=False)


@pytest.mark.parametrize("multirun", [False, True])
def test_a_folder_in_use_is_refused(tmp_path, multirun):
    (tmp_path / "results.json").write_text("{}")
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    with pytest.raises(UserError, match="nothing is overwritten"):
        jobs([f"{key}={tmp_path}"], multirun)


def test_a_folder_of_a_start_that_failed_is_taken_again(tmp_path):
    for name in ("train.log", ".hydra/config.yaml", "0_seed-0/train.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert jobs([f"hydra.run.dir={tmp_path}", "seeds=2"], multirun=False).directory == tmp_path
    (tmp_path / "0_seed-0" / "config.yaml").touch()
    with pytest.raises(UserError, match="nothing is overwritten"):
        jobs([f"hydra.run.dir={tmp_path}", "seeds=2"], multirun=False)


def test_names_of_jobs_need_no_quoting():
    assert path_safe("model-resnet18_solver.n_steps-4") == "model-resnet18_solver.n_steps-4"
    assert path_safe("a=[1, 'b']/$c d") == "a--1---b----c-d"
    assert (path_safe(0, ""), path_safe(3, "seed-1")) == ("0", "3_seed-1")
    assert len(path_safe("x" * 1000)) < 200
