"""Samples of densities: in the plane with known log-densities, handwritten digits, and the tables of PNODE's flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anode_exp.errors import UserError

Points = np.ndarray
"""[N, d] in float64."""

# ---------------------------------------------------------------- densities in the plane


@dataclass(frozen=True)
class Planar:
    """A density in the plane: a sampler of n points, and log p of points; as in FFJORD's code (arXiv 1810.01367)."""

    sample: Callable[[np.random.Generator, int], Points]
    log_density: Callable[[Points], np.ndarray]


def _log_normal(x: np.ndarray, std: float) -> np.ndarray:
    return -0.5 * (x / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


def _log_mean_exp(terms: np.ndarray) -> np.ndarray:
    """log of the mean of exp(terms) over the first axis."""
    top = terms.max(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isfinite(top), top + np.log(np.exp(terms - top).mean(0)), -np.inf)


# Two half circles of radius 2 with normal noise of standard deviation 0.2 in both directions: scikit-learn's make_moons
# with noise 0.1, times 2 and moved by (−1, −0.2).
_MOON_CENTRES = np.array([[-1.0, -0.2], [1.0, 0.8]])
_MOON_STD = 0.2


def _sample_moons(rng: np.random.Generator, n: int) -> Points:
    angle, lower = rng.uniform(0, np.pi, n), rng.integers(0, 2, n)
    arc = 2 * np.stack([np.cos(angle), np.sin(angle)], 1) * np.where(lower, -1, 1)[:, None]
    return _MOON_CENTRES[lower] + arc + _MOON_STD * rng.standard_normal((n, 2))


def _log_moons(x: Points) -> np.ndarray:
    """The integral over the angle by Gauss–Legendre rules on 16 parts of the half circle, accurate to rounding."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    angles = ((np.arange(16)[:, None] + (nodes + 1) / 2) / 16 * np.pi).ravel()
    log_weights = np.log(np.tile(weights / 2, 16) / 16)
    arc = 2 * np.stack([np.cos(angles), np.sin(angles)], 1)
    terms = []
    for centre, sign in zip(_MOON_CENTRES, (1, -1), strict=True):
        offsets = [x[:, i] - (centre[i] + sign * arc[:, i])[:, None] for i in range(2)]
        terms.append(sum(_log_normal(offset, _MOON_STD) for offset in offsets) + log_weights[:, None])
    joined = np.concatenate(terms)
    return _log_mean_exp(joined) + math.log(len(joined) / 2)


_CENTRES = 4 / 1.414 * np.array([[np.cos(a), np.sin(a)] for a in np.arange(8) * np.pi / 4])
_CENTRE_STD = 0.5 / 1.414


def _sample_eight_gaussians(rng: np.random.Generator, n: int) -> Points:
    return _CENTRES[rng.integers(0, 8, n)] + _CENTRE_STD * rng.standard_normal((n, 2))


def _log_eight_gaussians(x: Points) -> np.ndarray:
    return _log_mean_exp(np.stack([_log_normal(x - centre, _CENTRE_STD).sum(1) for centre in _CENTRES]))


def _sample_checkerboard(rng: np.random.Generator, n: int) -> Points:
    """Uniform on the 8 squares of side 2 in [−4, 4]² with column − row, counted from the middle, even."""
    column = rng.uniform(-2, 2, n)
    row = rng.uniform(0, 1, n) - 2 * rng.integers(0, 2, n) + np.floor(column) % 2
    return 2 * np.stack([column, row], 1)


def _log_checkerboard(x: Points) -> np.ndarray:
    column, row = np.floor(x / 2).T
    inside = (np.abs(x) <= 4).all(1) & ((column - row) % 2 == 0)
    return np.where(inside, -math.log(32.0), -np.inf)


# x = 2 R(−(θ_k + rate e^{f₀})) f with f₀ ~ N(1, 0.3²), f₁ ~ N(0, 0.1²), θ_k = 2πk/5: five bent blades.
_BLADES, _RATE, _RADIAL, _TANGENTIAL = 5, 0.25, 0.3, 0.1


def _sample_pinwheel(rng: np.random.Generator, n: int) -> Points:
    f0, f1 = 1 + _RADIAL * rng.standard_normal(n), _TANGENTIAL * rng.standard_normal(n)
    angle = rng.integers(0, _BLADES, n) * (2 * np.pi / _BLADES) + _RATE * np.exp(f0)
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.stack([f0 * cos + f1 * sin, f1 * cos - f0 * sin], 1)


def _log_pinwheel(x: Points) -> np.ndarray:
    """log p(x) = log mean over blades of N(f₀; 1, 0.3²) N(f₁; 0, 0.1²) / |4 (1 + rate f₁ e^{f₀})|.

    With polar coordinates (r, ψ) of f the angle of x is ψ − θ_k − rate e^{r cos ψ}, which Newton's method solves for ψ.
    A second solution exists only where f₁ is beyond 5 standard deviations, and is not counted.
    """
    radius, angle = np.hypot(*x.T) / 2, np.arctan2(x[:, 1], x[:, 0])
    terms = []
    for k in range(_BLADES):
        target = angle + k * (2 * np.pi / _BLADES)
        start = target + _RATE * np.exp(radius)
        turns = np.round(start / (2 * np.pi)) * 2 * np.pi
        psi = start - turns
        for _ in range(40):
            bend = _RATE * np.exp(radius * np.cos(psi))
            slope = 1 + bend * radius * np.sin(psi)
            psi = psi - np.clip((psi - bend - target + turns) / np.where(np.abs(slope) < 0.1, 0.1, slope), -0.5, 0.5)
        f0, f1 = radius * np.cos(psi), radius * np.sin(psi)
        bend = _RATE * np.exp(f0)
        found = np.abs(psi - bend - target + turns) < 1e-8
        volume = np.abs(1 + bend * f1)
        with np.errstate(divide="ignore"):
            term = _log_normal(f0 - 1, _RADIAL) + _log_normal(f1, _TANGENTIAL) - np.log(4 * volume)
        terms.append(np.where(found, term, -np.inf))
    return _log_mean_exp(np.stack(terms))


PLANAR: dict[str, Planar] = {
    "moons": Planar(_sample_moons, _log_moons),
    "eight_gaussians": Planar(_sample_eight_gaussians, _log_eight_gaussians),
    "checkerboard": Planar(_sample_checkerboard, _log_checkerboard),
    "pinwheel": Planar(_sample_pinwheel, _log_pinwheel),
}

# ---------------------------------------------------------------- data sets


@dataclass(frozen=True)
class DensityData:
    """Samples of a density, as a network receives them.

    Attributes:
        train, validation, test: [N, d].
        offset: nats to add to −log p of these samples to get that of the samples before whitening: −log |det| of the
            whitening.
        quantised: for samples that noise makes continuous: the training samples without noise, [N, d], and the matrix
            W that maps noise u, uniform over [0, 1)ᵈ, to what is added, x + u W. Training draws new noise in each
            step, because a flow would memorise a single draw.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    offset: float = 0.0
    quantised: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def output_size(self) -> int:
        return self.train.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.train, self.validation, self.test, *(self.quantised or ())))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> DensityData:
        train, validation, test = (x.to(device, dtype) for x in (self.train, self.validation, self.test))
        without, of_noise = self.quantised or (None, None)
        quantised = None
        if without is not None and of_noise is not None:
            quantised = without.to(device, dtype), of_noise.to(device, dtype)
        return DensityData(train, validation, test, self.offset, quantised)


