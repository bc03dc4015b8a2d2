"""Runs side by side on one page: curves, scores, costs and commands; runs that differ only in their seed are one."""

from collections.abc import Iterator
from pathlib import Path

from anode_exp.records.cells import Record
from anode_exp.records.folders import grouped
from anode_exp.report.drawing import draw
from anode_exp.report.page import COMMANDS, Section, write_page
from anode_exp.report.statistics import MISSING, SCORES, Group, command_rows, cost_rows, score_of, score_rows
from anode_exp.report.sweep import write_csv


def _sections(records: list[Record], target: Path) -> Iterator[Section]:
    places: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        assert record.config is not None
        places.setdefault((record.config.task.name, record.config.dataset.name), []).append(record)
    for i, ((task, dataset), mine) in enumerate(places.items(), start=1):
        score = score_of(mine)
        groups = [Group(dataset, label, label, None, runs, []) for label, runs in grouped(mine).items()]
        tables = [(SCORES, score_rows(groups, score)), ("Cost of a run", cost_rows(groups))]
        tables.append((COMMANDS, command_rows(groups)))
        pictures = []
        if any(run.epochs for run in mine):
            pictures.append(target / f"curves_{i}.png")
            draw(groups, f"{task}, {dataset}", pictures[0], score)
        yield Section(f"{task.capitalize()}, {dataset}", "", tables, pictures)


def write_runs_report(records: list[Record], names: str, target: Path) -> Path:
    """Write ``index.html`` (self-contained), ``README.md``, ``scores.csv`` and plots; returns the page.

    Args:
        records: begun runs of any tasks and data sets; each pair of these has its own section.
        names: the names of their folders.
    """
    target.mkdir(parents=True, exist_ok=True)
    sections = list(_sections(records, target))
    about = (
        "Runs are grouped by the settings in which they differ. Those that differ only in their seed are one curve, "
        "their mean, with a band from minimum to maximum. The best epoch is chosen on validation data if there is any, "
        f"else on the test data. Unfinished and diverged runs count only in curves; {MISSING} means no value."
    )
    shown = [(s.title, rows) for s in sections for caption, rows in s.tables if caption == SCORES]
    write_csv(target / "scores.csv", [{"section": title, **row} for title, rows in shown for row in rows])
    return write_page(f"Runs of {names}", about, sections, target)
