"""Linear attention in chunks: quadratic inside a chunk, the memory carried from chunk to chunk (arXiv:2307.08621, sec. 2).

With D_tj the decay from after token j up to where token t reads, and S the memory before the chunk,

    o_t = D_t0 S^T q_t + sum_{j<=t} D_tj (q_t . k_j) v_j;   S' = D_C0 S + sum_j D_Cj k_j v_j^T

No exponent is positive. Of a decay per channel a D of C x C x H numbers would be too much: see `channel_scores`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.linear_attention.decay import reading_and_writing

CHUNK = 64


def xla(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None,
    bonus: Array | None,
    initial_state: Array,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """See `linear_attention`. The backward pass keeps the memory before each chunk and works the rest out anew."""
    batch, length, heads, _ = q.shape
    chunk = chunk_size or min(CHUNK, 1 << (length - 1).bit_length())
    pad = -length % chunk
    decay = jnp.zeros(heads, jnp.float32) if log_decay is None else log_decay
    decay = jnp.broadcast_to(decay[None, None], (batch, length, heads)) if decay.ndim == 1 else decay

    def split(x: Array) -> Array:
        """[B, T, N, ...] -> [T / C, B, N, C, ...]; padding has no keys and does not decay, so the memory keeps."""
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, -1, chunk, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    one_chunk = _channel_chunk if decay.ndim == 4 else _chunk

    def body(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, decay = inputs
        out, state = one_chunk(q, k, v, decay, state, bonus)
        return state, out.astype(v.dtype)

    body = jax.checkpoint(body, prevent_cse=False)
    state, out = jax.lax.scan(body, initial_state, jax.tree.map(split, (q, k, v, decay)))
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1).reshape(batch, -1, heads, v.shape[-1])
    return out[:, :length], state


def _chunk(q: Array, k: Array, v: Array, log_decay: Array, state: Array, bonus: Array | None) -> tuple[Array, Array]:
    """One chunk: q, k, v [B, N, C, ...], log_decay [B, N, C]."""
    reading, writing = reading_and_writing(log_decay, strict=bonus is not None)
    place = jnp.arange(q.shape[2])
    causal = place[:, None] >= place[None] if bonus is None else place[:, None] > place[None]
    exponent = sum(r[..., :, None] - w[..., None, :] for r, w in zip(reading, writing, strict=True))
    # Masked before the exponential: above the diagonal it is positive and could overflow.
    between = jnp.exp(jnp.where(causal[None, None], exponent, -jnp.inf))
    from_start = jnp.exp(sum(reading))[..., None]
    to_end = jnp.exp(sum(w[..., -1:] - w for w in writing))[..., None]
    scores = between * _product("bnth,bnjh->bntj", q, k)
    out = _product("bntj,bnje->bnte", scores.astype(v.dtype), v)
    out += from_start * _product("bnth,bnhe->bnte", q.astype(jnp.float32), state)
    if bonus is not None:
        out += _own(q, k, bonus) * v
    added = _product("bnjh,bnje->bnhe", to_end * k, v.astype(jnp.float32))
    return out, jnp.exp(sum(w[..., -1:] for w in writing))[..., None] * state + added


def _channel_chunk(
    q: Array, k: Array, v: Array, log_decay: Array, state: Array, bonus: Array | None
) -> tuple[Array, Array]:
    """One chunk: q, k, v, log_decay [B, N, C, ...]."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores, before, after, total = channel_scores(q, k, log_decay, strict=bonus is not None)
    out = _product("bntj,bnje->bnte", scores, v) + _own(q, k, bonus) * v
    out += _product("bnth,bnhe->bnte", q * jnp.exp(before), state)
    added = _product("bnjh,bnje->bnhe", k * jnp.exp(after), v)
    return out, jnp.exp(total)[..., None] * state + added


def channel_scores(q: Array, k: Array, log_decay: Array, strict: bool) -> tuple[Array, Array, Array, Array]:
    """Products of queries and earlier keys under the decay of each channel between the two.

    Blocks of 1, 2, 4, ... tokens are joined in pairs. Where the later block reads the earlier one, the decay is split at
    the border between the two: into what decays after the writer and what decays before the reader, both at most one.

    Args:
      q: [..., C, H] float32, C a power of two.
      k: likewise.
      log_decay: likewise.
      strict: tokens read before their own decay.

    Returns:
      The products [..., C, C], zero on and above the diagonal, and the sums of log decays from the chunk's start to where
      each token reads and from after each token to the chunk's end, [..., C, H], and over the chunk, [..., H].
    """
    in_blocks = lambda x: x[..., None, :]  # [..., C, H] -> [..., C blocks, 1, H]  # noqa: E731
    q, k, total = in_blocks(q), in_blocks(k), in_blocks(log_decay)
    after = jnp.zeros_like(total)
    before = after if strict else total
    scores = jnp.zeros((*total.shape[:-1], 1), jnp.float32)
    early, late = (lambda x: x[..., 0::2, :, :]), (lambda x: x[..., 1::2, :, :])
    beside = lambda x, y: jnp.concatenate([x, y], axis=-2)  # noqa: E731
    while total.shape[-3] > 1:
        readers, writers = late(q) * jnp.exp(late(before)), early(k) * jnp.exp(early(after))
        across = jnp.concatenate([_product("...th,...jh->...tj", readers, writers), late(scores)], axis=-1)
        scores = beside(jnp.concatenate([early(scores), jnp.zeros_like(early(scores))], axis=-1), across)
        before = beside(early(before), late(before) + early(total))
        after = beside(early(after) + late(total), late(after))
        total = early(total) + late(total)
        q, k = beside(early(q), late(q)), beside(early(k), late(k))
    whole = lambda x: x[..., 0, :, :]  # noqa: E731
    return whole(scores), whole(before), whole(after), total[..., 0, 0, :]


def _own(q: Array, k: Array, bonus: Array | None) -> Array:
    """What each query reads of its own token's key, [B, N, C, 1]."""
    weighted = q.astype(jnp.float32) if bonus is None else q * bonus[None, :, None]
    return (weighted * k).sum(axis=-1, keepdims=True)


def _product(equation: str, x: Array, y: Array) -> Any:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
