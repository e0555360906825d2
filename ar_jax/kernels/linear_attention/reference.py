"""The equation of linear attention, token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def reference(
    q: Array, k: Array, v: Array, *, log_decay: Array | None = None, initial_state: Array | None = None
) -> tuple[Array, Array]:
    """See `linear_attention`."""
    batch, length, heads, dim = q.shape
    decay = jnp.broadcast_to(
        jnp.float32(1.0) if log_decay is None else jnp.exp(log_decay.astype(jnp.float32)), (batch, length, heads)
    )
    start = jnp.zeros((batch, heads, dim, v.shape[-1]), jnp.float32) if initial_state is None else initial_state

    def token(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q_t, k_t, v_t, decay_t = inputs
        state = decay_t[..., None, None] * state + k_t[..., :, None] * v_t[..., None, :]
        return state, jnp.einsum("bnhe,bnh->bne", state, q_t)

    f32 = jnp.float32
    steps = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q.astype(f32), k.astype(f32), v.astype(f32), decay))
    state, out = jax.lax.scan(token, start, steps)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), state
