"""Statistics of features: Frechet distance (FID, arXiv:1706.08500) and Inception score (arXiv:1606.03498).

    d(a, b)^2 = |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))
    score     = exp(mean_x KL(p(y | x) || mean_x p(y | x)))

Sums are kept in float64 on the host, batch by batch; a batch may have any size, and the cuts change the result by rounding alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np

SPLIT = 5000  # images whose mean prediction an Inception score is taken against; the scores of all splits are averaged


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] (divided by count - 1) of `count` vectors, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


class Moments:
    """Mean and covariance of vectors that come in batches (Chan, Golub and LeVeque 1979)."""

    def __init__(self, dim: int):
        self.count = 0
        self._mean, self._scatter = np.zeros(dim), np.zeros((dim, dim))

    def add(self, batch: np.ndarray) -> None:
        """Takes [B, D] vectors in."""
        batch = np.asarray(batch, np.float64)
        mean = batch.mean(axis=0)
        centred, step, total = batch - mean, mean - self._mean, self.count + len(batch)
        self._scatter += centred.T @ centred + np.outer(step, step) * (self.count * len(batch) / total)
        self._mean += step * (len(batch) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and covariance of all so far; the covariance of a single vector is zero."""
        return Gaussian(self._mean.copy(), self._scatter / max(self.count - 1, 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance of two Gaussians, at least 0.

    (cov_a cov_b)^(1/2) has the trace of (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2), which is symmetric: no complex numbers, no offset
    where a covariance is singular.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = root @ b.covariance @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((middle + middle.T) / 2), 0)).sum()
    squared = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(squared, 0.0))


class InceptionScore:
    """The Inception score of predictions that come in batches, the mean over splits of SPLIT images in the order they come."""

    def __init__(self, num_classes: int, split: int = SPLIT):
        self._split, self._scores = split, list[float]()
        self._sum, self._entropy, self._count = np.zeros(num_classes), 0.0, 0

    def add(self, probabilities: np.ndarray) -> None:
        """Takes [B, classes] predictions in."""
        left = np.asarray(probabilities, np.float64)
        while len(left):
            now, left = np.split(left, [self._split - self._count])
            self._sum += now.sum(axis=0)
            self._entropy -= _p_log_p(now).sum()
            self._count += len(now)
            if self._count == self._split:
                self._scores.append(self._score())
                self._sum[:], self._entropy, self._count = 0, 0.0, 0

    def result(self) -> float:
        """The score of all so far, 1 to the number of classes."""
        return float(np.mean([*self._scores, *([self._score()] if self._count else [])]))

    def _score(self) -> float:
        """exp(entropy of the mean - mean entropy)."""
        return float(np.exp(-_p_log_p(self._sum / self._count).sum() - self._entropy / self._count))


def _p_log_p(p: np.ndarray) -> np.ndarray:
    """p log p, 0 where p is 0."""
    return p * np.log(np.where(p > 0, p, 1))
