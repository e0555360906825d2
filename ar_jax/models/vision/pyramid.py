"""The pyramid that vision backbones share: stages of blocks on ever coarser grids, and a head on their mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax import Array

from ar_jax.mixers.norms import make_norm

Make = Callable[[], Any]  # of a module (x [B, H, W, C], train) -> [B, H', W', C']


class Pyramid(nn.Module):
    """Each stage makes the grid coarser, then applies its blocks, then a norm.

    Attributes:
      patches: makes what begins each stage.
      blocks: makes the blocks of each stage.
      norm_stages: each stage ends with a LayerNorm.
    """

    patches: tuple[Make, ...]
    blocks: tuple[tuple[Make, ...], ...]
    norm_stages: bool = False

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> list[Array]:
        """Images [B, H, W, 3] to the features of every stage, [B, h, w, C] each.

        Args:
          image: in [-1, 1], or as the model was trained.
          train: batch norms take the batch's own moments and keep their mean ("batch_stats").
        """
        x, features = image, []
        for i, (patch, blocks) in enumerate(zip(self.patches, self.blocks, strict=True)):
            x = patch(name=f"patch_{i}")(x, train)  # type: ignore[call-arg]
            for j, block in enumerate(blocks):
                x = block(name=f"block_{i}_{j}")(x, train)  # type: ignore[call-arg]
            if self.norm_stages:
                x = make_norm("layer", 1e-6, x.dtype, x.dtype)(name=f"norm_{i}")(x)
            features.append(x)
        return features


class Classifier(nn.Module):
    """A pyramid, the mean over the places of its last stage, and a head.

    Attributes:
      make_backbone: makes a Pyramid.
      make_head: makes a module [B, C] -> [B, classes].
      norm_mean: a LayerNorm follows the mean.
    """

    make_backbone: Make
    make_head: Make
    norm_mean: bool = False

    def setup(self) -> None:
        """The parts."""
        self.backbone, self.head = self.make_backbone(), self.make_head()
        if self.norm_mean:
            self.norm = make_norm("layer", 1e-6, None, "float32")()

    def features(self, image: Array, train: bool = False) -> Array:
        """Images [B, H, W, 3] to [B, C]."""
        x = self.backbone(image, train)[-1].mean(axis=(1, 2))
        return self.norm(x) if self.norm_mean else x

    def __call__(self, image: Array, train: bool = False) -> Array:
        """Images [B, H, W, 3] to logits [B, classes]."""
        return self.head(self.features(image, train))


class Convolution(nn.Module):
    """A convolution with padding on both sides, followed by a norm.

    Attributes:
      channels: of the output.
      kernel_size: of both axes.
      stride: of both axes.
      norm: "batch", "layer" or "none".
    """

    channels: int
    kernel_size: int = 3
    stride: int = 2
    norm: str = "layer"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[B, H, W, C] to [B, H / stride, W / stride, channels]."""
        half = self.kernel_size // 2
        size, stride, padding = (self.kernel_size,) * 2, (self.stride,) * 2, [(half, half)] * 2
        x = nn.Conv(self.channels, size, stride, padding, name="conv")(x)
        if self.norm == "batch":
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return x if self.norm == "none" else make_norm("layer", 1e-6, x.dtype, x.dtype)(name="norm")(x)


def depthwise(channels: int, kernel_size: int, dilation: int = 1, name: str | None = None) -> nn.Conv:
    """A convolution of each channel for itself that keeps the grid."""
    reach = dilation * (kernel_size // 2)
    return nn.Conv(
        channels,
        (kernel_size,) * 2,
        padding=[(reach, reach)] * 2,
        kernel_dilation=(dilation,) * 2,
        feature_group_count=channels,
        name=name,
    )
