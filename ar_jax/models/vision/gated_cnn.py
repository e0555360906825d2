"""MambaOut: gated convolutions, a Mamba block without its state space (S077, arXiv:2405.07992)."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.mixers.norms import make_norm
from ar_jax.models.vision.pyramid import Classifier, Convolution, Pyramid, depthwise

# Of the official code.
SIZES = {
    "femto": dict(dims=(48, 96, 192, 288), depths=(3, 3, 9, 3)),
    "kobe": dict(dims=(48, 96, 192, 288), depths=(3, 3, 15, 3)),
    "tiny": dict(dims=(96, 192, 384, 576), depths=(3, 3, 9, 3)),
    "small": dict(dims=(96, 192, 384, 576), depths=(3, 4, 27, 3)),
    "base": dict(dims=(128, 256, 512, 768), depths=(3, 4, 27, 3)),
}
gelu = functools.partial(nn.gelu, approximate=False)
layer_norm = make_norm("layer", 1e-6, jnp.float32, jnp.float32)


class GatedCnnBlock(nn.Module):
    """x + W_o (gelu(g) * [i, conv(c)]) with [g, i, c] = W norm(x); only the channels c are mixed over places.

    Attributes:
      expansion_ratio: hidden width over the width.
      conv_ratio: channels that are convolved, over the width.
      kernel_size: of their convolution, both axes.
    """

    expansion_ratio: float = 8 / 3
    conv_ratio: float = 1.0
    kernel_size: int = 7

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[B, H, W, C] to [B, H, W, C]."""
        dim = x.shape[-1]
        hidden, mixed = int(self.expansion_ratio * dim), int(self.conv_ratio * dim)
        wide = nn.Dense(2 * hidden, name="up")(layer_norm(name="norm")(x))
        gate, plain, conv = jnp.split(wide, [hidden, 2 * hidden - mixed], axis=-1)
        conv = depthwise(mixed, self.kernel_size, name="conv")(conv)
        return x + nn.Dense(dim, name="down")(gelu(gate) * jnp.concatenate([plain, conv], axis=-1))


class Stem(nn.Module):
    """norm(conv(gelu(norm(conv(x))))), each convolution halving the grid."""

    channels: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[B, H, W, 3] to [B, H / 4, W / 4, channels]."""
        half = Convolution(self.channels // 2, name="first")(x)
        return Convolution(self.channels, name="second")(gelu(half))


class MlpHead(nn.Module):
    """W_2 norm(gelu(W_1 x))."""

    num_classes: int
    mlp_ratio: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, C] to [B, classes]."""
        hidden = gelu(nn.Dense(self.mlp_ratio * x.shape[-1], name="up")(x))
        return nn.Dense(self.num_classes, name="down")(layer_norm(name="norm")(hidden))


def mamba_out(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    num_classes: int = 1000,
    conv_ratio: float = 1.0,
    kernel_size: int = 7,
) -> Classifier:
    """A classifier of gated convolutions; SIZES holds the paper's, by the names of these arguments."""
    patches: tuple[Any, ...] = (
        functools.partial(Stem, dims[0]),
        *(functools.partial(Convolution, dim) for dim in dims[1:]),
    )
    block = functools.partial(GatedCnnBlock, conv_ratio=conv_ratio, kernel_size=kernel_size)
    blocks = tuple((block,) * depth for depth in depths)
    return Classifier(
        functools.partial(Pyramid, patches, blocks), functools.partial(MlpHead, num_classes), norm_mean=True
    )
