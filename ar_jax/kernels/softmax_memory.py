"""A memory that is a running softmax over what came: the additive recurrence of LightNet (arXiv:2405.21022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.kernels.linear_attention import linear_attention

NOTHING = -1e30  # the log of what has not been written: finite, so that differences are
FORGOTTEN = -200.0  # nats: nothing is left of what decays by so much


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

    Cost: O(B T N H E) FLOPs; the memory does not grow with T.
    """
    batch, _, heads, key_dim = q.shape
    memory = empty_memory(batch, heads, key_dim, v.shape[-1]) if memory is None else memory
    k, fade, log_total = running_weights(log_k, starts, memory.log_total)
    k = k if amount is None else k * amount.astype(jnp.float32)
    out, values = linear_attention(q, k.astype(q.dtype), v, log_decay=fade, initial_state=memory.values)
    return out, Memory(values, log_total)


def running_weights(log_k: Array, starts: Array | None, before: Array) -> tuple[Array, Array, Array]:
    """What each token adds to a running softmax, and what of the rest that leaves.

    Args:
      log_k: [B, T, N, H]; NOTHING or less where a token writes nothing.
      starts: [B or 1, T] bool, tokens before which all is forgotten; None where there are none.
      before: [B, N, H] float32, the log of the sum so far; NOTHING before the first token.

    Returns:
      exp(log_k_t - z_t) and z_{t-1} - z_t, in nats, both [B, T, N, H], where z_t is the log of the sum up to token t; and
      the last z, [B, N, H].
    """
    log_k = jnp.maximum(log_k.astype(jnp.float32), NOTHING)
    log_total, earlier = _running_total(log_k, starts, before)
    k = jnp.where(log_k > NOTHING / 2, jnp.exp(jnp.minimum(log_k - log_total, 0)), 0)
    fade = jnp.maximum(jnp.where(earlier > NOTHING / 2, jnp.minimum(earlier - log_total, 0), 0), FORGOTTEN)
    if starts is not None:
        fade = jnp.where(starts[..., None, None], FORGOTTEN, fade)
    return k, fade, log_total[:, -1]


def _running_total(log_k: Array, starts: Array | None, before: Array) -> tuple[Array, Array]:
    """The log of the sum up to each token and up to the one before it, [B, T, N, H]; a token that starts begins anew."""
    first = jnp.zeros((1, log_k.shape[1]), bool) if starts is None else starts
    first = jnp.broadcast_to(first[..., None, None], (*log_k.shape[:2], 1, 1))

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(b[1], b[0], jnp.logaddexp(a[0], b[0])), a[1] | b[1]

    sums, anew = jax.lax.associative_scan(add, (log_k, first), axis=1)
    total = jnp.where(anew, sums, jnp.logaddexp(before[:, None], sums))
    return total, jnp.concatenate([before[:, None], total[:, :-1]], axis=1)


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
