"""Sampled densities against their own log-densities; tables against files made here."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anode_exp.data.densities import DENSITIES, PLANAR, load_density
from anode_exp.errors import UserError
from anode_exp.tasks.density import DensityBatches


@pytest.mark.parametrize(
    ("name", "entropy"),
    [
        ("moons", None),
        ("checkerboard", math.log(32)),
        ("eight_gaussians", math.log(8) + 1 + math.log(2 * math.pi * 0.125)),
        ("pinwheel", None),
    ],
)
def test_samples_have_their_density(name, entropy):
    density = PLANAR[name]
    x = density.sample(np.random.default_rng(3), 50_000)
    n, width = 240, 12 / 240
    axis = (np.arange(n) + 0.5) * width - 6
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    p = np.exp(np.concatenate([density.log_density(part) for part in np.array_split(grid, 10)])) * width**2
    assert p.sum() == pytest.approx(1, abs=1e-5)
    expected = len(x) * p.reshape(20, 12, 20, 12).sum((1, 3))
    counts, *_ = np.histogram2d(*x.T, bins=20, range=[[-6, 6]] * 2)
    enough = expected > 10
    chi2 = ((counts - expected)[enough] ** 2 / expected[enough]).sum()
    assert abs(chi2 - enough.sum()) < 5 * math.sqrt(2 * enough.sum())
    log_p = density.log_density(x[:10_000])
    assert np.isfinite(log_p).all()
    found = -(np.log(p[p > 0] / width**2) * p[p > 0]).sum()
    assert -log_p.mean() == pytest.approx(found, abs=5 * log_p.std() / 100 + 1e-3)
    if entropy is not None:
        assert found == pytest.approx(entropy, abs=7e-3)  # for Gaussians that do not overlap; these hardly do


def test_planar_sets_have_fixed_samples_of_the_sizes_asked_for():
    data = load_density("moons")
    assert [len(x) for x in (data.train, data.validation, data.test)] == [20_000, 5_000, 10_000]
    other = load_density("moons", train_size=10, validation_size=3, test_size=10_000)
    assert torch.equal(other.test, data.test) and other.train.shape == (10, 2)
    assert not torch.equal(other.train, data.test[:10])
    moved = other.to(torch.device("cpu"), torch.float32)
    assert moved.train.dtype == torch.float32 and moved.nbytes == (10 + 3 + 10_000) * 2 * 4 and moved.output_size == 2


def test_whitened_digits_count_the_determinant():
    """A normal distribution fitted before whitening and after it has the same −log p, with the offset."""
    from sklearn.datasets import load_digits

    data, again, other = (load_density("digits64", split=split) for split in (0, 0, 1))
    assert [len(x) for x in (data.train, data.validation, data.test)] == [1257, 180, 360]
    assert torch.equal(data.test, again.test) and not torch.equal(data.test, other.test)
    torch.testing.assert_close(data.train.mean(0), torch.zeros(64, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.cov(data.train.T), torch.eye(64, dtype=torch.float64), atol=1e-10, rtol=0)
    pixels = load_digits().data + np.random.default_rng(0).uniform(size=(1797, 64))
    train, test = (pixels[np.random.default_rng((1, 0)).permutation(1797)][i] for i in (slice(1257), slice(1437, None)))
    as_drawn = torch.distributions.MultivariateNormal(
        torch.from_numpy(train.mean(0)), torch.from_numpy(np.cov(train.T))
    ).log_prob(torch.from_numpy(test))
    white = torch.distributions.Normal(0.0, 1.0).log_prob(data.test).sum(1)
    torch.testing.assert_close(white - data.offset, as_drawn, rtol=1e-9, atol=1e-9)


def test_the_noise_of_digits_is_drawn_anew_in_every_step():
    """Uniform over [0, 1) in pixels, on the training samples only, and the same after a resume."""
    data = load_density("digits64")
    without, of_noise = data.quantised
    moved = data.to(torch.device("cpu"), torch.float32)
    assert moved.quantised[0].dtype == torch.float32
    assert data.nbytes - 8 * 64 * 1797 == without.nbytes + of_noise.nbytes == 8 * 64 * (1257 + 64)
    epoch = DensityBatches(data, 1257, "exact", seed=0, steps_per_epoch=3).epoch(1)
    first, second, third = (x for (x,) in epoch.starting_at(0))
    ((resumed,),) = epoch.starting_at(2)
    assert torch.equal(resumed, third)
    draws = []
    for x in (data.train, first, second):
        pixels, counts = (torch.linalg.solve(of_noise.T, y.T).T for y in (x, without))
        shift = counts.min(0).values  # the darkest pixels are 0
        pixels, counts = pixels - shift, counts - shift
        assert pixels.min() >= -1e-9 and pixels.max() < 17 + 1e-9
        draws.append((pixels + 1e-9) % 1)
        assert torch.equal((pixels + 1e-9).floor().sum(0), counts.round().sum(0)), "all digits, once"
        assert 0.49 < draws[-1].mean() < 0.51 and abs(draws[-1].std() - 12**-0.5) < 0.01
    assert not torch.allclose(draws[0], draws[1]) and not torch.allclose(draws[1], draws[2])


def table(root, name, array):
    path = root / name / "data.npy"
    path.parent.mkdir(parents=True)
    np.save(path, array)


def test_miniboone_is_split_from_the_end_and_standardised(tmp_path):
    raw = np.random.default_rng(0).normal(3, 2, (205, 43))
    table(tmp_path, "miniboone", raw)
    data = load_density("miniboone", tmp_path)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [205 - 20 - 18, 18, 20]
    mean, std = raw[:185].mean(0), raw[:185].std(0)
    np.testing.assert_allclose(data.test.numpy(), (raw[185:] - mean) / std, rtol=1e-12)
    np.testing.assert_allclose(data.validation.numpy(), (raw[167:185] - mean) / std, rtol=1e-12)
    np.testing.assert_allclose(data.train.numpy(), (raw[:167] - mean) / std, rtol=1e-12)


def test_power_keeps_six_columns_with_their_noise(tmp_path):
    raw = np.arange(8000.0).reshape(1000, 8)
    raw[:, 1] = raw[:, 3] = np.nan  # the columns to be dropped
    table(tmp_path, "power", raw)
    data = load_density("power", tmp_path)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [810, 90, 100]
    whole = torch.cat([data.train, data.validation]).numpy()
    np.testing.assert_allclose(whole.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(whole.std(0), 1, rtol=1e-12)
    everything = torch.cat([data.train, data.validation, data.test]).numpy()
    # Columns grew together by 8 per row, so they are linear in the last one, which has no noise, plus their noise.
    order = np.argsort(everything[:, 5])
    assert not np.array_equal(order, np.arange(1000))  # shuffled
    raw_units = 8.0 * np.arange(1000)
    for i, width in enumerate((0.001, 0.01, 1, 1, 1)):
        slope, start = np.polyfit(raw_units, everything[order][:, i], 1)
        noise = (everything[order][:, i] - start) / slope - raw_units
        assert noise.std() == pytest.approx(width / math.sqrt(12), rel=0.1)


class File(dict):
    """The part of h5py.File that is used."""

    arrays: dict[str, np.ndarray]

    def __init__(self, path, mode):
        assert mode == "r"
        super().__init__(self.arrays)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_bsds300_is_as_in_its_file(tmp_path, monkeypatch):
    path = tmp_path / "BSDS300" / "BSDS300.hdf5"
    path.parent.mkdir()
    path.touch()
    arrays = {key: np.full((n, 63), n, np.float32) for key, n in (("train", 5), ("validation", 2), ("test", 3))}
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=type("Made", (File,), {"arrays": arrays})))
    data = load_density("bsds300", tmp_path)
    for key, array in arrays.items():
        assert np.array_equal(getattr(data, key).numpy(), array)
    del arrays["test"]
    with pytest.raises(UserError, match=r"dataset=bsds300: .*cannot be read"):
        load_density("bsds300", tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="needs h5py, which is not installed; pip install h5py"):
        load_density("bsds300", tmp_path)


def test_files_that_are_absent_or_wrong_are_refused_with_what_to_do(tmp_path):
    for name in ("power", "miniboone", "bsds300"):
        with pytest.raises(
            UserError, match=rf"dataset={name}: .*{tmp_path.name}.*not found; unpack .*zenodo.*ANODE_DATA"
        ):
            load_density(name, tmp_path)
    table(tmp_path, "miniboone", np.zeros((5, 4)))
    with pytest.raises(UserError, match=r"miniboone: .*has the shape \(5, 4\), not \(rows, 43\)"):
        load_density("miniboone", tmp_path)
    (tmp_path / "miniboone" / "data.npy").write_bytes(b"no table")
    with pytest.raises(UserError, match="cannot be read"):
        load_density("miniboone", tmp_path)


def test_the_number_of_components_is_known_before_loading():
    for name in (*PLANAR, "digits64"):
        sizes = {} if name == "digits64" else {"train_size": 4, "validation_size": 2, "test_size": 3}
        assert load_density(name, **sizes).output_size == DENSITIES[name]
