"""Gated state spaces (arXiv:2206.13947): a diagonal state space (DSS) in few channels, between gates."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.long_convolution import long_convolution
from ar_jax.mixers.norms import make_norm
from ar_jax.mixers.protocol import Tokens


class GSS(nn.Module):
    """out = W_o (W_g DSS(gelu(W_v x)) * gelu(W_u x)), DSS(v)_t = Re sum_n c_n h_tn + d v_t (arXiv:2206.13947, fig. 1).

    h_t = exp(L) h_{t-1} + (exp(L) - 1) / L v_t with L = -exp(a) + i exp(b), N numbers for all channels and steps of size 1:
    whole sequences by Fourier transforms, single tokens by the recurrence, whose state has a constant size.

    Attributes:
      state_dim: N.
      dss_dim: channels of the state space, H; None takes a quarter of embed_dim.
      gate_dim: width of the gates; None takes four times embed_dim.
      log_frequency: L's imaginary part is exp(b), otherwise b.
      norm_state: a norm of its own in front of the state space, as in the published code.
      norm_epsilon: of it.
    """

    embed_dim: int
    state_dim: int = 64
    dss_dim: int | None = None
    gate_dim: int | None = None
    log_frequency: bool = True
    norm_state: bool = True
    norm_epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        """Of the state space."""
        return self.dss_dim or max(self.embed_dim // 4, 1)

    def setup(self) -> None:
        """Projections, and the state space: L [2, N] (a and b), c [2, H, N] (real and imaginary) and d [H]."""
        plain = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        width, state = self.gate_dim or 4 * self.embed_dim, self.state_dim
        self.value, self.gate, self.lift = plain(self.channels), plain(width), plain(width)
        self.out = Dense(self.embed_dim, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.norm_state:
            self.norm = make_norm("layer", self.norm_epsilon, self.dtype, self.param_dtype)()
        normal = nn.initializers.normal(1.0)
        self.poles = self.param("poles", normal, (2, state), self.param_dtype)
        self.read = self.param("read", nn.initializers.normal(state**-0.5), (2, self.channels, state), self.param_dtype)
        self.skip = self.param("skip", normal, (self.channels,), self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Array:
        """See Mixer: [B, H, N] complex64, whatever the length."""
        return jnp.zeros((batch_size, self.channels, self.state_dim), jnp.complex64)

    def __call__(self, x: Array, tokens: Tokens, state: Array | None = None) -> tuple[Array, Array | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed; a query reads itself, too."""
        gelu = functools.partial(nn.gelu, approximate=False)
        remembered, state = self.state_space(gelu(self.value(x)), tokens, state)
        return self.out(self.lift(remembered) * gelu(self.gate(x))), state

    def state_space(self, values: Array, tokens: Tokens, state: Array | None = None) -> tuple[Array, Array | None]:
        """DSS of values [B, T, H], and the state after them."""
        values = (self.norm(values) if self.norm_state else values).astype(jnp.float32)
        decay, frequency = self.poles.astype(jnp.float32)
        log_decay = jax.lax.complex(-jnp.exp(decay), jnp.exp(frequency) if self.log_frequency else frequency)
        weight = jax.lax.complex(*self.read.astype(jnp.float32)) * ((jnp.exp(log_decay) - 1) / log_decay)[None]
        out, state = long_convolution(values, log_decay[None], weight, tokens, state)
        return (out + self.skip.astype(jnp.float32)[None, None] * values).astype(self.dtype), state
