"""The equation of step attention with a dense mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

UNSEEN = -1e30  # added to a logit in float32 it leaves nothing of it, and e to its power is zero


def reference(
    q: Array,
    k: Array,
    v: Array,
    query_step: Array,
    key_step: Array,
    *,
    window: int | None = None,
    bias: Array | None = None,
    scale: float | None = None,
) -> Array:
    """See `step_attention`. Cost: O(B T S N H) FLOPs and O(B N T S) memory."""
    batch, length, heads, head_dim = q.shape
    shared = k.shape[2]
    group = heads // shared
    scale = head_dim**-0.5 if scale is None else scale
    # Heads go in front of time, and the queries that share a key head one behind the other: two plain batched products.
    q = jnp.moveaxis((q * jnp.asarray(scale, q.dtype)).reshape(batch, length, shared, group, head_dim), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, S, H]
    logits = jnp.einsum(
        "bkth,bksh->bkts", q.reshape(batch, shared, -1, head_dim), k, preferred_element_type=jnp.float32
    )
    if bias is not None:
        logits += bias.reshape(bias.shape[0], shared, -1, bias.shape[-1]).astype(jnp.float32)
    age = query_step[:, None, :, None] - key_step[:, None, None, :]  # [B, 1, T, S]
    visible = age >= 0 if window is None else (age >= 0) & (age < window)
    visible = jnp.tile(visible, (1, 1, group, 1))
    weights = jax.nn.softmax(logits + jnp.where(visible, 0.0, UNSEEN))
    weights *= visible.any(axis=-1, keepdims=True)  # without a key to read the softmax is even, not zero
    out = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v).reshape(batch, shared, group, length, -1)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, v.shape[-1])
