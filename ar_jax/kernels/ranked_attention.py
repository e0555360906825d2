"""Softmax attention to the keys of the largest scores, ranked in a few of their channels (Loki, arXiv:2406.02542)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.selected_attention import selected_attention
from ar_jax.kernels.selected_attention.xla import in_query_chunks
from ar_jax.kernels.step_attention.visibility import Visibility

LARGEST_TABLE = 1 << 20  # scores at a time, for each example and head


def ranked_attention(
    q: Array, k: Array, v: Array, visible: Visibility, *, rank: int, num_keys: int, scale: float | None = None
) -> Array:
    """o_i = sum_j p_ij v_j, p_i the softmax of scale q_i . k_j over the num_keys visible keys of the largest q'_i . k'_j.

    q' and k' are the first `rank` channels: with channels that are principal components, of the largest variance.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H], N a multiple of K; each query head chooses for itself.
      v: [B, S, K, H].
      visible: which keys a query may read.
      rank: the channels that scores are made of.
      num_keys: keys that a query reads, or all that are visible.
      scale: 1 / sqrt(H) if None.

    Returns:
      [B, T, N, H], zeros where a query sees nothing.

    Cost: O(T S N rank + T N num_keys H) FLOPs; so many numbers are read for one query.
    """
    (batch, length), (size, shared) = q.shape[:2], k.shape[1:3]
    narrow = k[..., :rank]
    lower, upper = (
        jnp.broadcast_to(jnp.swapaxes(a, 1, 2), (batch, length, a.shape[1])) for a in (visible.lower, visible.upper)
    )

    def choose(q: Array, lower: Array, upper: Array) -> Array:
        """The places [B, T, N, num_keys] of the keys to be read, -1 where there are fewer."""
        grouped = q[..., :rank].reshape(*q.shape[:2], shared, -1, rank)
        score = jnp.einsum("btkgr,bskr->btkgs", grouped, narrow, preferred_element_type=jnp.float32)
        bounds = (jnp.swapaxes(a, 1, 2) for a in (lower, upper))
        low, high = bounds
        seen = dataclasses.replace(visible, lower=low, upper=high).dense()
        score = jnp.where(seen[:, :, None, None], score, -jnp.inf).reshape(*q.shape[:3], size)
        best, place = jax.lax.top_k(score, min(num_keys, size))
        return jnp.where(best > -jnp.inf, place, -1)

    place = in_query_chunks(choose, (jax.lax.stop_gradient(q), lower, upper), LARGEST_TABLE // size)
    limit = jnp.full((1, length), size)
    return selected_attention(q, k, v, place, limit, scale=scale)[0]
