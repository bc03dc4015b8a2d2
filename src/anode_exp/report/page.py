"""A paper's reproduction next to the paper: curves, tables, commands, as one HTML page, Markdown and CSV.

``write_page`` makes such a page of any sections. Reads only run records (``cell.json``, ``config.yaml``,
``metrics.jsonl``, ``results.json``), anywhere below a folder.
"""

import base64
import html
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from anode_exp.records.cells import Record
from anode_exp.records.reading import read_lines
from anode_exp.report.costs import Table, claim_rows, cost_tables, other_evaluations
from anode_exp.report.drawing import draw
from anode_exp.report.statistics import (
    SCORES,
    Group,
    accuracy_rows,
    add_overview,
    command_rows,
    cost_rows,
    groups_of,
    score_of,
    score_rows,
)
from anode_exp.report.sweep import write_csv

CLAIMS = "What the paper states and what was measured here; ratios above 1 are in PNODE's favour"
ACCURACY = "Test accuracy in percent, min / max / mean over seeds"
COMMANDS = "Commands"


@dataclass(frozen=True)
class Reproduction:
    """A paper's runs of one length.

    Attributes:
        length, epochs: name and description of the recipe's length.
        records: the runs and studies that are recorded.
        expected: the command of every run of the reproduction, by (figure, method, seed); runs that a figure
            ``shares`` belong to another reproduction.
    """

    length: str
    epochs: str
    records: list[Record]
    expected: dict[Any, str]


@dataclass(frozen=True)
class Section:
    """One figure's part of the report: tables by caption, pictures, text."""

    title: str
    shown: str
    tables: list[Table]
    pictures: list[Path]
    text: str = ""


def _of_study(folder: Path, picture: Path) -> tuple[list[Path], list[Table], str]:
    """A study's picture, copied next to the page; its tables of costs, if it has some; its text."""
    if (folder / "study.png").resolve() != picture.resolve():
        shutil.copyfile(folder / "study.png", picture)
    rows = read_lines(folder / "study.jsonl")
    if rows and "n_steps" in rows[0] and "step_time_s" in rows[0]:
        other = other_evaluations(rows)
        text = f"The number of evaluations differs from the paper's formula: {', '.join(other)}." if other else ""
        return [picture], cost_tables(rows), text
    return [picture], [], (folder / "table.txt").read_text()


def _studies(spec: dict[str, Any], name: str, of: Reproduction) -> list[Record]:
    """The records of a figure's study."""
    place = spec["name"], name, None
    return [r for r in of.records if (r.cell["paper"], r.cell["figure"], r.cell["method"]) == place]


def _section(
    spec: dict[str, Any], name: str, of: Reproduction, groups: list[Group], target: Path, first: bool, several: bool
) -> Section:
    """A figure at one length: the page's first one, or one of several."""
    figure, tables, pictures, text = spec["figures"][name], [], [], ""
    title, place = figure["title"], name if first else f"{name}_{of.length}"
    if several:
        title = f"{title}, length={of.length}"
    if "methods" in figure:
        begun = [run for group in groups for run in group.runs if run.epochs]
        score = score_of(begun)
        accuracy = not begun or score == "accuracy"
        tables.append((ACCURACY, accuracy_rows(groups)) if accuracy else (SCORES, score_rows(groups, score)))
        if begun:
            pictures.append(target / f"{place}.png")
            draw(groups, title, pictures[0], score)
            tables.append(("Cost of a run", cost_rows(groups)))
        tables.append((COMMANDS, command_rows(groups)))
    if "study" in figure:
        folders = (record.directory for record in _studies(spec, name, of))
        folder = next((f for f in folders if (f / "study.png").exists()), None)
        of_runs = "_study" if "methods" in figure else ""
        if folder is None:
            text = f"not run: python -m anode_exp reproduce {spec['name']} figure={name} length={of.length}"
        else:
            drawn, of_study, text = _of_study(folder, target / f"{place}{of_runs}.png")
            pictures += drawn
            tables += of_study
    return Section(title, figure.get("shown", ""), tables, pictures, text)


