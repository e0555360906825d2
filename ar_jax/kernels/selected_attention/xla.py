"""The keys of the named blocks, gathered; and what other attention over gathered keys takes from here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.step_attention.visibility import UNSEEN

LARGEST_GATHER = 1 << 18  # keys that are gathered at a time, for each example and head


def xla(
    q: Array, k: Array, v: Array, begin: Array, limit: Array, *, block_size: int, aligned: bool, scale: float
) -> tuple[Array, Array]:
    """See `selected_attention`."""
    del aligned  # rows are gathered one by one
    heads_first = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

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
