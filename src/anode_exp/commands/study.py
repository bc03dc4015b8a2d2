"""``study NAME``: a measurement, with its table and plot."""

from anode_exp.commands.arguments import Parser, help_text, own_settings
from anode_exp.config.check import split_settings
from anode_exp.config.compose import composed_settings, folder
from anode_exp.config.describe import CONF, about, comments, described, near, options
from anode_exp.config.schema import StudySettings
from anode_exp.config.studies import STUDY_READS, study
from anode_exp.errors import UserError

ABOUT = "a measurement with its table and plot: memory, budgets, gradient errors, reversibility, evolving weights"


def main(arguments: list[str]) -> None:
    parsed = Parser("study", "name").parse_intermixed_args(arguments)
    names, name = options("study"), parsed.name
    if name is None and parsed.help:
        print(
            help_text(
                "study NAME [KEY=VALUE …]",
                f"Study: {ABOUT}. Each answers --help with its settings.",
                [("studies", [(n, about("study", n).line) for n in names])],
                [about("study", n).commands[0].removeprefix("python -m anode_exp ") for n in names],
            )
        )
        return
    if name is None or "=" in name:
        raise UserError(f"study: needs the name of one; there are {', '.join(names)}")
    if name not in names:
        raise UserError(f"study {name}: there is no such study; choose one of {', '.join(names)}{near(name, names)}")
    if parsed.help:
        print(help_page(name))
        return
    own, overrides = split_settings(StudySettings, parsed.settings, f"study {name}")
    of_run = [f"study.{key}='{value}'" for key in ("run", "checkpoint") if (value := getattr(own, key)) is not None]
    takes = comments(CONF / "study" / f"{name}.yaml")
    for key in ("run", "checkpoint"):
        if getattr(own, key) is not None and f"study.{key}" not in takes:
            raise UserError(f"{key}={getattr(own, key)}: study {name} does not take it; see study {name} --help")
    config, settings = study(name, [*overrides, *of_run], own.thorough)
    directory = folder(overrides, name)

    from anode_exp.studies.study import run_study

    run_study(config, settings, directory)


def help_page(name: str) -> str:
    said = about("study", name)
    config = composed_settings([f"+study={name}"])
    takes = ["thorough"] if (CONF / "study" / "thorough" / f"{name}.yaml").exists() else []
    rows = [r for r in described(config, [CONF / "study" / f"{name}.yaml"]) if r[0].startswith("study.")]
    rows = [r for r in rows if not r[0].startswith("study.gradients.")]
    of_run = [
        (key.removeprefix("study.").replace("=null", "="), text) for key, text in rows if key[6:9] in ("run", "che")
    ]
    rows = [r for r in rows if r[0][6:9] not in ("run", "che")]
    if "gradients" in config.study:
        rows.append(
            ("+study.gradients.NAME={name: …}", f"one more mode; there are {', '.join(config.study.gradients)}")
        )
    return help_text(
        f"study {name} [KEY=VALUE …]",
        f"{said.text[0].upper()}{said.text[1:]}.",
        [
            ("settings", [*of_run, *own_settings(StudySettings, takes),
                          ("hydra.run.dir=outputs/DATE/TIME-" + name, "where table, plot and records go"), *rows]),
        ],
        [c.removeprefix("python -m anode_exp ") for c in said.commands],
        f"Settings of train that it uses: {', '.join(STUDY_READS[name])}." if STUDY_READS[name] else "",
    )  # fmt: skip
