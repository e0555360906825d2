"""The convolution over the last few tokens that recurrent mixers have in front of their memory, with its activation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.mixers.common.short_convolution import Ring, empty_ring, short_convolution
from ar_jax.mixers.protocol import Tokens


class SiluConvolution(nn.Module):
    """out_t = silu(offset + sum_{j<width} filters_j x_{t-j}), one filter per channel.

    Attributes:
      channels: C.
      width: taps, the present token's first.
      use_bias: there is an offset.
      activate: otherwise silu is left out, where what follows has activations of its own.
    """

    channels: int
    width: int = 4
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    activate: bool = True

    def setup(self) -> None:
        """Filters [width, C] and offset [C]."""
        if self.width < 2:
            raise UsageError(
                f"config.model.mixer.width={self.width} must be at least 2: a filter of one token mixes nothing."
            )
        start = between(self.width**-0.5)
        self.filters = self.param("filters", start, (self.width, self.channels), self.param_dtype)
        if self.use_bias:
            self.offset = self.param("offset", start, (self.channels,), self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int) -> Ring:
        """The last width - 1 values."""
        return empty_ring(batch_size, self.width, self.channels, self.dtype)

    def __call__(self, values: Array, tokens: Tokens, before: Ring | None = None) -> tuple[Array, Ring | None]:
        """[B, T, C] as fed to [B, T, C], and the state after; see `short_convolution`."""
        mixed, after = short_convolution(values, self.filters, tokens, before)
        if self.use_bias:
            mixed += self.offset.astype(mixed.dtype)[None, None]
        return nn.silu(mixed) if self.activate else mixed, after


def between(bound: float) -> Any:
    """An initialiser: even in [-bound, bound]."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw
