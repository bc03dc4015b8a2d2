"""Every verb has --help, and either uses a setting or refuses it in one line."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from anode_exp import __main__
from anode_exp.commands.together import train
from anode_exp.config.compose import jobs
from anode_exp.config.describe import CONF, about, catalogue, comments, groups, options

RUN = ["dataset=digits", "dataset.train_size=20", "dataset.test_size=10", "model=resnet4", "recipe.batch_size=10",
       "recipe.epochs=1", "runtime.device=cpu"]  # fmt: skip


@pytest.fixture
def call(monkeypatch, capsys):
    """What a command line prints, its errors, and its exit code."""

    def run(line: str) -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "argv", ["anode_exp", *shlex.split(line)])
        code = 0
        try:
            __main__.main()
        except SystemExit as end:
            code = end.code
        out = capsys.readouterr()
        return out.out, out.err, code

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    train(jobs(RUN, multirun=False).configs[0], directory)
    return directory


@pytest.mark.parametrize("verb", __main__.VERBS)
def test_every_verb_has_help_with_commands_to_copy(call, verb):
    out, err, code = call(f"{verb} --help")
    assert code == 0 and not err
    assert out.startswith(f"usage: python -m anode_exp {verb}")
    assert f"  python -m anode_exp {verb}" in out.split("examples")[1]
    assert verb in call("--help")[0]


@pytest.mark.parametrize("name", options("study"))
def test_the_help_of_a_study_shows_its_settings_and_their_defaults(call, name):
    out, _, code = call(f"study {name} -h")
    assert code == 0 and f"study {name}" in out.split("examples")[1]
    assert about("study", name).line[1:20] in out
    assert "hydra.run.dir=" in out
    assert ("run=" in out.replace("hydra.run", "")) == (
        name in ("batchnorm", "density", "gradient_error", "evolution", "stiff")
    )
    for key in comments(CONF / "study" / f"{name}.yaml"):
        assert key in out or key in ("study.run", "study.checkpoint", "study.gradients", "solver.n_steps"), key


def test_help_shows_the_values_that_settings_lead_to(call):
    out, _, code = call("train model=squeezenext dataset=digits recipe=modern --help")
    assert code == 0
    for line in ("model.width=1.0 ", "recipe.schedule=cosine ", "dataset.flip=false "):
        assert f"  {line}" in out


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "recipe.optimizer=adam",
        "task=trajectory dataset=van_der_pol",
        "task=density",
        "task=density dataset=digits64",
    ],
)
def test_help_explains_every_setting(call, overrides):
    defaults = call(f"train {overrides} --help")[0]
    settings = [line for line in defaults.splitlines() if line.startswith("  ") and "=" in line.split(" ")[2]]
    assert len(settings) > 40
    bare = [line for line in settings if len(line.split()) < 2 and len(line) < 44]
    assert not bare, "every setting is explained"
    if "density" in overrides:
        assert "class-balanced" not in defaults, "what the data set's own files say, not another's"


def test_the_help_of_a_paper_lists_its_figures_and_methods(call):
    out, _, code = call("reproduce anode --help")
    assert code == 0 and "figure=table_resnet4" in out and "method=reverse_adjoint_rk45" in out


@pytest.mark.parametrize("line", ["--version", "train --version"])
def test_version(call, line):
    out, _, code = call(line)
    assert code == 0
    assert all(word in out for word in ("anode_exp ", "Python 3.", "torch ", "CUDA", "torchvision "))


def test_every_entry_of_the_list_has_a_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = catalogue()
    assert all(len(line) <= 100 for line in text.splitlines()) and "python -m" not in text
    for group, section in zip((*groups(), "study", "reproduce"), text.split("\n\n"), strict=True):
        head, *lines = section.splitlines()
        assert head.startswith(group)
        entries = [line for line in lines if line[2] != " "]
        assert [line.split()[0] for line in entries] == options(group)
        starts = {line.index(line.split(None, 1)[1]) for line in entries}
        assert len(starts) == 1, "aligned, and none without a description"


REFUSED = {
    # a verb's own words
    "evaluate": "needs run=DIR",
    "evaluate run={run} run={run}": "run is given twice",
    "evaluate run={run} calibrate=many": "calibrate=many: give a whole number",
    "evaluate run={run} calibrate=-1": "calibrate=-1: give a whole number, at least 0",
    "evaluate run={run} checkpoint=5": "checkpoint=5: choose one of best, last, 0",
    "evaluate run={run} -v": "-v: there is no such flag",
    "evaluate run={run}/nowhere": "holds no run",
    "study": "needs the name of a study; studies are batchnorm, budget",
    "study run={run}": "needs the name of a study",
    "study memry": "did you mean memory?",
    "study memory thorough=perhaps": "thorough=perhaps: give true or false",
    "study evolution thorough=true run={run}": "study evolution has one grid",
    "study evolution run={run}": "a run with model.evolution=reaction_diffusion_advection",
    "study batchnorm": "study batchnorm: needs run=DIR",
    "study batchnorm run={run},{run}/no": "holds no run",
    "train model.norm_intervals=4": "it needs model.norm_affine=by_time, or solver.adaptive=true",
    "study gradient_error checkpoint=last": "checkpoint=last: needs run=DIR",
    "bench rounds=0": "rounds=0: give a whole number, at least 1",
    "bench --fast": "--fast: there is no such flag",
    "reproduce": "needs the name of a paper; papers are anode, anodev2",
    "reproduce resnet": "resnet: no such reproduction",
    "report anode recipe.lr=1": "report takes length=, directory=, to= and seeds=",
    "report figure=fig3": "needs the name of a paper",
    "list models": "list takes no settings",
    "train --flag": "--flag",
    "train resume={run} --flag": "takes no flags",
    # settings that used to be accepted and ignored
    "train resume=": "resume=: give the folder of a run",
    "train hydra.sweep.dir=x": "hydra.sweep.dir: not used here; give hydra.run.dir=DIR",
    "train -m hydra.run.dir=x seed=0,1": "hydra.run.dir: not used here; give hydra.sweep.dir=DIR",
    "train -m hydra.sweep.subdir=x seed=0,1": "hydra.sweep.subdir: not used here; give hydra.sweep.dir=DIR",
    "train resume={run} hydra.run.dir=x": "a resumed run continues in its own folder",
    "evaluate run={run} hydra.run.dir=x": "recorded in the run's own folder",
    "evaluate run={run} dataset.flip=true": "dataset.flip: is for training images",
    "evaluate run={run} runtime.keep_every=2": "runtime.keep_every: is for training steps",
    "evaluate run={run} solver.rtol=1e-4": "solver.rtol: has no effect here; it needs solver.adaptive=true",
    "train solver.rtol=1e-4": "solver.rtol: has no effect here; it needs solver.adaptive=true",
    "train solver=dopri5 solver.adaptive=true solver.n_steps=4": "it needs solver.adaptive=false",
    "train model.block=residual solver=rk4": "solver: has no effect here; it needs model.block=ode",
    "train model.block=residual gradient=revolve": "gradient: has no effect here; it needs model.block=ode",
    "train model.evolution_coupling=first": "needs model.evolution=reaction_diffusion_advection",
    "train recipe.evolution_lr=3": "needs model.evolution=reaction_diffusion_advection",
    "train model.evolution=reaction_diffusion_advection model.evolution_steps=3": "model.evolution_activation=tanh",
    "train recipe=modern recipe.gamma=0.5": "it needs recipe.schedule=steps",
    "train model.norm=group model.statistics=by_time": "it needs model.field_norm=batch",
    "train model.norm=none model.field_gain=0": "it needs model.field_norm other than none",
    "train recipe.momentum=0 recipe.restart_momentum=true": "it needs recipe.momentum above 0",
    "train recipe.weight_decay=0 recipe.decay_all=false": "it needs recipe.weight_decay above 0",
    "train dataset=digits dataset.root=x": "it needs dataset=cifar10 or cifar100",
    "study memory recipe.lr=0.2": "recipe.lr: study memory does not use it; it uses n_steps",
    "study memory gradient=revolve": "gradient: study memory does not use it",
    "study memory solver=dopri5 solver.adaptive=true": "solver.adaptive: study memory does not use it",
    "study memory seeds=3": "seeds: study memory does not use it",
    "study memory hydra.sweep.dir=x": "hydra.sweep.dir: not used here; give hydra.run.dir=DIR",
    "study gradient_error solver=rk4": "solver: study gradient_error does not use it",
    "study gradient_error runtime.precision=bf16": "runtime.precision: study gradient_error does not use it",
    "study gradient_error run={run} model=resnet10": "model: study gradient_error with run=DIR does not use it",
    "study gradient_error run={run} checkpoint=every study.solvers=[rk4]": "takes the run's own solver",
    "study reversibility model=resnet4": "model: study reversibility does not use it",
    "study evolution run={run} study.batch_size=4": "study.batch_size: there is no such setting",
    "bench recipe.epochs=3": "recipe.epochs: bench times training steps",
    "bench length=short": "length: bench times training steps",
    "bench 'compare=[solver.rtol=1e-2]'": "solver.rtol: has no effect here",
    "bench 'compare=[hydra.run.dir=x]'": "hydra.run.dir: not a setting of an entry",
    "reproduce anode hydra.run.dir=x": "chosen by reproduce; give seeds=, directory=, figure= or launcher=",
    "reproduce anode figure=fig1_fig7 recipe.lr=1": "is a study, which takes no settings of runs and no seeds",
    "reproduce anode figure=fig1_fig7 seeds=2": "seeds=2: figure=fig1_fig7 is a study",
    "train experiment=null": "experiment=null: experiment is a preset; leave it out for none",
    "train 'hydra.run.dir=${{nope}}'": "hydra.run.dir: Interpolation key 'nope' not found",
    "train hydra.mode=MULTIRUN": "hydra.mode: give -m for a sweep",
    "train hydra/launcher=joblib": "hydra/launcher: is for sweeps; add -m",
    "train --config-name nosuch": "--config-name: not a flag of train",
    "train recipe.name=mine": "recipe.name=mine: choose one of adam, adamw, modern, paper",
    "train resume={run} dataset.root=/x": "dataset.root: has no effect here",
    "study memory study.name=budget": "study.name: chosen by the word after study",
    "study memory study.batch_size=null": "study.batch_size=null: give a whole number",
    "study memory study.n_steps=[] study.blocks_per_stage=[]": "nothing to measure",
    "study budget model.blocks_per_stage=0": "model.blocks_per_stage=0: a byte budget is for ODE blocks",
    "study memory model.blocks_per_stage=0 study.n_steps=[1] +study.gradients.b={{name:budget,memory:1GB}}": (
        "model.blocks_per_stage=0: a byte budget is for ODE blocks"
    ),
    "study memory run={run}": "study memory does not take it",
    "study memory 'hydra.run.dir=${{nope}}'": "Interpolation key 'nope' not found",
    "study gradient_error dataset.root=/x": "dataset.root: has no effect here",
    "study gradient_error run={run} checkpoint=every thorough=true": "leave one of them out",
    "study gradient_error study.adaptive_solvers=[] solver.min_step=0.1": "it needs study.adaptive_solvers",
    "bench hydra.verbose=true": "hydra.verbose: bench does not use it",
    "bench 'compare=[baseline=eager runtime.compile=true]'": "baseline=eager does not use it",
    "bench 'compare=[baseline=eager baseline=dataloader]'": "names two baselines",
    "reproduce anode gradient=revolve": "is set by the figure or method",
    "reproduce anode figure=table_resnet4 model=resnet10": "is set by the figure or method",
    "reproduce anode ++seed=7": "chosen by reproduce",
    "reproduce anode seeds=99999999999": "at most 1000",
    "report anode length=[short]": "length=[short]: choose one of paper, short",
    "train model.block=residual model.statistics=by_time": "model.statistics: has no effect here",
    "train model.blocks_per_stage=0 solver=rk4": "it needs model.blocks_per_stage above 0",
    "study batchnorm run={run} dataset.root=/x": "dataset.root: has no effect here",
    "study batchnorm run={run} dataset.flip=false": "dataset.flip: study batchnorm with run=DIR does not use it",
    "reproduce anode solver.rtol=1e-2 figure=table_resnet4": "solver.rtol: has no effect here",
}


@pytest.mark.parametrize("line", REFUSED)
def test_nothing_is_ignored(call, trained, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, err, code = call(line.format(run=trained))
    assert code == 2, out
    assert REFUSED[line] in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not any(tmp_path.iterdir()), "nothing was begun"


def test_a_setting_that_one_job_of_a_sweep_uses_is_taken():
    asked = jobs(["model.block=ode,residual", "solver=rk4", "solver.n_steps=3"], multirun=True)
    assert [c.solver.name for c in asked.configs] == ["rk4", "euler"]


def test_studies_and_benchmarks_write_where_they_are_told(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, err, code = call("study reversibility study.cases=false study.adaptive_solvers=[] hydra.run.dir=here/a")
    assert code == 0, err
    assert (tmp_path / "here" / "a" / "table.txt").exists() and [f.name for f in tmp_path.iterdir()] == ["here"]
    _, err, code = call("study reversibility study.cases=false hydra.run.dir=here/a")
    assert code == 2 and "nothing is overwritten" in err
    small = "dataset=fake dataset.train_size=20 model=resnet4 recipe.batch_size=4 rounds=1"
    _, err, code = call(f"bench {small} compare=[seed=0] hydra.run.dir=here/b")
    assert code == 0, err
    assert json.loads((tmp_path / "here" / "b" / "bench.json").read_text())["rounds"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["here"]


def test_a_run_in_a_study_finds_its_data_elsewhere(trained):
    from anode_exp.config.studies import study

    recorded = trained / "config.yaml"
    text = recorded.read_text()
    try:
        recorded.write_text(text.replace("name: digits", "name: cifar10"))
        config, _ = study("gradient_error", [f"study.run={trained}", "dataset.root=/elsewhere"])
        assert (config.dataset.root, config.dataset.train_size) == ("/elsewhere", 20)
        assert config.model.name == "resnet4"
    finally:
        recorded.write_text(text)
