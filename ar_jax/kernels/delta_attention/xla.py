"""The delta rules in chunks: what a chunk writes is the solution of one triangular system (arXiv:2406.06484, sec. 3).

With S the memory before the chunk and D_tj the decay from after token j up to and including token t, what the tokens of a
chunk write, R [C, E], and what they read, O [C, E], follow from

    R_t = beta_t (v_t - k_t^T S_decayed - sum_{j<t} D_tj (k_t . k_j) R_j),        (I + L) R = beta (V - K_decayed S)
    O_t = q_t^T S_decayed + sum_{j<=t} D_tj (q_t . k_j) R_j

and the memory after it is S_decayed + sum_j D_Cj k_j R_j^T. No exponent is positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.delta_attention import chunks

CHUNK = 64
Chunk = Callable[[Array, tuple[Array, ...]], tuple[Array, Array]]


def delta(
    q: Array, k: Array, v: Array, beta: Array, *, log_decay: Array, initial_state: Array, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """See `delta_attention`."""
    return _over_chunks(_delta_chunk, (q, k, v, beta, log_decay), initial_state, chunk_size, v.dtype)


def dplr(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    *,
    log_decay: Array,
    initial_state: Array,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """See `dplr_attention`."""
    return _over_chunks(_dplr_chunk, (q, k, v, a, b, log_decay), initial_state, chunk_size, v.dtype)


def _delta_chunk(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """One chunk: q, k, v [B, N, C, ...], beta and log_decay [B, N, C]."""
    q, k, v, beta, log_decay = inputs
    between = chunks.sums_between(log_decay)
    total = jnp.cumsum(log_decay, axis=-1)[..., None]  # [B, N, C, 1]
    from_start, to_end = jnp.exp(total), jnp.exp(between[..., -1, :, None])

    lower = beta[..., None] * jnp.tril(jnp.exp(between) * jnp.einsum("bnth,bnjh->bntj", k, k), -1)
    surprise = beta[..., None] * (v - from_start * jnp.einsum("bnth,bnhe->bnte", k, state))
    written = jnp.einsum("bntj,bnje->bnte", chunks.inverse(lower), surprise)
    scores = jnp.exp(between) * jnp.einsum("bnth,bnjh->bntj", q, k)
    out = from_start * jnp.einsum("bnth,bnhe->bnte", q, state) + jnp.einsum("bntj,bnje->bnte", scores, written)
    state = from_start[..., -1:, :] * state + jnp.einsum("bnjh,bnje->bnhe", to_end * k, written)
    return state, out


def _dplr_chunk(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """One chunk: q, k, v, a, b, log_decay [B, N, C, ...]. What b writes is U = (I - M_ab)^-1 (A_decayed S + M_ak V).

    Both a and q read the memory before their own token, q through that token's decay; what the token itself writes q
    reads besides.
    """
    q, k, v, a, b, log_decay = inputs
    reading, writing = jnp.stack([a, q * jnp.exp(log_decay)]), jnp.stack([b, k])
    (earlier_a, earlier_q), before, after = chunks.decayed_products(reading, writing, log_decay)
    own = jnp.einsum("bnth,wbnth->wbnt", q, writing)[..., None]
    read = jnp.einsum("rbnth,bnhe->rbnte", reading * jnp.exp(before)[None], state)
    moved = read[0] + jnp.einsum("bntj,bnje->bnte", earlier_a[1], v)
    moved = jnp.einsum("bntj,bnje->bnte", chunks.inverse(-earlier_a[0]), moved)
    written = jnp.stack([moved, v])
    out = read[1] + jnp.einsum("wbntj,wbnje->bnte", earlier_q, written) + (own * written).sum(0)
    added = jnp.einsum("wbnjh,wbnje->bnhe", writing * jnp.exp(after)[None], written)
    return jnp.exp(before[..., -1, :] + log_decay[..., -1, :])[..., None] * state + added, out


def _over_chunks(
    one_chunk: Chunk, arrays: tuple[Array, ...], initial_state: Array, chunk_size: int | None, dtype: Any
) -> tuple[Array, Array]:
    """Carries the memory through the chunks; backward keeps the memory before each chunk and computes the rest anew."""
    batch, length, heads = arrays[0].shape[:3]
    chunk = chunk_size or min(CHUNK, 1 << (length - 1).bit_length())

    def split(x: Array) -> Array:
        """[B, T, N, ...] -> [T / C, B, N, C, ...]; padding neither writes nor decays."""
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, -1, chunk, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    step = jax.checkpoint(one_chunk, prevent_cse=False)
    state, out = jax.lax.scan(step, initial_state, tuple(map(split, arrays)))
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1).reshape(batch, -1, heads, out.shape[-1])
    return out[:, :length].astype(dtype), state
