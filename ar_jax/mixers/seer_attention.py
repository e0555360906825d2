"""SeerAttention-R (arXiv:2506.08889): softmax attention with a gate that learns which blocks of keys will be read."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.selected_attention import selected_attention
from ar_jax.kernels.selected_attention.xla import in_query_chunks, masked_softmax
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
class Gated:
    """A line of keys, and what the gate knows of its blocks.

    Attributes:
      line: keys (turned) and values.
      blocks: [B, M, K, gate_dim], what the gate's queries are compared with: pooled, projected and turned; only full blocks
        are looked at.
      pools: [B, K, 3, H] float32, of the block that is being filled the largest, the least and the sum of its keys before
        they were turned.
    """

    line: KeyLine
    blocks: Array
    pools: Array


class SeerAttention(nn.Module):
    """g_tb = softmax_b(W_q q_t . W_k pool(k of block b)): a token reads the whole blocks of the largest g, and its own.

    A block is `block_size` tokens that come one after the other. Blocks are told by their first token's place; one that is
    not full yet counts as a zero vector, and is read in any case. The query heads that share a key head read the same.
    The attention's parameters are those of `Softmax`, so that a trained model becomes this one. A loss of its own trains the
    gate, and nothing but the gate: see `gate_divergence` and `ar_jax.objectives.gate_distillation`.

    A step of decoding reads num_blocks block_size keys and values, and gate_dim numbers of each earlier block; on TPUs,
    where the threshold leaves fewer blocks, only those (see `selected_attention`).

    Attributes:
      num_blocks: the budget: blocks that a token reads at most, its own among them.
      threshold: blocks of a smaller g are not read; 0 takes the num_blocks best.
      block_size: tokens of a block; 64 or 128 as published.
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
    qkv_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    def _softmax(self, **more: Any) -> Softmax:
        names = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "rope_base", "qkv_bias", "dtype", "param_dtype")
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
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Gated:
        """All keys and values, a key of the gate for each block, and the pools of the first block."""
        _, shared, head_dim = self._softmax(parent=None).dims
        line = empty_line(batch_size, max(max_len, 1), shared, head_dim, self.dtype)
        shape = (batch_size, -(-max(max_len, 1) // self.block_size), shared, self.gate_dim or head_dim)
        return Gated(line, jnp.zeros(shape, self.dtype), empty_pools(batch_size, shared, head_dim))

    def __call__(self, x: Array, tokens: Tokens, state: Gated | None = None) -> tuple[Array, Gated | None]:
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
            after = self._extended(before, line, reach, jax.lax.stop_gradient(k))
            begin = jnp.arange(0, line.size, self.block_size, dtype=jnp.int32)[None]
            gates = self._gates(asked, after.blocks, begin)
        else:
            after, (begin, pools) = before, self._packed(line, reach, jax.lax.stop_gradient(k))
            gates = self._gates(asked, self._compared(pools, begin), begin)
        out = self.softmax.out(merge_heads(back(self._read(q, line, begin, reach, gates, starts is None))))
        if state is not None:
            return out, after
        if starts is None:
            loss = gate_divergence(q, line.keys, gates, begin, reach, self.block_size)
            out = with_side_loss(self.statistics.moves(loss - self.statistics(), out), loss)
        return out, None

    def _read(self, q: Array, line: KeyLine, begin: Array, reach: Reach, gates: Gates, aligned: bool) -> Array:
        """[B, T, N, H] in time order."""
        if self.dense:
            place = jnp.arange(line.size, dtype=jnp.int32)[None]
            bounds: dict[str, Any] = {"query_position": reach.first[..., None], "key_position": place[..., None]}
            return step_attention(q, line.keys, line.values, reach.limit - 1, place, **bounds, reach=((0, line.size),))
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
        options: dict[str, Any] = {"block_size": self.block_size, "aligned": aligned}
        return selected_attention(q, line.keys, line.values, chosen, reach.limit, **options)[0]

    def _extended(self, before: Gated, line: KeyLine, reach: Reach, k: Array) -> Gated:
        """What the gate knows after further keys [B, T, K, H]; only the blocks that they are in are pooled and projected."""
        size, first = self.block_size, before.line.count // self.block_size
        touched = (size + k.shape[1] - 2) // size + 1
        fresh = empty_pools(len(k), k.shape[2], k.shape[3])[:, None]
        pools = jnp.concatenate([before.pools[:, None], jnp.repeat(fresh, touched - 1, axis=1)], axis=1)
        block = jnp.where(reach.place < line.size, reach.place // size - first[:, None], touched)
        pools = jax.vmap(_joined)(pools, block, k.astype(jnp.float32))
        number = first[:, None] + jnp.arange(touched, dtype=jnp.int32)[None]
        write = jax.vmap(lambda a, i, new: a.at[i].set(new.astype(a.dtype), mode="drop"))
        blocks = write(before.blocks, number, self._compared(pools, number * size))
        last = jax.vmap(lambda a, i: a[jnp.minimum(i, touched - 1)])(pools, line.count // size - first)
        begins = (line.count % size == 0)[:, None, None, None]
        return Gated(line, blocks, jnp.where(begins, fresh[:, 0], last))

    def _packed(self, line: KeyLine, reach: Reach, k: Array) -> tuple[Array, Array]:
        """Blocks that begin anew in each segment, as many as there are tokens at worst, and their pools."""
        size, count = self.block_size, line.size
        begin = block_begins(reach, line, size)
        index = jnp.minimum(begin[..., None] + jnp.arange(size)[None, None], count - 1)
        plain = extended(
            empty_line(k.shape[0], k.shape[1], k.shape[2], k.shape[3], jnp.float32), k, k, reach.place < count, None
        )[0].keys
        rows = jax.vmap(lambda a, i: a[i])(plain, index)
        return begin, jnp.stack([rows.max(axis=2), rows.min(axis=2), rows.sum(axis=2)], axis=3)

    def _compared(self, pools: Array, begin: Array) -> Array:
        """Pools of blocks [B, M, K, 3, H] that begin at [B or 1, M] to what the gate compares, [B, M, K, gate_dim]."""
        finite = (
            jnp.where(jnp.isfinite(pools), pools, 0)
            / jnp.asarray([1.0, 1.0, self.block_size])[None, None, None, :, None]
        )
        keys = self.gate.pooled_keys(finite.reshape(*finite.shape[:3], -1).astype(self.dtype))
        return turned_halves(keys, *angles(begin, self.gate.hidden, self.rope_base or 10000.0)).astype(self.dtype)

    def _gates(self, asked: Array, keys: Array, begin: Array) -> Gates:
        """What the gate gives, a function of queries; from keys [B, M, K, gate_dim] of the blocks that begin at [B or 1, M]."""
        size, width, base = self.block_size, self.gate.hidden, self.rope_base or 10000.0

        def share(asked: Array, first: Array, limit: Array) -> tuple[Array, Array]:
            asked = turned_halves(asked, *angles(jnp.maximum(limit - 1, 0), width, base)).astype(asked.dtype)
            logits = self.gate.logits(asked, keys)
            here = begin[:, None]
            seen = (here >= first[..., None]) & (here < limit[..., None])
            logits = jnp.where((here + size <= limit[..., None])[:, None], logits, 0)
            return masked_softmax(logits, jnp.broadcast_to(seen[:, None], logits.shape))[0], seen

        return Gates(asked, share)


def empty_pools(batch_size: int, heads: int, head_dim: int) -> Array:
    """Of no key: [B, K, 3, H] float32, the largest, the least and the sum."""
    shape = (batch_size, heads, head_dim)
    return jnp.stack([jnp.full(shape, -jnp.inf), jnp.full(shape, jnp.inf), jnp.zeros(shape)], axis=2)


def _joined(pools: Array, block: Array, k: Array) -> Array:
    """Pools [M, K, 3, H], and keys [T, K, H] of the blocks [T] in them."""
    if len(block) == 1:  # while sampling: a comparison is sooner done than a scatter
        high, low, total = (pools[:, :, i] for i in range(3))
        own = (jnp.arange(len(pools)) == block)[:, None, None, None]
        return jnp.where(own, jnp.stack([jnp.maximum(high, k), jnp.minimum(low, k), total + k], axis=2), pools)
    to = [pools[:, :, i].at[block] for i in range(3)]
    return jnp.stack([to[0].max(k, mode="drop"), to[1].min(k, mode="drop"), to[2].add(k, mode="drop")], axis=2)
