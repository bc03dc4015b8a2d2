"""One study: its JSON lines, its table and its plot."""

import json
from importlib import import_module
from pathlib import Path

import torch
from omegaconf import OmegaConf

from anode_exp.build import build_device, build_images, dtype_of, output_size, set_backends
from anode_exp.config.schema import StudyConfig, TrainConfig
from anode_exp.data import Normalisation, evaluation_batches
from anode_exp.records.environment import environment
from anode_exp.records.reading import read_lines, write_json
from anode_exp.training.streams import run_streams


def run_study(config: TrainConfig, study: StudyConfig, directory: Path) -> Path:
    """Measure, print the table, save everything in the folder, which is made if needed, and return the folder.

    A study NAME is ``rows`` in ``studies/NAME.py``, which measures, and ``report`` in ``report/NAME.py``.
    """
    device = build_device(config.runtime)
    set_backends(config.runtime)
    outputs = output_size(config.dataset)
    of = config.model.name
    batch = None
    if study.batch_size is not None:
        data, dtype = config.dataset, dtype_of(config.runtime.precision)
        normalise = Normalisation(data.mean, data.std, device, torch.contiguous_format, dtype)
        if study.name == "reversibility":  # pictures to look at
            normalise = Normalisation([0.0] * 3, [1.0] * 3, device)
        batch = next(evaluation_batches(build_images(config.dataset, device).train, study.batch_size, normalise))
        of = f"{of}, {config.dataset.name}, batch {len(batch[1])}"
    directory.mkdir(parents=True, exist_ok=True)
    setting = {"train": config, "study": study}
    text = "".join(OmegaConf.to_yaml({k: OmegaConf.structured(v)}) for k, v in setting.items())
    (directory / "config.yaml").write_text(text)
    facts = environment(device)
    write_json(directory / "environment.json", facts)
    rows = import_module(f"anode_exp.studies.{study.name}").rows
    (stream,) = run_streams(device, 1)
    with torch.cuda.stream(stream), (directory / "study.jsonl").open("w") as file:
        for row in rows(config, study, outputs, batch, directory):
            file.write(json.dumps(row) + "\n")
            file.flush()
    table = import_module(f"anode_exp.report.{study.name}").report(read_lines(directory / "study.jsonl"), directory)
    (directory / "table.txt").write_text(table + "\n")
    print(f"{of}, {facts['device']}\n\n{table}\n\n{directory}")
    return directory
