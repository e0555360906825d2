"""RMS norm of what a memory gave, with a gate before or behind it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class GatedNorm(nn.Module):
    """scale * rms(x silu(gate)), or scale * rms(x) * silu(gate), over each of `num_groups` parts of the channels.

    Attributes:
      num_groups: parts, each normalised by itself.
      norm_first: the gate comes behind the norm.
      epsilon: added to the mean square.
    """

    num_groups: int = 1
    norm_first: bool = False
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, gate: Array) -> Array:
        """x and gate [B, T, C] to [B, T, C]; the arithmetic is float32."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        opened = nn.silu(gate.astype(jnp.float32))
        wide = x.astype(jnp.float32)
        wide = wide if self.norm_first else wide * opened
        parts = wide.reshape(*x.shape[:-1], self.num_groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.square(parts).mean(axis=-1, keepdims=True) + self.epsilon)
        normed = parts.reshape(x.shape) * scale.astype(jnp.float32)[None, None]
        return (normed * opened if self.norm_first else normed).astype(self.dtype)
