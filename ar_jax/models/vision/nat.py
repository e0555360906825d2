"""The Neighborhood Attention Transformer (NAT, S193, arXiv:2204.07143)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.mixers.neighborhood import Neighborhood
from ar_jax.mixers.norms import make_norm
from ar_jax.models.vision.pyramid import Classifier, Convolution, Pyramid

# Of the official code; the channels of the two larger models have learned scales, as in CaiT.
SIZES = {
    "mini": dict(dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0),
    "tiny": dict(dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0),
    "small": dict(dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, layer_scale=1e-5),
    "base": dict(dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2.0, layer_scale=1e-5),
}
layer_norm = make_norm("layer", 1e-5, jnp.float32, jnp.float32)


class Tokenizer(nn.Module):
    """Two convolutions of stride 2 and a norm."""

    dim: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[B, H, W, 3] to [B, H / 4, W / 4, dim]."""
        return Convolution(self.dim, name="second")(Convolution(self.dim // 2, norm="none", name="first")(x))


class NatBlock(nn.Module):
    """x += s_1 attention(norm(x)); x += s_2 mlp(norm(x)).

    Attributes:
      num_heads: of attention.
      kernel_size: of its windows.
      dilation: of its windows.
      mlp_ratio: hidden width of the MLP over the width.
      layer_scale: the scales s of each channel at first; 0 has none.
    """

    num_heads: int
    kernel_size: int = 7
    dilation: int = 1
    mlp_ratio: float = 3.0
    layer_scale: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[B, H, W, C] to [B, H, W, C]."""
        channels = x.shape[-1]
        attention = Neighborhood(
            channels,
            self.num_heads,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            relative_bias=True,
            grid=x.shape[1:-1],
            name="attention",
        )
        x = x + self._scaled("attention_scale", attention.on_grid(layer_norm(name="attention_norm")(x)))
        hidden = nn.Dense(int(self.mlp_ratio * channels), name="up")(layer_norm(name="mlp_norm")(x))
        return x + self._scaled("mlp_scale", nn.Dense(channels, name="down")(nn.gelu(hidden, approximate=False)))

    def _scaled(self, name: str, x: Array) -> Array:
        if not self.layer_scale:
            return x
        start = nn.initializers.constant(self.layer_scale)
        return x * self.param(name, start, (x.shape[-1],))[None, None, None]


def nat(
    dim: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    mlp_ratio: float = 3.0,
    layer_scale: float = 0.0,
    kernel_size: int = 7,
    num_classes: int = 1000,
) -> Classifier:
    """A classifier, twice as wide from stage to stage; SIZES holds the paper's, by the names of these arguments."""
    downs = (functools.partial(Convolution, dim * 2**i) for i in range(1, len(depths)))
    blocks = tuple(
        (functools.partial(NatBlock, heads, kernel_size=kernel_size, mlp_ratio=mlp_ratio, layer_scale=layer_scale),)
        * depth
        for depth, heads in zip(depths, num_heads, strict=True)
    )
    backbone = functools.partial(Pyramid, (functools.partial(Tokenizer, dim), *downs), blocks)
    return Classifier(backbone, functools.partial(nn.Dense, num_classes), norm_mean=True)
