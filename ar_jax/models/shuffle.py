"""Token-shuffle: a window of tokens becomes one along the channels, and is one in the backbone (arXiv:2504.17789)."""

from __future__ import annotations

from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.models.blocks import MLP, BlockOptions


class MLPBlocks(nn.Module):
    """x += mlp(norm(x)), several times."""

    num_blocks: int
    options: BlockOptions

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, D] to [B, T, D]."""
        norm = self.options.make_norm()
        for i in range(self.num_blocks):
            x = x + MLP(self.options, name=f"mlp_{i}")(norm(name=f"norm_{i}")(x))
        return x


class Shuffle(nn.Module):
    """W_1 x_1 ++ ... ++ W_1 x_R, each of D / R channels, and MLPs behind it: R tokens as one of D channels (sec. 3.2)."""

    num_blocks: int
    options: BlockOptions

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, R, D] to [B, T, D]."""
        width = part_width(x.shape[3], x.shape[2])
        parts = Dense(width, use_bias=False, name="compress", **self.options.types)(x)
        return MLPBlocks(self.num_blocks, self.options, name="blocks")(parts.reshape(*x.shape[:2], -1))


class Unshuffle(nn.Module):
    """The way back: MLPs, then each of R parts of D / R channels widened to D."""

    count: int
    num_blocks: int
    options: BlockOptions

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, D] to R outputs side by side, [B, T, R D]."""
        batch, length, embed_dim = x.shape
        width = part_width(embed_dim, self.count)
        x = MLPBlocks(self.num_blocks, self.options, name="blocks")(x).reshape(batch, length, self.count, width)
        return Dense(embed_dim, use_bias=False, name="expand", **self.options.types)(x).reshape(batch, length, -1)


def part_width(embed_dim: int, count: int) -> int:
    """The channels of each of so many tokens in one.

    Raises:
      UsageError: they do not come out even.
    """
    if embed_dim % count:
        raise UsageError(
            f"config.model.merge='shuffle' shares embed_dim={embed_dim} between {count} tokens; choose a multiple of {count}."
        )
    return embed_dim // count
