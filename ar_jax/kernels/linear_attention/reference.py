"""The equation of linear attention, token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def reference(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None,
    bonus: Array | None,
    initial_state: Array,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """See `linear_attention`; chunk_size has no meaning here."""
    decay = jnp.zeros(q.shape[2], jnp.float32) if log_decay is None else log_decay
    decay = jnp.broadcast_to(decay[None, None], q.shape[:3]) if decay.ndim == 1 else decay

    def token(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q_t, k_t, v_t, decay_t = inputs
        out, state = step(q_t, k_t, v_t, state, log_decay=decay_t, bonus=bonus)
        return state, out

    state, out = jax.lax.scan(token, initial_state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, decay)))
    return jnp.moveaxis(out, 0, 1), state


def step(
    q: Array, k: Array, v: Array, state: Array, *, log_decay: Array | None, bonus: Array | None
) -> tuple[Array, Array]:
    """See `linear_attention_step`; log_decay is [B, N], [B, N, H] or None."""
    q, k, values = (x.astype(jnp.float32) for x in (q, k, v))
    written = k[..., None] * values[..., None, :]
    if log_decay is None:
        after = state + written
    else:
        after = jnp.exp(log_decay)[(..., *[None] * (4 - log_decay.ndim))] * state + written
    read = after if bonus is None else state + bonus[None, :, :, None] * written
    return jnp.einsum("bnhe,bnh->bne", read, q).astype(v.dtype), after
