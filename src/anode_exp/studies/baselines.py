"""Densities to compare with a flow: a normal distribution, a mixture of them, and a kernel estimate."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

Points = np.ndarray

# The candidates that validation samples choose from.
COMPONENTS = (5, 10, 15, 20, 40, 80)
REGULARISATIONS = (1e-6, 1e-2, 0.2, 0.3)
BANDWIDTHS = tuple(0.05 * 2 ** (i / 2) for i in range(12))
"""Standard deviations of the kernel, in units of the data's."""


@dataclass(frozen=True)
class Baseline:
    """A density fitted to training samples.

    Attributes:
        chosen: what the validation samples selected, in words.
        test_nll: mean −log p of the test samples, in nats.
    """

    name: str
    chosen: str
    test_nll: float


def gaussian(train: Points, validation: Points, test: Points) -> Baseline:
    """The normal distribution of the training samples' mean and covariance."""
    fitted = GaussianMixture(1, reg_covar=1e-9).fit(train)
    return Baseline("Gaussian", "", -float(fitted.score(test)))


def mixture(
    train: Points,
    validation: Points,
    test: Points,
    components: Sequence[int] = COMPONENTS,
    regularisations: Sequence[float] = REGULARISATIONS,
) -> Baseline:
    """A mixture of normal distributions by expectation–maximisation, chosen by likelihood of the validation samples.

    Args:
        components: numbers of them to choose from; those above a tenth of the training samples are left out.
        regularisations: variances added to every covariance, to choose from, in units of the components' mean variance.
    """
    unit = float(train.var(0).mean())
    best: tuple[float, GaussianMixture, str] | None = None
    for n in (n for n in components if 10 * n <= len(train)):
        for added in regularisations:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that stops early may still be the best
                fitted = GaussianMixture(n, reg_covar=added * unit, random_state=0).fit(train)
            score = float(fitted.score(validation))
            if best is None or score > best[0]:
                best = score, fitted, f"{n} components, {added:g} added"
    assert best is not None, "no number of components fits the samples"
    return Baseline("mixture", best[2], -float(best[1].score(test)))


def kernel_log_density(train: Points, points: Points, bandwidth: float) -> np.ndarray:
    """log p(x) = log mean over training samples of N(x; sample, bandwidth² I): [N]."""
    d, squares = train.shape[1], (train**2).sum(1)
    found = []
    for some in np.array_split(points, max(1, len(points) * len(train) // 10**7)):
        exponents = -(((some**2).sum(1)[:, None] - 2 * some @ train.T + squares) / (2 * bandwidth**2))
        top = exponents.max(1)
        found.append(top + np.log(np.exp(exponents - top[:, None]).mean(1)))
    return np.concatenate(found) - d / 2 * np.log(2 * np.pi * bandwidth**2)


def kernel_estimate(
    train: Points, validation: Points, test: Points, bandwidths: Sequence[float] = BANDWIDTHS
) -> Baseline:
    """A normal kernel on every training sample, with the best bandwidth for (1,000) validation samples.

    Bandwidths are in units of the root mean square of the components' standard deviations.
    """
    scale = float(np.sqrt(train.var(0).mean()))
    few = validation[:1000]
    best = max(bandwidths, key=lambda b: kernel_log_density(train, few, b * scale).mean())
    return Baseline(
        "kernel estimate", f"bandwidth {best * scale:.3g}", -float(kernel_log_density(train, test, best * scale).mean())
    )


def baselines(train: Points, validation: Points, test: Points) -> list[Baseline]:
    """All three; samples are [N, d]."""
    return [fit(train, validation, test) for fit in (gaussian, mixture, kernel_estimate)]
