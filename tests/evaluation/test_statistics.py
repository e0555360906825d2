"""Frechet distances and Inception scores against formulas that are known otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ar_jax.evaluation.statistics import Gaussian, InceptionScore, Moments, frechet_distance

RANDOM = np.random.default_rng(0)


def gaussian(dim: int, rank: int) -> Gaussian:
    root = RANDOM.normal(size=(dim, rank))
    return Gaussian(RANDOM.normal(size=dim), root @ root.T, 100)


def moments(*batches: np.ndarray) -> Gaussian:
    found = Moments(batches[0].shape[1])
    for batch in batches:
        found.add(batch)
    return found.gaussian()


@pytest.mark.parametrize("dim", [1, 2, 9])
def test_the_distance_of_gaussians_is_that_of_the_matrix_square_root(dim):
    a, b = gaussian(dim, 2 * dim), gaussian(dim, 2 * dim)
    cross = np.trace(np.atleast_2d(sqrtm(a.covariance @ b.covariance)).real)
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_the_distance_of_gaussians_along_the_axes_is_that_of_their_deviations():
    a, b = Gaussian(np.zeros(3), np.diag([1.0, 4.0, 0.0]), 9), Gaussian(np.ones(3), np.diag([9.0, 4.0, 4.0]), 9)
    assert frechet_distance(a, b) == pytest.approx(3 + (1 - 3) ** 2 + 0 + 2**2)  # a covariance may be singular


@pytest.mark.parametrize("rank", [5, 20])
def test_nothing_is_far_from_itself(rank):
    a = gaussian(20, rank)
    assert 0 <= frechet_distance(a, a) < 1e-6 * np.trace(a.covariance)


@pytest.mark.parametrize("cuts", [[], [1], [3, 4, 50], list(range(1, 101))], ids=len)
def test_moments_in_pieces_are_those_of_all_at_once(cuts):
    vectors = (1e4 + RANDOM.normal(size=(101, 4))).astype(
        np.float32
    )  # far from 0, where sums of squares lose their digits
    found = moments(*np.split(vectors, cuts))
    assert found.count == 101
    np.testing.assert_allclose(found.mean, vectors.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(vectors.astype(np.float64), rowvar=False), rtol=1e-7)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_inception_score_is_what_it_should_be_however_predictions_come(size):
    def score(predictions: np.ndarray, split: int = 5000) -> float:
        found = InceptionScore(predictions.shape[1], split)
        for first in range(0, len(predictions), size):
            found.add(predictions[first : first + size])
        return found.result()

    assert score(np.eye(10, dtype=np.float32)[np.arange(70) % 10]) == pytest.approx(10)
    assert score(np.full((20, 8), 1 / 8)) == pytest.approx(1)
    predictions = RANDOM.dirichlet(np.ones(6), 25)
    expected = []
    for part in (predictions[:10], predictions[10:20], predictions[20:]):
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        expected.append(np.exp(divergence.sum(axis=1).mean()))
    assert score(predictions, 10) == pytest.approx(np.mean(expected))
