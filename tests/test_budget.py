"""Plans for a byte budget: they predict what is measured, and no other plan that fits is faster."""

import copy
import functools
import itertools
import json

import pytest
import torch
from conftest import IMAGE_MODELS, Repeat, make_ode_block

from anode_exp.budget.measure import REPEATS, Planner
from anode_exp.budget.plan import RESERVE, Plan, policies
from anode_exp.build import autocast_for, dtype_of
from anode_exp.commands import together as train_module
from anode_exp.commands.together import train
from anode_exp.config.check import parse_bytes
from anode_exp.config.compose import jobs
from anode_exp.errors import UserError
from anode_exp.gradient import DtoCheckpoint
from anode_exp.models import MODELS, Evolution, ode_blocks, take_evaluations
from anode_exp.ode import SOLVERS
from anode_exp.runs import load_run
from anode_exp.tasks.classification import Classification


def planner(
    model="squeezenext", n_steps=2, batch=4, precision="fp32", evolves=False, solver=None, **settings
) -> Planner:
    torch.manual_seed(0)
    if model == "squeezenext":
        settings.setdefault("width", 0.25)
    network = MODELS[model](10, make_ode_block(DtoCheckpoint(), "rk2", n_steps), **settings)
    for block in ode_blocks(network):
        block.evolution = Evolution(block.f, sharing="kernel") if evolves else None
        block.solver = SOLVERS[solver]() if solver else block.solver
    dtype = dtype_of(precision)
    network, images, labels = network.to(dtype), torch.randn(batch, 3, 32, 32).to(dtype), torch.arange(batch) % 10

    def optimizer(n):
        return torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    return Planner(network, optimizer, autocast_for(precision, torch.device("cpu")), Classification(), (images, labels))


@functools.cache
def profiled() -> Planner:
    return planner()


def default() -> Planner:
    """The default planner, whose profiles are made once."""
    p = copy.copy(profiled())
    p._seconds = {}
    return p


def by_evaluations(p: Planner) -> Planner:
    """Times that do not depend on the machine: the number of evaluations of each policy."""
    p._seconds = {name: [sum(e) * (1 + 0.1 * i) for i, e in enumerate(x.evaluations)] for name, x in p.profiles.items()}
    return p


@pytest.mark.parametrize(
    "settings",
    [
        {"n_steps": 3},
        {"precision": "bf16", "n_steps": 1},
        {"model": "resnet10", "blocks_per_stage": 2, "batch": 1},
        {"norm": "group", "activation": "gelu", "n_steps": 1},
        {"model": "resnet10", "evolves": True, "batch": 1},
        {"solver": "alf", "n_steps": 3},
    ],
    ids=str,
)
def test_the_predicted_peak_is_the_measured_one(settings):
    p = planner(**settings)
    # Autocast's cache of weights in bfloat16 belongs to no block.
    accuracy = 0.01 if settings.get("precision") == "bf16" else 1e-4
    n = len(p.blocks)
    plans = [[name] * n for name in p.choices]
    names = list(p.choices)
    plans += [[names[(i * step + step) % len(names)] for i in range(n)] for step in (1, 2, 3)]
    for names in plans[::2]:
        assert p.predict(names) == pytest.approx(p.measure(Plan(tuple(names), 0, 0.0)), rel=accuracy), names


