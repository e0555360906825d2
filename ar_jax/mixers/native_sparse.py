"""Native sparse attention (NSA, arXiv:2502.11089): means of blocks, chosen blocks and a window, gated."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.native_sparse import Blocks, native_sparse
from ar_jax.kernels.selected_attention import selected_attention
from ar_jax.kernels.step_attention import step_attention
from ar_jax.mixers.common.key_line import KeyLine, Reach, block_begins, empty_line, extended, in_time
from ar_jax.mixers.positions import rotate
from ar_jax.mixers.protocol import Tokens, merge_heads, split_heads

FEW_QUERIES = 8  # so few read their windows one by one; more share them


@struct.dataclass
class Blockwise:
    """A line of keys, and the sums of each of its blocks, [B, M, K, H] float32."""

    line: KeyLine
    key_sum: Array
    value_sum: Array


class NativeSparse(nn.Module):
    """o_t = sum over branches c of sigmoid(g_ct) o_ct: the means of all blocks, num_blocks whole blocks, the last window.

    A block is `block_size` tokens that come one after the other. The whole blocks are those whose means weigh most, the first
    one, and the two latest; query heads that share a key head choose together.

    Attributes:
      num_kv_heads: key heads, a divisor of num_heads; None takes num_heads / 4, or 1.
      block_size: tokens of a block.
      num_blocks: whole blocks that a token reads.
      window: the latest tokens that it reads in any case.
      rope_base: see Softmax.
    """

    embed_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    block_size: int = 64
    num_blocks: int = 16
    window: int = 512
    rope_base: float = 10000.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int, int]:
        """Query heads, key heads and the width of a head."""
        heads, shared = self.num_heads, self.num_kv_heads or max(self.num_heads // 4, 1)
        if heads < 1 or heads % shared or (self.head_dim is None and self.embed_dim % heads):
            raise UsageError(
                f"config.model.mixer: num_kv_heads={shared} must divide num_heads={heads}, and that embed_dim={self.embed_dim}."
            )
        return heads, shared, self.head_dim or self.embed_dim // heads

    def setup(self) -> None:
        """Projections, and a gate for each branch and head."""
        if min(self.block_size, self.num_blocks, self.window) < 1:
            raise UsageError("config.model.mixer: block_size, num_blocks and window must be at least 1.")
        heads, shared, head_dim = self.dims
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value = (dense(n * head_dim) for n in (heads, shared, shared))
        self.gate = nn.Dense(3 * heads, dtype=self.dtype, param_dtype=self.param_dtype)
        self.out = dense(self.embed_dim)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Blockwise:
        """All keys and values, and a sum for each block of them."""
        _, shared, head_dim = self.dims
        line = empty_line(batch_size, max(max_len, 1), shared, head_dim, self.dtype)
        sums = jnp.zeros((batch_size, -(-max(max_len, 1) // self.block_size), shared, head_dim), jnp.float32)
        return Blockwise(line, sums, jnp.zeros_like(sums))

    def __call__(self, x: Array, tokens: Tokens, state: Blockwise | None = None) -> tuple[Array, Blockwise | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        _, shared, _ = self.dims
        q, k = split_heads(self.query(x), self.num_heads), split_heads(self.key(x), shared)
        if self.rope_base:
            q, k = (rotate(a, tokens.position, self.rope_base) for a in (q, k))
        (q, k, v), writes, starts, back = in_time((q, k, split_heads(self.value(x), shared)), tokens)
        before = self.init_state(x.shape[0], x.shape[1], 1) if state is None else state
        line, reach = extended(before.line, k, v, writes, starts)
        after = self._added(before, line, reach, k, v)
        branches = [back(out) for out in self._read(q, after, reach, starts is not None)]
        gates = nn.sigmoid(self.gate(x)).reshape(*x.shape[:2], self.num_heads, 3)
        mixed = sum(gates[..., i, None] * out for i, out in enumerate(branches))
        return self.out(merge_heads(mixed)), None if state is None else after

    def _added(self, before: Blockwise, line: KeyLine, reach: Reach, k: Array, v: Array) -> Blockwise:
        block = jnp.where(reach.place < line.size, reach.place // self.block_size, before.key_sum.shape[1])
        add = jax.vmap(lambda a, i, new: a.at[i].add(new.astype(jnp.float32), mode="drop"))
        return Blockwise(line, add(before.key_sum, block, k), add(before.value_sum, block, v))

    def _read(self, q: Array, state: Blockwise, reach: Reach, packed: bool) -> tuple[Array, Array, Array]:
        """The three branches, [B, T, N, H] each, in time order."""
        line, scale, size = state.line, self.dims[2] ** -0.5, state.line.size
        k, v = line.keys, line.values
        if packed:
            blocks = _packed_blocks(line, reach, self.block_size)
        else:
            begin = jnp.arange(0, size, self.block_size, dtype=jnp.int32)[None]
            mean_k, mean_v = ((a / self.block_size).astype(k.dtype) for a in (state.key_sum, state.value_sum))
            blocks = Blocks(mean_k, mean_v, begin)
        options: dict[str, Any] = {"block_size": self.block_size, "num_blocks": self.num_blocks, "scale": scale}
        options["aligned"] = not packed
        compressed, _, _, selected = native_sparse(q, k, v, blocks, reach.first, reach.limit, **options)
        if q.shape[1] <= FEW_QUERIES:
            begin = jnp.maximum(reach.limit - self.window, reach.first)[:, :, None, None]
            begin = jnp.broadcast_to(begin, (*q.shape[:2], k.shape[2], 1))
            near, _ = selected_attention(q, k, v, begin, reach.limit, block_size=min(self.window, size), scale=scale)
            return compressed, selected, near
        place = jnp.arange(size, dtype=jnp.int32)[None]
        # A key is read from its segment's first place on, and within the window: bounds on one coordinate, its place.
        reached: dict[str, Any] = {
            "query_position": reach.first[..., None],
            "key_position": place[..., None],
            "reach": ((0, size),),
        }
        near = step_attention(q, k, v, reach.limit - 1, place, window=self.window, scale=scale, **reached)
        return compressed, selected, near


def _packed_blocks(line: KeyLine, reach: Reach, size: int) -> Blocks:
    """Blocks that begin anew in each segment: as many as there are tokens, at worst."""
    begin = block_begins(reach, line, size)
    index = jnp.minimum(begin[..., None] + jnp.arange(size)[None, None], line.size - 1)
    k, v = (jax.vmap(lambda rows, i: rows[i].mean(axis=1))(a, index) for a in (line.keys, line.values))
    return Blocks(k, v, begin)
