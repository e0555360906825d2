"""Attention at two resolutions: all pairs of blocks by their means, some of them token by token (MRA, arXiv:2207.10284)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.step_attention.visibility import UNSEEN

MODES = ("full", "sparse")
PRIOR, CERTAIN = (
    5e3,
    1e4,
)  # added to the scores of pairs that are taken first, and of those that must not be approximated


def multiresolution(
    q: Array,
    k: Array,
    v: Array,
    present: Array | None = None,
    segment: Array | None = None,
    *,
    num_blocks: int,
    block_size: int = 32,
    mode: str = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    pairs: tuple[Array, Array] | None = None,
) -> Array:
    """o_i = sum_j w_ij v_j / sum_j w_ij with w_ij = exp(q_i . k_j / sqrt(H)) in num_blocks pairs of blocks.

    Elsewhere w_ij = exp(mean q . mean k / sqrt(H)) of the blocks of i and j ("full"), or 0 ("sparse"). The pairs are those
    whose means' logit is closest to the largest of its row, one choice for each example and head.

    Args:
      q: [B, T, N, H], in the order of the tokens' places.
      k: [B, T, N, H].
      v: [B, T, N, H].
      present: [B or 1, T] bool; tokens that are not read nobody, and get zeros.
      segment: [B or 1, T] int32, ascending: tokens of different segments do not read each other. Segments share the budget,
        and blocks that two of them share are taken first, as their means are of neither.
      num_blocks: how many pairs of blocks are exact.
      block_size: tokens of a block; the last one is filled up.
      mode: one of MODES.
      first_blocks: pairs with one of the first so many blocks are taken before others.
      diagonal_blocks: so are pairs of blocks that lie at most half so many apart.
      pairs: another choice than these make: which pairs are exact, row M + column of M blocks, [B, N, any] int32, and which
        may be approximated, [B, N, M, M] bool.

    Returns:
      [B, T, N, H] in v's dtype; zeros where a token reads nothing.

    Cost: O(num_blocks block_size^2 H + (T / block_size)^2 H) FLOPs for each example and head.
    """
    (batch, length, heads, _), pad = q.shape, -q.shape[1] % block_size
    shape = (batch, length)
    present = jnp.ones(shape, bool) if present is None else jnp.broadcast_to(present, shape)
    segment = jnp.zeros(shape, jnp.int32) if segment is None else jnp.broadcast_to(segment, shape)

    def blocks(a: Array) -> Array:
        """[B, T, ...] to [B, M, block_size, ...]."""
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(batch, -1, block_size, *a.shape[2:])

    there, owner = blocks(present), blocks(segment)
    q, k, v = (jnp.moveaxis(blocks(a) * there[..., None, None].astype(a.dtype), 3, 1) for a in (q, k, v))
    options: dict[str, Any] = {"num_blocks": num_blocks, "mode": mode}
    options |= {"first_blocks": first_blocks, "diagonal_blocks": diagonal_blocks}
    one: Any = functools.partial(_one_head, **options)
    out = jax.vmap(jax.vmap(one, (0, 0, 0, None, None, 0)))(q, k, v, there, owner, pairs)  # [B, N, M, block_size, H]
    return jnp.moveaxis(out.reshape(batch, heads, -1, v.shape[-1]), 1, 2)[:, :length]


def _one_head(
    q: Array,
    k: Array,
    v: Array,
    there: Array,
    owner: Array,
    pairs: tuple[Array, Array] | None,
    *,
    num_blocks: int,
    mode: str,
    first_blocks: int,
    diagonal_blocks: int,
) -> Array:
    """[M, block_size, H] each, of one example and head."""
    count, scale = there.sum(axis=1), q.shape[-1] ** -0.5
    mean_q, mean_k, mean_v = (a.astype(jnp.float32).sum(axis=1) / jnp.maximum(count, 1)[:, None] for a in (q, k, v))
    coarse = mean_q @ mean_k.T * scale  # [M, M]
    smooth, shared = _pairs(there, owner)
    if pairs is None:
        chosen = _chosen(coarse, smooth, shared, num_blocks, first_blocks, diagonal_blocks)
    else:
        chosen, smooth = pairs[0], smooth & pairs[1]
    row, column = jnp.unravel_index(chosen, coarse.shape)
    fine = jnp.einsum("mth,msh->mts", q[row], k[column], preferred_element_type=jnp.float32) * scale
    seen = there[row][:, :, None] & there[column][:, None]
    seen &= owner[row][:, :, None] == owner[column][:, None]
    rest = smooth.at[row, column].set(False) if mode == "full" else jnp.zeros_like(smooth)
    fine = jnp.where(seen, fine, UNSEEN)
    coarse = jnp.where(rest, coarse, UNSEEN)
    peak = jnp.full(q.shape[:2], UNSEEN).at[row].max(jax.lax.stop_gradient(fine.max(axis=2)))
    peak = jnp.maximum(peak, jax.lax.stop_gradient(coarse.max(axis=1, keepdims=True)))  # [M, block_size]
    near = jnp.where(seen, jnp.exp(fine - peak[row][:, :, None]), 0)
    far = (
        jnp.where(rest[:, None], jnp.exp(coarse[:, None] - peak[..., None]), 0) * count[None, None]
    )  # [M, block_size, M]
    total = far.sum(axis=2).at[row].add(near.sum(axis=2))
    read = (far @ mean_v).at[row].add(jnp.einsum("mts,msh->mth", near, v[column].astype(jnp.float32)))
    out = jnp.where((total > 0)[..., None], read / jnp.where(total > 0, total, 1)[..., None], 0)
    return (out * there[..., None]).astype(v.dtype)


def _pairs(there: Array, owner: Array) -> tuple[Array, Array]:
    """Pairs of blocks [M, M] that lie in one segment, so that means stand for them; and others with tokens of the same."""
    some = there.any(axis=1)
    low = jnp.where(there, owner, jnp.iinfo(jnp.int32).max).min(axis=1)
    high = jnp.where(there, owner, -1).max(axis=1)
    alike = (low[:, None] <= high[None]) & (low[None] <= high[:, None]) & some[:, None] & some[None]
    pure = low == high
    smooth = alike & pure[:, None] & pure[None]
    return smooth, alike & ~smooth


def _chosen(
    coarse: Array, smooth: Array, shared: Array, num_blocks: int, first_blocks: int, diagonal_blocks: int
) -> Array:
    """The pairs of blocks that are read token by token, as indices of the flattened [M, M]."""
    number = jnp.arange(len(coarse))
    # The largest of each row tie at 0, however a compiler rounds what it computes once more for their maximum.
    largest = number[None] == coarse.argmax(axis=1)[:, None]
    score = jnp.where(largest, 0, jnp.minimum(coarse - coarse.max(axis=1, keepdims=True), 0))
    if diagonal_blocks:
        score += PRIOR * (jnp.abs(number[:, None] - number[None]) <= diagonal_blocks // 2)
    if first_blocks:
        first = number < first_blocks
        score += PRIOR * first[:, None] + PRIOR * first[None]
    score = jnp.where(smooth, score, jnp.where(shared, score + 3 * CERTAIN, score - CERTAIN))
    return jax.lax.top_k(jax.lax.stop_gradient(score).reshape(-1), min(num_blocks, score.size))[1]
