"""The equation of step attention with a dense mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.step_attention.visibility import UNSEEN, Visibility


def reference(
    q: Array,
    k: Array,
    v: Array,
    visible: Visibility,
    bias: Array | None,
    sinks: Array | None,
    *,
    scale: float,
    soft_cap: float | None,
) -> tuple[Array, Array]:
    """See `step_attention`; returns out and log-sum-exp. Cost: O(B T S N H) FLOPs and O(B N T S) memory."""
    batch, length, heads, head_dim = q.shape
    shared = k.shape[2]
    group = heads // shared
    # Heads go in front of time, and the queries that share a key head one behind the other: two plain batched products.
    q = jnp.moveaxis((q * jnp.asarray(scale, q.dtype)).reshape(batch, length, shared, group, head_dim), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, S, H]
    logits = jnp.einsum(
        "bkth,bksh->bkts", q.reshape(batch, shared, -1, head_dim), k, preferred_element_type=jnp.float32
    )
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits += bias.reshape(bias.shape[0], shared, -1, bias.shape[-1]).astype(jnp.float32)
    seen = jnp.tile(visible.dense()[:, None], (1, 1, group, 1))  # [B or 1, 1, G T, S]
    # In float32 such a number leaves nothing of a logit. Without a key to read all weigh the same, and `some` drops them.
    logits += jnp.where(seen, 0.0, UNSEEN)
    some = seen.any(axis=-1, keepdims=True)
    peak = logits.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = jnp.repeat(sinks.astype(jnp.float32).reshape(shared, group), length, axis=1)[None, :, :, None]
        peak = jnp.maximum(peak, sink)
    peak = jax.lax.stop_gradient(peak)
    weights = jnp.exp(logits - peak) * some
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sink - peak)
    reads = total > 0
    total = jnp.where(reads, total, 1.0)
    out = jnp.einsum("bkts,bksh->bkth", (weights / total).astype(v.dtype), v)
    lse = jnp.where(reads, peak + jnp.log(total), UNSEEN)
    out = jnp.moveaxis(out.reshape(batch, shared, group, length, -1), 3, 1).reshape(batch, length, heads, v.shape[-1])
    return out, jnp.moveaxis(lse.reshape(batch, heads, length), 2, 1)
