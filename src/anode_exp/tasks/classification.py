"""Classification of images by cross entropy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anode_exp.data import WHOLE, Augmentation, EpochBatches, ImageData, Normalisation, Part, Split, evaluation_batches
from anode_exp.tasks.task import Batch, Sums


class Classification:
    """Batches are images [B, 3, H, W] and labels [B]; the network's outputs are logits [B, classes].

    The loss is the mean cross entropy, the score the accuracy in [0, 1].

    Args:
        label_smoothing: share of each training target that is spread over all classes.
    """

    score, higher_is_better, form, unit = "accuracy", True, ".2%", "images"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = network(images)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits

    def sums(self, output: Tensor, batch: Batch) -> Sums:
        return {"correct": (output.argmax(1) == batch[1]).sum()}

    def zeros(self, device: torch.device) -> Sums:
        return {"correct": torch.zeros((), dtype=torch.long, device=device)}

    def evaluation_sums(self, network: nn.Module, batch: Batch) -> Sums:
        logits = network(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1], reduction="sum"), **self.sums(logits, batch)}

    def metrics(self, sums: Mapping[str, float], count: int) -> dict[str, float]:
        return {{"correct": "accuracy"}.get(name, name): value / count for name, value in sums.items()}


class ImageBatches:
    """Augmented training batches of a data set, and its other splits as they are.

    Args:
        images: on the device.
        seed: of the epochs' orders, crops and flips.
        part: this process's part of every batch and of the evaluated splits.
    """

    def __init__(
        self,
        images: ImageData,
        batch_size: int,
        augmentation: Augmentation,
        normalise: Normalisation,
        seed: int,
        part: Part = WHOLE,
    ) -> None:
        self.images, self.batch_size, self.seed, self.part = images, batch_size, seed, part
        self.augmentation, self.normalise = augmentation, normalise
        self.device, self.nbytes = images.device, images.nbytes

    def size(self, split: str) -> int:
        return len(getattr(self.images, split))

    def epoch(self, number: int) -> EpochBatches:
        settings = (self.batch_size, self.augmentation, self.normalise, self.seed, number, self.part)
        return EpochBatches(self.images.train, *settings)

    def evaluation(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        images: Split = getattr(self.images, split)
        return evaluation_batches(images.subset(self.part.of(len(images))), batch_size, self.normalise)
