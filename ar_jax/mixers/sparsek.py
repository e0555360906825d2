"""SparseK attention (arXiv:2406.16747): every token reads the same few keys, chosen by a score that learns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.selected_attention.xla import masked_softmax
from ar_jax.kernels.sparsek import sparsek
from ar_jax.mixers.common.key_line import in_time
from ar_jax.mixers.positions import rotate
from ar_jax.mixers.protocol import Tokens, merge_heads, split_heads

Read = Callable[[Any, tuple[Array, ...]], tuple[Any, Array]]
GATES = ("soft", "straight_through")
CHUNK = 64  # tokens that are read and written at a time


@struct.dataclass
class Pool:
    """The keys that may still be read, in no order.

    Attributes:
      k: [B, K, P, H].
      v: [B, K, P, H].
      score: [B, K, P] float32.
      place: [B, K, P] int32, the number of the token; -1 where there is none.
      count: [B] int32, how many tokens have come.
      first: [B] int32, where the segment of the last one begins.
    """

    k: Array
    v: Array
    score: Array
    place: Array
    count: Array
    first: Array


class SparseK(nn.Module):
    """m_t = SparseK(u_1 ... u_t; num_keys) with u_s = w . x_s + slope s;   o_t = sum_s softmax_s(q_t . m_ts k_s) m_ts v_s.

    Scores do not depend on the query and thresholds only rise, so a key that is left out is never read again: the state keeps
    the `capacity` keys of the highest scores. Where more of them have a part in m, the rest is cut off.

    Attributes:
      num_kv_heads: key heads, each with scores of its own; a divisor of num_heads; None takes num_heads.
      num_keys: the sum of m, so many keys are read, or more of them in part.
      capacity: most keys that are read; None takes 2 num_keys.
      window: the latest tokens are read besides, in full.
      gates: "soft": m is multiplied; "straight_through": keys that have a part in m are read in full, and the gradient is
        that of m.
      gate_keys: m is multiplied to keys and values; otherwise to values alone.
      position_slope: added to the scores per token, so that they need not grow.
      rope_base: see Softmax.
    """

    embed_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_keys: int = 64
    capacity: int | None = None
    window: int = 64
    gates: str = "soft"
    gate_keys: bool = True
    position_slope: float = 0.0
    rope_base: float = 10000.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Query heads, key heads, the width of a head, and the capacity."""
        heads, shared = self.num_heads, self.num_kv_heads or self.num_heads
        if heads < 1 or heads % shared or (self.head_dim is None and self.embed_dim % heads):
            raise UsageError(
                f"config.model.mixer: num_kv_heads={shared} must divide num_heads={heads}, and that embed_dim={self.embed_dim}."
            )
        capacity = 2 * self.num_keys if self.capacity is None else self.capacity
        if not 1 <= self.num_keys <= capacity or self.window < 1:
            raise UsageError(
                f"config.model.mixer: num_keys={self.num_keys} must be at least 1 and at most capacity={capacity}, and "
                f"window={self.window} at least 1: a token reads itself."
            )
        return heads, shared, self.head_dim or self.embed_dim // heads, capacity

    def setup(self) -> None:
        """Projections; the scores' is a vector for each key head."""
        choose(dict.fromkeys(GATES), self.gates, "model.mixer.gates")
        heads, shared, head_dim, _ = self.dims
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value = (dense(n * head_dim) for n in (heads, shared, shared))
        self.score = nn.Dense(shared, use_bias=False, dtype=jnp.float32, param_dtype=self.param_dtype)
        self.out = dense(self.embed_dim)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Pool:
        """Room for capacity + window keys, however long the sequence."""
        _, shared, head_dim, capacity = self.dims
        size = (batch_size, shared, capacity + self.window)
        entries = jnp.zeros((*size, head_dim), self.dtype)
        numbers = jnp.zeros(batch_size, jnp.int32)
        place = jnp.full(size, -1, jnp.int32)
        return Pool(entries, jnp.zeros_like(entries), jnp.zeros(size), place, numbers, jnp.zeros_like(numbers))

    def __call__(self, x: Array, tokens: Tokens, state: Pool | None = None) -> tuple[Array, Pool | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        _, shared, _, _ = self.dims
        q, k = split_heads(self.query(x), self.num_heads), split_heads(self.key(x), shared)
        if self.rope_base:
            q, k = (rotate(a, tokens.position, self.rope_base) for a in (q, k))
        fed = q, k, split_heads(self.value(x), shared), self.score(x.astype(jnp.float32))
        fed, writes, starts, back = in_time(fed, tokens)
        batch, length = x.shape[:2]
        marks = [
            jnp.broadcast_to(default if mark is None else mark, (batch, length))
            for mark, default in ((writes, jnp.ones((), bool)), (starts, jnp.zeros((), bool)))
        ]
        pool = self.init_state(batch, 1, 1) if state is None else state
        out, pool = _in_chunks(self._read, (*fed, *marks), pool)
        return self.out(merge_heads(back(out))), None if state is None else pool

    def _read(self, pool: Pool, fed: tuple[Array, ...]) -> tuple[Pool, Array]:
        """A chunk of tokens in time order: the pool after them, and what they read, [B, T, N, H]."""
        q, k, v, score, writes, starts = fed
        own = pool.count[:, None] + jnp.cumsum(writes, axis=1) - writes
        first = jnp.maximum(jax.lax.cummax(jnp.where(starts, own, 0), axis=1), pool.first[:, None])
        score = score + self.position_slope * own[..., None].astype(jnp.float32)
        place = jnp.broadcast_to(jnp.where(writes, own, -1)[..., None], score.shape)
        new = {"k": k, "v": v, "score": score, "place": place}
        both = {
            name: jnp.concatenate(
                [getattr(pool, name), jnp.swapaxes(a, 1, 2).astype(getattr(pool, name).dtype)], axis=2
            )
            for name, a in new.items()
        }
        out = self._attend(q, both, first, own + writes)
        return _kept(both, own[:, -1] + writes[:, -1], first[:, -1], self.window, pool.k.shape[2]), out

    def _attend(self, q: Array, keys: dict[str, Array], first: Array, limit: Array) -> Array:
        _, shared, head_dim, capacity = self.dims
        place, limit = keys["place"][:, None], limit[:, :, None, None]  # [B, 1, K, P], [B, T, 1, 1]
        seen = (place >= first[:, :, None, None]) & (place < limit)
        near = seen & (place >= limit - self.window)
        score = jnp.broadcast_to(keys["score"][:, None], seen.shape)
        old = seen & ~near
        least = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(old, score, -jnp.inf)), capacity)[0][..., -1:]
        share, _ = sparsek(score, self.num_keys, old & (score >= least))
        part = share > 0
        if self.gates == "straight_through":
            share = share + jax.lax.stop_gradient(part - share)
        gate = jnp.where(near, 1, share)[:, :, :, None].astype(self.dtype)  # [B, T, K, 1, P]
        grouped = q.reshape(*q.shape[:2], shared, -1, head_dim)
        logits = jnp.einsum("btkgh,bkph->btkgp", grouped, keys["k"]) * head_dim**-0.5
        if self.gate_keys:
            logits = logits * gate
        weights, _ = masked_softmax(logits.astype(jnp.float32), (near | part)[:, :, :, None])
        read = jnp.einsum("btkgp,bkph->btkgh", weights.astype(self.dtype) * gate, keys["v"])
        return read.reshape(q.shape)


