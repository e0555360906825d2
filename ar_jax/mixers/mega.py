"""Mega (arXiv:2209.10655): a gated single head of attention over moving averages."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.line import empty_line
from ar_jax.mixers.common.moving_average import MovingAverage
from ar_jax.mixers.common.short_convolution import empty_ring
from ar_jax.mixers.common.single_head import ATTENTIONS, Head, attend
from ar_jax.mixers.norms import NORMS, make_norm
from ar_jax.mixers.protocol import Tokens

BIASES = ("simple", "rotary")


@struct.dataclass
class MegaState:
    """What Mega remembers.

    Attributes:
      average: the moving average's state.
      entries: keys and values, all of them or, with chunks, the last chunk_size - 1.
    """

    average: Any
    entries: Any


class Mega(nn.Module):
    """out = u * (silu(W_h m + r * attention(q, k, v) U) - x),   m = silu(EMA(x)),   v = silu(W_v x).

    The gates u = sigmoid(W_u m) and r = silu(W_r m), and z = silu(W_z m), come from the moving average; q and k are z times
    and plus vectors of their own. x + out is the published layer, norm_first=False its post-norm form.

    Attributes:
      z_dim: width of q and k.
      v_dim: width of v; None takes twice embed_dim.
      ema_dim: dimensions of the moving average in each channel.
      truncation: tokens that it averages, at least 2; 0 for all.
      attention: "softmax", "laplace" or "relu2"; the last two divide q . k by the number of keys that are visible.
      chunk_size: attention reads its own chunk of so many tokens (linear cost); 0 has none.
      causal: attention and average read earlier tokens; otherwise all.
      bias: of a distance: "simple", a learned number, or "rotary", a product of two vectors that the distance turns.
      max_positions: of the "simple" bias, beyond which distances share theirs; None takes the chunk, or all places.
      norm: one of its own in front of average and values, which the residual (x above) does not pass: "none", or a key of
        ar_jax.mixers.norms.
      norm_epsilon: of it.
      num_rows: the places that there are.
    """

    embed_dim: int
    num_rows: int = 0
    z_dim: int = 64
    v_dim: int | None = None
    ema_dim: int = 16
    truncation: int = 0
    attention: str = "softmax"
    chunk_size: int = 0
    causal: bool = True
    bias: str = "simple"
    max_positions: int | None = None
    norm: str = "none"
    norm_epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def reads_peers(self) -> bool:
        """The bidirectional form reads everything."""
        return not self.causal

    @property
    def value_dim(self) -> int:
        """Width of v."""
        return self.v_dim or 2 * self.embed_dim

    def setup(self) -> None:
        """The average, projections, and the vectors that make q and k of z."""
        self._check()
        dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        self.average = self._average()
        self.value, self.gate = dense(self.value_dim), dense(self.value_dim)
        self.shared, self.update, self.hidden = dense(self.z_dim), dense(self.embed_dim), dense(self.embed_dim)
        self.out = dense(self.embed_dim)
        small = nn.initializers.normal(0.02)
        self.scales = self.param("scales", small, (2, self.z_dim), self.param_dtype)
        self.offsets = self.param("offsets", nn.initializers.zeros, (2, self.z_dim), self.param_dtype)
        if self.bias == "rotary":
            self.turned = self.param("turned", small, (2, self.z_dim), self.param_dtype)
        else:
            reach = self.max_positions or self.chunk_size or max(self.num_rows, 1)
            self.distances = self.param("distances", small, (2 * reach - 1,), self.param_dtype)
        if self.norm != "none":
            self.own_norm = make_norm(self.norm, self.norm_epsilon, self.dtype, self.param_dtype)()

    @nn.nowrap
    def _average(self) -> MovingAverage:
        return MovingAverage(self.embed_dim, self.ema_dim, self.causal, self.truncation, self.param_dtype)

    def _check(self) -> None:
        where = "model.mixer"
        choose(ATTENTIONS, self.attention, f"{where}.attention")
        choose(dict.fromkeys(BIASES), self.bias, f"{where}.bias")
        choose(NORMS | {"none": None}, self.norm, f"{where}.norm")
        for name in ("truncation", "chunk_size"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise UsageError(f"config.{where}.{name}={getattr(self, name)} must be 0, or at least 2.")
        if self.bias == "rotary" and self.z_dim % 2:
            raise UsageError(f"config.{where}.bias='rotary' turns pairs, but z_dim={self.z_dim} is odd; make it even.")

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Any:
        """See Mixer: the average, and keys and values of a chunk or, without chunks, of all tokens."""
        if not self.causal:
            return ()
        width = self.z_dim + self.value_dim + 1
        average = self._average().clone(parent=None).init_state(batch_size)
        if self.chunk_size:
            return MegaState(average, empty_ring(batch_size, self.chunk_size, width, self.dtype))
        return MegaState(average, empty_line(batch_size, max_len, width, self.dtype))

    def __call__(self, x: Array, tokens: Tokens, state: Any = None) -> tuple[Array, Any]:
        """See Mixer. Tokens of one step read each other in the order they are fed; a query reads itself, too."""
        out, _, after = self.parts(x, tokens, state)
        return out, after

    def parts(self, x: Array, tokens: Tokens, state: Any = None) -> tuple[Array, tuple[Array, Array], Any]:
        """Outputs, what they are made of (the average [B, T, D] and the weights of attention), and the state."""
        x = x.astype(self.dtype)
        normed = x if self.norm == "none" else self.own_norm(x)
        remembered = state if isinstance(state, MegaState) else MegaState(None, None)
        averaged, average = self.average(normed, tokens, remembered.average)
        averaged = nn.silu(averaged).astype(self.dtype)
        shared = nn.silu(self.shared(averaged))
        q, k = ((shared * self.scales[i][None, None] + self.offsets[i][None, None]).astype(self.dtype) for i in (0, 1))
        head = Head(self.attention, self.chunk_size, self.causal, self._bias)
        read, weights, entries = attend(head, q, k, nn.silu(self.value(normed)), tokens, remembered.entries)
        hidden = nn.silu(self.hidden(averaged) + self.out(read * nn.silu(self.gate(averaged))))
        out = nn.sigmoid(self.update(averaged)) * (hidden - x)
        return out, (averaged, weights), MegaState(average, entries) if isinstance(state, MegaState) else state

    def _bias(self, distance: Array) -> Array:
        """Of keys so many tokens before their query, float32 in the shape of the distances."""
        if self.bias == "simple":
            table = self.distances.astype(jnp.float32)
            reach = (len(table) + 1) // 2
            return table[jnp.clip(reach - 1 - distance, 0, 2 * reach - 2)]
        half = self.z_dim // 2
        a, b = (jax.lax.complex(row[:half], row[half:]) for row in self.turned.astype(jnp.float32))
        speed = jnp.float32(10000.0) ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = distance.astype(jnp.float32)[..., None] * speed.reshape((1,) * distance.ndim + (-1,))
        product = (a * b.conj()).reshape((1,) * distance.ndim + (-1,))
        return (product.real * jnp.cos(angle) - product.imag * jnp.sin(angle)).sum(axis=-1)
