"""Attention to a fixed number of slots that tokens write to: gated slot attention (GSA), and bounded memory (ABC)."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.slot_attention import Slots, empty_slots, slot_attention
from ar_jax.kernels.softmax_memory import NOTHING, running_weights
from ar_jax.mixers.common.feature_maps import FEATURE_MAPS, num_features
from ar_jax.mixers.common.head_gate import GATES, gated
from ar_jax.mixers.common.heads import head_width
from ar_jax.mixers.common.memory import fading
from ar_jax.mixers.common.short_convolution import Ring
from ar_jax.mixers.common.silu_convolution import SiluConvolution
from ar_jax.mixers.positions import rotate
from ar_jax.mixers.protocol import Tokens, in_time_order, merge_heads, split_heads

WRITES = ("gated", "softmax")
LARGEST_LOGIT = 32.0


@struct.dataclass
class SlotsState:
    """What is remembered, whatever the length.

    Attributes:
      slots: keys and values in them.
      log_total: [B, K, M] float32, the log of the sum of all that was written to each; None where writes are gated.
      recent: the last values that the short filters reach; None without them.
    """

    slots: Slots
    log_total: Array | None
    recent: Ring | None


class SlotAttention(nn.Module):
    """o_t = V_t^T softmax(K_t^T q_t), where K and V hold M slots that fade by a_t as token t writes w_t: `slot_attention`.

    Attributes:
      num_kv_heads: heads of keys and values, a divisor of num_heads; None takes num_heads.
      head_dim: width of a head's queries and keys; None takes embed_dim / num_heads.
      value_dim: width of a head's values; None takes head_dim.
      num_slots: M, for each head of keys; None takes head_dim.
      write: "gated" is a = sigmoid(W x)^(1 / decay_divisor), w = 1 - a (GSA, arXiv:2409.07146); "softmax" writes
        exp(W x), of at most LARGEST_LOGIT nats, over the sum of all that was written to the slot so far (ABC, arXiv:2110.02488).
      decay_divisor: the power's.
      feature_map: of queries and keys, one of FEATURE_MAPS that keeps their width.
      value_map: of values, likewise.
      query_scale: factor of queries; None takes 1 / sqrt(head_dim).
      rope_base: queries and keys are turned by their places; 0 turns nothing.
      short_width: taps of a causal convolution with silu behind the projections of q, k and v; 0 has none.
      out_map: of what is read, one of FEATURE_MAPS that keeps its width.
      norm_heads: behind that, each head is RMS-normalised by itself, all with one scale; otherwise all together.
      norm_epsilon: of this norm.
      out_gate: what is normalised is multiplied by this function of W_g x: a key of GATES.
    """

    embed_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    num_slots: int | None = None
    write: str = "gated"
    decay_divisor: float = 8.0
    feature_map: str = "silu"
    value_map: str = "silu"
    query_scale: float | None = 1.0
    rope_base: float = 0.0
    short_width: int = 0
    out_map: str = "silu"
    norm_heads: bool = False
    norm_epsilon: float = 1e-5
    out_gate: str = "none"
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int, int, int, int]:
        """Query heads, key heads, the width of a head's keys and of its values, and slots."""
        head_dim = head_width(self.embed_dim, self.num_heads, self.head_dim)
        shared = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if shared < 1 or self.num_heads % shared:
            raise UsageError(
                f"num_kv_heads={shared} does not divide num_heads={self.num_heads}; use one of its divisors."
            )
        return self.num_heads, shared, head_dim, self.value_dim or head_dim, self.num_slots or head_dim

    def setup(self) -> None:
        """Projections as matrices, [D, heads H] and back, and the norm."""
        heads, shared, head_dim, value_dim, num_slots = self.dims
        choose(dict.fromkeys(WRITES), self.write, "model.mixer.write")
        choose(GATES, self.out_gate, "model.mixer.out_gate")
        for key in ("feature_map", "value_map", "out_map"):
            choose(FEATURE_MAPS, getattr(self, key), f"model.mixer.{key}")
            if num_features(getattr(self, key), 2) != 2:
                raise UsageError(f"config.model.mixer.{key}={getattr(self, key)!r} changes the width; set another.")
        if self.rope_base and head_dim % 2:
            raise UsageError(f"rope_base={self.rope_base} turns pairs, but head_dim={head_dim} is odd; set it to 0.")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = functools.partial(Dense, use_bias=False, **types)
        self.query, self.key, self.value = (plain(width) for width in self._widths)
        self.gate = nn.Dense(shared * num_slots, use_bias=False, dtype=jnp.float32, param_dtype=self.param_dtype)
        self.out = plain(self.embed_dim)
        self.norm = nn.RMSNorm(epsilon=self.norm_epsilon, **types)
        if self.out_gate != "none":
            self.out_gates = plain(heads * value_dim)
        if self.short_width:
            self.short = SiluConvolution(sum(self._widths), self.short_width, use_bias=False, **types)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Of the projections to queries, keys and values."""
        heads, shared, head_dim, value_dim, _ = self.dims
        return heads * head_dim, shared * head_dim, shared * value_dim

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> SlotsState:
        """See Mixer."""
        _, shared, head_dim, value_dim, num_slots = self.dims
        slots = empty_slots(batch_size, shared, num_slots, head_dim, value_dim)
        total = jnp.full((batch_size, shared, num_slots), NOTHING, jnp.float32) if self.write == "softmax" else None
        if not self.short_width:
            return SlotsState(slots, total, None)
        short = SiluConvolution(sum(self._widths), self.short_width, dtype=self.dtype, parent=None)
        return SlotsState(slots, total, short.init_state(batch_size))

    def __call__(self, x: Array, tokens: Tokens, state: SlotsState | None = None) -> tuple[Array, SlotsState | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        parts, recent = [self.query(x), self.key(x), self.value(x)], None
        if self.short_width:
            mixed, recent = self.short(jnp.concatenate(parts, axis=-1), tokens, None if state is None else state.recent)
            ends = self._widths[0], sum(self._widths[:2])
            parts = jnp.split(mixed, ends, axis=-1)
        heads, shared, head_dim, _, _ = self.dims
        q, k, v = (split_heads(a, n) for a, n in zip(parts, (heads, shared, shared), strict=True))
        if self.rope_base:
            q, k = (rotate(a, tokens.position, self.rope_base) for a in (q, k))
        phi = FEATURE_MAPS[self.feature_map]
        q, k, v = phi(q), phi(k), FEATURE_MAPS[self.value_map](v)
        q = q * (head_dim**-0.5 if self.query_scale is None else self.query_scale)
        fed = (q, k, v, split_heads(self.gate(x).astype(jnp.float32), shared))
        before = None if state is None else (state.slots, state.log_total)
        out, (slots, total) = in_time_order(self._attend, fed, tokens, before)
        return self._finish(out, x), None if state is None else SlotsState(slots, total, recent)

    def _attend(
        self, fed: tuple[Array, ...], writes: Array | None, starts: Array | None, before: Any
    ) -> tuple[Array, tuple[Slots, Array | None]]:
        """See in_time_order; to [B, T, N, E]."""
        q, k, v, logits = fed
        slots, total = (None, None) if before is None else before
        if self.write == "softmax":
            logits = jnp.clip(logits, -LARGEST_LOGIT, LARGEST_LOGIT)
            if writes is not None:
                logits = jnp.where(writes[..., None, None], logits, NOTHING)
            total = jnp.full(logits[:, 0].shape, NOTHING) if total is None else total
            write, log_decay, total = running_weights(logits, starts, total)
        else:
            log_decay = jax.nn.log_sigmoid(logits) / self.decay_divisor
            log_decay = fading(log_decay, writes, None)
            write = -jnp.expm1(log_decay)  # nothing, by a query or padding
            log_decay = fading(log_decay, None, starts)
        options: dict[str, Any] = {"chunk_size": self.chunk_size, "implementation": self.implementation}
        out, slots = slot_attention(q, k, v, write, log_decay, slots=slots, **options)
        return out, (slots, total)

    def _finish(self, out: Array, x: Array) -> Array:
        """Norm, gate and last projection of what was read, [B, T, N, E]."""
        out = FEATURE_MAPS[self.out_map](out)
        out = merge_heads(self.norm(out)) if self.norm_heads else self.norm(merge_heads(out))
        return self.out(gated(self.out_gate, out, None if self.out_gate == "none" else self.out_gates(x)))
