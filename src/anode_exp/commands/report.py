"""``report PAPER`` or ``report DIR …``: curves and tables of a reproduction, or of any runs, on one page."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from anode_exp.commands.arguments import PROGRAM, Parser
from anode_exp.commands.reproduce import paper_help, paper_name
from anode_exp.config.check import split_settings
from anode_exp.config.compose import composed
from anode_exp.config.describe import options
from anode_exp.config.reproduction import directories, runs, specification
from anode_exp.config.schema import ReportSettings
from anode_exp.errors import UserError

if TYPE_CHECKING:
    from anode_exp.report.page import Reproduction

ABOUT = "curves and tables on one page: of the runs in any folders, or of a paper's runs next to the published results"


def main(arguments: list[str]) -> None:
    parsed = Parser("report", "paper").parse_intermixed_args(arguments)
    if parsed.help:
        print(paper_help("report", ABOUT, parsed.paper, ReportSettings))
        return
    words = [parsed.paper] if parsed.paper is not None and "=" not in parsed.paper else []
    words += [word for word in parsed.settings if "=" not in word]
    if words and words[0] not in options("reproduce"):
        report_runs(words, [a for a in (parsed.paper, *parsed.settings) if a not in words])
        return
    paper = paper_name("report", parsed.paper)
    own, others = split_settings(ReportSettings, parsed.settings, "report")
    if others:
        raise UserError(f"{others[0]}: report takes length=, directory=, to= and seeds=")
    lengths = own.length.split(",")
    for length in lengths:
        if length not in options("length"):
            raise UserError(f"length={own.length}: choose one of {', '.join(options('length'))}, or both")

    from anode_exp.records.cells import COPIES, copy_records
    from anode_exp.report.page import write_report

    given = [a.partition("=")[0] for a in parsed.settings]
    found = [_reproduction(paper, length, own, given) for length in dict.fromkeys(lengths)]
    target = Path(own.to or directories(paper, lengths[0], Path(own.directory))[0] / "report")
    page = write_report(specification(paper), found, target)
    if own.to is not None:
        copy_records([record for of in found for record in of.records], target / COPIES)
    print((target / "README.md").read_text())
    print(page)


def _reproduction(paper: str, length: str, own: ReportSettings, given: list[str]) -> "Reproduction":
    """A paper's runs of one length; UserError if there are none."""
    from anode_exp.records.cells import read_records
    from anode_exp.report.page import Reproduction

    spec = specification(paper)
    expected = runs(spec, own.seeds, list(spec["figures"]), list(spec["methods"]))
    places = directories(paper, length, Path(own.directory))
    records = [r for r in read_records(*places) if r.cell["length"] == length]
    if not records:
        remedy = f"make some with: {PROGRAM} reproduce {paper} length={length}"
        raise UserError(f"{places[0]}: holds no runs of {paper} at length={length}; {remedy}")
    settings = {"length": length, "directory": own.directory}
    words = shlex.join(f"{k}={v}" for k, v in settings.items() if k in given)
    commands = {}
    for seed, figure, method in expected:
        command = f"{PROGRAM} reproduce {paper} figure={figure} method={method} 'seeds=[{seed}]' {words}"
        commands[figure, method, seed] = command.rstrip()
    epochs = "every experiment's whole recipe"
    if length != "paper":
        epochs = f"{composed([f'length={length}']).recipe.epochs} epochs"
    return Reproduction(length, epochs, records, commands)


def report_runs(folders: list[str], settings: list[str]) -> None:
    """Write the page of any runs; UserError for folders that hold none."""
    for word in folders:
        if word in options("reproduce"):
            raise UserError(f"{word}: a paper has its own page; use report {word} directory=DIR for its runs in DIR")
        if not Path(word).is_dir():
            papers = ", ".join(options("reproduce"))
            raise UserError(f"{word}: is not a paper or folder; give one of {papers}, or a folder such as outputs/DATE")
    own, others = split_settings(ReportSettings, settings, "report")
    for argument in (a for a in settings if a in others or not a.startswith("to=")):
        raise UserError(f"{argument}: a report of folders takes only to=, the folder of its page")

    from anode_exp.records.folders import read_runs
    from anode_exp.report.runs import write_runs_report

    records = read_runs([Path(word) for word in folders])
    if not records:
        raise UserError(f"{', '.join(folders)}: there are no runs; give a folder of runs, such as outputs/DATE")
    target = Path(own.to) if own.to is not None else Path(folders[0]) / "report"
    page = write_runs_report(records, ", ".join(folders), target)
    print((target / "README.md").read_text())
    print(page)