def _kept(keys: dict[str, Array], count: Array, first: Array, window: int, size: int) -> Pool:
    """The latest `window` keys of the present segment, and of the others those of the highest scores: `size` in all."""
    place = keys["place"]
    worth = jnp.where(place >= count[:, None, None] - window, jnp.inf, keys["score"])
    worth = jnp.where(place >= first[:, None, None], worth, -jnp.inf)
    worth = jnp.where(place >= 0, worth, -jnp.inf)
    index = jax.lax.top_k(jax.lax.stop_gradient(worth), size)[1]
    take = jax.vmap(jax.vmap(lambda a, i: a[i]))
    kept = {name: take(a, index) for name, a in keys.items()}
    return Pool(**kept, count=count, first=first)


def _in_chunks(read: Read, fed: tuple[Array, ...], pool: Pool) -> tuple[Array, Pool]:
    """read over chunks of the arrays [B, T, ...], one after the other; what fills up the last one leaves no trace."""
    length = fed[0].shape[1]
    if length <= CHUNK:
        pool, out = read(pool, fed)
        return out, pool
    count = -(-length // CHUNK)

    def cut(a: Array) -> Array:
        a = jnp.pad(a, ((0, 0), (0, count * CHUNK - length)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(len(a), count, CHUNK, *a.shape[2:]), 1, 0)

    pool, out = jax.lax.scan(jax.checkpoint(read), pool, tuple(cut(a) for a in fed))
    return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], -1, *out.shape[3:])[:, :length], pool
