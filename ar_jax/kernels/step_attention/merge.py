"""Attention over parts of the keys, made into attention over all of them."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def merge(outs: Array, lses: Array) -> tuple[Array, Array]:
    """What attention over all keys gives, from what it gives over P parts of them (arXiv:2205.14135).

    out = sum_p w_p out_p with w = softmax_p(lse_p);   lse = log sum_p exp(lse_p)

    The operation is associative, so parts may be merged in any grouping: blocks of a cache, or a tree over devices.

    Args:
      outs: [P, ..., H], of each part; zeros where a query reads nothing of it.
      lses: [P, ...] float32, -1e30 there.

    Returns:
      [..., H] in the dtype of outs, and [...] float32.
    """
    peak = lses.max(axis=0)
    weights = jnp.exp(lses - peak[None])
    total = weights.sum(axis=0)
    out = (weights[..., None] * outs.astype(jnp.float32)).sum(axis=0) / total[..., None]
    return out.astype(outs.dtype), peak + jnp.log(total)
