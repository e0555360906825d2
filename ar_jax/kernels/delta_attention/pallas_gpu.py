"""Delta rules on GPUs: what each chunk does to the memory is found for all chunks at once, as batched products.

Only that the memory goes from one chunk to the next is a kernel, the same for both rules: see `states`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ar_jax.kernels import triton
from ar_jax.kernels.delta_attention import chunks
from ar_jax.kernels.delta_attention.pallas_gpu_states import states

CHUNK = 64


def delta(
    q: Array, k: Array, v: Array, beta: Array, *, log_decay: Array, initial_state: Array, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """See `delta_attention`. With A = (I + lower)^-1 what is written is A beta v - (A beta decayed k) S."""
    q, k, values, beta, log_decay = _split((q, k, v, beta, log_decay), chunk_size)
    between = chunks.sums_between(log_decay)
    total = jnp.cumsum(log_decay, axis=-1)[..., None]
    from_start, to_end = jnp.exp(total), jnp.exp(between[..., -1, :, None])
    lower = beta[..., None] * jnp.tril(jnp.exp(between) * _product("bznth,bznjh->bzntj", k, k), -1)
    inverse = chunks.inverse(lower) * beta[..., None, :]
    fade = jnp.broadcast_to(from_start[..., -1, :], (*k.shape[:3], k.shape[4]))
    w, u, x = -inverse @ (from_start * k), inverse @ values, to_end * k
    before, written, final = states(v.dtype, w, u, x, fade, None, initial_state)
    scores = jnp.exp(between) * _product("bznth,bznjh->bzntj", q, k)
    out = _product("bznth,bznhe->bznte", (from_start * q).astype(v.dtype), before)
    out += _product("bzntj,bznje->bznte", scores.astype(v.dtype), written)
    return _joined(out, v), final


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
    """See `dplr_attention`. With A = (I - M_ab)^-1 what b writes is A M_ak v + (A decayed a) S."""
    *arrays, log_decay = _split((q, k, v, a, b, log_decay), chunk_size)
    outer = log_decay.shape[:3]
    # One axis for examples, chunks and heads: XLA's CPU compiler (jaxlib 0.10.2) does not survive axes of size one here.
    q, k, values, a, b, log_decay = (s.reshape(-1, *s.shape[3:]) for s in (*arrays, log_decay))
    reading, writing = jnp.stack([a, q * jnp.exp(log_decay)]), jnp.stack([b, k])
    (earlier_a, earlier_q), before, after = chunks.decayed_products(reading, writing, log_decay)
    own = jnp.einsum("zth,wzth->wzt", q, writing)[..., None]
    reading, writing = reading * jnp.exp(before)[None], writing * jnp.exp(after)[None]
    inverse = chunks.inverse(-earlier_a[0])
    fade = jnp.exp(before[..., -1, :] + log_decay[..., -1, :])
    w, u = inverse @ reading[0], inverse @ (earlier_a[1] @ values)
    added = _product("zjh,zje->zhe", writing[1], values)
    parts = (s.reshape(*outer, *s.shape[1:]) for s in (w, u, writing[0], fade, added))
    *kept, final = states(v.dtype, *parts, initial_state)
    memories, moved = (s.reshape(-1, *s.shape[3:]) for s in kept)
    out = _product("zth,zhe->zte", reading[1].astype(v.dtype), memories)
    out += _product("ztj,zje->zte", earlier_q[0].astype(v.dtype), moved) + own[0] * moved
    out += earlier_q[1] @ values + own[1] * values
    return _joined(out.reshape(*outer, *out.shape[1:]), v), final


def _split(arrays: tuple[Array, ...], chunk_size: int | None) -> list[Array]:
    """[B, T, N, ...] -> [B, T / C, N, C, ...] float32; padding neither writes nor decays."""
    batch, length = arrays[0].shape[:2]
    size = triton.padded(length, max(chunk_size or CHUNK, triton.SMALLEST))

    def split(s: Array) -> Array:
        s = jnp.pad(s.astype(jnp.float32), [(0, 0), (0, -length % size)] + [(0, 0)] * (s.ndim - 2))
        return jnp.swapaxes(s.reshape(batch, -1, size, *s.shape[2:]), 2, 3)

    return [split(s) for s in arrays]


def _joined(out: Array, v: Array) -> Array:
    """Undoes _split, in v's shape and dtype."""
    out = jnp.swapaxes(out, 2, 3)
    return out.reshape(len(out), -1, *out.shape[3:])[:, : v.shape[1]].astype(v.dtype)


def _product(equation: str, x: Array, y: Array) -> Any:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
