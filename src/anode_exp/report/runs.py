"""Any runs side by side: curves, scores, cost and commands of those that differ in their seed alone, as one page."""

from collections.abc import Iterator
from pathlib import Path

from anode_exp.records.cells import Record
from anode_exp.records.folders import grouped
from anode_exp.report.drawing import draw
from anode_exp.report.page import COMMANDS, Section, write_page
from anode_exp.report.statistics import MISSING, Group, command_rows, cost_rows, spread, status_counts
from anode_exp.report.sweep import write_csv

SCORES = "Score on the test data, mean over seeds (least–most)"


def score_of(records: list[Record]) -> str:
    """The metric by which the runs' epochs are compared, such as ``accuracy``."""
    for record in records:
        for key in record.results or {}:
            if key.startswith("best_test_"):
                return key.removeprefix("best_test_")
    names = (key for record in records for line in record.epochs for key in line)
    return next((key.removeprefix("test_") for key in names if key.startswith("test_") and key != "test_loss"), "loss")


def score_rows(groups: list[Group], score: str) -> list[dict[str, str]]:
    """The score of completed runs after the last epoch and at the best one, and the training loss."""
    scale, form = (100.0, ".2f") if score == "accuracy" else (1.0, ".4g")
    unit = ", %" if score == "accuracy" else ""
    rows = []
    for group in groups:
        ends = [(run.last(f"test_{score}"), run.results) for run in group.completed]
        last = [scale * end for end, _ in ends if end is not None]
        best = [scale * r[f"best_test_{score}"] for _, r in ends if r and r.get(f"best_test_{score}") is not None]
        losses = [x for run in group.completed if (x := run.last("train_loss")) is not None]
        rows.append({
            "runs of": group.label, "runs": status_counts(group), f"{score}{unit}, last epoch": spread(last, form),
            f"{score}{unit}, best epoch": spread(best, form), "training loss": spread(losses, ".4g"),
        })  # fmt: skip
    return rows


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
        picture = None
        if any(run.epochs for run in mine):
            picture = target / f"curves_{i}.png"
            draw(groups, f"{task}, {dataset}", picture, score)
        yield Section(f"{task.capitalize()}, {dataset}", "", tables, picture)


def write_runs_report(records: list[Record], names: str, target: Path) -> Path:
    """Write ``index.html`` (self-contained), ``README.md``, ``scores.csv`` and plots; returns the page.

    Args:
        records: begun runs of any tasks and data sets; each pair of these has a section of its own.
        names: of the folders that they lie in.
    """
    target.mkdir(parents=True, exist_ok=True)
    sections = list(_sections(records, target))
    about = (
        "Runs are grouped by the settings in which they differ; those that differ in their seed alone are one curve, "
        "their mean, in a band from the least to the most. The best epoch is chosen on validation data where a run has "
        f"some, else on the test data. Unfinished and diverged runs count in curves alone; {MISSING} is no value."
    )
    shown = [(s.title, rows) for s in sections for caption, rows in s.tables if caption == SCORES]
    write_csv(target / "scores.csv", [{"section": title, **row} for title, rows in shown for row in rows])
    return write_page(f"Runs of {names}", about, sections, target)
