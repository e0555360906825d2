"""Dropout from a byte per element."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class Dropout(nn.Module):
    """Zeroes elements with probability `rate`, rounded to a multiple of 1/256, and scales the others so that the mean stays.

    Linen's own draws 32 random bits an element, which on CPUs is a sixth of a small model's training step.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """x of any shape; needs the rng "dropout" unless deterministic or the rate is 0."""
        dropped = round(self.rate * 256)
        if deterministic or dropped == 0:
            return x
        words = jax.random.bits(self.make_rng("dropout"), (-(-x.size // 4),), jnp.uint32)
        draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
        return jnp.where(draws >= dropped, x * (256 / (256 - dropped)), 0)