def write_report(spec: dict[str, Any], reproductions: list[Reproduction], target: Path) -> Path:
    """Write ``index.html`` (self-contained), ``README.md``, ``accuracy.csv`` and plots; returns the page.

    A figure without records has a section at the first length only. The claims are measured at that length.

    Args:
        spec: a paper's methods, figures and published numbers.
        reproductions: one for every length that the page shows.
    """
    target.mkdir(parents=True, exist_ok=True)
    first, several = reproductions[0], len(reproductions) > 1
    sections, overview = [], dict[str, dict[str, str]]()
    for name, figure in spec["figures"].items():
        for of in reproductions:
            groups = groups_of(spec, name, of.records, of.expected)
            if of is not first and not any(group.runs for group in groups) and not _studies(spec, name, of):
                continue
            sections.append(_section(spec, name, of, groups, target, of is first, several))
            if "published" in figure:
                title = figure["title"].removeprefix("Table, ")
                add_overview(overview, f"{title}, length={of.length}" if several else title, groups)
    if overview:
        caption = "Mean test accuracy in percent at the last epoch"
        sections.insert(0, Section("The table", "", [(caption, list(overview.values()))], []))
    if "claims" in spec:
        stiff = groups_of(spec, "robertson", first.records, first.expected)
        title = f"The claims, length={first.length}" if several else "The claims"
        sections.insert(0, Section(title, "", [(CLAIMS, claim_rows(spec, first.records, stiff))], []))
    head = f"{spec['paper']} reproduced: {'; '.join(f'{of.length}, {of.epochs}' for of in reproductions)}"
    about = f"Published: {spec['source']}; {spec['published_kind']}. {spec['about'].strip()}"
    if "short" in (of.length for of in reproductions):
        about += " A short training run does not measure the published accuracies: at best it shows an ordering."
    accuracies = [(s.title, table) for s in sections for caption, table in s.tables if caption == ACCURACY]
    write_csv(target / "accuracy.csv", [{"figure": title, **row} for title, table in accuracies for row in table])
    return write_page(head, about, sections, target)


def write_page(head: str, about: str, sections: list[Section], target: Path) -> Path:
    """Write ``index.html``, with embedded pictures, and ``README.md``; returns the page."""
    (target / "index.html").write_text(_page(head, about, sections))
    (target / "README.md").write_text(_markdown(head, about, sections, target))
    return target / "index.html"


CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #111 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #bbb } img { max-width: 100%; height: auto }
div.table { overflow-x: auto } table { border-collapse: collapse; margin: .3rem 0 1rem; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; font-size: 12px } summary { cursor: pointer }
"""


def _html_table(caption: str, rows: list[dict[str, str]]) -> str:
    body = tabulate(rows, headers="keys", tablefmt="html", disable_numparse=True)
    body = body.replace("<table>", f"<table><caption>{html.escape(caption)}</caption>", 1)
    table = f'<div class="table">{body}</div>'
    return f"<details><summary>Commands</summary>{table}</details>" if caption == COMMANDS else table


def _page(head: str, about: str, sections: list[Section]) -> str:
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(head)}</title><style>{CSS}</style>',
        f"<h1>{html.escape(head)}</h1><p>{html.escape(about)}</p>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.shown:
            parts.append(f"<p>The paper: {html.escape(section.shown)}.</p>")
        for picture in section.pictures:
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
        parts += [_html_table(caption, rows) for caption, rows in section.tables if rows]
        if section.text:
            parts.append(f"<pre>{html.escape(section.text)}</pre>")
    return "\n".join(parts) + "\n</html>\n"


def _markdown(head: str, about: str, sections: list[Section], target: Path) -> str:
    parts = [f"# {head}", about]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.shown:
            parts.append(f"The paper: {section.shown}.")
        parts += [f"![{section.title}]({picture.relative_to(target)})" for picture in section.pictures]
        for caption, rows in section.tables:
            if caption == COMMANDS:
                lines = "\n".join(f"# {row['method']}: {row['run']}\n{row['command']}" for row in rows)
                parts.append(f"```\n{lines}\n```")
            elif rows:
                table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
                parts.append(f"{caption}:\n\n{table}")
        if section.text:
            parts.append(f"```\n{section.text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
