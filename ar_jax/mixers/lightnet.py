"""LightNet: linear attention whose keys are a running softmax over time (S192)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.softmax_memory import NOTHING, Memory, empty_memory, softmax_mean, softmax_memory
from ar_jax.mixers.common.place_order import written_before_read
from ar_jax.mixers.protocol import NEVER, State, Tokens, in_time_order, merge_heads, split_heads

ROTATIONS = ("none", "cosine")


class LightNet(nn.Module):
    """o_t = sum_j (q_t . softmax_j(k)) v_j, the softmax per channel over the tokens up to t  (arXiv:2405.21022).

    q = silu(W_q x); y = W_o (norm(o) * swish(W_2 W_1 x)), the norm over all heads. The decay is additive: a token takes
    from what was before as much as it adds, wherever it stands, so one scan serves tokens of any number of dimensions.

    Attributes:
      expand_ratio: width of the keys of a head.
      gate_dim: the rank of the output's gate.
      norm_epsilon: added to the mean square.
      rotation: "none", or "cosine": MD-LRPE, q and k become (q cos a, q sin a), the angles a the position on each axis
        times learned speeds, and the channels dealt to the axes in equal parts.
      causal: otherwise all tokens read all others.
    """

    embed_dim: int
    num_heads: int = 4
    expand_ratio: int = 16
    gate_dim: int = 16
    norm_epsilon: float = 1e-6
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
        self.norm = nn.RMSNorm(epsilon=self.norm_epsilon, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.rotation == "cosine":
            per_axis = -(-self.expand_ratio // self.position_axes)
            speeds = 10000.0 ** (-np.arange(per_axis) / per_axis)
            start = np.broadcast_to(speeds, (self.num_heads, per_axis))
            self.speeds = self.param("speeds", lambda key: jnp.asarray(start, self.param_dtype))

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Memory | tuple[()]:
        """See Mixer: a matrix and the log of its weights for each head."""
        if not self.causal:
            return ()
        keys = self.expand_ratio * (2 if self.rotation == "cosine" else 1)
        return empty_memory(batch_size, self.num_heads, keys, self.embed_dim // self.num_heads)

    def __call__(self, x: Array, tokens: Tokens, state: State | None = None) -> tuple[Array, State | None]:
        """See Mixer. Causal: tokens of one step read each other in the order they are fed."""
        if self.causal:
            out, after = in_time_order(self._mix, self._with_angles(x, tokens), tokens, state)
            return out, (None if state is None else after)
        if tokens.segment is None:
            q, log_k, v, amount = self._heads(self._with_angles(x, tokens))
            log_k = jnp.where((tokens.step < NEVER)[..., None, None], log_k, NOTHING)
            return self._finish(softmax_mean(q, log_k, v, amount), x), state
        # All write before the first reads: the sequence once to write, and once more to ask.
        twice = written_before_read(tokens)
        again = self._with_angles(jnp.concatenate([x, x], axis=1), twice)
        return in_time_order(self._mix, again, twice, None)[0][:, x.shape[1] :], state

    def _mix(
        self, fed: Array, writes: Array | None, starts: Array | None, memory: Memory | None
    ) -> tuple[Array, Memory]:
        """See in_time_order."""
        q, log_k, v, amount = self._heads(fed)
        if writes is not None:
            log_k = jnp.where(writes[..., None, None], log_k, NOTHING)
        out, after = softmax_memory(q, log_k, v, amount=amount, starts=starts, memory=memory)
        return self._finish(out, fed[..., : self.embed_dim]), after

    def _with_angles(self, x: Array, tokens: Tokens) -> Array:
        """x with the coordinates behind its channels, so that they come into the order of time with it."""
        if self.rotation == "none":
            return x
        place = jnp.maximum(tokens.position, 0).astype(jnp.float32)
        place = jnp.broadcast_to(place, (len(x), *place.shape[1:]))
        return jnp.concatenate([x.astype(jnp.float32), place], axis=-1)

    def _heads(self, fed: Array) -> tuple[Array, Array, Array, Array | None]:
        """q, log k, v and the keys' factors of x and its coordinates."""
        x = fed[..., : self.embed_dim].astype(self.dtype)
        q = nn.silu(split_heads(self.query(x), self.num_heads)) * self.expand_ratio**-0.5
        log_k = split_heads(self.key(x), self.num_heads).astype(jnp.float32)
        v = split_heads(self.value(x), self.num_heads)
        if self.rotation == "none":
            return q, log_k, v, None
        place = fed[..., self.embed_dim :][..., None, :, None]  # [B, T, 1, D, 1]
        angle = place * self.speeds.astype(jnp.float32)[None, None, :, None, :]
        angle = angle.reshape(*angle.shape[:3], -1)[..., : self.expand_ratio]
        turn = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return jnp.concatenate([q, q], axis=-1) * turn.astype(q.dtype), jnp.concatenate([log_k] * 2, axis=-1), v, turn

    def _finish(self, out: Array, x: Array) -> Array:
        x = x.astype(self.dtype)
        gate = self.gate_up(self.gate_down(x))
        return self.out(self.norm(merge_heads(out)) * nn.swish(gate))
