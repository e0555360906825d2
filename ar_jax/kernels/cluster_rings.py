"""Attention to the latest keys of one's own cluster: a ring buffer for each cluster, so that nothing is of the future."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.kernels.selected_attention.xla import masked_softmax


@struct.dataclass
class Rings:
    """The latest W keys of each of C clusters; the n-th key of a cluster stands in slot n mod W.

    Attributes:
      k: [B, N, C, W, H].
      v: [B, N, C, W, H].
      count: [B, N, C] int32, how many have come.
    """

    k: Array
    v: Array
    count: Array


def empty_rings(batch_size: int, heads: int, clusters: int, window: int, head_dim: int, dtype: Any) -> Rings:
    """Before the first key."""
    zeros = jnp.zeros((batch_size, heads, clusters, window, head_dim), dtype)
    return Rings(zeros, jnp.zeros_like(zeros), jnp.zeros(zeros.shape[:3], jnp.int32))


def read_one(rings: Rings, q: Array, k: Array, v: Array, asking: Array, cluster: Array) -> tuple[Array, Rings]:
    """One token more: it enters its cluster's ring, and reads its query's; see `read_many`. Arrays are [B, N, H] and [B, N]."""
    window = rings.k.shape[3]
    each = jax.vmap(jax.vmap(lambda a, c, *rest: a.at[c, rest[0]].set(rest[1], mode="drop")))
    own = jnp.maximum(cluster, 0)
    slot = jnp.take_along_axis(rings.count, own[..., None], axis=2)[..., 0] % window
    to = jnp.where(cluster >= 0, cluster, rings.count.shape[2])  # what is no key is dropped
    keys, values = (each(a, to, slot, new.astype(a.dtype)) for a, new in ((rings.k, k), (rings.v, v)))
    count = jax.vmap(jax.vmap(lambda n, c: n.at[c].add(1, mode="drop")))(rings.count, to)
    read = jax.vmap(jax.vmap(lambda a, c: a[c]))
    seen = jnp.arange(window)[None, None] < read(count, asking)[..., None]
    logits = jnp.einsum("bnh,bnwh->bnw", q, read(keys, asking), preferred_element_type=jnp.float32)
    weights, _ = masked_softmax(logits * q.shape[-1] ** -0.5, seen)
    out = jnp.einsum("bnw,bnwh->bnh", weights.astype(v.dtype), read(values, asking))
    return out, Rings(keys, values, count)


def read_many(
    rings: Rings | None,
    q: Array,
    k: Array,
    v: Array,
    asking: Array,
    cluster: Array,
    starts: Array | None,
    *,
    clusters: int,
    window: int,
) -> tuple[Array, Rings | None]:
    """Each token reads the latest `window` keys of its query's cluster, itself among them if it is of it.

    Args:
      rings: what came before; None where nothing did.
      q: [B, T, N, H], in time order.
      k: [B, T, N, H].
      v: [B, T, N, H].
      asking: [B, T, N] int32, the queries' clusters.
      cluster: [B, T, N] int32, the keys'; < 0 for what is no key.
      starts: [B or 1, T] bool, tokens that read nothing from before them; None where none is.
      clusters: their number.
      window: keys that are read at most.

    Returns:
      [B, T, N, H], zeros where a token reads nothing, and the rings after these tokens.

    Cost: O(T window H) for each example and head, and a sort of numbers.
    """
    batch, length, heads, _ = q.shape
    q, k, v, asking, cluster = (jnp.swapaxes(a, 1, 2) for a in (q, k, v, asking, cluster))
    past = 0
    if rings is not None:
        old, label = _oldest_first(rings)
        past = label.shape[2]
        k, v = (jnp.concatenate([a, new.astype(a.dtype)], axis=2) for a, new in zip(old, (k, v), strict=True))
        cluster = jnp.concatenate([label, cluster], axis=2)
    size = past + length
    place = jnp.arange(size, dtype=jnp.int32)
    # A key's number is its cluster, then its place: sorted, a cluster's keys stand together, the latest one last.
    numbers = jnp.where(cluster >= 0, cluster, clusters) * size + place[None, None]
    order = jnp.argsort(numbers, axis=2)
    numbers = jnp.take_along_axis(numbers, order, axis=2)
    search = jax.vmap(jax.vmap(lambda row, wanted: jnp.searchsorted(row, wanted).astype(jnp.int32)))
    first = jnp.zeros((1, 1), jnp.int32)
    if starts is not None:
        first = past + jax.lax.cummax(jnp.where(starts, jnp.arange(length)[None], -past), axis=1)
    end = search(numbers, asking * size + past + 1 + jnp.arange(length, dtype=jnp.int32)[None, None])
    begin = search(numbers, asking * size + first[:, None])
    count = min(window, size)
    index = end[..., None] - count + jnp.arange(count, dtype=jnp.int32)[None, None, None]  # [B, N, T, W]
    rows = jax.vmap(jax.vmap(lambda a, order, i: a[order[jnp.maximum(i, 0)]]))
    keys, values = (rows(a, order, index) for a in (k, v))
    logits = jnp.einsum("bnth,bntwh->bntw", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights, _ = masked_softmax(logits, index >= begin[..., None])
    out = jnp.swapaxes(jnp.einsum("bntw,bntwh->bnth", weights.astype(v.dtype), values), 1, 2)
    if rings is None:
        return out, None
    ends = search(numbers, jnp.broadcast_to(size * (1 + jnp.arange(clusters))[None, None], (batch, heads, clusters)))
    starts_at = search(numbers, jnp.broadcast_to(size * jnp.arange(clusters)[None, None], (batch, heads, clusters)))
    total = rings.count + (ends - starts_at) - jnp.minimum(rings.count, window)
    slot = jnp.arange(window, dtype=jnp.int32)[None, None, None]
    index = ends[..., None] - window + (slot - total[..., None]) % window
    return out, Rings(rows(k, order, index), rows(v, order, index), total)


def _oldest_first(rings: Rings) -> tuple[tuple[Array, Array], Array]:
    """Keys and values [B, N, C W, H], those of a cluster in time order, and their clusters [B, N, C W], -1 for empty slots."""
    batch, heads, clusters, window, _ = rings.k.shape
    age = jnp.arange(window)[None, None, None]
    slot = (rings.count[..., None] + age) % window
    label = jnp.where(age >= window - rings.count[..., None], jnp.arange(clusters)[None, None, :, None], -1)
    k, v = (
        jnp.take_along_axis(a, slot[..., None], axis=3).reshape(batch, heads, -1, a.shape[-1])
        for a in (rings.k, rings.v)
    )
    return (k, v), label.reshape(batch, heads, -1)
