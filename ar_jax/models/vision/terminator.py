"""Terminator: hyper-kernels gated by the image they convolve, and no residuals (S043, arXiv:2401.17948)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.mixers.common.hyper_kernel import HyperKernel, line_coordinates
from ar_jax.mixers.hyper_zzw import RecursiveGatedUnit, gelu, standardize
from ar_jax.models.dropout import Dropout

IMAGE, BATCH = (1, 2), (0, 1, 2)  # what a channel is standardised over
GROUPS = 12  # of the official code
he_normal = nn.initializers.he_normal()


class HyperInteraction(nn.Module):
    """Scores from hyper-kernels that are multiplied twice by a mean: w_c m_c^2 of channels, and with `places` w_s m_s^2 of places.

    Attributes:
      channels: of the image.
      grid: its sides.
      places: scores are the product of both; otherwise those of channels.
      hidden_dim: of the slow nets; see HyperKernel.
      num_layers: likewise.
    """

    channels: int
    grid: tuple[int, int]
    places: bool = False
    hidden_dim: int = 16
    num_layers: int = 1

    @nn.compact
    def __call__(self, read: Array, x: Array) -> Array:
        """x [B, H, W, C] times the sigmoid of the scores of `read`, [B, H, W, C]."""
        net = functools.partial(HyperKernel, 1, hidden_dim=self.hidden_dim, num_layers=self.num_layers)
        index = jnp.arange(self.channels)
        own = net(self.channels, name="channel_kernel")(line_coordinates(index, self.channels), index)[:, 0]
        score = own[None, None, None] * jnp.square(read.mean(axis=IMAGE, keepdims=True))
        if self.places:
            coordinates, index = _grid_coordinates(self.grid)
            kernel = net(index.size, num_axes=2, name="place_kernel")(coordinates, index).reshape(1, *self.grid, 1)
            score = score * kernel * jnp.square(read.mean(axis=-1, keepdims=True))
        return x * nn.sigmoid(score)


class LocalHyperZZW(nn.Module):
    """gelu(norm(W (k * x))) + b, k a hyper-kernel for each channel, whose context is what each of its taps sees of an image.

    Attributes:
      kernel_size: odd.
      batch_kernels: one kernel for the batch, of the mean context, as published: then an example's answer depends on the
        others. Otherwise each example has its own.
      hidden_dim: see HyperKernel.
      num_layers: likewise.
    """

    kernel_size: int
    batch_kernels: bool = False
    hidden_dim: int = 16
    num_layers: int = 1

    @nn.compact
    def __call__(self, context: Array, x: Array) -> Array:
        """[B, H, W, C] of both."""
        batch, height, width, channels = x.shape
        size, coordinates, index = self.kernel_size, *_grid_coordinates((self.kernel_size,) * 2)
        rows, columns = (jnp.asarray(_pooling(n, size)) for n in (height, width))
        seen = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, context).reshape(batch, size**2, channels)
        if self.batch_kernels:
            seen = seen.mean(axis=0, keepdims=True)
        net = HyperKernel(channels, size**2, 2, self.hidden_dim, self.num_layers, context=True, name="kernel")
        kernels = jnp.broadcast_to(net(coordinates, index, seen), (batch, size**2, channels))
        read = _convolved(x, kernels.reshape(batch, size, size, channels))
        mixed = nn.Dense(channels, kernel_init=he_normal, name="mix")(read)
        return gelu(standardize(mixed, BATCH)) + self.param("shift", nn.initializers.zeros, (1,))[None, None, None]


class SlowFastBlock(nn.Module):
    """Gelu of the bottleneck of many branches of one image, all of its size; nothing is added to the image itself.

    With K = W * x, W a hyper-kernel as large as the image, global branches are matrix products y_i = K v_i over the image
    of each channel, as the official code has them: K's row of a place meets v's column of it.

    Attributes:
      factor: channels of the output over those of the input.
      kernel_sizes: of four local branches.
      groups: of channels that are standardised over the batch and over the image in turns (G-IBS).
      batch_kernels: see LocalHyperZZW.
      dropout_rate: of the output.
      hidden_dim: of all slow nets; see HyperKernel.
      num_layers: likewise.
    """

    factor: int = 1
    kernel_sizes: Sequence[int] = (3, 5, 7, 9)
    groups: int = GROUPS
    batch_kernels: bool = False
    dropout_rate: float = 0.0
    hidden_dim: int = 16
    num_layers: int = 1

    @nn.compact
    def __call__(self, x: Array, before: Sequence[Array] = (), train: bool = False) -> tuple[Array, Array]:
        """x [B, N, N, C] to [B, N, N, factor C], and W, [N, N, C].

        Args:
          x: the block's input.
          before: outputs of earlier blocks that the bottleneck reads, too, repeated to C channels.
          train: with dropout.
        """
        channels, grid = x.shape[-1], (x.shape[1], x.shape[2])
        wide = channels * self.factor
        if grid[0] != grid[1]:
            raise UsageError(
                f"Terminator multiplies images as matrices, so they must be square, not {grid[0]}x{grid[1]}."
            )
        if wide % self.groups or any(channels % a.shape[-1] for a in before):
            raise UsageError(
                f"groups={self.groups} must divide the {wide} channels of a block, and each width the next."
            )
        slow: dict[str, Any] = {"hidden_dim": self.hidden_dim, "num_layers": self.num_layers}
        coordinates, index = _grid_coordinates(grid)
        kernel = HyperKernel(channels, index.size, 2, name="kernel", **slow)(coordinates, index).reshape(
            *grid, channels
        )
        weighted = kernel[None] * x
        unit = functools.partial(RecursiveGatedUnit, channels, axes=IMAGE, grid=grid)
        fast = standardize(unit(name="kernel_unit")(weighted) + unit(name="unit")(x), IMAGE)
        mixed = standardize(nn.Dense(channels, kernel_init=he_normal, name="mix")(x), IMAGE)
        noticed = HyperInteraction(channels, grid, name="channel_interaction", **slow)(x, x)
        noticed = standardize(noticed, IMAGE)
        far, far_mixed, far_noticed = (jnp.einsum("bikc,bkjc->bijc", weighted, v) for v in (fast, mixed, noticed))
        both = HyperInteraction(channels, grid, places=True, name="interaction", **slow)(far, x)
        pairs = ((x, noticed), (noticed, x), (mixed, x), (x, mixed))
        near = [
            LocalHyperZZW(size, self.batch_kernels, name=f"local_{i}", **slow)(*pair)
            for i, (size, pair) in enumerate(zip(self.kernel_sizes, pairs, strict=True))
        ]
        earlier = [jnp.tile(a, (1, 1, 1, channels // a.shape[-1])) for a in before]
        branches = [far, far_mixed, far_noticed, nn.sigmoid(far) * far, fast, both, *near, *earlier]
        out = nn.Dense(wide, kernel_init=he_normal, name="bottleneck")(jnp.concatenate(branches, axis=-1))
        parts = jnp.split(out, self.groups, axis=-1)
        out = jnp.concatenate([standardize(a, IMAGE if i % 2 else BATCH) for i, a in enumerate(parts)], axis=-1)
        out = gelu(out) + self.param("shift", nn.initializers.zeros, (1,))[None, None, None]
        return Dropout(self.dropout_rate)(out, deterministic=not train), kernel


class Terminator(nn.Module):
    """A classifier of images: blocks behind one another, the mean over places, a linear layer.

    Attributes:
      num_classes: of the answers.
      factors: what each block multiplies the channels by.
      reads_before: which earlier blocks' outputs each block's bottleneck reads, too.
      kernel_sizes: see SlowFastBlock, as the others.
    """

    num_classes: int
    factors: Sequence[int] = (4, 2, 2, 1, 1)
    reads_before: Sequence[Sequence[int]] = ((), (), (0,), (1,), (2, 1))
    kernel_sizes: Sequence[int] = (3, 5, 7, 9)
    groups: int = GROUPS
    batch_kernels: bool = False
    dropout_rate: float = 0.0
    hidden_dim: int = 16
    num_layers: int = 1

    @nn.compact
    def __call__(self, image: Array, train: bool = False) -> tuple[Array, Array]:
        """Square images [B, N, N, C] to logits [B, classes], and the slow neural loss [], see `slow_neural_loss`."""
        x = image
        outputs: list[Array] = []
        kernels: list[Array] = []
        shared = (
            self.kernel_sizes,
            self.groups,
            self.batch_kernels,
            self.dropout_rate,
            self.hidden_dim,
            self.num_layers,
        )
        for i, (factor, before) in enumerate(zip(self.factors, self.reads_before, strict=True)):
            block = SlowFastBlock(factor, *shared, name=f"block_{i}")
            x, kernel = block(x, [outputs[j] for j in before], train)
            outputs.append(x)
            kernels.append(kernel)
        logits = nn.Dense(self.num_classes, kernel_init=he_normal, name="head")(x.mean(axis=IMAGE))
        return logits, slow_neural_loss(kernels)


def slow_neural_loss(kernels: Sequence[Array]) -> Array:
    """The local feedback error of the slow nets: squared distance of the global kernels of every two blocks, [].

    Args:
      kernels: [N, N, C] of each block; a narrow one is repeated to the width of the other, as its output is.
    """
    total = jnp.zeros(())
    for i, deep in enumerate(kernels):
        for shallow in kernels[:i]:
            total += jnp.square(jnp.tile(shallow, (1, 1, deep.shape[-1] // shallow.shape[-1])) - deep).mean()
    return total


def _convolved(x: Array, kernels: Array) -> Array:
    """Images [B, H, W, C] with a kernel [B, k, k, C] for each channel of each example, zeros around: [B, H, W, C]."""
    size, (_, height, width, _) = kernels.shape[1], x.shape
    around = jnp.pad(x, ((0, 0), ((size - 1) // 2,) * 2, ((size - 1) // 2,) * 2, (0, 0)))

    @jax.checkpoint
    def row(total: Array, i: Array) -> tuple[Array, None]:
        rows = jax.lax.dynamic_slice_in_dim(around, i, height, axis=1)
        taps = jax.lax.dynamic_index_in_dim(kernels, i, axis=1, keepdims=True)
        return total + sum(rows[:, :, j : j + width] * taps[:, :, j : j + 1] for j in range(size)), None

    return jax.lax.scan(row, jnp.zeros_like(x), jnp.arange(size))[0]


def _grid_coordinates(grid: tuple[int, ...]) -> tuple[Array, Array]:
    """The places of a grid from -1 to 1 along each axis, [places, axes], and their numbers."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in grid]
    coordinates = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(grid))
    return jnp.asarray(coordinates), jnp.arange(math.prod(grid))


def _pooling(length: int, parts: int) -> np.ndarray:
    """[parts, length]: each part's mean, the parts as equal as they can be, and overlapping where they must."""
    part, place = np.arange(parts)[:, None], np.arange(length)[None]
    inside = (place >= part * length // parts) & (place < -(-(part + 1) * length // parts))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)
