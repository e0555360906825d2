"""A transformer of axial attention and convolutions on whole images, as in axial-attention (cf. arXiv:1912.12180)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.mixers.axial import along
from ar_jax.mixers.neighborhood import Neighborhood
from ar_jax.mixers.norms import make_norm


class ChannelConvMLP(nn.Module):
    """conv_3x3(leaky_relu(conv_3x3((x - mean) / (std + epsilon) * scale + shift))), moments over the channels."""

    mlp_ratio: int = 4
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] to [B, H, W, C]."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))[None, None, None]
        shift = self.param("shift", nn.initializers.zeros, (channels,))[None, None, None]
        mean, std = x.mean(axis=-1, keepdims=True), x.std(axis=-1, keepdims=True)
        x = (x - mean) / (std + self.epsilon) * scale + shift
        hidden = nn.leaky_relu(nn.Conv(self.mlp_ratio * channels, (3, 3), name="up")(x), 0.01)
        return nn.Conv(channels, (3, 3), name="down")(hidden)


class AxialImageTransformer(nn.Module):
    """Per layer: attention along columns, then along rows, then two convolutional MLPs, each a residual of x.

    Attributes:
      num_layers: how often.
      num_heads: of attention.
      head_dim: C / num_heads if None.
      reversible: the residuals of two streams that both begin as x, each added to one stream and read from the other, so
        that activations could be computed backwards (arXiv:1707.04585); the output is the mean of the streams.
    """

    num_layers: int
    num_heads: int = 8
    head_dim: int | None = None
    reversible: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, *grid, C] to [B, *grid, C], on grids of two axes."""
        grid, channels, small = x.shape[1:-1], x.shape[-1], nn.initializers.normal(0.02)
        for axis, size in enumerate(grid):
            shape = tuple(size if other == axis else 1 for other in range(len(grid)))
            x = x + self.param(f"position_{axis}", small, (1, *shape, channels))
        streams = [x, x]
        for layer in range(self.num_layers):
            halves: list[Any] = [self._line(f"layer_{layer}_{half}", half, grid, channels) for half in range(2)]
            mlps: list[Any] = [ChannelConvMLP(name=f"layer_{layer}_{half}_mlp") for half in range(2)]
            for part in (halves, mlps):
                for half, residual in enumerate(part):
                    if self.reversible:
                        streams[half] = streams[half] + residual(streams[1 - half])
                    else:
                        streams[0] = streams[0] + residual(streams[0])
        return (streams[0] + streams[1]) / 2 if self.reversible else streams[0]

    def _line(self, name: str, axis: int, grid: tuple[int, ...], channels: int) -> Callable[[Array], Array]:
        """Attention along an axis, behind a norm."""
        norm = make_norm("layer", 1e-5, jnp.float32, jnp.float32)(name=f"{name}_norm")
        line = functools.partial(Neighborhood, channels, self.num_heads, self.head_dim, along(axis, len(grid)))
        attention = line(qkv_bias=False, grid=grid, name=f"{name}_line")
        return lambda x: attention.on_grid(norm(x))
