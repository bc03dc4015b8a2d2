"""``reproduce PAPER``: the runs of a paper that are still missing."""

from __future__ import annotations

import sys

from anode_exp.commands.arguments import Parser, help_text, own_settings
from anode_exp.composition import about, options
from anode_exp.config import ReproduceSettings
from anode_exp.errors import UserError
from anode_exp.reproduction import cells, specification

ABOUT = "a paper's figures and tables, run by run; continues where it stopped"


def main(arguments: list[str]) -> None:
    parsed = Parser("reproduce", "paper").parse_intermixed_args(arguments)
    if parsed.help:
        print(paper_help("reproduce", ABOUT, parsed.paper))
        return
    asked = cells(paper_name("reproduce", parsed.paper), parsed.settings)

    from anode_exp.reproduce import reproduce  # imports torch

    sys.exit(reproduce(asked))


def paper_name(verb: str, given: str | None) -> str:
    """The paper that was named.

    Raises:
        UserError: if none was.
    """
    if given is None or "=" in given:
        raise UserError(f"{verb}: needs the name of a paper; there are {', '.join(options('reproduce'))}")
    return given


def paper_help(verb: str, text: str, paper: str | None, schema: type = ReproduceSettings) -> str:
    """Help of a verb about papers; with a paper, its figures and methods."""
    papers = options("reproduce")
    if paper is None or "=" in paper:
        parts = [("papers", [(p, about("reproduce", p).line) for p in papers])]
        paper = papers[0]
    else:
        spec = specification(paper)
        parts = [
            ("figures", [(f"figure={name}", figure["title"]) for name, figure in spec["figures"].items()]),
            ("methods", [(f"method={name}", method["label"]) for name, method in spec["methods"].items()]),
        ]
    examples = [f"{verb} {paper} length=short seeds=1"]
    if verb == "reproduce":
        examples += [
            f"reproduce {paper} figure=table_resnet4 seeds=3 length=short",
            f"reproduce {paper} figure=table_resnet4 runtime.precision=bf16",
        ]
    return help_text(
        f"{verb} PAPER [KEY=VALUE …]",
        f"{verb.capitalize()}: {text}.",
        [*parts, ("settings", own_settings(schema))],
        examples,
        "Any setting of train besides applies to every run." if verb == "reproduce" else "",
    )
