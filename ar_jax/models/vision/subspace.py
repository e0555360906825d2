"""ULSAM: an attention map for each group of channels (S022, arXiv:2006.15102)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError


class SubspaceAttention(nn.Module):
    """x_g (1 + softmax over places (relu(bn(w_g . maxpool(relu(bn(a_g x_g + b_g))))))) for each group g of channels.

    The softmax is one map for all channels of a group.

    Attributes:
      num_groups: of channels.
    """

    num_groups: int = 4

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[B, H, W, C] to [B, H, W, C]."""
        batch, height, width, channels = x.shape
        if channels % self.num_groups:
            raise UsageError(f"num_groups={self.num_groups} does not divide the {channels} channels; use a divisor.")
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        size = channels // self.num_groups
        scale = self.param("scale", nn.initializers.ones, (channels,))
        shift = self.param("shift", nn.initializers.zeros, (channels,))
        weight = self.param("weight", nn.initializers.lecun_normal(), (self.num_groups, size))
        bias = self.param("bias", nn.initializers.zeros, (self.num_groups,))
        hidden = nn.relu(norm(name="channel_norm")(x * scale[None, None, None] + shift[None, None, None]))
        pooled = nn.max_pool(hidden, (3, 3), padding=[(1, 1), (1, 1)])
        grouped = pooled.reshape(batch, height, width, self.num_groups, size)
        maps = jnp.einsum("bhwgc,gc->bhwg", grouped, weight) + bias[None, None, None]
        maps = nn.relu(norm(name="map_norm")(maps)).reshape(batch, height * width, self.num_groups)
        maps = jax.nn.softmax(maps, axis=1).reshape(batch, height, width, self.num_groups)
        return x * (1 + jnp.repeat(maps, size, axis=-1))
