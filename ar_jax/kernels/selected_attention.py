"""Softmax attention in which every query names the blocks of keys that it reads: the cost is that of what is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.step_attention.visibility import UNSEEN

LARGEST_GATHER = 1 << 18  # keys that are gathered at a time, for each example and head


def selected_attention(
    q: Array, k: Array, v: Array, begin: Array, limit: Array, *, block_size: int = 1, scale: float | None = None
) -> tuple[Array, Array]:
    """o_i = sum_j p_ij v_j with p_i = softmax_j(scale q_i . k_j) over the keys j < limit_i of the blocks that query i names.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H], N a multiple of K: query heads share key heads, and blocks, in groups.
      v: [B, S, K, H].
      begin: [B, T, K, M] int32, the first key of each block, all different; < 0 where there is none. With N in place of K each
        query head names its own.
      limit: [B or 1, T] int32; later keys are not read.
      block_size: keys of a block, one behind the other.
      scale: 1 / sqrt(H) if None.

    Returns:
      [B, T, N, H] in v's dtype, zeros where a query reads nothing; log-sum-exp [B, T, N] float32, -1e30 there.

    Cost: O(B T N M block_size H) FLOPs.
    """
    heads_first = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def read(q: Array, begin: Array, limit: Array) -> tuple[Array, Array]:
        index = begin[..., None] + jnp.arange(block_size, dtype=jnp.int32)[None, None, None, None]
        seen = (begin[..., None] >= 0) & (index < limit[:, :, None, None, None])
        index, seen = (a.reshape(*begin.shape[:3], -1) for a in (jnp.where(seen, index, 0), seen))
        keys, values = (_rows(a, jnp.swapaxes(index, 1, 2)) for a in heads_first)  # [B, K, T, M, H]
        grouped = q.reshape(*q.shape[:2], begin.shape[2], -1, q.shape[-1])
        logits = jnp.einsum("btkgh,bktmh->btkgm", grouped, keys, preferred_element_type=jnp.float32) * scale
        weights, lse = masked_softmax(logits, seen[:, :, :, None])
        out = jnp.einsum("btkgm,bktmh->btkgh", weights.astype(values.dtype), values)
        return out.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])

    limit = jnp.broadcast_to(limit, q.shape[:2])
    return in_query_chunks(read, (q, begin, limit), LARGEST_GATHER // (begin.shape[3] * block_size))


def masked_softmax(logits: Array, seen: Array) -> tuple[Array, Array]:
    """Weights and log-sum-exp over the last axis of logits [..., M], where seen; zeros and -1e30 where nothing is."""
    logits = jnp.where(seen, logits, UNSEEN)
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - peak), 0)
    total = weights.sum(axis=-1, keepdims=True)
    reads = total > 0
    total = jnp.where(reads, total, 1)
    return weights / total, jnp.where(reads, peak + jnp.log(total), UNSEEN)[..., 0]


def in_query_chunks(function: Callable[..., Any], arrays: Any, size: int) -> Any:
    """function(arrays) for arrays [B, T, ...], so many queries at a time where there are more."""
    length = jax.tree.leaves(arrays)[0].shape[1]
    if length <= max(size, 1):
        return function(*arrays)
    count = math.ceil(length / max(size, 1))
    size = math.ceil(length / count)

    def cut(a: Array) -> Array:
        a = jnp.pad(a, ((0, 0), (0, count * size - length)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(len(a), count, size, *a.shape[2:]), 1, 0)

    def join(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], count * size, *a.shape[3:])[:, :length]

    step = jax.checkpoint(lambda piece: function(*piece))
    return jax.tree.map(join, jax.lax.map(step, jax.tree.map(cut, arrays)))


def _rows(a: Array, index: Array) -> Array:
    """Rows of a [B, K, S, H] by index [B, N, T, M], [B, N, T, M, H]; N / K neighbours read the same head."""
    batch, heads = index.shape[:2]
    head = jnp.arange(heads) // (heads // a.shape[1])
    return a[jnp.arange(batch)[:, None, None, None], head[None, :, None, None], index]
