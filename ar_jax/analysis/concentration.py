"""How far attention concentrates, and on whom: the instruments of Linear Log-Normal Attention (arXiv:2311.13541)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ar_jax.config import UsageError


@dataclasses.dataclass(frozen=True)
class Concentration:
    """Of one matrix of weights, whose rows sum to one. Attention that concentrates has little entropy.

    It does so without bias where the gap is small, too: each query on keys of its own. Where the gap is large, all of them
    concentrate on the same keys.

    Attributes:
      entropy_bits: the mean over queries of the entropy of what they read: from 0, one key, to log2 of the number of keys.
      spectral_gap: 1 - |the second largest eigenvalue|, from 0, as where every token reads itself, to 1, where all read alike.
      log_variance: of the logarithms of the weights: of log-normal ones it tells the temperature.
    """

    entropy_bits: float
    spectral_gap: float
    log_variance: float

    @property
    def temperature(self) -> float:
        """1 / the standard deviation of the logarithms: what divides logits of unit variance."""
        return 1 / math.sqrt(self.log_variance) if self.log_variance > 0 else math.inf


def concentration(weights: np.ndarray) -> Concentration:
    """Measures a matrix of attention weights.

    Args:
      weights: [T, T] or, for a mean over matrices, [..., T, T]: at least 0, every row with a sum of 1.

    Raises:
      UsageError: no square matrices of at least two tokens, or rows that have another sum.
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2] or weights.shape[-1] < 2:
        raise UsageError(f"attention weights {weights.shape} should be square, [..., T, T] with T at least 2.")
    if (weights < 0).any() or not np.allclose(weights.sum(axis=-1), 1, atol=1e-3):
        raise UsageError("attention weights should be at least 0 and have rows with a sum of 1; normalise them first.")
    there = weights > 0
    logs = np.log(weights, out=np.zeros_like(weights), where=there)
    entropy = -(weights * logs).sum(axis=-1).mean() / math.log(2)
    sizes = np.sort(np.abs(np.linalg.eigvals(weights)), axis=-1)
    return Concentration(float(entropy), float((1 - sizes[..., -2]).mean()), float(logs[there].var()))


def softmax_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(H)), of [..., T, H] to [..., T, T]."""
    logits = np.asarray(q, np.float64) @ np.swapaxes(np.asarray(k, np.float64), -1, -2) * q.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def linear_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """What linear attention weighs pairs with, of features at least 0, [..., T, F] to [..., T, T]."""
    weights = np.asarray(q, np.float64) @ np.swapaxes(np.asarray(k, np.float64), -1, -2)
    return weights / weights.sum(axis=-1, keepdims=True)


def fit_log_normal(
    head_dim: int, spreads: tuple[float, float] = (4.0, 10.0), num_tokens: int = 512, seed: int = 0
) -> tuple[float, float]:
    """The a and b of `matched_moments` for heads of this width, by least squares on drawn queries and keys.

    Args:
      head_dim: H.
      spreads: the range of alpha^2 var(q) + beta^2 var(k), in which the log-variance is nearly a line; at 9 it is
        that of softmax's logits of queries and keys of unit variance.
      num_tokens: how many queries, and keys, are drawn for each of ten spreads.
      seed: of what is drawn.
    """
    random, found = np.random.default_rng(seed), []
    grid = np.linspace(*spreads, 10)
    for spread in grid:
        q, k = (np.exp(random.normal(size=(num_tokens, head_dim)) * math.sqrt(spread / 2)) for _ in range(2))
        found.append(np.log(q @ k.T).var())
    slope, offset = np.polyfit(grid, found, 1)
    return float(slope), float(offset)
