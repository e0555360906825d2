"""Step attention with a bias that depends on the key alone, without an array of queries by keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

FEW_QUERIES = 8  # so few: the bias is written out, and the keys stay as they lie


def key_biased(
    attend: Any,
    q: Array,
    k: Array,
    v: Array,
    *steps: Array,
    key_bias: Array,
    scale: float | None = None,
    **options: Any,
) -> Array:
    """Attention with logits s_ij = scale q_i . k_j + b_j, b_j for each head of the queries.

    The bias is a product, too: of b_j, as further channels of key j, and of a one in the channel of the query's head. What
    depends on the query alone leaves the softmax as it is, so that c_i - c_j, as a decay between two tokens, is -c_j.

    Args:
      attend: `step_attention`.
      q: [B, T, N, H].
      k: [B, S, K, H].
      v: [B, S, K, H].
      *steps: its query_step and key_step.
      key_bias: [B, N, S] float32.
      scale: 1 / sqrt(H) if None.
      **options: of `step_attention`, return_lse excepted.

    Returns:
      [B, T, N, H].
    """
    (batch, length, heads, head_dim), shared = q.shape, k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    if length <= FEW_QUERIES:
        bias = jnp.broadcast_to(key_bias[:, :, None], (batch, heads, length, k.shape[1]))
        return attend(q, k, v, *steps, bias=bias, scale=scale, **options)
    group = heads // shared
    ones = jnp.broadcast_to(jnp.tile(jnp.eye(group), (shared, 1))[None, None], (batch, length, heads, group))
    own = jnp.moveaxis(key_bias.reshape(batch, shared, group, -1), 3, 1)  # [B, S, K, G]
    wide_q = jnp.concatenate([q.astype(jnp.float32) * scale, ones], axis=-1)
    wide_k = jnp.concatenate([k.astype(jnp.float32), own.astype(jnp.float32)], axis=-1)
    wide_v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, group)))
    return attend(wide_q, wide_k, wide_v, *steps, scale=1.0, **options)[..., :head_dim]


def forgotten(log_forget: Array, *keys: Array) -> Array:
    """The logarithm of what is left, cumulated: c_i - c_j is the decay from key j to query i (arXiv:2503.02130).

    Tokens of one step forget together: c is the sum up to the last of them.

    Args:
      log_forget: [B, S, N] <= 0.
      *keys: [B or 1, S] int32, what orders the tokens in time: the step, and before it (as in a lexsort) the segment.

    Returns:
      [B, N, S] float32.
    """
    keys = tuple(jnp.broadcast_to(key, log_forget.shape[:2]) for key in keys)
    order = jnp.lexsort(keys, axis=1)
    ends = jnp.zeros_like(order, bool).at[:, -1].set(True)
    for key in keys:
        key = jnp.take_along_axis(key, order, axis=1)
        ends = ends.at[:, :-1].max(key[:, 1:] != key[:, :-1])
    log_forget = jnp.take_along_axis(log_forget.astype(jnp.float32), order[..., None], axis=1)
    sums = jnp.where(ends[..., None], jnp.cumsum(log_forget, axis=1), -jnp.inf)
    sums = jax.lax.cummax(sums, axis=1, reverse=True)  # sums only fall, so that of the next end is the largest
    return jnp.swapaxes(jnp.take_along_axis(sums, jnp.argsort(order, axis=1)[..., None], axis=1), 1, 2)
