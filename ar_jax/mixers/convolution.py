"""Gated depthwise causal convolution."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.short_convolution import Ring, empty_ring, short_convolution
from ar_jax.mixers.protocol import Tokens


class Convolution(nn.Module):
    """out_t = W_o (silu(W_g x_t) * sum_{j<width} w_j * W_v x_{t-j}), one filter w per channel (cf. arXiv:1901.10430).

    Attributes:
      width: taps of the filters, the present token's first; with one alone tokens do not read each other.
    """

    embed_dim: int
    width: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    def setup(self) -> None:
        """Projections and the filters [width, D], the present token's first."""
        if self.width < 1:
            raise UsageError(f"config.model.mixer.width={self.width} must be at least 1, the present token.")
        dense = functools.partial(Dense, self.embed_dim, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.value, self.gate, self.out = dense(), dense(), dense()
        self.filters = self.param(
            "filters", nn.initializers.normal(self.width**-0.5), (self.width, self.embed_dim), self.param_dtype
        )

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Ring:
        """See Mixer: the last width - 1 values."""
        return empty_ring(batch_size, self.width, self.embed_dim, self.dtype)

    def __call__(self, x: Array, tokens: Tokens, state: Ring | None = None) -> tuple[Array, Ring | None]:
        """See Mixer."""
        mixed, state = short_convolution(self.value(x), self.filters, tokens, state)
        return self.out(mixed * nn.silu(self.gate(x))), state
