"""The selective scan in chunks: the state is carried, and backward computes the states of one chunk at a time anew."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 64


def xla(
    x: Array, delta: Array, a: Array, b: Array, c: Array, *, initial_state: Array, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """See `selective_scan`; b and c are [B, T, G, S].

    Tokens are taken one by one: a parallel scan inside the chunk does several times the arithmetic, and every token
    already updates D S numbers at once. Channels come last, so that vector units fill whatever S is.
    """
    batch, length, channels = x.shape
    groups, size = b.shape[2:]
    chunk = min(chunk_size or CHUNK, length)
    rate = a.astype(jnp.float32).T[None]  # [1, S, D]

    def split(s: Array) -> Array:
        """[B, T, ...] -> [T / C, C, B, ...]; padding has delta 0, which neither writes nor decays."""
        s = jnp.pad(s.astype(jnp.float32), [(0, 0), (0, -length % chunk)] + [(0, 0)] * (s.ndim - 2))
        return jnp.moveaxis(s.reshape(batch, -1, chunk, *s.shape[2:]), 0, 2)

    def spread(s: Array) -> Array:
        """[B, G, S] -> [B, S, D]."""
        s = jnp.swapaxes(s, 1, 2)[..., None]
        return jnp.broadcast_to(s, (batch, size, groups, channels // groups)).reshape(batch, size, channels)

    def token(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        x_t, delta_t, b_t, c_t = inputs
        state = jnp.exp(delta_t[:, None] * rate) * state + (delta_t * x_t)[:, None] * spread(b_t)
        return state, (spread(c_t) * state).sum(1)

    def one_chunk(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        return jax.lax.scan(token, state, inputs)

    step = jax.checkpoint(one_chunk, prevent_cse=False)
    state, y = jax.lax.scan(step, jnp.swapaxes(initial_state, 1, 2), tuple(map(split, (x, delta, b, c))))
    y = jnp.moveaxis(y.reshape(-1, batch, channels)[:length], 0, 1)
    return y.astype(x.dtype), jnp.swapaxes(state, 1, 2)
