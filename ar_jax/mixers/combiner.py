"""Combiner (arXiv:2107.05768): full attention as a conditional expectation that is factorised."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.combiner import FACTORIZATIONS, Factorization, Table, combined, table_of, updated
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.key_line import KeyLine, Reach, empty_line, extended, in_time
from ar_jax.mixers.positions import rotate
from ar_jax.mixers.protocol import Tokens, merge_heads, split_heads


@struct.dataclass
class Abstracted:
    """A line of tokens, queries and keys side by side in its keys; and the abstractions, a table for each group."""

    line: KeyLine
    tables: tuple[Table, ...]


class Combiner(nn.Module):
    """o_i = sum over j nearby of p(j|i) v_j + sum over regions R of p(R|i) sum over j in R of p(j|R) v_j.

    p(.|i) is one softmax over q_i . k_j of the tokens nearby and q_i . k_R of the regions; p(j|R) the softmax of q_R . k_j,
    with q_R and k_R the largest of the region's queries and keys in each channel. So every token is read, with
    O(T sqrt(T)) or O(T log T) products. Packed segments are read one after the other, each at the
    cost of the whole.

    Attributes:
      factorization: "fixed": its own block, and each block before; "logsparse": itself, and dyadic blocks; "axial": its own
        row, and each column above it.
      width: tokens of a block, or of a row; None takes the root of the table of places, rounded up.
      rope_base: see Softmax.
    """

    embed_dim: int
    num_heads: int = 4
    factorization: str = "fixed"
    width: int | None = None
    rope_base: float = 10000.0
    num_rows: int = 0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    def setup(self) -> None:
        """Projections."""
        choose(FACTORIZATIONS, self.factorization, "model.mixer.factorization")
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise UsageError(
                f"config.model.mixer.num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}."
            )
        if self.width is not None and self.width < 1:
            raise UsageError(f"config.model.mixer.width={self.width} must be at least 1.")
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value, self.out = (dense(self.embed_dim) for _ in range(4))

    def _how(self, length: int) -> Factorization:
        width = self.width or math.isqrt(max(self.num_rows or length, 1) - 1) + 1
        return FACTORIZATIONS[self.factorization](length, width)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Abstracted:
        """All tokens, and an abstraction of each region."""
        head_dim, size = self.embed_dim // self.num_heads, max(max_len, 1)
        wide = empty_line(batch_size, size, self.num_heads, 2 * head_dim, self.dtype)
        line = dataclasses.replace(wide, v=wide.v[..., :head_dim])
        shapes = ((batch_size, len(g.tokens), self.num_heads, head_dim) for g in self._how(size).groups)
        return Abstracted(line, tuple((jnp.zeros(s, self.dtype), jnp.zeros(s, self.dtype)) for s in shapes))

    def __call__(self, x: Array, tokens: Tokens, state: Abstracted | None = None) -> tuple[Array, Abstracted | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        if self.rope_base:
            q, k = (rotate(a, tokens.position, self.rope_base) for a in (q, k))
        (q, k, v), writes, starts, back = in_time((q, k, v), tokens)
        before = self.init_state(x.shape[0], x.shape[1], 1) if state is None else state
        line, reach = extended(before.line, jnp.concatenate([q, k], axis=-1), v, writes, starts)
        how = self._how(line.size)
        if starts is not None:
            out = self._packed(q, line, reach, how)
            return self.out(merge_heads(back(out))), None
        past_q, past_k = jnp.split(line.keys, 2, axis=-1)
        if state is not None and q.shape[1] == 1:
            pairs = zip(state.tables, how.groups, strict=True)
            tables = tuple(updated(t, past_q, past_k, line.values, g, reach.place[:, 0]) for t, g in pairs)
        else:
            tables = tuple(table_of(past_q, past_k, line.values, group) for group in how.groups)
        out = combined(q, past_k, line.values, tables, how, reach.first, reach.limit)
        return self.out(merge_heads(back(out))), None if state is None else Abstracted(line, tables)

    def _packed(self, q: Array, line: KeyLine, reach: Reach, how: Factorization) -> Array:
        """Every segment by itself: as long as the whole, moved to the line's start, its queries alone being kept."""
        length = line.size
        place = jnp.arange(length, dtype=jnp.int32)

        def segment(total: Array, start: Array) -> Array:
            """Queries of the segment that begins at `start` [B]."""
            index = jnp.minimum(start[:, None] + place[None], length - 1)
            own_k, own_v = (jax.vmap(lambda a, i: a[i])(a, index) for a in (line.keys, line.values))
            past_q, past_k = jnp.split(own_k, 2, axis=-1)
            tables = [table_of(past_q, past_k, own_v, group) for group in how.groups]
            limit = reach.limit - start[:, None]
            read = combined(q, past_k, own_v, tables, how, jnp.zeros_like(limit), limit)
            return jnp.where((reach.first == start[:, None])[..., None, None], read, total)

        def one(total: Array, start: Array) -> tuple[Array, None]:
            return jax.lax.cond((start < length).any(), segment, lambda total, start: total, total, start), None

        begins = jnp.sort(jnp.where(reach.place == reach.first, reach.place, length), axis=1)
        return jax.lax.scan(one, jnp.zeros_like(q), jnp.swapaxes(begins, 0, 1))[0]
