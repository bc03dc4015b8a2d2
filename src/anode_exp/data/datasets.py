"""Data sets by name: CIFAR-10 and CIFAR-100 through torchvision, scikit-learn's digits, and random images."""

from __future__ import annotations

import fcntl
import shutil
import urllib.error
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from anode_exp.data.image_data import ImageData, Split, balanced_subset
from anode_exp.errors import UserError

Loader = Callable[[Path, bool], tuple[Split, Split]]
"""(root, may download) → (train, test)."""


def _download(dataset: type[CIFAR10], root: Path) -> None:
    """Download a data set, once if several processes ask for it at the same time.

    It is unpacked in another folder and then moved to its own, so that no process sees a part of it.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder, archive = root / dataset.base_folder, root / dataset.filename
    partial = root / f"{dataset.base_folder}.partial"
    with (root / f".{dataset.base_folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            if archive.exists():
                (partial / archive.name).symlink_to(archive.resolve())
            dataset(str(partial), download=True)
            (partial / folder.name).rename(folder)
        finally:
            shutil.rmtree(partial)


def _cifar(dataset: type[CIFAR10], name: str) -> Loader:
    def load(root: Path, download: bool) -> tuple[Split, Split]:
        folder = root / dataset.base_folder
        absent = not folder.is_dir()
        where = f"{name} under {root.resolve()}"
        if absent and not download:
            raise UserError(
                f"{where}: not found, and dataset.download=false; put the folder {dataset.base_folder} there, "
                "point dataset.root or ANODE_DATA at it, or allow the download"
            )
        try:
            if absent:
                _download(dataset, root)
            # Files already there are checked, never replaced: a corrupt one is reported to the user.
            parts = [dataset(str(root), train=train) for train in (True, False)]
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise UserError(
                f"{where}: not found, and the download failed ({error}); "
                f"put the folder {dataset.base_folder} there, or point dataset.root or ANODE_DATA at it"
            ) from error
        except RuntimeError as error:  # torchvision's MD5 check
            raise UserError(
                f"{where}: a file in {folder} is missing or does not match its published MD5; "
                "delete the folder to download it again, or copy it again"
            ) from error
        except OSError as error:
            raise UserError(f"{where}: {error.strerror or error}; choose a readable dataset.root") from error
        train, test = (Split(torch.from_numpy(p.data), torch.tensor(p.targets)) for p in parts)
        return train, test

    return load


def _digits(root: Path, download: bool) -> tuple[Split, Split]:
    """1,797 handwritten digits (UCI, bundled with scikit-learn), 8×8 → 32×32×3; 1,437 for training, 360 for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32))[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", align_corners=False)
    data = Split(
        images.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous(),
        torch.from_numpy(bunch.target).long(),
    )
    test, train = balanced_subset(data.labels, 360)
    return data.subset(train), data.subset(test)


def _fake(root: Path, download: bool) -> tuple[Split, Split]:
    """Random images and labels of CIFAR-10's sizes, for benchmarks: nothing can be learned from them."""
    generator = torch.Generator().manual_seed(0)

    def random(n: int) -> Split:
        eight_bytes = torch.randint(-(2**63), 2**63 - 1, (n, 32, 32 * 3 // 8), generator=generator)  # 3 times as fast
        return Split(eight_bytes.view(torch.uint8).view(n, 32, 32, 3), torch.arange(n) % 10)

    return random(50_000), random(10_000)


DATASETS: dict[str, tuple[Loader, int]] = {
    "cifar10": (_cifar(CIFAR10, "CIFAR-10"), 10),
    "cifar100": (_cifar(CIFAR100, "CIFAR-100"), 100),
    "digits": (_digits, 10),
    "fake": (_fake, 10),
}
"""Name → (loader, number of classes)."""


def load(
    name: str,
    root: Path,
    download: bool = True,
    train_size: int | None = None,
    test_size: int | None = None,
    validation_size: int = 0,
) -> ImageData:
    """A data set with its fixed, class-balanced subsets, on the CPU.

    The validation images are taken from the training images first, and ``train_size`` images from the rest.

    Raises:
        UserError: if files are missing or corrupt, or a subset is larger than its data.
    """
    loader, num_classes = DATASETS[name]
    train, test = loader(root, download)

    def choose(labels: Tensor, size: int, setting: str) -> tuple[Tensor, Tensor]:
        if size > len(labels):
            raise UserError(f"dataset.{setting}={size}: {name} has {len(labels)} images for it; choose at most that")
        return balanced_subset(labels, size)

    held_out, rest = choose(train.labels, validation_size, "validation_size")
    validation, train = train.subset(held_out), train.subset(rest) if len(held_out) else train
    if len(train) == 0:
        raise UserError(f"dataset.validation_size={validation_size}: leaves no image of {name} to train on")
    if train_size is not None:
        train = train.subset(choose(train.labels, train_size, "train_size")[0])
    if test_size is not None:
        test = test.subset(choose(test.labels, test_size, "test_size")[0])
    return ImageData(train, validation, test, num_classes)
