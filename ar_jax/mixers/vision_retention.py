"""Vision retention: retention along the tokens, or over the rows and columns of the grid that they fill (S080)."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.grid_retention import Columns, empty_columns, grid_retention
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.mixers.common.memory import FORGOTTEN
from ar_jax.mixers.linear import fixed_log_decay
from ar_jax.mixers.norms import make_norm
from ar_jax.mixers.protocol import Tokens, in_time_order, merge_heads, split_heads


@struct.dataclass
class Retained:
    """What is remembered in two dimensions.

    Attributes:
      columns: a memory for each column.
      count: [B] int32, how many tokens have come.
    """

    columns: Columns
    count: Array


class VisionRetention(nn.Module):
    """o_t = sum_s g^(d(t, s)) (q_t . k_s / sqrt(H)) v_s, normalised per head  (ViR, arXiv:2310.19731).

    In one dimension s are all tokens before t, and d is how many ago. In two, tokens fill rows of `line_length` in the
    order in which they come: s are those in no later row and no later column, and d is the rows and columns in between.
    In raster order these are the image's rows; a prefix stands in the corner, which all read.
    g = 1 - 2^(-5 - head).

    Attributes:
      dimensions: 1 or 2.
      line_length: of a row; 0 takes the grid's last axis.
      chunk_size: tokens worked out pair by pair: 1 is the recurrent form, the whole length the parallel one; None chooses.
      qkv_bias: queries, keys and values have a bias.
      out_bias: the last projection has one.
    """

    embed_dim: int
    num_heads: int = 4
    dimensions: int = 2
    line_length: int = 0
    chunk_size: int | None = None
    qkv_bias: bool = False
    out_bias: bool = True
    grid: tuple[int, ...] = ()
    num_prefix: int = 0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Places of a row."""
        return self.line_length or (self.grid[-1] if self.grid else 0)

    @nn.nowrap
    def _check(self) -> None:
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise UsageError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; use one of its divisors."
            )
        if self.dimensions not in (1, 2):
            raise UsageError(f"config.model.mixer.dimensions={self.dimensions} must be 1 or 2.")
        if self.dimensions == 2 and self.width < 1:
            raise UsageError(f"config.model.mixer.line_length={self.line_length} must be at least 1 without a grid.")

    def setup(self) -> None:
        """Projections as matrices, and the norm of heads."""
        self._check()
        dense = functools.partial(Dense, self.embed_dim, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value = (dense(use_bias=self.qkv_bias) for _ in range(3))
        self.out = dense(use_bias=self.out_bias)
        self.norm = make_norm("layer", 1e-5, self.dtype, self.param_dtype)()

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Array | Retained:
        """See Mixer: a matrix per head and, in two dimensions, per column."""
        self._check()
        head_dim = self.embed_dim // self.num_heads
        if self.dimensions == 1:
            return jnp.zeros((batch_size, self.num_heads, head_dim, head_dim), jnp.float32)
        columns = empty_columns(batch_size, self.num_heads, self.width, head_dim, head_dim)
        return Retained(columns, jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self, x: Array, tokens: Tokens, state: Array | Retained | None = None
    ) -> tuple[Array, Array | Retained | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        out, after = in_time_order(self._line if self.dimensions == 1 else self._rows, x, tokens, state)
        return out, (None if state is None else after)

    def _heads(self, x: Array, writes: Array | None) -> tuple[Array, Array, Array]:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        k = k if writes is None else jnp.where(writes[..., None, None], k, 0)
        return q * q.shape[-1] ** -0.5, k, v

    def _log_decay(self) -> np.ndarray:
        return fixed_log_decay("fixed", self.num_heads)

    def _line(self, x: Array, writes: Array | None, starts: Array | None, state: Array | None) -> tuple[Array, Array]:
        """See in_time_order: one dimension."""
        decay = jnp.broadcast_to(jnp.asarray(self._log_decay())[None, None], (*x.shape[:2], self.num_heads))
        decay = decay if writes is None else jnp.where(writes[..., None], decay, 0)
        decay = decay if starts is None else jnp.where(starts[..., None], FORGOTTEN, decay)
        heads = self._heads(x, writes)
        out, after = linear_attention(*heads, log_decay=decay, initial_state=state, chunk_size=self.chunk_size)
        return self.out(merge_heads(self.norm(out))), after

    def _rows(
        self, x: Array, writes: Array | None, starts: Array | None, state: Retained | None
    ) -> tuple[Array, Retained]:
        """See in_time_order: two dimensions."""
        writes = jnp.ones((1, x.shape[1]), bool) if writes is None else writes
        writes = jnp.broadcast_to(writes, x.shape[:2]).astype(jnp.int32)
        rank, run = jnp.cumsum(writes, axis=1) - writes, None
        if state is not None:
            rank += state.count[:, None]
        if starts is not None:  # each segment fills a grid of its own
            run = jnp.broadcast_to(jnp.cumsum(starts.astype(jnp.int32), axis=1), rank.shape)
            rank -= jax.lax.cummax(jnp.where(starts, rank, 0), axis=1)
        out, columns = grid_retention(
            *self._heads(x, writes > 0),
            jnp.maximum(rank - self.num_prefix, 0),
            jnp.asarray(np.stack([self._log_decay()] * 2)),
            width=self.width,
            run=run,
            columns=None if state is None else state.columns,
            chunk_size=self.chunk_size,
        )
        count = writes.sum(axis=1) + (0 if state is None else state.count)
        return self.out(merge_heads(self.norm(out))), Retained(columns, count)
