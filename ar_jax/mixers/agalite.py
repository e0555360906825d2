"""AGaLiTe (arXiv:2310.15719): a gated linear transformer whose matrix of a memory is approximated by a few vectors."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.heads import head_width
from ar_jax.mixers.protocol import Tokens, in_time_order, merge_heads, split_heads

CHUNK = 64  # tokens whose states stand side by side
FIRST_TICK = 1


@struct.dataclass
class Waves:
    """What is remembered, whatever the length: keys and values on R waves, and the sum of keys.

    Attributes:
      keys: [B, R, N, eta H] float32.
      values: [B, R, N, H] float32.
      total: [B, N, eta H] float32.
      tick: [B] int32, the time.
    """

    keys: Array
    values: Array
    total: Array
    tick: Array


class AGaLiTe(nn.Module):
    """out = W_o (sum_r v_rt (k_rt . q_t) / (2 R s_t . q_t + epsilon)),   for each head      (arXiv:2310.15719).

    k_rt = (1 - g_t) k_r,t-1 + cos(w_r t) g_t k_t;   v_rt = (1 - b_t) v_r,t-1 + cos(w_r t) b_t v_t;   s_t as k_rt, without cos

    with w_r from -pi to pi. The product of the two sums over r stands for the memory of outer products of keys and values,
    R (eta + 1) H numbers for eta H^2. Keys, queries and their gates have eta H features, an outer product of two vectors:
    k = relu(W_1 x) (x) relu(P_1 x), q = relu(W_2 x) (x) relu(P_2 x), g = sigmoid(W_3 x) (x) sigmoid(P_3 x); b = sigmoid(W_4 x).

    Attributes:
      head_dim: H; None divides embed_dim among the heads.
      expansion: eta.
      num_waves: R.
      epsilon: added to the sum of weights.
      one_clock: time goes on from segment to segment, as published for the episodes of an agent; otherwise each begins anew.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    expansion: int = 4
    num_waves: int = 2
    epsilon: float = 1e-5
    one_clock: bool = False
    chunk_size: int | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Of a head."""
        return head_width(self.embed_dim, self.num_heads, self.head_dim)

    def setup(self) -> None:
        """Projections as matrices, [D, heads H] or [D, heads eta], and back, all with biases."""
        for name in ("expansion", "num_waves"):
            if getattr(self, name) < 1:
                raise UsageError(f"config.model.mixer.{name}={getattr(self, name)} must be at least 1.")
        start = nn.initializers.orthogonal(math.sqrt(2))
        dense = functools.partial(Dense, kernel_init=start, dtype=self.dtype, param_dtype=self.param_dtype)
        wide, spread = self.num_heads * self.width, self.num_heads * self.expansion
        self.key, self.query, self.value, self.value_gate, self.key_gate = (dense(wide) for _ in range(5))
        self.key_spread, self.query_spread, self.gate_spread = (dense(spread) for _ in range(3))
        self.out = dense(self.embed_dim)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Waves:
        """See Mixer."""
        size, wide = (batch_size, self.num_waves, self.num_heads), self.expansion * self.width
        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        tick = jnp.full(batch_size, FIRST_TICK, jnp.int32)
        return Waves(zeros((*size, wide)), zeros((*size, self.width)), zeros((batch_size, self.num_heads, wide)), tick)

    def __call__(self, x: Array, tokens: Tokens, state: Waves | None = None) -> tuple[Array, Waves | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""

        def product(act: Any, wide: Any, spread: Any) -> Array:
            """[B, T, N, eta H], eta outside."""
            a, p = (act(split_heads(project(x), self.num_heads).astype(jnp.float32)) for project in (wide, spread))
            outer = p[..., None] * a[..., None, :]
            return outer.reshape(*outer.shape[:3], -1)

        k = product(nn.relu, self.key, self.key_spread)
        q = product(nn.relu, self.query, self.query_spread)
        key_gate = product(nn.sigmoid, self.key_gate, self.gate_spread)
        v, value_gate = (
            split_heads(project(x), self.num_heads).astype(jnp.float32) for project in (self.value, self.value_gate)
        )
        fed = (q, k, v, key_gate, nn.sigmoid(value_gate))
        before = self.init_state(len(x), 0, 0) if state is None else state
        out, after = in_time_order(self._remember, fed, tokens, before)
        return self.out(merge_heads(out).astype(self.dtype)), None if state is None else after

    def _remember(
        self, fed: tuple[Array, ...], writes: Array | None, starts: Array | None, before: Waves
    ) -> tuple[Array, Waves]:
        """See in_time_order; to [B, T, N, H]."""
        q, k, v, key_gate, value_gate = fed
        if writes is not None:  # a query or padding writes nothing, and time stands still for it
            key_gate, value_gate = (jnp.where(writes[..., None, None], a, 0) for a in (key_gate, value_gate))
        keep_keys, keep_values = 1 - key_gate, 1 - value_gate
        if starts is not None:  # what was before is gone
            keep_keys, keep_values = (jnp.where(starts[..., None, None], 0, a) for a in (keep_keys, keep_values))
        ticks, last = self._ticks(q[..., 0, 0], writes, starts, before.tick)
        wave = cosines(ticks, self.num_waves)[..., None, None]  # [B, T, R, 1, 1]
        keys, values = (k * key_gate)[:, :, None] * wave, (v * value_gate)[:, :, None] * wave
        sums = (keys, values, k * key_gate)
        keep = (keep_keys[:, :, None], keep_values[:, :, None], keep_keys)
        out, (keys, values, total) = self._read(q, sums, keep, before)
        return out, Waves(keys, values, total, last)

    def _ticks(self, like: Array, writes: Array | None, starts: Array | None, before: Array) -> tuple[Array, Array]:
        """The time of each token, [B, T] int32 as `like`: of one that writes, one more than of the last; and the last, [B]."""
        writes = jnp.ones((1, 1), bool) if writes is None else writes
        counted = jnp.broadcast_to(writes, like.shape).astype(jnp.int32)
        ticks = before[:, None] + jnp.cumsum(counted, axis=1)
        if starts is not None and not self.one_clock:
            lead = jnp.where(starts, ticks - counted - FIRST_TICK, 0)
            ticks = ticks - jax.lax.cummax(lead, axis=1)
        return ticks, ticks[:, -1]

    def _read(self, q: Array, sums: Any, keep: Any, before: Waves) -> tuple[Array, Any]:
        """What queries [B, T, N, eta H] read in decaying sums, and the last of them; backward works the sums out anew."""
        batch, length = q.shape[:2]
        chunk = min(self.chunk_size or CHUNK, length)

        def split(a: Array, filling: float) -> Array:
            """[B, T, ...] to [T / C, B, C, ...]; what fills the last chunk up keeps the memory as it is."""
            fill = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (a.ndim - 2)
            a = jnp.pad(a, fill, constant_values=filling)
            return jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0)

        def body(memory: Any, inputs: Any) -> tuple[Any, Array]:
            q, sums, keep = inputs
            keys, values, total = (decaying_sum(*arrays) for arrays in zip(sums, keep, memory, strict=True))
            alike = jnp.einsum("btrnh,btnh->btrn", keys, q)
            weight = 2 * self.num_waves * jnp.einsum("btnh,btnh->btn", total, q) + self.epsilon
            out = jnp.einsum("btrnh,btrn->btnh", values, alike) / weight[..., None]
            return tuple(a[:, -1] for a in (keys, values, total)), out

        cut = split(q, 0.0), tuple(split(a, 0.0) for a in sums), tuple(split(a, 1.0) for a in keep)
        start = (before.keys, before.values, before.total)
        memory, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start, cut)
        return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length], memory


def cosines(ticks: Array, num_waves: int) -> Array:
    """cos(w_r t) for frequencies evenly from -pi to pi, [..., R] float32; the phase is worked out in whole numbers.

    Args:
      ticks: [...] int32.
      num_waves: R; one wave has the frequency -pi.
    """
    steps = max(num_waves - 1, 1)
    half_turns = (2 * np.arange(num_waves) - steps).reshape(*(1,) * ticks.ndim, -1)  # in units of pi / steps
    phase = (ticks[..., None] % (2 * steps)) * jnp.asarray(half_turns, jnp.int32) % (2 * steps)
    return jnp.cos(phase.astype(jnp.float32) * (math.pi / steps))


def decaying_sum(values: Array, keep: Array, before: Array) -> Array:
    """h_t = keep_t h_{t-1} + values_t, [B, T, ...], by a scan over pairs of tokens.

    Args:
      values: [B, T, ...].
      keep: [B, T, ...], of as many axes.
      before: [B, ...], h before the first token.
    """
    values = values.at[:, 0].add(keep[:, 0] * before)

    def pair(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] * b[0], a[1] * b[0] + b[1]

    return jax.lax.associative_scan(pair, (keep, values), axis=1)[1]
