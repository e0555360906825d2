"""Linear attention in chunks: quadratic inside a chunk, the memory carried from chunk to chunk (arXiv:2307.08621, sec. 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def xla(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None = None,
    initial_state: Array | None = None,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """See `linear_attention`.

    With c_t the sum of log decays from the chunk's start up to t, and S the memory before the chunk,
    o_t = exp(c_t) S^T q_t + sum_{j<=t} exp(c_t - c_j) (q_t . k_j) v_j: no exponent is positive.
    """
    batch, length, heads, dim = q.shape
    chunk = min(length, chunk_size or 64)
    pad = -length % chunk
    decay = jnp.broadcast_to(
        jnp.float32(0.0) if log_decay is None else log_decay.astype(jnp.float32), (batch, length, heads)
    )
    start = jnp.zeros((batch, heads, dim, v.shape[-1]), jnp.float32) if initial_state is None else initial_state

    def split(a: Array) -> Array:
        """[B, T, N, ...] -> [T / chunk, B, N, chunk, ...]; padding has no keys and does not decay, so the memory keeps."""
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        a = a.reshape(batch, -1, chunk, *a.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(a, 1, 0), 3, 2)

    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    def one_chunk(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q_c, k_c, v_c, g_c = inputs
        total = jnp.cumsum(g_c, axis=-1)  # [B, N, C]
        # The difference is masked before the exponential: above the diagonal it is positive and could overflow.
        between = jnp.exp(jnp.where(causal, total[..., :, None] - total[..., None, :], -jnp.inf))  # [B, N, C, C]
        scores = jnp.einsum("bnth,bnsh->bnts", q_c, k_c, preferred_element_type=jnp.float32) * between
        inside = jnp.einsum("bnts,bnse->bnte", scores.astype(v_c.dtype), v_c, preferred_element_type=jnp.float32)
        carried = jnp.einsum("bnth,bnhe->bnte", q_c.astype(jnp.float32), state) * jnp.exp(total)[..., None]
        remaining = jnp.exp(total[..., -1:] - total)[..., None]
        added = jnp.einsum("bnsh,bnse->bnhe", k_c * remaining, v_c.astype(jnp.float32))
        return jnp.exp(total[..., -1])[..., None, None] * state + added, inside + carried

    state, out = jax.lax.scan(one_chunk, start, jax.tree.map(split, (q, k, v, decay)))
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1).reshape(batch, -1, heads, v.shape[-1])
    return out[:, :length].astype(v.dtype), state
