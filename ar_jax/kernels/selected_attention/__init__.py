"""Softmax attention in which every query names the blocks of keys that it reads: the cost is that of what is named."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.dispatch import choose_form, on_each_device
from ar_jax.kernels.selected_attention.pallas_tpu import pallas_tpu
from ar_jax.kernels.selected_attention.reference import reference
from ar_jax.kernels.selected_attention.xla import xla

__all__ = ["FORMS", "selected_attention"]

FORMS: dict[str, Any] = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu}


def selected_attention(
    q: Array,
    k: Array,
    v: Array,
    begin: Array,
    limit: Array,
    *,
    block_size: int = 1,
    aligned: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """o_i = sum_j p_ij v_j with p_i = softmax_j(scale q_i . k_j) over the keys j < limit_i of the blocks that query i names.

    On TPUs the blocks of a few queries, as while sampling, are read where they lie, and only those that are named; see
    `pallas_tpu`. Other forms gather them first.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H], N a multiple of K: query heads share key heads, and blocks, in groups.
      v: [B, S, K, H].
      begin: [B, T, K, M] int32, the first key of each block, all different; < 0 where there is none. With N in place of K each
        query head names its own.
      limit: [B or 1, T] int32; later keys are not read.
      block_size: keys of a block, one behind the other.
      aligned: every block begins at a multiple of block_size, so that it can be fetched as a piece.
      scale: 1 / sqrt(H) if None.
      implementation: a key of FORMS; None takes the platform's.

    Returns:
      [B, T, N, H] in v's dtype, zeros where a query reads nothing; log-sum-exp [B, T, N] float32, -1e30 there.

    Raises:
      ValueError: an implementation that is unknown or not for this platform.

    Cost: O(B T N M block_size H) FLOPs; of k and v what is named is read, B T K M block_size H numbers each, if they lie in
    memory with a head's keys behind one another.
    """
    arrays = {"q": q, "k": k, "v": v, "begin": begin, "limit": jnp.broadcast_to(limit, q.shape[:2])}
    form = choose_form("selected_attention", FORMS, implementation)
    options = {"block_size": block_size, "aligned": aligned, "scale": q.shape[-1] ** -0.5 if scale is None else scale}
    if form in (reference, xla):  # the compiler cuts these by itself
        return form(**arrays, **options)
    heads, each = ("batch", None, "heads", None), ("batch", None)
    axes = dict.fromkeys(("q", "k", "v", "begin"), heads) | {"limit": each}
    return on_each_device(lambda own: form(**own, **options), arrays, axes, (heads, heads[:3]))
