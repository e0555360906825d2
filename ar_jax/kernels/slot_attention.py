"""Attention to slots: a fixed number of places for keys and values, which every token writes to in shares of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.kernels.linear_attention.decay import NOTHING_LEFT, running_sums

CHUNK = 16  # tokens that are worked out pair by pair, for every slot


@struct.dataclass
class Slots:
    """What stands in the slots.

    Attributes:
      keys: [B, K, H, M] float32.
      values: [B, K, M, E] float32.
    """

    keys: Array
    values: Array


def empty_slots(batch_size: int, heads: int, num_slots: int, key_dim: int, value_dim: int) -> Slots:
    """Before the first token."""
    keys = jnp.zeros((batch_size, heads, key_dim, num_slots), jnp.float32)
    return Slots(keys, jnp.zeros((batch_size, heads, num_slots, value_dim), jnp.float32))


def slot_attention(
    q: Array,
    k: Array,
    v: Array,
    write: Array,
    log_decay: Array,
    *,
    slots: Slots | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Slots]:
    """Gated slot attention (arXiv:2409.07146), and attention with bounded memory (arXiv:2110.02488), in two passes.

    K_t = K_{t-1} diag(a_t) + k_t w_t^T;   p_t = softmax(K_t^T q_t);   V_t = diag(a_t) V_{t-1} + w_t v_t^T;   o_t = V_t^T p_t

    where a = exp(log_decay) and the softmax is over the slots.

    Args:
      q: [B, T, N, H], with its scale applied; N is a multiple of K, whose heads are shared by neighbouring queries' heads.
      k: [B, T, K, H].
      v: [B, T, K, E].
      write: w, [B, T, K, M], how much of a token goes to each of M slots.
      log_decay: [B, T, K, M] float32 nats, <= 0.
      slots: what stands in them before the first token; None is nothing.
      chunk_size: tokens that the second pass takes at a time; see `linear_attention`.
      implementation: of the second pass; see `linear_attention`.

    Returns:
      o [B, T, N, E] in v's dtype, and the slots after the last token.

    Cost: O(B T N M (H + E)) FLOPs; the slots do not grow with T.
    """
    batch, heads, shared = len(q), q.shape[2], k.shape[2]
    slots = empty_slots(batch, shared, write.shape[-1], q.shape[-1], v.shape[-1]) if slots is None else slots
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), NOTHING_LEFT)
    logits, keys = slot_logits(q, k, write, log_decay, slots.keys)
    share = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    each = heads // shared
    spread = (lambda a, axis=2: jnp.repeat(a, each, axis=axis)) if each > 1 else (lambda a, axis=2: a)
    out, values = linear_attention(
        share,
        spread(write.astype(v.dtype)),
        spread(v),
        log_decay=spread(log_decay),
        initial_state=spread(slots.values, 1),
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return out, Slots(keys, values[:, ::each])


def slot_logits(q: Array, k: Array, write: Array, log_decay: Array, keys: Array) -> tuple[Array, Array]:
    """What the slots' keys have in common with the queries, K_t^T q_t: [B, T, N, M] float32, and the last K, [B, K, H, M].

    Tokens of a chunk are taken in pairs, o_tm = sum_{j<=t} exp(G_tm - G_jm) (q_t . k_j) w_jm with G the decays' running
    sums: no exponent is positive. The backward pass keeps the keys before each chunk and works the rest out anew.
    """
    batch, length, heads, _ = q.shape
    shared, chunk = k.shape[2], min(CHUNK, length)

    def split(a: Array) -> Array:
        """[B, T, ...] to [T / C, B, C, ...]; padding writes nothing and does not decay, so the keys keep."""
        a = jnp.pad(a.astype(jnp.float32), [(0, 0), (0, -length % chunk)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0)

    def body(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, write, decay = inputs  # [B, C, K, G, H], [B, C, K, ...]
        sums = [jnp.moveaxis(s, -1, 1) for s in running_sums(jnp.moveaxis(decay, 1, -1))]  # [B, C, K, M]
        causal = jnp.tril(jnp.ones((chunk, chunk), bool))[None, :, :, None, None]
        between = sum(s[:, :, None] - s[:, None] for s in sums)  # [B, C, C, K, M]
        fade = jnp.exp(jnp.where(causal, between, -jnp.inf)) * write[:, None]
        out = jnp.einsum("btkgj,btjkm->btkgm", jnp.einsum("btkgh,bjkh->btkgj", q, k), fade)
        out += jnp.exp(sum(sums))[:, :, :, None] * jnp.einsum("btkgh,bkhm->btkgm", q, state)
        to_end = jnp.exp(sum(s[:, -1:] - s for s in sums)) * write
        kept = jnp.exp(sum(s[:, -1] for s in sums))[:, :, None] * state
        return kept + jnp.einsum("bjkh,bjkm->bkhm", k, to_end), out

    grouped = q.reshape(batch, length, shared, heads // shared, -1)
    body = jax.checkpoint(body, prevent_cse=False)
    keys, out = jax.lax.scan(body, keys, tuple(map(split, (grouped, k, write, log_decay))))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, write.shape[-1])[:, :length], keys
