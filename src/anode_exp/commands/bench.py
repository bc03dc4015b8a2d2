"""``bench``: training steps of several configurations and of common training loops, timed in turn."""

from fnmatch import fnmatchcase

from anode_exp.commands.arguments import Parser, help_text, own_settings
from anode_exp.config.check import check_used, lacking_in_torchdiffeq, split_settings, yaml_or_text
from anode_exp.config.compose import composed, folder, given_keys, parse
from anode_exp.config.describe import near
from anode_exp.config.schema import BenchSettings, TrainConfig
from anode_exp.errors import UserError

ABOUT = "time of a training step of several configurations and of common training loops, measured in turn"
EXAMPLES = (
    "bench model=squeezenext solver=rk2",
    "bench 'compare=[gradient=full_backprop, gradient=dto_checkpoint solver=rk4, baseline=dataloader]'",
    "bench model=squeezenext 'compare=[runtime.compile=false, runtime.compile=true, seeds=5]'",
)


def main(arguments: list[str]) -> None:
    parsed = Parser("bench").parse_intermixed_args(arguments)
    if parsed.help:
        usage = "bench [GROUP=OPTION …] [KEY=VALUE …] [compare=LIST]"
        text = f"Bench: {ABOUT}. All other settings are those of train and apply to every entry."
        place = ("hydra.run.dir=outputs/DATE/TIME-bench", "folder of the table and the records")
        baselines = [(f"baseline={name}", said) for name, said in BASELINES.items()]
        parts = [("settings", [*own_settings(BenchSettings), place]), ("baselines", baselines)]
        print(help_text(usage, text, parts, EXAMPLES))
        return
    entries, rounds = bench_entries(parsed.settings)
    directory = folder(split_settings(BenchSettings, parsed.settings, "bench")[1], "bench")

    from anode_exp.studies.bench import run_bench

    run_bench(entries, rounds, directory)


BASELINES = {
    "eager": "a plain loop: contiguous layout, images on the device, no graph",
    "dataloader": "the same, fed by torchvision's DataLoader with 4 workers",
    "torch_checkpoint": "this project's step with torch.utils.checkpoint around each block",
    "torchdiffeq_adjoint": "this project's step with torchdiffeq's odeint_adjoint in each block, a wrong gradient",
}

NOT_TIMED = (
    *("length", "recipe.epochs", "recipe.max_steps", "recipe.test_batch_size", "recipe.lr", "recipe.milestones"),
    *("recipe.gamma", "recipe.schedule", "recipe.warmup_epochs", "recipe.evolution_lr", "recipe.restart_momentum"),
    *("recipe.moving_average", "runtime.check_every", "runtime.keep_every", "runtime.sync_debug", "dataset.test_size"),
)
"""Settings of a run that do not affect the training step that ``bench`` times."""


def bench_entries(arguments: list[str]) -> tuple[list[tuple[str, TrainConfig, str | None]], int]:
    """The entries to compare, each (label, configuration, baseline), and the number of rounds.

    ``compare=[…]`` lists the entries. An entry has overrides, separated by spaces, in addition to those that all
    entries share; ``baseline=NAME`` among them is one of ``BASELINES``. Without ``compare``, the project's step is
    compared with all baselines except ``torchdiffeq_adjoint``.

    Raises UserError for the first mistake.
    """
    own, shared = split_settings(BenchSettings, arguments, "bench")
    compare = yaml_or_text(own.compare)
    if not isinstance(compare, list) or not all(isinstance(entry, str) for entry in compare):
        example = "compare='[gradient=dto_checkpoint, gradient=full_backprop solver=rk4]'"
        raise UserError(f"compare={own.compare}: give a list of settings, such as {example}")
    for key in given_keys(parse(shared)):
        if key.startswith(("hydra.", "hydra/")) and key != "hydra.run.dir":
            raise UserError(f"{key}: bench does not use it; give hydra.run.dir=DIR")
    labels = compare or ["", *(f"baseline={name}" for name in BASELINES if name != "torchdiffeq_adjoint")]
    entries = [_entry(label, shared) for label in labels]
    check_used(given_keys(parse(shared)), [config for _, config, _ in entries])
    if len(set(labels)) < len(labels):
        raise UserError("compare: names the same entry twice")
    if len({(c.runtime.device, c.runtime.precision == "tf32", c.runtime.cudnn_benchmark) for _, c, _ in entries}) > 1:
        raise UserError(
            "compare: the entries differ in device, TF32 or runtime.cudnn_benchmark, which a process sets once; "
            "compare them in two runs"
        )
    return entries, own.rounds


def _entry(label: str, shared: list[str]) -> tuple[str, TrainConfig, str | None]:
    baselines = [word.partition("=")[2] for word in label.split() if word.startswith("baseline=")]
    for name in baselines:
        if name not in BASELINES:
            raise UserError(f"baseline={name}: choose one of {', '.join(BASELINES)}" + near(name, BASELINES))
    settings = [word for word in label.split() if not word.startswith("baseline=")]
    config = composed([*shared, *settings], "list them in compare")
    check_used(given_keys(parse(settings)), [config])
    if baselines and config.task.name != "classification":
        raise UserError(
            f"baseline={baselines[0]}: takes task=classification; list settings in compare, as --help shows"
        )
    if len(baselines) > 1:
        raise UserError(f"compare: {label} names two baselines; write an entry for each")
    baseline = baselines[0] if baselines else None
    own_step = ("gradient*", "runtime.compile", "runtime.cuda_graph", "runtime.channels_last")
    unused = own_step[1:] if baseline in ("eager", "dataloader") else own_step[:-1]
    if baseline == "torchdiffeq_adjoint" and (refused := lacking_in_torchdiffeq(config)):
        raise UserError(f"baseline={baseline}: {refused}")
    for key in given_keys(parse(settings)):
        if key.startswith(("hydra.", "hydra/")):
            raise UserError(f"{key}: not a setting of an entry; give hydra.run.dir=DIR to bench itself")
        if baseline and any(fnmatchcase(key, pattern) for pattern in unused):
            raise UserError(f"{key}: baseline={baseline} does not use it; leave it out of its entry")
    for key in given_keys(parse([*shared, *settings])):
        if key in NOT_TIMED:
            raise UserError(f"{key}: bench times training steps, which it does not affect; leave it out")
    if config.gradient.name == "budget":
        raise UserError("gradient=budget: bench does not plan for a budget; use study budget, or study memory")
    if config.seeds > 1 and baseline:
        raise UserError(f"baseline={baseline}: takes one seed; set seeds=1")
    return label or "as composed", config, baseline
