"""Step time and peak memory of the plans for several byte budgets."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from anode_exp.budget.measure import Planner
from anode_exp.budget.plan import RESERVE
from anode_exp.build import autocast_for, build_optimizer, placed, varied
from anode_exp.config.check import parse_bytes
from anode_exp.config.schema import GradientConfig, StudyConfig, TrainConfig
from anode_exp.models import ode_blocks
from anode_exp.records.reading import Row
from anode_exp.studies.memory import peaks_and_times
from anode_exp.tasks.classification import Classification
from anode_exp.tasks.task import Batch
from anode_exp.training.graphed_step import capture_of
from anode_exp.training.progress import bar


def rows(config: TrainConfig, study: StudyConfig, outputs: int, batch: Batch, directory: Path) -> Iterator[Row]:
    n_steps, precision = config.solver.n_steps, config.runtime.precision

    def network() -> tuple[nn.Module, torch.memory_format]:
        made = varied(config, GradientConfig(name="dto_checkpoint"), outputs)
        return placed(made, config, batch[0].device)

    measured_network, layout = network()
    images, labels = batch[0].contiguous(memory_format=layout), batch[1].clone()
    count, new_capture = len(study.budgets) or 8, capture_of(config, images.device)
    with bar(Planner.dry_runs(n_steps) + count * (1 + study.repeats), study.name) as progress:
        planner = Planner(
            measured_network.train(), lambda n: build_optimizer(n, config.recipe),
            autocast_for(precision, images.device), Classification(), (images, labels), progress.update,
            new_capture=new_capture,
        )  # fmt: skip
        most = planner.predict(["full_backprop"] * len(planner.blocks)) + RESERVE
        least = planner.least() + RESERVE
        budgets = [parse_bytes(b) for b in study.budgets]
        budgets = budgets or [int(least * (most / least) ** (i / 7)) + (i == 7) for i in range(8)]
        planner.seconds(max(budgets))
        planner.tick = lambda: None
        plans = [(budget, *planner.fitted(budget)) for budget in budgets]
        networks: dict[str, nn.Module] = {}
        for i, (_, plan, _) in enumerate(plans):
            networks[str(i)], _ = network()
            for block, name in zip(ode_blocks(networks[str(i)]), plan.policies, strict=True):
                block.gradient = planner.choices[name]
        for row in peaks_and_times(networks, (images, labels), precision, study.repeats, progress.update, new_capture):
            budget, plan, dry = plans[int(row.pop("gradient"))]
            facts = {"budget_bytes": budget, "predicted_bytes": plan.predicted_bytes, "dry_step_bytes": dry}
            yield {**facts, **row, "policies": plan.policies}
