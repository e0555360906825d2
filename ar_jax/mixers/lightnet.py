"""LightNet: linear attention whose keys are a running softmax over time (S192)."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.softmax_memory import NOTHING, Memory, empty_memory, softmax_mean, softmax_memory
from ar_jax.mixers.common.place_order import written_before_read
from ar_jax.mixers.common.short_convolution import Ring
from ar_jax.mixers.common.silu_convolution import SiluConvolution
from ar_jax.mixers.protocol import NEVER, State, Tokens, in_time_order, merge_heads, split_heads

ROTATIONS = ("none", "cosine")


@struct.dataclass
class LightNetState:
    """What is remembered.

    Attributes:
      memory: a matrix and the log of its weights for each head.
      recent: the last projected tokens that the short filters reach; None without them.
    """

    memory: Memory
    recent: Ring | None


class LightNet(nn.Module):
    """o_t = sum_j (q_t . softmax_j(k)) v_j, the softmax per channel over the tokens up to t  (arXiv:2405.21022).

    q = silu(W_q x); y = W_o (norm(o) * swish(W_2 W_1 x)), the norm over all heads. The decay is additive: a token takes
    from what was before as much as it adds, wherever it stands, so one scan serves tokens of any number of dimensions.

    Attributes:
      expand_ratio: width of the keys of a head.
      gate_dim: the rank of the output's gate.
      short_width: taps of a causal convolution behind the projections of q, k and v, in front of silu; 0 has none.
      short_bias: it has an offset.
      norm_epsilon: added to the mean square.
      norm_scale: the norm has a scale.
      rotation: "none", or "cosine": MD-LRPE, q and k become (q cos a, q sin a), the angles a the position on each axis
        times learned speeds, and the channels dealt to the axes in equal parts.
      causal: otherwise all tokens read all others.
    """

    embed_dim: int
    num_heads: int = 4
    expand_ratio: int = 16
    gate_dim: int = 16
    short_width: int = 0
    short_bias: bool = False
    norm_epsilon: float = 1e-6
    norm_scale: bool = True
    rotation: str = "none"
    causal: bool = True
    position_axes: int = 1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def reads_peers(self) -> bool:
        """See Mixer."""
        return not self.causal

    def setup(self) -> None:
        """Projections as matrices, and the speeds of rotation."""
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise UsageError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; use one of its divisors."
            )
        choose(dict.fromkeys(ROTATIONS), self.rotation, "model.mixer.rotation")
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        keys = self.num_heads * self.expand_ratio
        self.query, self.key, self.value = dense(keys), dense(keys), dense(self.embed_dim)
        self.gate_down, self.gate_up, self.out = dense(self.gate_dim), dense(self.embed_dim), dense(self.embed_dim)
        if self.short_width:
            if not self.causal:
                raise UsageError(
                    "config.model.mixer: short_width reads earlier tokens only; set causal=True, or it to 0."
                )
            self.short = self._short()
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.norm = nn.RMSNorm(epsilon=self.norm_epsilon, use_scale=self.norm_scale, **types)
        if self.rotation == "cosine":
            per_axis = -(-self.expand_ratio // self.position_axes)
            speeds = 10000.0 ** (-np.arange(per_axis) / per_axis)
            start = np.broadcast_to(speeds, (self.num_heads, per_axis))
            self.speeds = self.param("speeds", lambda key: jnp.asarray(start, self.param_dtype))

    @nn.nowrap
    def _short(self, **options: Any) -> SiluConvolution:
        """Of q, k and v side by side."""
        channels = 2 * self.num_heads * self.expand_ratio + self.embed_dim
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return SiluConvolution(channels, self.short_width, self.short_bias, activate=False, **types, **options)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> LightNetState | tuple[()]:
        """See Mixer: a constant size, whatever the length."""
        if not self.causal:
            return ()
        keys = self.expand_ratio * (2 if self.rotation == "cosine" else 1)
        memory = empty_memory(batch_size, self.num_heads, keys, self.embed_dim // self.num_heads)
        return LightNetState(memory, self._short(parent=None).init_state(batch_size) if self.short_width else None)

    def __call__(self, x: Array, tokens: Tokens, state: State | None = None) -> tuple[Array, State | None]:
        """See Mixer. Causal: tokens of one step read each other in the order they are fed."""
        if self.causal:
            before = state if isinstance(state, LightNetState) else LightNetState(None, None)  # type: ignore[arg-type]
            projected, recent = self._projected(x), before.recent
            if self.short_width:
                projected, recent = self.short(projected, tokens, before.recent)
            fed = (projected, x, self._places(x, tokens))
            out, memory = in_time_order(self._mix, fed, tokens, before.memory)
            return out, (None if state is None else LightNetState(memory, recent))
        if tokens.segment is None:
            q, log_k, v, amount = self._heads(self._projected(x), self._places(x, tokens))
            log_k = jnp.where((tokens.step < NEVER)[..., None, None], log_k, NOTHING)
            return self._finish(softmax_mean(q, log_k, v, amount), x), state
        # All write before the first reads: the sequence once to write, and once more to ask.
        twice, both = written_before_read(tokens), jnp.concatenate([x, x], axis=1)
        again = (self._projected(both), both, self._places(both, twice))
        return in_time_order(self._mix, again, twice, None)[0][:, x.shape[1] :], state

    def _mix(
        self, fed: tuple[Array, Array, Array], writes: Array | None, starts: Array | None, memory: Memory | None
    ) -> tuple[Array, Memory]:
        """See in_time_order."""
        projected, x, places = fed
        q, log_k, v, amount = self._heads(projected, places)
        if writes is not None:
            log_k = jnp.where(writes[..., None, None], log_k, NOTHING)
        out, after = softmax_memory(q, log_k, v, amount=amount, starts=starts, memory=memory)
        return self._finish(out, x), after

    def _projected(self, x: Array) -> Array:
        """q, k and v side by side, [B, T, C]."""
        return jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)

    def _places(self, x: Array, tokens: Tokens) -> Array:
        """The coordinates of tokens, float32 [B, T, axes], where they are rotated by them; otherwise none."""
        place = jnp.maximum(tokens.position, 0).astype(jnp.float32)[..., : None if self.rotation == "cosine" else 0]
        return jnp.broadcast_to(place, (len(x), *place.shape[1:]))

    def _heads(self, projected: Array, places: Array) -> tuple[Array, Array, Array, Array | None]:
        """q, log k, v and the keys' factors."""
        keys = self.num_heads * self.expand_ratio
        q, log_k, v = (split_heads(a, self.num_heads) for a in jnp.split(projected, [keys, 2 * keys], axis=-1))
        q, log_k = nn.silu(q) * self.expand_ratio**-0.5, log_k.astype(jnp.float32)
        if self.rotation == "none":
            return q, log_k, v, None
        place = places[..., None, :, None]  # [B, T, 1, D, 1]
        angle = place * self.speeds.astype(jnp.float32)[None, None, :, None, :]
        angle = angle.reshape(*angle.shape[:3], -1)[..., : self.expand_ratio]
        turn = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return jnp.concatenate([q, q], axis=-1) * turn.astype(q.dtype), jnp.concatenate([log_k] * 2, axis=-1), v, turn

    def _finish(self, out: Array, x: Array) -> Array:
        x = x.astype(self.dtype)
        gate = self.gate_up(self.gate_down(x))
        return self.out(self.norm(merge_heads(out)) * nn.swish(gate))
