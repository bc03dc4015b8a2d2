"""``list``: everything that can be chosen by name."""

from anode_exp.commands.arguments import Parser, help_text
from anode_exp.config.describe import catalogue
from anode_exp.errors import UserError

ABOUT = "models, solvers, gradient modes, data sets, presets, studies and papers, each with one line"


def main(arguments: list[str]) -> None:
    parsed = Parser("list").parse_intermixed_args(arguments)
    if parsed.help:
        print(help_text("list", f"List: {ABOUT}.", examples=["list"]))
        return
    if parsed.settings:
        raise UserError(f"{parsed.settings[0]}: list takes no settings")
    print(catalogue())
