import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import LOADERS

from anode_exp.build import build_data
from anode_exp.config.compose import composed
from anode_exp.data import DATASETS, load
from anode_exp.data.datasets import _cifar
from anode_exp.errors import UserError


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_data_sets_that_need_no_download(name, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, name, LOADERS[name])
    data = load(name, tmp_path, download=False)
    for split in (data.train, data.test):
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (32, 32, 3)
        assert split.labels.min() == 0 and split.labels.max() == data.num_classes - 1
    assert len(data.validation) == 0
    again = load(name, tmp_path)
    assert torch.equal(data.train.images, again.train.images)
    assert not any(tmp_path.iterdir())


def test_digits_are_the_real_ones_with_a_fixed_balanced_test_split(tmp_path):
    data = load("digits", tmp_path)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert torch.bincount(data.test.labels).tolist() == [36] * 10
    zeros = data.train.images[data.train.labels == 0].float().mean(0)[..., 0]
    assert zeros[16, 16] < 60 < zeros[16, 8], "a zero is a ring around an empty middle"
    assert not {tuple(i.flatten().tolist()) for i in data.test.images} & {
        tuple(i.flatten().tolist()) for i in data.train.images
    }, "no test image is trained on"


def test_validation_is_held_out_first_and_never_trained_on(tmp_path):
    whole = load("digits", tmp_path, validation_size=200)
    small = load("digits", tmp_path, validation_size=200, train_size=100, test_size=50)
    assert (len(whole.train), len(whole.validation)) == (1237, 200)
    assert (len(small.train), len(small.validation), len(small.test)) == (100, 200, 50)
    assert torch.equal(whole.validation.images, small.validation.images)
    for n in torch.bincount(small.train.labels).tolist():
        assert n == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_size": 1438}, "dataset.train_size=1438: digits has 1437"),
        ({"test_size": 361}, "dataset.test_size=361: digits has 360"),
        ({"validation_size": 1438}, "dataset.validation_size=1438: digits has 1437"),
        ({"validation_size": 1437}, "leaves no image"),
        ({"validation_size": 1400, "train_size": 38}, "dataset.train_size=38: digits has 37"),
    ],
)
def test_subsets_larger_than_the_data(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load("digits", tmp_path, **settings)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_absent_data_and_no_download(name, tmp_path):
    with pytest.raises(UserError, match=r"not found, and dataset.download=false; put the folder cifar-10"):
        load(name, tmp_path, download=False)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(UserError, match=r"download failed .*no route to host.*; put the folder"):
        load("cifar10", tmp_path)


class SlowDownload:
    """A data set whose files arrive one after the other; ``downloads`` has the folder of every download."""

    base_folder, filename, downloads = "batches", "batches.tar.gz", []

    def __init__(self, root, train=True, download=False):
        folder = Path(root) / self.base_folder
        if download:
            self.downloads.append(Path(root))
            folder.mkdir()
            time.sleep(0.3)
            (folder / "file").write_text("whole")
        if not (folder / "file").exists():
            raise RuntimeError("corrupt")
        self.data, self.targets = np.zeros((2, 32, 32, 3), np.uint8), [0, 1]


def test_processes_that_need_the_same_data_download_them_once(tmp_path):
    load_it = _cifar(SlowDownload, "slow")

    def later(s):
        time.sleep(s)
        return load_it(tmp_path / "data", True)

    with ThreadPoolExecutor() as threads:
        for train, test in threads.map(later, [0, 0, 0.15]):
            assert len(train) == len(test) == 2
    assert len(SlowDownload.downloads) == 1
    assert [path.name for path in (tmp_path / "data").iterdir() if path.name[0] != "."] == ["batches"]


@pytest.mark.parametrize("download", [True, False])
def test_corrupt_data_are_named_and_left_alone(download, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match=r"missing or does not match its published MD5; delete the folder"):
        load("cifar10", tmp_path, download=download)
    assert (folder / "data_batch_1").read_bytes() == b"not a pickle"


@pytest.mark.cifar
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar_whole(cifar_root, name, classes):
    data = load(name, cifar_root, download=False)
    assert (len(data.train), len(data.test), data.num_classes) == (50_000, 10_000, classes)
    assert torch.bincount(data.train.labels).tolist() == [50_000 // classes] * classes
    assert torch.bincount(data.test.labels).tolist() == [10_000 // classes] * classes
    theirs = DATASET_CLASSES[name](str(cifar_root), train=False)
    image, label = theirs[17]
    assert torch.equal(data.test.images[17], torchvision.transforms.functional.pil_to_tensor(image).permute(1, 2, 0))
    assert data.test.labels[17] == label
    if name == "cifar10":  # the recipe's mean is this data set's
        mean = data.train.images.float().mean((0, 1, 2)) / 255
        torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=1e-3)


DATASET_CLASSES = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


def test_the_registry_is_the_four_of_the_command_line():
    assert list(DATASETS) == ["cifar10", "cifar100", "digits", "fake"]


def test_a_root_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = composed(["dataset=cifar10", "dataset.root='~/data'", "dataset.download=false"])
    with pytest.raises(UserError, match=f"CIFAR-10 under {tmp_path}/data: not found"):
        build_data(config.dataset, torch.device("cpu"))
