"""The gate in place of a residual's sum that makes deep memories trainable by reward (GTrXL, arXiv:1910.06764)."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.kernels.dense import Dense

OPENING = 2.0  # at first the gate is nearly shut: sigmoid(-2) of what is new


class GRUGate(nn.Module):
    """(1 - z) x + z tanh(W_h y + U_h (r x)),   r = sigmoid(W_r y + U_r x),   z = sigmoid(W_z y + U_z x - b)."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        """x and what a layer made of it, y, both [B, T, D], to [B, T, D]."""
        width = x.shape[-1]
        start = nn.initializers.orthogonal(math.sqrt(2))
        dense = functools.partial(
            Dense, width, use_bias=False, kernel_init=start, dtype=self.dtype, param_dtype=self.param_dtype
        )
        offset = self.param("offset", nn.initializers.constant(OPENING), (width,), self.param_dtype)
        reset = nn.sigmoid(dense(name="reset_new")(y) + dense(name="reset_old")(x))
        update = dense(name="update_new")(y) + dense(name="update_old")(x) - offset.astype(self.dtype)[None, None]
        new = nn.tanh(dense(name="new")(y) + dense(name="old")(reset * x))
        share = nn.sigmoid(update)
        return (1 - share) * x + share * new
