"""Large kernel attention and the Visual Attention Network (S122, arXiv:2202.09741)."""

from __future__ import annotations

import functools

from flax import linen as nn
from jax import Array

from ar_jax.models.vision.pyramid import Classifier, Convolution, Pyramid, depthwise

# Of the official code, there called tiny, small, base and large.
SIZES = {
    "b0": dict(embed_dims=(32, 64, 160, 256), depths=(3, 3, 5, 2)),
    "b1": dict(embed_dims=(64, 128, 320, 512), depths=(2, 2, 4, 2)),
    "b2": dict(embed_dims=(64, 128, 320, 512), depths=(3, 3, 12, 3)),
    "b3": dict(embed_dims=(64, 128, 320, 512), depths=(3, 5, 27, 3)),
}
gelu = functools.partial(nn.gelu, approximate=False)


class LargeKernel(nn.Module):
    """LKA(x) = x * W conv_7x7, dilated 3 (conv_5x5 (x)): a kernel of 21 x 21 in three cheap parts, as a gate of x."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] to [B, H, W, C]."""
        channels = x.shape[-1]
        near = depthwise(channels, 5, name="near")(x)
        far = depthwise(channels, 7, dilation=3, name="far")(near)
        return x * nn.Dense(channels, name="point")(far)


class LargeKernelAttention(nn.Module):
    """x + W_2 LKA(gelu(W_1 x))."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] to [B, H, W, C]."""
        channels = x.shape[-1]
        gated = LargeKernel(name="gate")(gelu(nn.Dense(channels, name="up")(x)))
        return x + nn.Dense(channels, name="down")(gated)


class ConvMLP(nn.Module):
    """W_2 gelu(conv_3x3(W_1 x)), the convolution of each channel for itself."""

    hidden_dim: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] to [B, H, W, C]."""
        hidden = depthwise(self.hidden_dim, 3, name="conv")(nn.Dense(self.hidden_dim, name="up")(x))
        return nn.Dense(x.shape[-1], name="down")(gelu(hidden))


class VanBlock(nn.Module):
    """x += s_1 attention(norm(x)); x += s_2 mlp(norm(x)), with batch norms and learned scales s of each channel.

    Attributes:
      mlp_ratio: hidden width of the MLP over the width.
    """

    mlp_ratio: float = 4.0

    def setup(self) -> None:
        """The parts that keep their width."""
        self.attention = LargeKernelAttention()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[B, H, W, C] to [B, H, W, C]."""
        channels, small = x.shape[-1], nn.initializers.constant(0.01)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        scales = [self.param(f"scale_{i}", small, (channels,)).astype(x.dtype)[None, None, None] for i in (1, 2)]
        x = x + scales[0] * self.attention(norm(name="attention_norm")(x))
        mlp = ConvMLP(int(self.mlp_ratio * channels), name="mlp")
        return x + scales[1] * mlp(norm(name="mlp_norm")(x))


def van(
    embed_dims: tuple[int, ...],
    depths: tuple[int, ...],
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
    num_classes: int = 1000,
) -> Classifier:
    """A classifier of large kernels; SIZES holds the paper's, by the names of these arguments."""
    sizes = [(7, 4)] + [(3, 2)] * (len(embed_dims) - 1)
    patches = tuple(
        functools.partial(Convolution, dim, kernel, stride, "batch")
        for dim, (kernel, stride) in zip(embed_dims, sizes, strict=True)
    )
    blocks = tuple(
        (functools.partial(VanBlock, ratio),) * depth for ratio, depth in zip(mlp_ratios, depths, strict=True)
    )
    return Classifier(
        functools.partial(Pyramid, patches, blocks, norm_stages=True), functools.partial(nn.Dense, num_classes)
    )
