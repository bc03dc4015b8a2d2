"""``report PAPER``: curves and tables of a reproduction next to the published ones, as one page."""

import shlex
from pathlib import Path

from anode_exp.commands.arguments import PROGRAM, Parser
from anode_exp.commands.reproduce import paper_help, paper_name
from anode_exp.config.check import split_settings
from anode_exp.config.compose import composed
from anode_exp.config.describe import options
from anode_exp.config.reproduction import cells, directories, specification
from anode_exp.config.schema import ReportSettings
from anode_exp.errors import UserError

ABOUT = "curves and tables of a paper's runs next to the published ones, as one page"


def main(arguments: list[str]) -> None:
    parsed = Parser("report", "paper").parse_intermixed_args(arguments)
    if parsed.help:
        print(paper_help("report", ABOUT, parsed.paper, ReportSettings))
        return
    paper = paper_name("report", parsed.paper)
    own, others = split_settings(ReportSettings, parsed.settings, "report")
    if others:
        raise UserError(f"{others[0]}: report takes length=, directory=, to= and seeds=")
    if own.length not in options("length"):
        raise UserError(f"length={own.length}: choose one of {', '.join(options('length'))}")
    expected = cells(paper, [f"length={own.length}", f"seeds={own.seeds}"])
    places = directories(paper, own.length, Path(own.directory))

    from anode_exp.records.cells import COPIES, copy_records, read_records
    from anode_exp.report.page import write_report

    records = [r for r in read_records(*places) if r.cell["length"] == own.length]
    if not records:
        remedy = f"make some with: {PROGRAM} reproduce {paper} length={own.length}"
        raise UserError(f"{places[0]}: holds no runs of {paper} at length={own.length}; {remedy}")
    target = Path(own.to or places[0] / "report")
    words = [a.partition("=")[0] for a in parsed.settings]
    given = shlex.join(f"{k}={getattr(own, k)}" for k in ("length", "directory") if k in words)
    commands = {}
    for c in (c for c in expected if c.method is not None):
        command = f"{PROGRAM} reproduce {paper} figure={c.shown_in} method={c.method} 'seeds=[{c.seed}]' {given}"
        commands[c.shown_in, c.method, c.seed] = command.rstrip()
    epochs = "every experiment's whole recipe"
    if own.length != "paper":
        epochs = f"{composed([f'length={own.length}']).recipe.epochs} epochs"
    page = write_report(specification(paper), own.length, epochs, records, commands, target)
    if own.to is not None:
        copy_records(records, target / COPIES)
    print((target / "README.md").read_text())
    print(page)
