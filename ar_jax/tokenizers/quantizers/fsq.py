"""Finite scalar quantization: each channel is rounded to a few levels (arXiv:2309.15505)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Grid, Layout
from ar_jax.tokenizers.quantizers.protocol import Quantized


class FiniteScalarQuantizer(nn.Module):
    """round(bounded(z)): no table is learned, and no loss is needed.

    Attributes:
      levels: values of each channel; (8, 5, 5, 5) are 1000 codes, (8, 8, 8, 5, 5, 5) are 64000 (their table 1).
    """

    levels: Sequence[int] = (8, 5, 5, 5)

    resample_channels = 0

    @property
    def vocab_size(self) -> int:
        """The number of combinations."""
        return int(np.prod(self.levels))

    @property
    def channels(self) -> int:
        """One per entry of levels."""
        return len(self.levels)

    in_channels = channels

    @nn.nowrap
    def layout(self, grid: Grid) -> Layout:
        """See Quantizer."""
        if not self.levels or min(self.levels) < 2:
            raise UsageError(f"config.tokenizer.quantizer.levels={tuple(self.levels)} must be numbers of at least 2.")
        return (grid,)

    def __call__(self, z: Array, key: Array | None = None) -> Quantized:
        """See Quantizer; values lie in [-1, 1]."""
        bounded = self._bounded(z)
        rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        digits = jnp.round(bounded).astype(jnp.int32) + self._shaped(self._halves, z)
        codes = (digits * self._shaped(self._bases, z)).sum(axis=-1).reshape(len(z), -1)
        return Quantized(rounded / self._shaped(self._halves, z), codes, {}, z.reshape(len(z), -1, self.channels))

    def lookup(self, codes: Array, known: Array | None = None) -> Array:
        """Codes [B, L] to values [B, L, channels]; see Quantizer."""
        digits = codes[..., None] // self._bases[None, None] % np.asarray(self.levels)[None, None]
        values = (digits - self._halves[None, None]) / self._halves[None, None].astype(np.float32)
        return values if known is None else jnp.where(known[..., None], values, 0.0)

    def _bounded(self, z: Array) -> Array:
        """z squeezed between the lowest and the highest level; an even number of levels has one more below 0 than above."""
        levels = np.asarray(self.levels)
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = np.where(levels % 2, 0.0, 0.5)
        shift = np.tan(offset / half)
        half, offset, shift = (self._shaped(a.astype(np.float32), z) for a in (half, offset, shift))
        return jnp.tanh(z + shift) * half - offset

    @property
    def _halves(self) -> np.ndarray:
        return np.asarray(self.levels, np.int32) // 2

    @property
    def _bases(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)

    @nn.nowrap
    def _shaped(self, row: np.ndarray, z: Array) -> np.ndarray:
        return row.reshape((1,) * (z.ndim - 1) + (-1,))
