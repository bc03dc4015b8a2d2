"""The verb ``bench``: training steps of several compositions, and of common ways to train, timed in turn."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from anode_exp.build import Assembly, assemble, build_data, build_device, dtype_of, set_backends
from anode_exp.config.schema import TrainConfig
from anode_exp.data import Augmentation, DataSet, ImageData
from anode_exp.data.torchvision_loader import torchvision_loader
from anode_exp.models import ode_blocks
from anode_exp.records.environment import device_name, environment
from anode_exp.records.reading import write_json
from anode_exp.studies.peers import PEERS
from anode_exp.studies.throughput import Contestant, time_in_turn
from anode_exp.tasks.task import Batch
from anode_exp.training.graphed_step import training_step
from anode_exp.training.progress import bar
from anode_exp.training.step import Step, set_learning_rate, state_tensors, train_step
from anode_exp.training.streams import run_streams


def run_bench(entries: list[tuple[str, TrainConfig, str | None]], rounds: int, directory: Path) -> Path:
    """Time every entry, print the table, save both in the folder, which is made if needed, and return the folder.

    Args:
        entries: label, configuration, and baseline: None for the project's own step, ``eager`` for a plain loop
            (contiguous layout, data on the device), ``dataloader`` for that loop with torchvision's DataLoader and 4
            workers, one of ``PEERS`` for the project's step with another library's gradient.
    """
    directory.mkdir(parents=True, exist_ok=True)
    device = build_device(entries[0][1].runtime)
    # The global flags are set once for the process, from the first entry.
    set_backends(entries[0][1].runtime)
    data: dict[str, DataSet] = {}
    contestants = []
    for label, config, baseline in entries:
        key = json.dumps(vars(config.dataset), sort_keys=True)
        if key not in data:
            data[key] = build_data(config.dataset, device)
        contestants.append(_contestant(label, config, baseline, data[key], device))
    with bar(len(contestants) * (1 + rounds), "bench") as progress:
        rows, bandwidth, rates = time_in_turn(contestants, device, rounds, progress.update)
    limits = {"copy_bytes_per_s": bandwidth, "matrix_flops_per_s": {str(d)[6:]: rate for d, rate in rates.items()}}
    write_json(directory / "bench.json", {**environment(device), "limits": limits, "rounds": rounds, "rows": rows})
    products = ", ".join(f"{rate / 1e12:,.3f} TFLOP/s in {str(d)[6:]}" for d, rate in rates.items())
    head = f"{device_name(device)}: copies {bandwidth / 1e9:,.1f} GB/s, matrix products {products}"
    text = f"{head}\n\n{bench_table(rows)}"
    (directory / "table.txt").write_text(text + "\n")
    print(f"{text}\n\n{directory}")
    return directory


def _contestant(
    label: str, config: TrainConfig, baseline: str | None, data: DataSet, device: torch.device
) -> Contestant:
    """A step of each of the configuration's seeds, each on its own stream on CUDA, as in a run."""
    streams = run_streams(device, config.seeds)
    networks = []
    for seed, stream in enumerate(streams, config.seed):
        with torch.cuda.stream(stream):
            networks.append(_steps(replace(config, seed=seed), baseline, data))
    size = min(config.recipe.batch_size, len(data.train))

    def take(which: int) -> None:
        for stream, of_network in zip(streams, networks, strict=True):
            with torch.cuda.stream(stream):
                of_network[which]()

    def own() -> list[Tensor]:
        return [x for _, _, tensors in networks for x in tensors()]

    epoch_steps = config.recipe.steps_per_epoch or -(-len(data.train) // size)
    dtype = torch.bfloat16 if config.runtime.precision == "bf16" else dtype_of(config.runtime.precision)
    step, eagerly, alone = partial(take, 0), partial(take, 1), baseline == "dataloader"
    return Contestant(label, step, eagerly, config.seeds * size, epoch_steps, own, dtype, alone)


def _steps(
    config: TrainConfig, baseline: str | None, data: DataSet
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], list[Tensor]]]:
    """Functions that take a training step, take it eagerly, and return the tensors held between steps."""
    if baseline in ("eager", "dataloader"):
        config = replace(config, runtime=replace(config.runtime, channels_last=False))
    assembly = assemble(config, data)
    network, optimizer = assembly.network, assembly.optimizer
    if baseline in PEERS:
        for block in ode_blocks(network):
            block.gradient = PEERS[baseline]()
    set_learning_rate(optimizer, 1e-4)  # small, so that weights stay finite
    source = _on_device(assembly)
    if baseline == "dataloader" and isinstance(data, ImageData):
        source = _loaded(assembly, data)
    counted: Step = partial(train_step, *assembly.stepped)
    take = training_step(assembly) if baseline is None else counted

    def own() -> list[Tensor]:
        return [*state_tensors(network, optimizer), *(p.grad for p in network.parameters() if p.grad is not None)]

    return lambda: take(next(source)), lambda: counted(next(source)), own


def _on_device(assembly: Assembly) -> Iterator[Batch]:
    """Whole batches, without end."""
    for epoch in count(1):
        for batch in assembly.data.epoch(epoch).starting_at(0):
            if len(batch[0]) == assembly.batch_size:
                yield batch


def _loaded(assembly: Assembly, images: ImageData) -> Iterator[Batch]:
    data, device = assembly.config.dataset, assembly.device
    augment = Augmentation(data.crop_padding, data.flip)
    loader = torchvision_loader(images.train, assembly.batch_size, augment, data.mean, data.std)
    while True:
        for batch, labels in loader:
            dtype = dtype_of(assembly.config.runtime.precision)
            yield batch.to(device, dtype, non_blocking=True), labels.to(device, non_blocking=True)


def bench_table(rows: list[dict[str, Any]]) -> str:
    """One line per contestant."""
    table = []
    for r in rows:
        low, high = r["step_s_quartiles"]
        peak = r["peak_bytes"] / 1e6
        launched = {} if r["kernels_per_step"] is None else {"kernels": r["kernels_per_step"]}
        table.append({
            "": r["label"], "ms per step": f"{r['step_s'] * 1e3:,.1f} ({low * 1e3:,.1f}–{high * 1e3:,.1f})",
            "relative to first": f"×{r['ratio']:.3f}", "samples/s": f"{r['images_per_s']:,.0f}",
            "epoch, s": f"{r['epoch_s']:,.1f}", "peak, MB": f"{peak:,.{0 if peak >= 10 else 2}f}",
            "operators": r["operators_per_step"], **launched, "copy rate": f"{r['bandwidth_share']:.0%}",
            "matrix rate": f"{r['matrix_share']:.0%}", "floor, ms": f"{r['floor_s'] * 1e3:,.1f}",
        })  # fmt: skip
    return tabulate(table, headers="keys", disable_numparse=True)
