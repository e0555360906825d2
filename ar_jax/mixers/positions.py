"""Positions inside attention: rotations (RoPE) and learned relative biases, on any number of axes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array


def rotate(x: Array, position: Array, base: float, erase_placeless: bool = False) -> Array:
    """Rotary position embedding on D axes (RoFormer, arXiv:2104.09864): channel pairs turn by an angle per position.

    The pairs (0, 1), (2, 3), ... are dealt to the axes in equal parts; pair j of an axis with P pairs turns by
    position * base^(-j / P). A token without a place (-1) is not turned.

    Args:
      x: [B, T, N, H] with H even.
      position: [B or 1, T, D] int32.
      base: the ratio of the slowest to the fastest wavelength, roughly.
      erase_placeless: a token without a place becomes zero instead.
    """
    num_axes, pairs = position.shape[-1], x.shape[-1] // 2
    counts = [pairs // num_axes + (axis < pairs % num_axes) for axis in range(num_axes)]
    axis = np.repeat(np.arange(num_axes), counts)
    speed = np.concatenate([base ** (-np.arange(count) / max(count, 1)) for count in counts]).astype(np.float32)
    angle = jnp.maximum(position, 0).astype(jnp.float32)[:, :, axis] * speed[None, None]  # [B, T, pairs]
    cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    if erase_placeless:
        placed = (position >= 0).all(axis=-1)[:, :, None, None]
        cos, sin = cos * placed, sin * placed
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


class RelativeBias(nn.Module):
    """A learned bias per head for each distance along each axis, summed over the axes (T5, arXiv:1910.10683).

    Distances beyond max_distance share its bias; a pair with a token that has no place gets a bias of its own.
    """

    num_heads: int
    max_distance: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, query_position: Array, key_position: Array) -> Array:
        """[B or 1, T, D] and [B or 1, S, D] to [B or 1, N, T, S]."""
        num_axes, reach = query_position.shape[-1], self.max_distance
        table = self.param(
            "table", nn.initializers.normal(0.02), (num_axes, 2 * reach + 2, self.num_heads), self.param_dtype
        )
        distance = query_position[:, :, None, :] - key_position[:, None, :, :]
        placed = (query_position[:, :, None, :] >= 0) & (key_position[:, None, :, :] >= 0)
        index = jnp.where(placed, jnp.clip(distance, -reach, reach) + reach, 2 * reach + 1)  # [B, T, S, D]
        return jnp.moveaxis(sum(table[axis][index[..., axis]] for axis in range(num_axes)), -1, 1)
