"""Images as uint8 tensors on the training device, and the batches of an epoch, which depend only on (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anode_exp.data.part import WHOLE, Part


@dataclass(frozen=True)
class Split:
    """images: [N, 32, 32, 3] uint8 (channels last in memory, as batches are); labels: [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, indices: Tensor | slice) -> Split:
        return Split(self.images[indices], self.labels[indices])

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + self.labels.nbytes


@dataclass(frozen=True)
class ImageData:
    """A data set. ``validation`` is empty unless images were held out of the training set."""

    train: Split
    validation: Split
    test: Split
    num_classes: int

    def to(self, device: torch.device) -> ImageData:
        return ImageData(self.train.to(device), self.validation.to(device), self.test.to(device), self.num_classes)

    @property
    def device(self) -> torch.device:
        return self.train.labels.device

    @property
    def nbytes(self) -> int:
        return self.train.nbytes + self.validation.nbytes + self.test.nbytes


@dataclass(frozen=True)
class Augmentation:
    """Random crop after padding by ``crop_padding`` black pixels, and horizontal flip with probability 1/2."""

    crop_padding: int
    flip: bool


class Normalisation:
    """(image/255 − mean) / std, one value per channel, as one fused multiply-add."""

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        device: torch.device,
        memory_format: torch.memory_format = torch.channels_last,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        std_t = torch.tensor(std, device=device, dtype=dtype)
        self.scale = (1.0 / 255.0 / std_t).view(1, 3, 1, 1)
        self.shift = (-torch.tensor(mean, device=device, dtype=dtype) / std_t).view(1, 3, 1, 1)
        self.memory_format = memory_format

    def __call__(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 → [B, 3, H, W] in ``dtype``."""
        pixels = images.permute(0, 3, 1, 2).to(self.scale.dtype)
        return torch.addcmul(self.shift, pixels, self.scale).contiguous(memory_format=self.memory_format)


def balanced_subset(labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices of a fixed, class-balanced choice of ``size`` labels, and the rest; both in the data's order.

    Classes differ by at most one image, or by more if a class does not have enough images. The choice does not
    depend on any seed.

    Raises:
        ValueError: if size is more than there are labels.
    """
    if size > len(labels):
        raise ValueError(f"size is {size}, but there are only {len(labels)} images")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[torch.argsort(labels[shuffled].cpu(), stable=True)]
    counts = torch.bincount(labels.cpu())
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.arange(len(labels)) - torch.repeat_interleave(starts, counts)
    # First images of rank 0 in every class, then of rank 1, …
    chosen = by_class[torch.argsort(rank, stable=True)[:size]]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[chosen] = True
    return mask.nonzero().flatten(), (~mask).nonzero().flatten()


class EpochBatches:
    """The training batches of one epoch: permutation, crops and flips drawn at once, on the images' device.

    They depend only on (seed, epoch), so an epoch has the same batches in a resumed run. The last batch is
    smaller where the batch size does not divide the number of images.

    Iterating gives the part of each batch, (images [B, 3, 32, 32] float32, labels [B]), without host synchronisation.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augmentation: Augmentation,
        normalise: Normalisation,
        seed: int,
        epoch: int,
        part: Part = WHOLE,
    ) -> None:
        self.split, self.batch_size, self.normalise, self.part = split, batch_size, normalise, part
        self.flip = augmentation.flip
        device, n, pad = split.labels.device, len(split), augmentation.crop_padding
        # The CPU's generator uses the low 32 bits of its seed. Multiples of 2³² divided by the golden ratio stay far
        # apart there, so epochs of one seed do not coincide with those of another.
        generator = torch.Generator(device).manual_seed((seed * 2654435769 + epoch) % 2**32)
        self.order = torch.randperm(n, generator=generator, device=device)
        self.offsets = torch.randint(-pad, pad + 1, (2, n, 1), generator=generator, device=device)
        self.flips = torch.rand((n, 1), generator=generator, device=device) < 0.5

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from the given one on."""
        for start in range(step * self.batch_size, len(self.split), self.batch_size):
            mine = self.part.of(min(self.batch_size, len(self.split) - start))
            yield self._batch(slice(start + mine.start, start + mine.stop))

    def _batch(self, batch: slice) -> tuple[Tensor, Tensor]:
        """A method, not part of the generator, which would hold its tensors while the network trains."""
        size = self.split.images.shape[1]
        pixels = torch.arange(size, device=self.order.device)
        index = self.order[batch]
        # Source row and column of every output pixel; outside the image means black.
        rows = self.offsets[0, batch] + pixels
        columns = torch.where(self.flips[batch], size - 1 - pixels, pixels) if self.flip else pixels
        columns = self.offsets[1, batch] + columns
        rows, columns = rows[:, :, None], columns[:, None, :]
        inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
        images = self.split.images[index[:, None, None], rows.clamp(0, size - 1), columns.clamp(0, size - 1)]
        return self.normalise(images * inside.unsqueeze(-1)), self.split.labels[index]


def evaluation_batches(split: Split, batch_size: int, normalise: Normalisation) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [B, 3, 32, 32] float32, labels [B]) in the data's order, unaugmented."""
    for start in range(0, len(split), batch_size):
        batch = slice(start, start + batch_size)
        yield normalise(split.images[batch]), split.labels[batch]
