"""What recurrent mixers do to the vectors of each head: keys of length one, and the norm of what was read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError


def head_width(embed_dim: int, num_heads: int, head_dim: int | None) -> int:
    """head_dim, or what dividing embed_dim among the heads gives.

    Raises:
      UsageError: there are no heads, or they do not divide it.
    """
    if num_heads < 1 or (head_dim is None and embed_dim % num_heads):
        raise UsageError(
            f"num_heads={num_heads} does not divide embed_dim={embed_dim}; set head_dim or another num_heads."
        )
    return head_dim or embed_dim // num_heads


def unit(x: Array, epsilon: float = 1e-6) -> Array:
    """x [..., H] over its length, in float32; epsilon is added to the length's square."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + epsilon)


class HeadNorm(nn.Module):
    """Layer norm of each head, with a scale and a bias for each of its channels: a group norm of single tokens.

    Attributes:
      epsilon: added to the variance.
    """

    epsilon: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, N, H] to [B, T, N, H]; the arithmetic is float32."""
        scale = self.param("scale", nn.initializers.ones, x.shape[2:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[2:], self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)[None, None] + bias.astype(jnp.float32)[None, None]).astype(self.dtype)
