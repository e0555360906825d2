"""Changes of resolution as constant matrices, one product per axis without gathers; and bands of frequency."""

from __future__ import annotations

from collections.abc import Sequence

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


def band_cutoffs(sides: Sequence[int]) -> np.ndarray:
    """Where the band of each grid ends, in parts of the highest frequency: bands are as wide as their grids have cells.

    cutoff_k = cutoff_(k-1) + side_k^2 / sum_j side_j^2       (NFIG, arXiv:2503.07076, sec. 3.2; their sigma_k / sigma_max)

    Args:
      sides: of the grids, from coarse to fine.

    Returns: [len(sides)] float64, rising to 1.
    """
    cells = np.square(np.asarray(sides, float))
    return np.cumsum(cells) / cells.sum()


def low_pass(x: Array, cutoff: float) -> Array:
    """Squares [B, H, H, C] with what lies above a radial frequency taken out: F^-1(F(x) * mask), float32.

    Args:
      x: of any dtype.
      cutoff: in parts of the highest radial frequency that the grid holds; 1 keeps all, 0 the mean alone.
    """
    rows, cols = np.fft.fftfreq(x.shape[1])[:, None], np.fft.fftfreq(x.shape[2])[None]
    radius = np.hypot(rows, cols)
    kept = radius <= cutoff * radius.max() * (1 + 1e-6)  # a cutoff of 1 is a sum that may come out a little below
    if kept.all():
        return x.astype(jnp.float32)
    spectrum = jnp.fft.fft2(x.astype(jnp.float32), axes=(1, 2)) * kept[None, :, :, None]
    return jnp.fft.ifft2(spectrum, axes=(1, 2)).real.astype(jnp.float32)
