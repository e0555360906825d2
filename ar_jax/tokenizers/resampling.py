"""Changes of resolution as constant matrices: one product per axis, no gathers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array


def area_matrix(length: int, size: int) -> np.ndarray:
    """[size, length] averages over the bins floor(i length / size) .. ceil((i + 1) length / size)."""
    starts, ends = np.arange(size) * length // size, -(-np.arange(1, size + 1) * length // size)
    inside = (np.arange(length) >= starts[:, None]) & (np.arange(length) < ends[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def bicubic_matrix(length: int, size: int) -> np.ndarray:
    """[size, length] cubic convolution with a = -0.75; cell i looks at (i + 1/2) length / size - 1/2, edges are repeated."""
    places = (np.arange(size) + 0.5) * (length / size) - 0.5
    taps = np.floor(places)[:, None].astype(int) + np.arange(-1, 3)  # [size, 4]
    weights = _cubic(np.abs(places[:, None] - taps))
    matrix = np.zeros((size, length))
    np.add.at(matrix, (np.arange(size)[:, None], np.clip(taps, 0, length - 1)), weights)
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' kernel: piecewise cubic, interpolating, zero from distance 2 on."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def resize(x: Array, matrix: np.ndarray) -> Array:
    """Squares [B, H, H, C] to [B, size, size, C] by a matrix [size, H] on both axes."""
    rows = jnp.einsum("sh,bhwc->bswc", jnp.asarray(matrix, x.dtype), x, precision="highest")
    return jnp.einsum("tw,bswc->bstc", jnp.asarray(matrix, x.dtype), rows, precision="highest")
