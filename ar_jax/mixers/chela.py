"""CHELA (arXiv:2406.08128): linear attention in tiles over short-long convolutions."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.mixers.common.long_convolution import finite_convolution
from ar_jax.mixers.common.memory import fading
from ar_jax.mixers.common.short_convolution import Ring, empty_ring, short_convolution
from ar_jax.mixers.protocol import Tokens, in_time_order, merge_heads, split_heads


@struct.dataclass
class ChelaState:
    """What CHELA remembers, whatever the length; None for a whole sequence.

    Attributes:
      short: the last values that the short filters reach.
      long: those that the long filters reach.
      memory: [B, N, Z, H] float32, of linear attention.
    """

    short: Ring | None
    long: Ring | None
    memory: Array | None


class CHELA(nn.Module):
    """out = W_o (norm(attention(q, k, v)) * silu(W_r c)),   c = silu(long * silu(short * x)), v = silu(W_v x).

    `*` with a filter is a causal convolution, one filter per channel; q and k are z = silu(W_z c) times and plus vectors of
    their own, as in Mega. Attention is linear, S_t = S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, and works in tiles.

    Attributes:
      num_heads: of attention.
      z_dim: width of q and k, of all heads.
      v_dim: width of v and of the gate, of all heads; None takes twice embed_dim.
      short_width: taps of the short filters.
      long_width: taps of the long ones, which start as decaying powers.
      chunk_size: of a tile; None chooses.
    """

    embed_dim: int
    num_heads: int = 4
    z_dim: int = 64
    v_dim: int | None = None
    short_width: int = 4
    long_width: int = 256
    chunk_size: int | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def value_dim(self) -> int:
        """Width of v."""
        return self.v_dim or 2 * self.embed_dim

    def setup(self) -> None:
        """Filters [width, D], the present token's tap first, projections, and the vectors that make q and k of z."""
        for name in ("z_dim", "value_dim"):
            if self.num_heads < 1 or getattr(self, name) % self.num_heads:
                raise UsageError(f"num_heads={self.num_heads} does not divide {name}={getattr(self, name)}.")
        for name in ("short_width", "long_width"):
            if getattr(self, name) < 2:
                raise UsageError(f"config.model.mixer.{name}={getattr(self, name)} must be at least 2.")
        plain = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.shared, self.value, self.gate = plain(self.z_dim), plain(self.value_dim), plain(self.value_dim)
        self.out = plain(self.embed_dim)
        start = nn.initializers.normal(self.short_width**-0.5)
        self.short = self.param("short", start, (self.short_width, self.embed_dim), self.param_dtype)
        self.long = self.param("long", _fading, (self.long_width, self.embed_dim), self.param_dtype)
        self.scales = self.param("scales", nn.initializers.normal(1.0), (2, self.z_dim), self.param_dtype)
        self.offsets = self.param("offsets", nn.initializers.zeros, (2, self.z_dim), self.param_dtype)
        self.norm = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> ChelaState:
        """See Mixer."""
        short, long = (
            empty_ring(batch_size, width, self.embed_dim, self.dtype) for width in (self.short_width, self.long_width)
        )
        size = (batch_size, self.num_heads, self.z_dim // self.num_heads, self.value_dim // self.num_heads)
        return ChelaState(short, long, jnp.zeros(size, jnp.float32))

    def __call__(self, x: Array, tokens: Tokens, state: ChelaState | None = None) -> tuple[Array, ChelaState | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        x = x.astype(self.dtype)
        before = ChelaState(None, None, None) if state is None else state
        near, short = short_convolution(x, self.short, tokens, before.short)
        far, long = finite_convolution(nn.silu(near), self.long, tokens, before.long)
        convolved = nn.silu(far).astype(self.dtype)
        shared = nn.silu(self.shared(convolved))
        q, k = (shared * self.scales[i][None, None] + self.offsets[i][None, None] for i in (0, 1))
        fed = jnp.concatenate([q.astype(self.dtype), k.astype(self.dtype), nn.silu(self.value(x))], axis=-1)
        read, memory = in_time_order(self._attend, fed, tokens, before.memory)
        out = self.out(merge_heads(self.norm(read)) * nn.silu(self.gate(convolved)))
        return out, None if state is None else ChelaState(short, long, memory)

    def _attend(self, fed: Array, writes: Array | None, starts: Array | None, state: Any) -> tuple[Array, Array]:
        """See in_time_order; q, k and v side by side to [B, T, N, H]."""
        parts = jnp.split(fed, [self.z_dim, 2 * self.z_dim], axis=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in parts)
        if writes is not None:  # a query or padding writes nothing
            k = jnp.where(writes[..., None, None], k, 0)
        log_decay = fading(None, None, starts, q.shape[:3])
        scale = q.shape[-1] ** -0.5
        return linear_attention(q * scale, k, v, log_decay=log_decay, initial_state=state, chunk_size=self.chunk_size)


def _fading(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Filters that fade with the distance, in every channel at another speed."""
    speed = jnp.geomspace(1.0, shape[0], shape[1])[None]
    fade = jnp.exp(-jnp.arange(shape[0], dtype=jnp.float32)[:, None] / speed)
    return (nn.initializers.normal(1.0)(key, shape) * fade / jnp.sqrt(jnp.square(fade).sum(axis=0))[None]).astype(dtype)
