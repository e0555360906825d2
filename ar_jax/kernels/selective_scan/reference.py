"""The equation of the selective scan, token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def reference(
    x: Array, delta: Array, a: Array, b: Array, c: Array, *, initial_state: Array, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """See `selective_scan`; b and c are [B, T, G, S]."""
    del chunk_size
    channels = x.shape[2] // b.shape[2]  # of each group
    a = a.astype(jnp.float32)[None]

    def token(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        x_t, delta_t, b_t, c_t = inputs
        b_t, c_t = (jnp.repeat(s, channels, axis=1) for s in (b_t, c_t))  # [B, D, S]
        state = jnp.exp(delta_t[..., None] * a) * state + (delta_t * x_t)[..., None] * b_t
        return state, (c_t * state).sum(-1)

    steps = tuple(jnp.moveaxis(s.astype(jnp.float32), 1, 0) for s in (x, delta, b, c))
    state, y = jax.lax.scan(token, initial_state, steps)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), state
