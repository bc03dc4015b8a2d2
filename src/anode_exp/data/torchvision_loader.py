"""The usual way to feed images, as a baseline: torchvision's transforms on PIL images, in worker processes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from anode_exp.data.image_data import Augmentation, Split


class _PilImages(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: an array of images, a transform for each."""

    def __init__(self, split: Split, transform: Any) -> None:
        self.images, self.labels, self.transform = split.images.cpu().numpy(), split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def torchvision_loader(
    split: Split, batch_size: int, augmentation: Augmentation, mean: list[float], std: list[float], workers: int = 4
) -> DataLoader[tuple[Tensor, int]]:
    """Shuffled batches ([B, 3, 32, 32] float32, [B] int64) on the CPU, pinned where there is CUDA; the last is dropped.

    Random crop, horizontal flip, conversion and normalisation, one image at a time, in ``workers`` processes.
    """
    steps: list[Any] = []
    if augmentation.crop_padding:
        steps.append(transforms.RandomCrop(split.images.shape[1], padding=augmentation.crop_padding))
    if augmentation.flip:
        steps.append(transforms.RandomHorizontalFlip())
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    # Four workers are intended, also where torch warns that there are fewer cores.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return DataLoader(
        _PilImages(split, transforms.Compose(steps)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
