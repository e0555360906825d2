"""Native sparse attention's first two branches: means of blocks, and the blocks whose means weigh most (arXiv:2502.11089)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.kernels.selected_attention import selected_attention
from ar_jax.kernels.selected_attention.xla import in_query_chunks, masked_softmax

LARGEST_TABLE = 1 << 20  # logits of blocks at a time, for each example and head


@struct.dataclass
class Blocks:
    """Blocks of keys that stand behind one another, and what each is on average.

    Attributes:
      k: [B, M, K, H] mean keys.
      v: [B, M, K, H] mean values.
      begin: [B or 1, M] int32, the first key of each.
    """

    k: Array
    v: Array
    begin: Array


def native_sparse(
    q: Array,
    k: Array,
    v: Array,
    blocks: Blocks,
    first: Array,
    limit: Array,
    *,
    block_size: int,
    num_blocks: int,
    scale: float,
    aligned: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Compression and selection.

    Compression: p_i = softmax_c(scale q_i . mean k_c) over the blocks that end before query i; o = sum_c p_ic mean v_c.
    Selection: the num_blocks blocks of the largest p, averaged over a group of query heads; the first block, the query's
    own and the one before it always come first. Their keys j <= i are read one by one.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H].
      v: [B, S, K, H].
      blocks: of these keys.
      first: [B or 1, T] int32, the first key that a query may read; a block begins there.
      limit: [B or 1, T] int32, behind the last one.
      block_size: keys of a block.
      num_blocks: to be selected by each query.
      scale: of the logits.
      aligned: blocks begin at multiples of block_size.

    Returns:
      Compression's output [B, T, N, H] and log-sum-exp [B, T, N], the selected blocks [B, T, K, num_blocks] (-1: none) and
      their output [B, T, N, H].
    """
    shape = q.shape[:2]
    shared, count = k.shape[2], min(num_blocks, blocks.k.shape[1])
    keys, values = jnp.swapaxes(blocks.k, 1, 2), jnp.swapaxes(blocks.v, 1, 2)
    begin = jnp.broadcast_to(blocks.begin, (len(q), blocks.begin.shape[1]))

    def choose(q: Array, first: Array, limit: Array) -> tuple[Array, Array, Array]:
        grouped = q.reshape(*q.shape[:2], shared, -1, q.shape[-1])
        logits = jnp.einsum("btkgh,bkmh->btkgm", grouped, keys, preferred_element_type=jnp.float32) * scale
        ended, forced = _standing(begin, first, limit, block_size)
        weights, lse = masked_softmax(logits, ended[:, :, None, None])
        out = jnp.einsum("btkgm,bkmh->btkgh", weights.astype(values.dtype), values)
        score = jnp.where(forced[:, :, None], 1.0, jnp.where(ended[:, :, None], weights.mean(axis=3), -1.0))
        best, chosen = jax.lax.top_k(jax.lax.stop_gradient(score), count)
        chosen = jnp.where(best >= 0, chosen, -1)
        return out.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1]), chosen

    first, limit = jnp.broadcast_to(first, shape), jnp.broadcast_to(limit, shape)
    out, lse, chosen = in_query_chunks(choose, (q, first, limit), LARGEST_TABLE // begin.shape[1])
    starts = jax.vmap(lambda row, i: row[i])(begin, chosen)
    named = jnp.where(chosen >= 0, starts, -1)
    read, _ = selected_attention(q, k, v, named, limit, block_size=block_size, aligned=aligned, scale=scale)
    return out, lse, jnp.pad(chosen, ((0, 0),) * 3 + ((0, num_blocks - count),), constant_values=-1), read


def _standing(begin: Array, first: Array, limit: Array, size: int) -> tuple[Array, Array]:
    """Which blocks [B, M] end before each query, and which it reads in any case, [B, T, M] bool."""
    begin, first, last = begin[:, None], first[..., None], limit[..., None] - 1
    own = (begin <= last) & (begin >= first)
    return own & (begin + size <= last + 1), own & ((begin == first) | (begin + 2 * size > last))


def block_means(a: Array, size: int) -> Array:
    """Means of a [B, S, ...] over blocks of so many, [B, ceil(S / size), ...]; of a last one over what it has."""
    length = a.shape[1]
    padded = jnp.pad(a, ((0, 0), (0, -length % size)) + ((0, 0),) * (a.ndim - 2))
    sums = padded.reshape(len(a), -1, size, *a.shape[2:]).sum(axis=2)
    counts = jnp.minimum(length - jnp.arange(0, length, size), size).astype(a.dtype)
    return sums / counts.reshape(1, -1, *(1,) * (a.ndim - 2))
