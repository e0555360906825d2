"""Linear attention in which every query reads every key: one sum, no order."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def bidirectional_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    normalize: bool = False,
    epsilon: float | None = None,
    key_mask: Array | None = None,
) -> Array:
    """Linear attention without an order (arXiv:2006.16236, eq. 6).

    o_i = S^T q_i,   S = sum_j k_j v_j^T;   with normalize o_i = S^T q_i / (q_i . z),   z = sum_j k_j

    Args:
      q: [B, T, N, H], with its feature map and scale applied.
      k: [B, S, N, H], likewise; S may differ from T.
      v: [B, S, N, E].
      normalize: divide by the sum of the weights q_i . k_j.
      epsilon: added to that sum, as published code does; None adds nothing, but keeps it from zero.
      key_mask: [B, S] bool, the keys that are read; None reads all.

    Returns:
      o [B, T, N, E] in v's dtype.

    Raises:
      ValueError: shapes that do not fit one another.

    Cost: O(B (T + S) N H E) FLOPs.
    """
    if not (q.ndim == k.ndim == v.ndim == 4 and q.shape[::2] == k.shape[::2] and q.shape[3] == k.shape[3]) or (
        k.shape[:3] != v.shape[:3]
    ):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} should be [B, T, N, H], [B, S, N, H], [B, S, N, E]")
    if key_mask is not None:
        if key_mask.shape != k.shape[:2] or key_mask.dtype != jnp.bool_:
            raise ValueError(f"key_mask {key_mask.dtype} {key_mask.shape} should be bool [B, S] = {k.shape[:2]}")
        k = jnp.where(key_mask[..., None, None], k, 0)
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    out = jnp.einsum("btnh,bnhe->btne", q, jnp.einsum("bsnh,bsne->bnhe", k, v.astype(jnp.float32)))
    if normalize:
        weight = jnp.einsum("btnh,bnh->btn", q, k.sum(axis=1))
        out = divided(out, weight[..., None], epsilon)
    return out.astype(v.dtype)


def divided(out: Array, weight: Array, epsilon: float | None = None) -> Array:
    """out / (weight + epsilon); without an epsilon the weight is kept from zero."""
    if epsilon is not None:
        return out / (weight + epsilon)
    return out / jnp.where(jnp.abs(weight) < 1e-6, jnp.asarray(1e-6, weight.dtype), weight)
