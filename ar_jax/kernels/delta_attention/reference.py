"""The equations of the delta rules, token by token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def delta(
    q: Array, k: Array, v: Array, beta: Array, *, log_decay: Array, initial_state: Array, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """See `delta_attention`: what is written is beta_t (v_t - S'_t^T k_t), where S'_t is the decayed memory."""
    del chunk_size

    def token(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q_t, k_t, v_t, beta_t, log_decay_t = inputs
        state = jnp.exp(log_decay_t)[..., None, None] * state
        written = beta_t[..., None] * (v_t - _read(state, k_t))
        state = state + k_t[..., :, None] * written[..., None, :]
        return state, _read(state, q_t)

    return _over_tokens(token, (q, k, v, beta, log_decay), initial_state, v.dtype)


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
    """See `dplr_attention`: a reads the memory of the token before, undecayed."""
    del chunk_size

    def token(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q_t, k_t, v_t, a_t, b_t, log_decay_t = inputs
        moved = b_t[..., :, None] * _read(state, a_t)[..., None, :]
        state = jnp.exp(log_decay_t)[..., None] * state + moved + k_t[..., :, None] * v_t[..., None, :]
        return state, _read(state, q_t)

    return _over_tokens(token, (q, k, v, a, b, log_decay), initial_state, v.dtype)


def _read(state: Array, key: Array) -> Array:
    """S^T key: [B, N, H, E] and [B, N, H] -> [B, N, E]."""
    return jnp.einsum("bnhe,bnh->bne", state, key)


def _over_tokens(token: Any, arrays: tuple[Array, ...], initial_state: Array, dtype: Any) -> tuple[Array, Array]:
    state, out = jax.lax.scan(token, initial_state, tuple(jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in arrays))
    return jnp.moveaxis(out, 0, 1).astype(dtype), state
