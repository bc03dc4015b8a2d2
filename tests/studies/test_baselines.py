"""Baselines on normal data, whose entropy is known."""

import math

import numpy as np
import pytest

from anode_exp.studies.baselines import gaussian, kernel_estimate, kernel_log_density, mixture


def two_normals(n, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.5, (n, 2)) + 10 * rng.integers(0, 2, (n, 1))


def test_a_mixture_finds_the_two_that_the_samples_are_of_and_a_gaussian_cannot():
    splits = [two_normals(n, seed) for seed, n in enumerate((2000, 500, 2000))]
    entropy = math.log(2) + 1 + math.log(2 * math.pi * 0.25)
    found = mixture(*splits, components=(1, 2, 10))
    assert found.chosen == "2 components, 1e-06 added"
    assert found.test_nll == pytest.approx(entropy, abs=0.06)
    assert gaussian(*splits).test_nll > entropy + 1
    estimate = kernel_estimate(*splits)
    assert entropy < estimate.test_nll < entropy + 0.3


def test_the_gaussian_is_that_of_mean_and_covariance():
    train, test = two_normals(300, 0), two_normals(100, 1)
    covariance = np.cov(train.T, bias=True)
    z = (test - train.mean(0)) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    truth = (z**2).sum(1).mean() / 2 + np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] / 2
    assert gaussian(train, train, test).test_nll == pytest.approx(truth, rel=1e-6)


def test_the_kernel_estimate_is_a_mean_of_normals():
    train, x, h = two_normals(30, 0), two_normals(7, 1), 0.8
    kernels = np.exp(-((x[:, None] - train) ** 2).sum(2) / (2 * h * h)) / (2 * np.pi * h * h)
    np.testing.assert_allclose(kernel_log_density(train, x, h), np.log(kernels.mean(1)), rtol=1e-10)


def test_the_bandwidth_is_chosen_on_validation_samples():
    splits = [two_normals(n, seed) for seed, n in enumerate((300, 200, 200))]
    candidates = (0.01, 0.1, 1.0)
    found = kernel_estimate(*splits, bandwidths=candidates)
    scale = np.sqrt(splits[0].var(0).mean())
    scores = [kernel_log_density(splits[0], splits[1], b * scale).mean() for b in candidates]
    assert found.chosen == f"bandwidth {candidates[int(np.argmax(scores))] * scale:.3g}"
