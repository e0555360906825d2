"""Attention within clusters of queries and keys (Routing Transformer, arXiv:2003.05997)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.selected_attention.xla import masked_softmax

ITSELF = (
    -5e4
)  # the logit of a token that reads itself, where queries are keys: it does so only where it reads nothing else


def unit(x: Array) -> Array:
    """x [..., H] at unit length."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def balanced_clusters(
    q: Array,
    k: Array,
    v: Array,
    means: Array,
    present: Array | None = None,
    segment: Array | None = None,
    *,
    window: int,
    causal: bool = False,
    shared: bool = False,
    memory: tuple[Array, Array] | None = None,
) -> Array:
    """Each cluster holds the `window` queries, and the `window` keys, that are nearest to its mean, and is read by itself.

    A token may be in several clusters, whose outputs are averaged, or in none, which gives zeros. Who is in a cluster depends
    on the whole sequence: with `causal`, as published, what is read is not of the future, but what is chosen depends on it.

    Args:
      q: [B, T, N, H].
      k: [B, T, N, H].
      v: [B, T, N, H].
      means: [N, C, H] of unit length.
      present: [B or 1, T] bool, tokens that take part; None for all.
      segment: [B or 1, T] int32: tokens of different segments do not read each other.
      window: tokens of a cluster.
      causal: a query reads keys that do not come after it.
      shared: keys are the queries at unit length, and a token does not read itself if it can help it.
      memory: keys and values [N, C, M, H] that all queries of a cluster read, too.

    Returns:
      [B, T, N, H] in v's dtype.

    Cost: O(T C H + C window^2 H) for each example and head: O(T^1.5 H) with sqrt(T) clusters of sqrt(T) tokens.
    """
    batch, length = q.shape[:2]
    shape, size = (batch, length), min(window, length)
    present = jnp.ones(shape, bool) if present is None else jnp.broadcast_to(present, shape)
    segment = jnp.zeros(shape, jnp.int32) if segment is None else jnp.broadcast_to(segment, shape)
    k = unit(q).astype(q.dtype) if shared else k
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))  # [B, N, T, H]

    def nearest(a: Array) -> Array:
        """The places of each cluster's tokens, [B, N, C, window]."""
        score = jnp.einsum("bnth,nch->bnct", unit(jax.lax.stop_gradient(a)), means)
        return jax.lax.top_k(jnp.where(present[:, None, None], score, -jnp.inf), size)[1]

    asking = nearest(q)
    read = asking if shared else nearest(k)
    rows = jax.vmap(jax.vmap(lambda a, i: a[i]))
    labels = jax.vmap(lambda a, i: a[i])
    asked, keys, values = rows(q, asking), rows(k, read), rows(v, read)  # [B, N, C, W, H]
    seen = labels(present, read)[..., None, :] & (
        labels(segment, asking)[..., None] == labels(segment, read)[..., None, :]
    )
    logits = jnp.einsum("bncqh,bnckh->bncqk", asked, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        seen &= asking[..., None] >= read[..., None, :]
    if shared:
        logits = jnp.where(asking[..., None] == read[..., None, :], ITSELF, logits)
    if memory is not None:
        old_keys, old_values = (jnp.broadcast_to(a[None], (batch, *a.shape)) for a in memory)
        more = (
            jnp.einsum("bncqh,bnckh->bncqk", asked, old_keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        )
        logits = jnp.concatenate([more, logits], axis=-1)
        seen = jnp.concatenate([jnp.ones(more.shape, bool), seen], axis=-1)
        values = jnp.concatenate([old_values.astype(values.dtype), values], axis=3)
    weights, _ = masked_softmax(logits, seen)
    out = jnp.einsum("bncqk,bnckh->bncqh", weights, values.astype(jnp.float32))
    add = jax.vmap(jax.vmap(lambda i, o: jnp.zeros((length, o.shape[-1])).at[i.reshape(-1)].add(o.reshape(i.size, -1))))
    count = add(asking, jnp.ones((*asking.shape, 1)))
    return jnp.swapaxes(add(asking, out) / (count + 1e-5), 1, 2).astype(v.dtype)


def cluster_sums(x: Array, means: Array, present: Array | None = None) -> tuple[Array, Array]:
    """Sums [N, C, H] of the vectors x [B, T, N, H] that are nearest to each mean [N, C, H], and their numbers [N, C]."""
    nearest = jnp.argmax(jnp.einsum("btnh,nch->btnc", x, means), axis=-1)
    one = jax.nn.one_hot(nearest, means.shape[1])
    if present is not None:
        one = one * present[..., None, None]
    return jnp.einsum("btnc,btnh->nch", one, x), one.sum(axis=(0, 1))