def test_dry_runs_leave_no_trace():
    p = planner("resnet10", batch=2)
    state = {k: v.clone() for k, v in p.network.state_dict().items()}
    random = torch.get_rng_state()
    p.seconds(10**12)
    p.measure(p.plan(10**12))
    assert all(torch.equal(v, state[k]) for k, v in p.network.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(x.grad is None for x in p.network.parameters())
    assert all(e.forward == e.backward == 0 for e in take_evaluations(p.network))
    assert all(isinstance(b.gradient, DtoCheckpoint) for b in ode_blocks(p.network))


def test_no_plan_that_fits_is_faster():
    p = by_evaluations(default())
    # Few policies, so that every plan there is can be tried
    kept = ("full_backprop", "dto_checkpoint", "stage_checkpoint keep", "stage_checkpoint rebuild")
    p.choices = {k: p.choices[k] for k in kept}
    p.profiles = {k: p.profiles[k] for k in kept}
    every = [(p.predict(names), sum(p._seconds[k][i] for i, k in enumerate(names)))
             for names in itertools.product(kept, repeat=4)]  # fmt: skip
    least, most = p.least(), p.predict(["full_backprop"] * 4)
    assert least == min(peak for peak, _ in every)
    for share in (0, 0.03, 0.1, 0.2, 0.4, 0.7, 1):
        budget = int(least + share * (most - least))
        plan = p.plan(budget)
        assert plan.predicted_bytes <= budget
        assert plan.block_seconds == pytest.approx(min(s for peak, s in every if peak <= budget))
    assert p.plan(most).policies == ("full_backprop",) * 4


@pytest.mark.parametrize("model", [m for m in IMAGE_MODELS if m != "resnet18"])
def test_from_nothing_fits_to_everything_kept(model):
    p = by_evaluations(planner(model, n_steps=3 if model == "alexnet" else 2))
    least, most = p.least() + RESERVE, p.predict(["full_backprop"] * len(p.blocks)) + RESERVE
    with pytest.raises(
        UserError, match=r"does not fit .* MiB with any checkpoint policy; give \d+MiB or more"
    ) as error:
        p.fitted(least - 1)
    offered = int(str(error.value).partition("give ")[2].partition("MiB")[0])
    assert 0 <= offered * 2**20 - least < 2**20
    times = []
    for budget in (least, int((least * most) ** 0.5), most):
        plan, measured = p.fitted(budget)
        assert measured <= budget and measured == pytest.approx(plan.predicted_bytes, rel=0.1)
        times.append(plan.block_seconds)
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_a_method_that_can_be_undone_has_that_policy_and_none_by_stages():
    p = by_evaluations(planner("resnet4", solver="alf", n_steps=8))
    assert set(p.choices) >= {"reversible", "step_checkpoint keep", "revolve step 1"}
    assert not any("stage" in name for name in p.choices)
    most = p.predict(["full_backprop"])
    assert p.predict(["reversible"]) < 0.5 * most
    assert "reversible" in p.plan(int(0.5 * most)).policies


def test_a_kernel_that_takes_more_comes_off_the_budget(monkeypatch):
    p = by_evaluations(default())
    most = p.predict(["full_backprop"] * 4) + RESERVE
    counted = p.measure
    monkeypatch.setattr(p, "measure", lambda plan: counted(plan) + 3 * 2**20)
    plan, measured = p.fitted(most)
    assert measured <= most and plan.policies != ("full_backprop",) * 4
    with pytest.raises(UserError, match="does not fit"):
        p.fitted(p.least() + RESERVE)


def test_the_least_budget_fits_whatever_an_allocator_adds(monkeypatch):
    """Workspaces, which are the same for every plan, and rounding of every tensor, which is not."""
    p = by_evaluations(default())
    counted = p.measure

    def allocated(plan):
        return counted(plan) + 40 * 2**20 + 512 * sum(map(len, plan.policies))

    monkeypatch.setattr(p, "measure", allocated)
    least = p.least() + RESERVE
    _, measured = p.fitted(least)
    assert 40 * 2**20 < measured <= least - RESERVE
    with pytest.raises(UserError, match="does not fit"):
        p.fitted(least - 1)


def test_what_a_run_replays_is_what_is_timed():
    """Every block is timed from a recording under every policy; eagerly if it cannot be recorded."""
    p = planner("resnet10", batch=2)
    captures = []

    def capture():
        captures.append(Repeat(p.network))
        return captures[-1]

    p.new_capture = capture
    most = p.predict(["full_backprop"] * 2)
    times = p.seconds(most)
    assert len(captures) == 2 * len(p.choices) and {c.replays for c in captures} == {REPEATS}
    assert all(0 < x < float("inf") for row in times.values() for x in row)

    def broken():
        raise RuntimeError("no graph here")

    p._seconds, p.new_capture = {}, broken
    assert all(0 < x < float("inf") for row in p.seconds(most).values() for x in row)


@pytest.mark.parametrize(("precision", "dtype"), [("fp64", torch.float64), ("bf16", torch.bfloat16)])
def test_blocks_are_timed_on_states_of_the_runs_dtype(precision, dtype):
    p = planner("resnet4", n_steps=1, batch=2, precision=precision)
    seen = set()
    for block in p.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    p.seconds(10**12)
    assert seen == {dtype}


SMALL = ["dataset=fake", "dataset.train_size=40", "dataset.test_size=20", "model=squeezenext", "model.width=0.5",
         "solver=rk2", "solver.n_steps=3", "recipe.batch_size=16", "gradient=budget", "runtime.device=cpu"]  # fmt: skip


def test_a_run_in_a_budget(tmp_path):
    settings = [*SMALL, "solver.n_steps=2", "gradient.memory=28MiB", "recipe.epochs=1"]
    (config,) = jobs(settings, multirun=False).configs
    results = train(config, tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert results["peak_memory_bytes"] <= plan["budget_bytes"] == 28 * 2**20
    assert results["peak_memory_bytes"] == pytest.approx(plan["predicted_bytes"], rel=0.1)
    for block, measured in zip(plan["blocks"], results["nfe"]["blocks"], strict=True):
        found = {k: block[f"evaluations_{k}"] for k in ("forward", "backward")}
        assert found == measured and block["seconds"] > 0 and block["kept_bytes"] > 0
    assert plan["measured_bytes"] == results["peak_memory_bytes"], "measured by the very steps"
    assert "predicted" in (tmp_path / "run" / "train.log").read_text()
    assert load_run(tmp_path / "run").epoch == 1

    # A resumed run keeps its plan, even if another one would be made now.
    plan["blocks"][0]["policy"], plan["blocks"][1]["policy"] = "full_backprop", "stage_checkpoint keep"
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    config.recipe.epochs = 2
    results = train(config, tmp_path / "run", resume=True)
    assert results["nfe"]["blocks"][0] == {"forward": 4, "backward": 0}
    assert results["nfe"]["blocks"][1] == {"forward": 4, "backward": 4}


@pytest.mark.parametrize("averaged", [[], ["recipe.moving_average=0.9", "dataset.train_size=5000"]])
def test_the_least_that_a_run_is_told_to_have_is_enough(tmp_path, monkeypatch, averaged):
    """Including averaged weights, and the order, crops and flips of every image of an epoch."""
    of_one_block = [s for s in SMALL if not s.startswith("model")] + ["model=resnet4", "solver.n_steps=2"]
    settings = [*of_one_block, "recipe.max_steps=3", "recipe.batch_size=4", *averaged]
    (config,) = jobs([*settings, "gradient.memory=1MB"], multirun=False).configs
    with pytest.raises(UserError, match=r"does not fit 1.0 MiB .* give \d+MiB") as error:
        train(config, tmp_path / "short")
    offered = str(error.value).partition("give ")[2].partition(" ")[0]
    (config,) = jobs([*settings, f"gradient.memory={offered}"], multirun=False).configs
    results = train(config, tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert results["peak_memory_bytes"] == plan["measured_bytes"] <= plan["budget_bytes"]

    def as_planned(directory, trainer, resume):
        for block, entry in zip(ode_blocks(trainer.network), plan["blocks"], strict=True):
            block.gradient = policies(2, block.solver)[entry["policy"]]

    monkeypatch.setattr(train_module, "_plan", as_planned)
    assert train(config, tmp_path / "unrehearsed")["train_loss"] == results["train_loss"], "it leaves no trace"
    for ours, theirs in zip(
        *(load_run(tmp_path / d, "last").network.buffers() for d in ("run", "unrehearsed")), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2**31), ("500 MB", 500_000_000), ("1.5KiB", 1536), ("4096", 4096), ("7kB", 7000)],
)
def test_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["2G", "GiB", "-1GiB", "0MB", "two", "1e9B"])
def test_no_bytes(text):
    with pytest.raises(UserError, match="such as 2GiB or 500MB"):
        parse_bytes(text)


def test_budgets_and_adaptive_steps_do_not_mix():
    with pytest.raises(UserError, match="plans for a known number of steps"):
        jobs([*SMALL, "solver=dopri5", "solver.adaptive=true"], multirun=False)


def test_a_budget_needs_blocks_in_every_job_of_a_sweep():
    with pytest.raises(UserError, match=r"model.blocks_per_stage=0 has none; give at least 1"):
        jobs([*SMALL, "model.blocks_per_stage=1,0"], multirun=True)
