"""The equation of selected attention, with a table of who reads whom."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.selected_attention.xla import masked_softmax


def reference(
    q: Array, k: Array, v: Array, begin: Array, limit: Array, *, block_size: int, aligned: bool, scale: float
) -> tuple[Array, Array]:
    """See `selected_attention`. Cost: O(B T N S H), whatever is named."""
    del aligned
    place, begin = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, None, None], begin[..., None]
    inside = (place >= begin) & (place < begin + block_size) & (begin >= 0)
    seen = inside.any(axis=3) & (place[:, :, :, 0] < limit[..., None, None])  # [B, T, K or N, S]
    seen = jnp.repeat(seen, q.shape[2] // seen.shape[2], axis=2)
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    logits = jnp.einsum("btnh,bsnh->btns", q, k, preferred_element_type=jnp.float32) * scale
    weights, lse = masked_softmax(logits, seen)
    return jnp.einsum("btns,bsnh->btnh", weights.astype(v.dtype), v), lse
