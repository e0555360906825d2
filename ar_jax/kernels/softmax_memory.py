"""A memory that is a running softmax over what came: the additive recurrence of LightNet (arXiv:2405.21022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

NOTHING = -1e30  # the log of what has not been written: finite, so that differences are
CHUNK = 16  # tokens among which pairs are compared channel by channel


@struct.dataclass
class Memory:
    """What was written so far.

    Attributes:
      values: [B, N, H, E] float32, for each channel of the keys the softmax-weighted mean of values.
      log_total: [B, N, H] float32, the log of the sum of its weights; NOTHING before the first token.
    """

    values: Array
    log_total: Array


def empty_memory(batch_size: int, heads: int, key_dim: int, value_dim: int) -> Memory:
    """Before the first token."""
    return Memory(
        jnp.zeros((batch_size, heads, key_dim, value_dim), jnp.float32),
        jnp.full((batch_size, heads, key_dim), NOTHING, jnp.float32),
    )


def softmax_memory(
    q: Array,
    log_k: Array,
    v: Array,
    *,
    amount: Array | None = None,
    starts: Array | None = None,
    memory: Memory | None = None,
) -> tuple[Array, Memory]:
    """o_t = sum_{j<=t} (sum_h q_th a_jh exp(log_k_jh - z_th)) v_j,   z_t = log sum_{j<=t} exp(log_k_j).

    As a recurrence S_t = exp(z_{t-1} - z_t) S_{t-1} + a_t exp(log_k_t - z_t) v_t^T, o_t = S_t^T q_t: what decays the memory
    is added up and not multiplied. No exponent is positive.

    Args:
      q: [B, T, N, H], with its scale applied.
      log_k: [B, T, N, H] float32; NOTHING or less where a token writes nothing.
      v: [B, T, N, E].
      amount: a, [B, T, N, H], a factor of the written key that the total does not count; None is 1.
      starts: [B or 1, T] bool, tokens before which all is forgotten.
      memory: what was written before; None is nothing.

    Returns:
      o [B, T, N, E] in v's dtype, and the memory after the last token.

    Cost: O(B T N H (E + CHUNK)) FLOPs; the memory does not grow with T.
    """
    batch, length, heads, key_dim = q.shape
    chunk, pad = min(CHUNK, length), -length % min(CHUNK, length)
    before = empty_memory(batch, heads, key_dim, v.shape[-1]) if memory is None else memory
    run = jnp.zeros((1, length), jnp.int32) if starts is None else jnp.cumsum(starts.astype(jnp.int32), axis=1)
    run = jnp.broadcast_to(run, (batch, length))
    amount = jnp.ones_like(q) if amount is None else amount

    def split(a: Array, value: float = 0) -> Array:
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2), constant_values=value)
        return jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0)

    last = jnp.pad(run, ((0, 0), (0, pad)), "edge").reshape(batch, -1, chunk)
    inputs = (split(q), split(log_k.astype(jnp.float32), NOTHING), split(v), split(amount), jnp.moveaxis(last, 1, 0))
    (after, _), out = jax.lax.scan(_one_chunk, (before, jnp.zeros(batch, jnp.int32)), inputs)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, v.shape[-1])[:, :length].astype(v.dtype), after


def _one_chunk(carry: tuple[Memory, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Memory, Array], Array]:
    """Pairs inside a chunk one by one, what came before it through the memory."""
    memory, run_before = carry
    q, log_k, v, amount, run = inputs  # [B, C, N, .], run [B, C]: which stretch between forgettings
    carried = (run == run_before[:, None])[..., None, None]
    past = jnp.where(carried, memory.log_total[:, None], NOTHING)  # [B, C, N, H]
    seen = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None] & (run[:, :, None] == run[:, None, :])  # [B, C, C]
    pairs = jnp.where(seen[..., None, None], log_k[:, None], NOTHING)  # [B, t, s, N, H]
    log_total = jax.nn.logsumexp(jnp.concatenate([past[:, :, None], pairs], axis=2), axis=2)
    log_total = jnp.maximum(log_total, NOTHING)
    weights = jnp.where(pairs > NOTHING / 2, jnp.exp(jnp.minimum(pairs - log_total[:, :, None], 0)), 0)
    fade = jnp.where(past > NOTHING / 2, jnp.exp(jnp.minimum(past - log_total, 0)), 0)
    q, keys = q.astype(jnp.float32), weights * amount.astype(jnp.float32)[:, None]
    scores = jnp.einsum("btnh,btsnh->btsn", q, keys)
    values = v.astype(jnp.float32)
    out = jnp.einsum("btsn,bsne->btne", scores, values) + jnp.einsum("btnh,bnhe->btne", q * fade, memory.values)
    written = jnp.einsum("bsnh,bsne->bnhe", keys[:, -1], values)
    return (Memory(fade[:, -1][..., None] * memory.values + written, log_total[:, -1]), run[:, -1]), out


def softmax_mean(q: Array, log_k: Array, v: Array, amount: Array | None = None) -> Array:
    """What `softmax_memory` gives where all tokens have come before the first asks: one scan in any number of dimensions.

    o_t = sum_j (sum_h q_th a_jh softmax_j(log_k_jh)) v_j

    Args:
      q: [B, T, N, H]; the other arguments as there.
      log_k: [B, T, N, H].
      v: [B, T, N, E].
      amount: [B, T, N, H], or None.

    Returns:
      [B, T, N, E].
    """
    peak = jax.lax.stop_gradient(jnp.maximum(log_k.max(axis=1, keepdims=True), NOTHING / 2))
    weights = jnp.exp(log_k.astype(jnp.float32) - peak)
    total = jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
    keys = weights / total if amount is None else weights / total * amount.astype(jnp.float32)
    values = jnp.einsum("btnh,btne->bnhe", keys, v.astype(jnp.float32))
    return jnp.einsum("btnh,bnhe->btne", q.astype(jnp.float32), values).astype(v.dtype)
