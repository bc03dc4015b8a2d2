"""``evaluate``: a trained run under its own or other solvers, steps and data sets."""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from anode_exp.commands.arguments import Parser, help_text, own_settings
from anode_exp.config.change import check_evaluation, evaluations
from anode_exp.config.check import split_settings
from anode_exp.config.schema import EvaluateSettings
from anode_exp.errors import UserError

ABOUT = "loss and metrics of a trained run, also under other solvers, steps and data sets"
EXAMPLES = (
    "evaluate run=outputs/DATE/TIME solver.n_steps=1,2,4,8",
    "evaluate run=outputs/DATE/TIME checkpoint=last solver=dopri5 solver.adaptive=true",
    "evaluate run=outputs/DATE/TIME calibrate=50 model.statistics=forward,by_time",
)
NOTES = (
    "Settings of the run that may change, several values separated by commas: solver, solver.*, dataset, dataset.*, "
    "runtime.device, runtime.precision, runtime.channels_last, runtime.cudnn_benchmark, recipe.test_batch_size, "
    "model.statistics."
)


def main(arguments: list[str]) -> None:
    parsed = Parser("evaluate").parse_intermixed_args(arguments)
    if parsed.help:
        text = f"Evaluate: {ABOUT}. Rows are added to DIR/evaluations.jsonl."
        settings = [("settings", own_settings(EvaluateSettings))]
        print(help_text("evaluate run=DIR [KEY=VALUE …]", text, settings, EXAMPLES, NOTES))
        return
    own, overrides = split_settings(EvaluateSettings, parsed.settings, "evaluate")
    if not own.run:
        raise UserError("evaluate: needs run=DIR, the folder of a trained run, such as outputs/DATE/TIME")
    configs = evaluations(Path(own.run), overrides)
    check_evaluation(overrides, own.calibrate)

    from anode_exp.runs import evaluate_run

    print(table(evaluate_run(Path(own.run), own.checkpoint, configs, own.calibrate)))


def table(rows: list[dict[str, Any]]) -> str:
    def shown(key: str, value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return f"{value:.2%}" if key.endswith("accuracy") else f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.3e}"

    shown_rows = [{key: shown(key, value) for key, value in row.items()} for row in rows]
    return tabulate(shown_rows, headers="keys", disable_numparse=True)
