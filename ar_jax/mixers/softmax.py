"""Softmax attention on the step rule, with a growing cache or, with a window, a ring buffer."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.step_attention import step_attention
from ar_jax.mixers.positions import RelativeBias, rotate
from ar_jax.mixers.protocol import Tokens, merge_heads, split_heads

UNSEEN = np.iinfo(np.int32).max  # the step of an empty place in the cache: later than every query


@struct.dataclass
class Cache:
    """Keys, values, steps and positions of the remembered tokens, in the order they came; a ring once it is full.

    Attributes:
      k: [B, S, K, H].
      v: [B, S, K, H].
      step: [B, S] int32.
      position: [B, S, D] int32, or D = 0 where no bias needs it.
      count: int32 scalar, how many tokens have come.
    """

    k: Array
    v: Array
    step: Array
    position: Array
    count: Array

    def append(self, new: Cache) -> Cache:
        """Writes new tokens behind the last, over the oldest ones where the end is reached."""
        size, length = self.k.shape[1], new.k.shape[1]
        skipped = max(length - size, 0)
        place = (self.count + skipped + jnp.arange(length - skipped)) % size

        def write(old: Array, came: Array) -> Array:
            came = jnp.broadcast_to(came, (old.shape[0], *came.shape[1:])).astype(old.dtype)
            return old.at[:, place].set(came[:, skipped:], unique_indices=True)

        names = ("k", "v", "step", "position")
        return Cache(**{n: write(getattr(self, n), getattr(new, n)) for n in names}, count=self.count + length)


class Softmax(nn.Module):
    """Multi-head attention (arXiv:1706.03762), grouped (GQA) or multi-query (MQA) if num_kv_heads is smaller.

    Attributes:
      num_kv_heads: key and value heads, a divisor of num_heads; None takes num_heads.
      head_dim: embed_dim / num_heads if None.
      rope_base: base of the rotary embedding over all axes of the position; 0 turns nothing.
      qk_norm: RMS-normalise queries and keys per head (arXiv:2302.05442).
      bias_distance: reach of a learned relative bias per axis; 0 has none.
      window: only the last so many steps are read, and the state is a ring buffer; 0 reads all.
    """

    embed_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float = 10000.0
    qk_norm: bool = False
    bias_distance: int = 0
    window: int = 0
    position_axes: int = 0
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int, int]:
        """Query heads, key heads and the width of a head."""
        if self.num_heads < 1 or (self.head_dim is None and self.embed_dim % self.num_heads):
            divisors = [d for d in range(1, self.embed_dim + 1) if self.embed_dim % d == 0]
            raise UsageError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; use one of {divisors}, or set head_dim."
            )
        shared = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if shared < 1 or self.num_heads % shared:
            raise UsageError(f"num_kv_heads={shared} does not divide num_heads={self.num_heads}.")
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        if self.rope_base and head_dim % 2:
            raise UsageError(
                f"the rotary embedding turns pairs, but head_dim={head_dim} is odd; set rope_base=0 or an even head_dim."
            )
        return self.num_heads, shared, head_dim

    def setup(self) -> None:
        """Projections as matrices: [D, heads H] and back."""
        heads, shared, head_dim = self.dims
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value = dense(heads * head_dim), dense(shared * head_dim), dense(shared * head_dim)
        self.out = dense(self.embed_dim)
        if self.qk_norm:
            self.query_norm = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype)
            self.key_norm = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.bias_distance:
            self.bias = RelativeBias(heads, self.bias_distance, self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Cache:
        """A cache for max_len tokens or, with a window, for as many as its steps can hold."""
        _, shared, head_dim = self.dims
        size = max(min(max_len, self.window * max_step_len) if self.window else max_len, 1)
        entries = jnp.zeros((batch_size, size, shared, head_dim), self.dtype)
        position = jnp.zeros((batch_size, size, self.position_axes if self.bias_distance else 0), jnp.int32)
        # Two arrays, not one twice: a sampler donates its state, and a buffer can be donated only once.
        return Cache(
            entries, jnp.zeros_like(entries), jnp.full((batch_size, size), UNSEEN), position, jnp.zeros((), jnp.int32)
        )

    def __call__(self, x: Array, tokens: Tokens, state: Cache | None = None) -> tuple[Array, Cache | None]:
        """See Mixer."""
        q = split_heads(self.query(x), self.num_heads)
        if self.qk_norm:
            q = self.query_norm(q)
        if self.rope_base:
            q = rotate(q, tokens.position, self.rope_base)
        new = self._entries(x, tokens)
        if state is None:
            readable = new
        elif self.window:  # the ring still needs what this piece would overwrite
            readable, state = jax.tree.map(_join, state, new), state.append(new)
        else:
            readable = state = state.append(new)
        bias = self.bias(tokens.position, readable.position) if self.bias_distance else None
        out = step_attention(
            q,
            readable.k,
            readable.v,
            tokens.step,
            readable.step,
            window=self.window or None,
            bias=bias,
            implementation=self.implementation,
        )
        return self.out(merge_heads(out)), state

    def _entries(self, x: Array, tokens: Tokens) -> Cache:
        """What the remembered tokens of x leave in the cache."""
        n = tokens.num_remembered
        x, step, position = x[:, :n], tokens.step[:, :n], tokens.position[:, :n]
        k = split_heads(self.key(x), self.dims[1])
        if self.qk_norm:
            k = self.key_norm(k)
        if self.rope_base:
            k = rotate(k, position, self.rope_base)
        return Cache(
            k,
            split_heads(self.value(x), self.dims[1]),
            step,
            position if self.bias_distance else position[..., :0],
            jnp.zeros((), jnp.int32),
        )


def _join(old: Array, new: Array) -> Array:
    return (
        old
        if old.ndim == 0
        else jnp.concatenate([old, jnp.broadcast_to(new, (old.shape[0], *new.shape[1:])).astype(old.dtype)], axis=1)
    )
