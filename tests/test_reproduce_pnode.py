"""PNODE's reproduction: figures that are studies, studies of a figure's runs, and claims next to what was measured."""

import json

import pytest

from anode_exp.commands.reproduce import is_done, reproduce, with_runs
from anode_exp.config.reproduction import cells, specification
from anode_exp.errors import UserError
from anode_exp.records.cells import copy_records, read_records
from anode_exp.report.costs import claim_rows, cost_tables, other_evaluations
from anode_exp.report.page import Reproduction, write_report

COST = ["figure=cost_euler", "dataset=digits", "model.width=0.25", "study.repeats=1", "study.n_steps=[1,2]",
        "study.batch_size=4", "runtime.channels_last=false"]  # fmt: skip
MOONS = ["figure=moons", "dataset.train_size=64", "dataset.validation_size=32", "dataset.test_size=32",
         "model.hidden=[4]", "recipe.epochs=1", "recipe.steps_per_epoch=2"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The costs and one density, small."""
    place = tmp_path_factory.mktemp("pnode")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anode_exp.studies.density.RESOLUTION", 60)
        for asked in (COST, [*MOONS, "seeds=1"]):
            found = cells("pnode", [*asked, "length=short", f"directory={place}"])
            assert reproduce(found) == 0 and all(map(is_done, found))
        yield place


def test_the_page(place):
    records = read_records(place)
    page = write_report(specification("pnode"), [Reproduction("short", "10 epochs", records, {})], place / "page")
    text = (place / "page" / "README.md").read_text()
    assert page.read_text().count("data:image/png;base64,") == 3, "costs, the density's curves, and its study"
    assert "| byte budget" in text and "| vanilla, torchdiffeq" in text and "kernel estimate" in text
    assert "not run: python -m anode_exp reproduce pnode figure=cost_rk4 length=short" in text
    evaluations = text.partition("Evaluations of f")[2].partition("The number of evaluations differs")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in evaluations.splitlines()[4:] if line]
    assert ["naive (full backpropagation)", "Ns + 0", "1 + 0", "2 + 0"] in lines
    assert ["vanilla, torchdiffeq", "Ns + Ns", "1 + 1", "2 + 2"] in lines
    assert ["ACA", "Ns + 2Ns + 1", "1 + 1", "2 + 2"] in lines
    assert "The number of evaluations differs from the paper's formula: ACA, PNODE, stages solved again." in text
    copy_records(records, place / "page" / "records")
    again = read_records(place / "page" / "records")
    write_report(specification("pnode"), [Reproduction("short", "10 epochs", again, {})], place / "again")
    assert (place / "again" / "README.md").read_text() == text, "the records kept are enough"


def test_a_study_of_runs_is_made_again_when_there_are_more_of_them(place):
    asked = [*MOONS, "length=short", f"directory={place}"]
    first = cells("pnode", [*asked, "seeds=1"])
    assert [(cell.study, cell.of_runs) for cell in first] == [(None, False), ("density", True)]
    assert reproduce(first) == 0 and "seed-1" not in with_runs(first[1]).settings[0]
    more = cells("pnode", [*asked, "seeds=2"])
    assert is_done(more[0]) and not is_done(more[1]) and is_done(more[2])
    assert reproduce(more) == 0 and is_done(more[2])
    recorded = json.loads((more[2].directory / "cell.json").read_text())
    assert recorded["command"].count("_seed-") == 2 and recorded["study"] == "density"
    assert is_done(first[1]), "that of one seed is part of it"


def test_a_study_with_other_settings_is_refused(place):
    (cell,) = cells("pnode", [*COST, "dataset.root=elsewhere", "length=short", f"directory={place}"])
    assert is_done(cell), "where the data lie is no part of it"
    (other,) = cells("pnode", [*COST, "runtime.precision=bf16", "length=short", f"directory={place}"])
    with pytest.raises(UserError, match="holds a study with other settings"):
        is_done(other)


def test_a_data_set_without_its_file_is_left_out_unless_it_is_named(tmp_path, capsys):
    asked = [f"directory={tmp_path}", "seeds=1", "method=flow"]
    found = cells("pnode", asked)
    assert [c.figure for c in found if c.optional] == ["power", "miniboone", "bsds300"]
    assert reproduce([c for c in found if c.figure == "miniboone"]) == 0
    said = capsys.readouterr().out
    assert "miniboone, flow, seed 0: left out; dataset=miniboone" in said and "none of its runs is completed" in said
    assert reproduce(cells("pnode", [*asked, "figure=miniboone"])) == 2


def row(label, n, seconds, peak, forward, backward):
    return {"gradient": label, "n_steps": n, "step_time_s": seconds, "counted_bytes": peak, "cuda_bytes": None,
            "device_bytes": None, "nfe_forward": 4 * forward, "nfe_backward": 4 * backward, "blocks": 4,
            "batch_size": 500, "solver": "rk2"}  # fmt: skip


ROWS = [
    row("full_backprop", 2, 1.0, 800e6, 4, 0), row("torchdiffeq", 2, 3.0, 300e6, 4, 4),
    row("reverse_adjoint", 2, 1.5, 200e6, 4, 4), row("dto_checkpoint", 2, 1.8, 500e6, 4, 4),
    row("step_checkpoint keep", 2, 2.4, 300e6, 4, 9), row("stage_checkpoint keep", 2, 1.2, 250e6, 4, 4),
    row("stage_checkpoint rebuild", 2, 1.4, 150e6, 4, 7), row("revolve stage 3", 2, 1.6, 100e6, 4, 9),
]  # fmt: skip


def test_claims_beside_what_was_measured(tmp_path):
    for name, rows in (("a", ROWS), ("b", [r for r in ROWS if r["gradient"] != "torchdiffeq"])):
        (tmp_path / name).mkdir()
        cell = {"paper": "pnode", "length": "short", "figure": name, "method": None, "seed": None, "study": "memory"}
        (tmp_path / name / "cell.json").write_text(json.dumps(cell))
        (tmp_path / name / "study.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = claim_rows(specification("pnode"), read_records(tmp_path), [])
    assert [(r["ratio"], r["holds"]) for r in found] == [
        ("×2.50", "yes"), ("×1.25", "–"), ("×1.50", "up to ×1.50"), ("×1.50", "up to ×1.50"), ("×3.00", "yes"),
        ("×3.00", "yes"), ("–", "–"),
    ]  # fmt: skip
    assert found[0]["setting"] == "rk2, batch 500, N = 2 to 2" and found[-1]["ours"] == "not run"
    assert "ANODE ×1.50, ACA ×2.00 of PNODE's time" in found[2]["ours"]
    assert "naive, ANODE, ACA 300 MB, PNODE's least 100 MB" in found[4]["ours"]


def test_a_claim_without_one_of_its_methods_is_not_measured(tmp_path):
    cell = {"paper": "pnode", "length": "short", "figure": "a", "method": None, "seed": None, "study": "memory"}
    (tmp_path / "cell.json").write_text(json.dumps(cell))
    few = [r for r in ROWS if r["gradient"] in ("full_backprop", "dto_checkpoint", "stage_checkpoint keep")]
    (tmp_path / "study.jsonl").write_text("".join(json.dumps(r) + "\n" for r in few))
    found = claim_rows(specification("pnode"), read_records(tmp_path), [])
    assert [row["ours"] for row in found[:3]] == [
        "not measured: vanilla, this project", "not measured: ACA",
        "not measured: PNODE, binomial, 3 states; PNODE, stages solved again; ACA",
    ]  # fmt: skip


def test_tables_of_costs():
    tables = dict(cost_tables(ROWS))
    (epoch,) = (rows for caption, rows in tables.items() if caption.startswith("Time of an epoch"))
    assert {r["method"]: r["N = 2"] for r in epoch}["ANODE"] == "180", "100 steps"
    (steps,) = (rows for caption, rows in tables.items() if caption.startswith("Time of a training step"))
    assert {r["method"]: r["N = 2"] for r in steps}["vanilla, torchdiffeq"] == "3 ×3.00"
    assert len(tables) == 4, "the whole device's memory is measured on CUDA alone"
    on_cuda = [r | {"cuda_bytes": 5e8, "device_bytes": 9e8} for r in ROWS]
    whole = dict(cost_tables(on_cuda))["The whole device's memory in use, MB"]
    assert {r["N = 2"] for r in whole} == {"900"}
    assert other_evaluations(ROWS) == ["PNODE, stages solved again"]
