"""Linformer (arXiv:2006.04768): keys and values are projected along time to a few."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.step_attention import step_attention
from ar_jax.mixers.common.heads import head_width
from ar_jax.mixers.common.line import present
from ar_jax.mixers.common.place_order import total
from ar_jax.mixers.protocol import Carried, Tokens, merge_heads, split_heads


class Linformer(nn.Module):
    """out = softmax(q (E^T K)^T / sqrt(H)) (F^T V), E and F [places, rank], for all heads (arXiv:2006.04768, eq. 7).

    It reads a whole sequence. A token's row of E is that of its place; a place that is not there adds nothing.

    Attributes:
      rank: to how many keys and values a sequence is projected, k in the paper.
      num_kv_heads: key and value heads, a divisor of num_heads; None takes num_heads.
      head_dim: embed_dim / num_heads if None.
      share_heads: all heads have the same projections along time ("headwise sharing").
      share_projections: E = F ("key-value sharing").
      share_layers: all layers of a decoder have the first one's projections along time ("layerwise sharing"); with
        share_heads and share_projections there is then a single one. (Those of the later layers are there, and not read.)
      share_values: the values are the keys, as one published code shares them.
      num_rows: the places that there are.
    """

    embed_dim: int
    num_rows: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rank: int = 32
    share_heads: bool = True
    share_projections: bool = False
    share_layers: bool = False
    share_values: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    @property
    def dims(self) -> tuple[int, int, int]:
        """Query heads, key heads and the width of a head."""
        shared = self.num_kv_heads or self.num_heads
        head_dim = head_width(self.embed_dim, self.num_heads, self.head_dim)
        if self.num_heads % shared:
            raise UsageError(f"num_kv_heads={shared} does not divide num_heads={self.num_heads}.")
        return self.num_heads, shared, head_dim

    def setup(self) -> None:
        """Projections of channels [D, heads H], and along time [places, K or 1, rank]."""
        heads, shared, head_dim = self.dims
        if self.rank < 1:
            raise UsageError(f"config.model.mixer.rank={self.rank} must be at least 1.")
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key = dense(heads * head_dim), dense(shared * head_dim)
        self.out = dense(self.embed_dim, use_bias=True)
        shape = (self.num_rows, 1 if self.share_heads else shared, self.rank)
        start = nn.initializers.normal(self.rank**-0.5)
        self.key_projection = self.param("key_projection", start, shape, self.param_dtype)
        if not self.share_values:
            self.value = dense(shared * head_dim)
            if not self.share_projections:
                self.value_projection = self.param("value_projection", start, shape, self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> tuple[()]:
        """See Mixer: nothing is remembered."""
        return ()

    @nn.nowrap
    def init_shared(self, batch_size: int, length: int) -> tuple[Array, Array, Array] | None:
        """See Mixer: with share_layers the first layer's E and F, and whether there has been a layer."""
        shape = (self.num_rows, 1 if self.share_heads else self.dims[1], self.rank)
        empty = jnp.zeros(shape, self.param_dtype)
        return (empty, empty, jnp.zeros((), bool)) if self.share_layers else None

    def __call__(self, x: Array, tokens: Tokens, state: Any = None) -> tuple[Array, Any]:
        """See Mixer."""
        tables = self._tables()
        if isinstance(state, Carried):
            keys, values, there = state.shared
            tables = jnp.where(there, keys, tables[0]), jnp.where(there, values, tables[1])
            state = Carried(state.state, (*tables, jnp.ones_like(there)))
        elif self.share_layers:
            raise UsageError(
                "config.model.mixer.share_layers=True needs config.model.kind='decoder', which hands projections from layer "
                "to layer: choose it, or leave share_layers out."
            )
        if tokens.segment is not None:
            return self.out(merge_heads(self._of_segments(x, tokens, tables))), state
        return self.read(x, x, tokens, tables), state

    def _tables(self) -> tuple[Array, Array]:
        """E and F, [places, K or 1, rank]."""
        one = self.share_values or self.share_projections
        return self.key_projection, self.key_projection if one else self.value_projection

    def read(self, x: Array, context: Array, tokens: Tokens, tables: tuple[Array, ...] | None = None) -> Array:
        """What tokens x [B, T, D] read of a context [B, S, D], whose own tokens are given, [B, T, D]; by its own tables."""
        q = split_heads(self.query(x), self.num_heads)
        tables = self._tables() if tables is None else tables
        k, v = (_along_time(values, rows) for values, rows in self._projected(context, tokens, tables))
        out = step_attention(q, k, v, jnp.zeros(q.shape[1], jnp.int32), jnp.zeros(self.rank, jnp.int32))
        return self.out(merge_heads(out))

    def _projected(self, x: Array, tokens: Tokens, tables: tuple[Array, ...]) -> list[tuple[Array, Array]]:
        """Keys and values [B, S, K, H], and the rows of their projections [B or 1, S, K or 1, rank]."""
        row = jnp.arange(x.shape[1])[None] if tokens.row is None else tokens.row
        x = present(x, tokens)
        k = split_heads(self.key(x), self.dims[1])
        v = k if self.share_values else split_heads(self.value(x), self.dims[1])
        return [(values, table.astype(self.dtype)[row]) for values, table in zip((k, v), tables, strict=True)]

    def _of_segments(self, x: Array, tokens: Tokens, tables: tuple[Array, ...]) -> Array:
        """[B, T, N, H]. Each of several packed sequences has projected keys of its own, of which each token takes its."""
        heads, shared, head_dim = self.dims
        k, v = (
            total(jnp.swapaxes(rows, 2, 3)[..., None] * values[:, :, None], tokens)  # [B, T, rank, K, H]
            for values, rows in self._projected(x, tokens, tables)
        )
        q = self.query(x).reshape(*x.shape[:2], shared, heads // shared, head_dim)
        weights = nn.softmax(jnp.einsum("btkgh,btrkh->btkgr", q, k).astype(jnp.float32) * head_dim**-0.5)
        return jnp.einsum("btkgr,btrkh->btkgh", weights.astype(v.dtype), v).reshape(*x.shape[:2], heads, head_dim)


def _along_time(values: Array, rows: Array) -> Array:
    """sum_s rows_s values_s: [B, S, K, H] and [B or 1, S, K or 1, rank] to [B, rank, K, H]."""
    if rows.shape[2] == 1:
        shared = rows[:, :, 0]
        if len(rows) == 1:
            return jnp.einsum("sr,bskh->brkh", shared[0], values)
        return jnp.einsum("bsr,bskh->brkh", shared, values)
    if len(rows) == 1:
        return jnp.einsum("skr,bskh->brkh", rows[0], values)
    return jnp.einsum("bskr,bskh->brkh", rows, values)
