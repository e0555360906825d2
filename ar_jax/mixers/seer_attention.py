"""SeerAttention-R (arXiv:2506.08889): softmax attention with a gate that learns which blocks of keys will be read."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.selected_attention import in_query_chunks, masked_softmax, selected_attention
from ar_jax.kernels.step_attention import step_attention
from ar_jax.mixers.common.block_gate import BlockGate, angles, turned_halves
from ar_jax.mixers.common.gate_divergence import Gates, gate_divergence
from ar_jax.mixers.common.key_line import KeyLine, Reach, block_begins, empty_line, extended, in_time
from ar_jax.mixers.common.side_loss import with_side_loss
from ar_jax.mixers.common.statistics import Statistics
from ar_jax.mixers.positions import rotate
from ar_jax.mixers.protocol import Tokens, merge_heads, split_heads
from ar_jax.mixers.softmax import Softmax

LARGEST_TABLE = 1 << 20  # gates of queries at a time, for each example and head


@struct.dataclass
class Pools:
    """A line of keys, and what the gate knows of its blocks.

    Attributes:
      line: keys (turned) and values.
      pools: [B, M, K, 3, H] float32, the largest, the least and the sum of each block's keys before they were turned.
    """

    line: KeyLine
    pools: Array


class SeerAttention(nn.Module):
    """g_tb = softmax_b(W_q q_t . W_k pool(k of block b)): a token reads the whole blocks of the largest g, and its own.

    A block is `block_size` tokens that come one after the other. Blocks are told by their first token's place; one that is
    not full yet counts as a zero vector, and is read in any case. The query heads that share a key head read the same.
    The attention's parameters are those of `Softmax`, so that a trained model becomes this one. A loss of its own trains the
    gate, and nothing but the gate: see `gate_divergence` and `ar_jax.objectives.gate_distillation`.

    Attributes:
      num_blocks: blocks that a token reads at most, its own among them.
      threshold: blocks of a smaller g are not read; 0 takes the num_blocks best.
      block_size: tokens of a block.
      gate_dim: the width of what is compared; None takes the heads' width.
      groups: see BlockGate.
      gate_norm: what is compared is RMS-normalised.
      dense: all blocks are read, while the gate is trained.
      num_heads: this and what follows: see Softmax.
    """

    embed_dim: int
    num_blocks: int = 16
    threshold: float = 0.0
    block_size: int = 64
    gate_dim: int | None = None
    groups: str = "project"
    gate_norm: bool = False
    dense: bool = False
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float = 10000.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    def _softmax(self, **more: Any) -> Softmax:
        names = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "rope_base", "dtype", "param_dtype")
        return Softmax(**{name: getattr(self, name) for name in names}, **more)

    def setup(self) -> None:
        """Softmax attention's projections, and the gate's."""
        self.softmax = self._softmax()
        heads, shared, head_dim = self.softmax.dims
        if min(self.block_size, self.num_blocks) < 1 or not 0 <= self.threshold < 1:
            raise UsageError(
                f"config.model.mixer: block_size and num_blocks must be at least 1, and threshold={self.threshold} in [0, 1)."
            )
        width = self.gate_dim or head_dim
        options: dict[str, Any] = {"groups": self.groups, "qk_norm": self.gate_norm, "param_dtype": self.param_dtype}
        self.gate = BlockGate(heads, shared, head_dim, width, **options)
        self.statistics = Statistics((), nn.initializers.zeros, "divergence")

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Pools:
        """All keys and values, and the pools of each block."""
        _, shared, head_dim = self._softmax(parent=None).dims
        line = empty_line(batch_size, max(max_len, 1), shared, head_dim, self.dtype)
        shape = (batch_size, -(-max(max_len, 1) // self.block_size), shared, head_dim)
        low, high = jnp.full(shape, -jnp.inf), jnp.full(shape, jnp.inf)
        return Pools(line, jnp.stack([low, high, jnp.zeros(shape)], axis=3))

    def __call__(self, x: Array, tokens: Tokens, state: Pools | None = None) -> tuple[Array, Pools | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        shared = self.softmax.dims[1]
        q, k, v = (
            split_heads(project(x), n)
            for project, n in (
                (self.softmax.query, self.num_heads),
                (self.softmax.key, shared),
                (self.softmax.value, shared),
            )
        )
        turned = [rotate(a, tokens.position, self.rope_base) if self.rope_base else a for a in (q, k)]
        asked = self.gate.queries(jax.lax.stop_gradient(q))
        (q, turned_k, k, v, asked), writes, starts, back = in_time((turned[0], turned[1], k, v, asked), tokens)
        before = self.init_state(x.shape[0], x.shape[1], 1) if state is None else state
        line, reach = extended(before.line, turned_k, v, writes, starts)
        if starts is None:
            after = Pools(line, self._pooled(before.pools, line, reach, jax.lax.stop_gradient(k)))
            begin = jnp.arange(0, line.k.shape[1], self.block_size, dtype=jnp.int32)[None]
            pools = after.pools
        else:
            after, (begin, pools) = before, self._packed(line, reach, jax.lax.stop_gradient(k))
        gates = self._gates(asked, pools, begin)
        out = self.softmax.out(merge_heads(back(self._read(q, line, begin, reach, gates))))
        if state is not None:
            return out, after
        if starts is None:
            loss = gate_divergence(q, line.k, gates, begin, reach, self.block_size)
            out = with_side_loss(self.statistics.moves(loss - self.statistics(), out), loss)
        return out, None

    def _read(self, q: Array, line: KeyLine, begin: Array, reach: Reach, gates: Gates) -> Array:
        """[B, T, N, H] in time order."""
        if self.dense:
            place = jnp.arange(line.k.shape[1], dtype=jnp.int32)[None]
            bounds: dict[str, Any] = {"query_position": reach.first[..., None], "key_position": place[..., None]}
            return step_attention(q, line.k, line.v, reach.limit - 1, place, **bounds, reach=((0, place.shape[1]),))
        begin = jnp.broadcast_to(begin, (len(q), begin.shape[1]))

        def choose(asked: Array, first: Array, limit: Array) -> Array:
            """The first keys of the blocks that each query reads, [B, T, K, num_blocks], -1 for none."""
            share, seen = gates(asked, first, limit)
            own = begin[:, None] + self.block_size >= limit[..., None]
            score = jnp.where(share >= self.threshold, share, -1.0)
            score = jnp.where(own[:, None], 2.0, score)
            score = jax.lax.stop_gradient(jnp.where(seen[:, None], score, -1.0))
            best, block = jax.lax.top_k(score, min(self.num_blocks, begin.shape[1]))
            starts = jax.vmap(lambda row, i: row[i])(begin, block)
            return jnp.moveaxis(jnp.where(best >= 0, starts, -1), 1, 2)

        chosen = in_query_chunks(choose, (gates.asked, reach.first, reach.limit), LARGEST_TABLE // begin.shape[1])
        return selected_attention(q, line.k, line.v, chosen, reach.limit, block_size=self.block_size)[0]

    def _pooled(self, pools: Array, line: KeyLine, reach: Reach, k: Array) -> Array:
        block = jnp.where(reach.place < line.k.shape[1], reach.place // self.block_size, pools.shape[1])
        k = k.astype(jnp.float32)

        def one(old: Array, i: Array, new: Array) -> Array:
            high, low, total = (old[:, :, j].at[i] for j in range(3))
            parts = high.max(new, mode="drop"), low.min(new, mode="drop"), total.add(new, mode="drop")
            return jnp.stack(parts, axis=2)

        return jax.vmap(one)(pools, block, k)

    def _packed(self, line: KeyLine, reach: Reach, k: Array) -> tuple[Array, Array]:
        """Blocks that begin anew in each segment, as many as there are tokens at worst, and their pools."""
        size, count = self.block_size, line.k.shape[1]
        begin = block_begins(reach, line, size)
        index = jnp.minimum(begin[..., None] + jnp.arange(size)[None, None], count - 1)
        plain = extended(
            empty_line(k.shape[0], k.shape[1], k.shape[2], k.shape[3], jnp.float32), k, k, reach.place < count, None
        )[0].k
        rows = jax.vmap(lambda a, i: a[i])(plain, index)
        return begin, jnp.stack([rows.max(axis=2), rows.min(axis=2), rows.sum(axis=2)], axis=3)

    def _gates(self, asked: Array, pools: Array, begin: Array) -> Gates:
        """What the gate gives, a function of queries."""
        size, width, base = self.block_size, self.gate.hidden, self.rope_base or 10000.0
        finite = jnp.where(jnp.isfinite(pools), pools, 0) / jnp.asarray([1.0, 1.0, size])[None, None, None, :, None]
        keys = self.gate.pooled_keys(finite.reshape(*finite.shape[:3], -1).astype(asked.dtype))
        keys = turned_halves(keys, *angles(begin, width, base)).astype(asked.dtype)

        def share(asked: Array, first: Array, limit: Array) -> tuple[Array, Array]:
            asked = turned_halves(asked, *angles(jnp.maximum(limit - 1, 0), width, base)).astype(asked.dtype)
            logits = self.gate.logits(asked, keys)
            here = begin[:, None]
            seen = (here >= first[..., None]) & (here < limit[..., None])
            logits = jnp.where((here + size <= limit[..., None])[:, None], logits, 0)
            return masked_softmax(logits, jnp.broadcast_to(seen[:, None], logits.shape))[0], seen

        return Gates(asked, share)