Splits = tuple[Points, Points, Points]
"""train, validation, test."""


def _from_the_end(data: Points) -> Splits:
    """The last tenth is for testing, the last tenth of the rest for validation."""
    rest, test = np.split(data, [len(data) - len(data) // 10])
    train, validation = np.split(rest, [len(rest) - len(rest) // 10])
    return train, validation, test


def _standardised(splits: Splits) -> Splits:
    """By mean and standard deviation of training and validation data together, as in the published figures."""
    train, validation, test = splits
    both = np.concatenate([train, validation])
    mean, std = both.mean(0), both.std(0)
    return (train - mean) / std, (validation - mean) / std, (test - mean) / std


def _table(path: Path, columns: int) -> Points:
    data = np.load(path)
    if data.ndim != 2 or data.shape[1] != columns:
        raise ValueError(f"has the shape {data.shape}, not (rows, {columns})")
    return data.astype(np.float64)


def _power(path: Path) -> Splits:
    """Household power consumption, d = 6: shuffled, columns 3 and 1 dropped, dequantised; standardised."""
    rng = np.random.RandomState(42)
    data = _table(path, 8)
    rng.shuffle(data)
    data = np.delete(data, (1, 3), 1)
    n = len(data)
    voltage, gap, metering = 0.01 * rng.rand(n, 1), 0.001 * rng.rand(n, 1), rng.rand(n, 3)  # in the papers' order
    return _standardised(_from_the_end(data + np.hstack([gap, voltage, metering, np.zeros((n, 1))])))


def _miniboone(path: Path) -> Splits:
    """Particles of the MiniBooNE experiment, d = 43; standardised."""
    return _standardised(_from_the_end(_table(path, 43)))


def _bsds300(path: Path) -> Splits:
    """8×8 patches of natural images without their mean, d = 63; as they are in the file."""
    with import_module("h5py").File(path, "r") as file:
        train, validation, test = (np.asarray(file[key]) for key in ("train", "validation", "test"))
    return train, validation, test


TABLES: dict[str, tuple[str, int, Callable[[Path], Splits]]] = {
    "power": ("power/data.npy", 6, _power),
    "miniboone": ("miniboone/data.npy", 43, _miniboone),
    "bsds300": ("BSDS300/BSDS300.hdf5", 63, _bsds300),
}
"""Name → (file under the root, as unpacked from the archive of MAF's authors; columns; reader).

Source: Papamakarios et al., Masked autoregressive flow (arXiv 1705.07057); FFJORD and PNODE split and scale alike.
"""

ARCHIVE = "https://zenodo.org/records/1161203 (data.tar.gz)"


def _load_table(name: str, root: Path) -> Splits:
    file, _, read = TABLES[name]
    path = root / file
    where = f"dataset={name}: {path.resolve()}"
    if not path.is_file():
        raise UserError(f"{where}: not found; unpack {ARCHIVE} and point dataset.root or ANODE_DATA at its folder data")
    try:
        return read(path)
    except ImportError as error:
        raise UserError(f"{where}: reading it needs h5py, which is not installed; pip install h5py") from error
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{where}: cannot be read ({' '.join(str(error).split())[:100]}); copy the file again"
        ) from error


def _digits64(split: int) -> DensityData:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels in 0 … 16, d = 64; 360 for testing, 180 for validation.

    Dequantised by noise uniform over [0, 1), and whitened: mean 0 and covariance I over the training samples.
    """
    from sklearn.datasets import load_digits

    counts = load_digits().data
    pixels = counts + np.random.default_rng(0).uniform(size=counts.shape)
    order = np.random.default_rng((1, split)).permutation(len(pixels))
    train, validation, test = np.split(pixels[order], [len(pixels) - 540, len(pixels) - 360])
    mean = train.mean(0)
    variances, axes = np.linalg.eigh(np.cov(train.T))
    whitening = axes / np.sqrt(variances)
    parts = ((x - mean) @ whitening for x in (train, validation, test, counts[order[: len(train)]]))
    train_x, validation_x, test_x, without = map(torch.from_numpy, parts)
    quantised = without, torch.from_numpy(whitening)
    return DensityData(train_x, validation_x, test_x, float(np.log(variances).sum() / 2), quantised)


DENSITIES: dict[str, int] = {**dict.fromkeys(PLANAR, 2), "digits64": 64, **{k: v[1] for k, v in TABLES.items()}}
"""Name → number of components of a sample."""


def load_density(
    name: str,
    root: Path = Path("data"),
    train_size: int = 20_000,
    validation_size: int = 5_000,
    test_size: int = 10_000,
    split: int = 0,
) -> DensityData:
    """A data set on the CPU, in float64 unless its file is not.

    Args:
        root: folder of the tables' files.
        train_size, validation_size, test_size: samples to draw from a density in the plane; always the same ones.
        split: number of the random division of digits64.

    Raises:
        UserError: if a file is missing, or cannot be read.
    """
    splits: Sequence[Points]
    if name == "digits64":
        return _digits64(split)
    if name in PLANAR:
        sizes = (train_size, validation_size, test_size)
        splits = [PLANAR[name].sample(np.random.default_rng((0, i)), n) for i, n in enumerate(sizes)]
    else:
        splits = _load_table(name, root)
    train, validation, test = (torch.from_numpy(np.ascontiguousarray(x)) for x in splits)
    return DensityData(train, validation, test)
