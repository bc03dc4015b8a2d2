"""``study NAME``: a measurement, with its table and plot."""

from anode_exp.commands.arguments import PROGRAM, Parser, help_text, own_settings
from anode_exp.config.check import split_settings
from anode_exp.config.compose import composed_settings, folder
from anode_exp.config.describe import CONF, about, comments, described, near, options
from anode_exp.config.schema import StudySettings
from anode_exp.config.studies import STUDY_READS, study
from anode_exp.errors import UserError

ABOUT = (
    "a measurement with its table and plot: memory, budgets, gradient errors, reversibility, evolving weights, "
    "stiff systems, densities"
)

OF_RUN = ("study.run=", "study.checkpoint=")


def main(arguments: list[str]) -> None:
    parsed = Parser("study", "name").parse_intermixed_args(arguments)
    names, name = options("study"), parsed.name
    if name is None and parsed.help:
        parts = [("studies", [(n, about("study", n).line) for n in names])]
        examples = [about("study", n).commands[0].removeprefix(f"{PROGRAM} ") for n in names]
        about_all = f"Study: {ABOUT}. study NAME --help shows the settings of each."
        print(help_text("study NAME [KEY=VALUE …]", about_all, parts, examples))
        return
    if name is None or "=" in name:
        raise UserError(f"study: needs the name of a study; studies are {', '.join(names)}")
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
    of_run = [(key.removeprefix("study.").replace("=null", "="), text) for key, text in rows if key.startswith(OF_RUN)]
    rows = [r for r in rows if not r[0].startswith(OF_RUN)]
    if "gradients" in config.study:
        modes = ", ".join(config.study.gradients)
        rows.append(("+study.gradients.NAME={name: …}", f"add a mode to {modes}"))
    place = (f"hydra.run.dir=outputs/DATE/TIME-{name}", "folder of the table, the plot and the records")
    settings = [*of_run, *own_settings(StudySettings, takes), place, *rows]
    examples = [c.removeprefix(f"{PROGRAM} ") for c in said.commands]
    notes = f"Settings of train that it uses: {', '.join(STUDY_READS[name])}." if STUDY_READS[name] else ""
    text = f"{said.text[0].upper()}{said.text[1:]}."
    return help_text(f"study {name} [KEY=VALUE …]", text, [("settings", settings)], examples, notes)
