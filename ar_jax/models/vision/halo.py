"""Blocked local attention with halos (HaloNet, S040, arXiv:2103.12731)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.step_attention import step_attention

PADDINGS = ("masked", "read", "inverted")


class HaloAttention(nn.Module):
    """o_i = sum_j softmax_j(q_i . (k_j / sqrt(H) + r_{j-i})) v_j over the block of i and a halo around it.

    r is a sum of two learned tables, one for each axis.

    Attributes:
      block_size: places of a block, both axes.
      halo_size: places around it.
      num_heads: of attention.
      head_dim: of queries and keys.
      out_dim: channels of the output; None takes those of the input.
      stride: only every so-manieth place asks, and the output's grid is as much coarser.
      pool: with a stride, all places ask, and the output is the mean of 2 x 2 of them.
      scale_positions: r is divided by sqrt(H), too.
      project: the values, head_dim wide, are projected to out_dim with a bias; otherwise the heads are the output.
      qkv_bias: the projections of queries, keys and values have biases; keys outside of the image have none.
      padding: what lies outside of the image is "masked"; or "read", as keys of zeros, as in timm; or "inverted": all but
        it is masked, as in halonet-pytorch.
    """

    block_size: int
    halo_size: int
    num_heads: int = 8
    head_dim: int = 64
    out_dim: int | None = None
    stride: int = 1
    pool: bool = False
    scale_positions: bool = True
    project: bool = True
    padding: str = "masked"
    qkv_bias: bool = False

    @property
    def window(self) -> int:
        """Places that a block reads, along each axis."""
        return self.block_size + 2 * self.halo_size

    @property
    def query_stride(self) -> int:
        """Every so-manieth place asks."""
        return 1 if self.pool or self.block_size % self.stride else self.stride

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[B, H, W, C] to [B, H / stride, W / stride, out_dim].

        Raises:
          UsageError: a grid that blocks do not fill.
        """
        height, width, channels = x.shape[1:]
        choose(dict.fromkeys(PADDINGS), self.padding, "padding")
        if height % self.block_size or width % self.block_size:
            raise UsageError(
                f"block_size={self.block_size} does not divide the grid of {height} x {width}; use a divisor of both."
            )
        out_dim, step = self.out_dim or channels, self.query_stride
        value_dim = self.head_dim if self.project else out_dim // self.num_heads
        dense = functools.partial(nn.Dense, use_bias=self.qkv_bias)
        q = dense(self.num_heads * self.head_dim, name="query")(x[:, ::step, ::step])
        q = self._blocks(q)
        k = self._windows(dense(self.num_heads * self.head_dim, name="key")(x))
        v = self._windows(dense(self.num_heads * value_dim, name="value")(x))
        out = self._attend(q, k, v, (height, width))
        out = self._unblock(out, (height // step, width // step))
        if self.project:
            out = nn.Dense(out_dim, name="out")(out)
        return nn.avg_pool(out, (2, 2), (2, 2)) if self.stride > step else out

    def _attend(self, q: Array, k: Array, v: Array, grid: tuple[int, int]) -> Array:
        """q [B blocks, t, N, H], k and v [B blocks, s, N, .] to [B blocks, t, N, .]."""
        scale = self.head_dim**-0.5
        bias = self._positions(q * scale if self.scale_positions else q)
        real = self._windows(jnp.ones((1, *grid, self.num_heads)))[..., 0, 0] > 0  # [blocks, s]
        real = jnp.tile(real, (len(q) // len(real), 1))
        if self.padding == "inverted":
            read = ~real | real.all(axis=1, keepdims=True)
            same = real.all(axis=1)  # a block that is masked as a whole reads evenly
            k = jnp.where(same[:, None, None, None], 0, k)
            bias = jnp.where(same[:, None, None, None], 0, bias)
        else:
            read = real if self.padding == "masked" else jnp.ones_like(real)
        asked = jnp.zeros((1, q.shape[1]), jnp.int32)
        return step_attention(q, k, v, asked, jnp.where(read, 0, 1), bias=bias, scale=scale)

    def _positions(self, q: Array) -> Array:
        """q_i . r_{j-i}, [B blocks, N, t, s]."""
        side, window = self.block_size // self.query_stride, self.window
        small = nn.initializers.normal(self.head_dim**-0.5)
        row, column = (self.param(n, small, (2 * window - 1, self.head_dim)) for n in ("rows", "columns"))
        away = np.arange(window)[None] - np.arange(side)[:, None] + window - 1  # [side, window]
        q = q.reshape(-1, side, side, self.num_heads, self.head_dim)
        along_rows = jnp.einsum("byxnh,yvh->bnyxv", q, row[away])
        along_columns = jnp.einsum("byxnh,xuh->bnyxu", q, column[away])
        both = along_rows[..., :, None] + along_columns[..., None, :]
        return both.reshape(len(q), self.num_heads, side * side, window * window)

    def _blocks(self, x: Array) -> Array:
        """[B, H, W, N H] to [B blocks, places, N, H]."""
        side = self.block_size // self.query_stride
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height // side, side, width // side, side, self.num_heads, -1)
        return jnp.swapaxes(x, 2, 3).reshape(-1, side * side, self.num_heads, x.shape[-1])

    def _unblock(self, x: Array, grid: tuple[int, int]) -> Array:
        """Undoes _blocks."""
        side = self.block_size // self.query_stride
        x = x.reshape(-1, grid[0] // side, grid[1] // side, side, side, x.shape[-2] * x.shape[-1])
        return jnp.swapaxes(x, 2, 3).reshape(-1, *grid, x.shape[-1])

    def _windows(self, x: Array) -> Array:
        """[B, H, W, N H] to [B blocks, places, N, H], with zeros outside."""
        halo, window = self.halo_size, self.window
        x = jnp.pad(x, ((0, 0), (halo, halo), (halo, halo), (0, 0)))
        for axis in (1, 3):
            starts = np.arange(0, x.shape[axis] - 2 * halo, self.block_size)
            x = jnp.take(x, starts[:, None] + np.arange(window)[None], axis=axis)  # [B, blocks, window, ...]
        x = jnp.swapaxes(x, 2, 3)  # [B, rows of blocks, columns of blocks, window, window, N H]
        return x.reshape(-1, window * window, self.num_heads, x.shape[-1] // self.num_heads)
