"""Mamba (arXiv:2312.00752): a diagonal state space whose step, input and reading follow the token, behind a convolution."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.selective_scan import selective_scan
from ar_jax.mixers.common.memory import Remembered
from ar_jax.mixers.common.silu_convolution import SiluConvolution, between
from ar_jax.mixers.common.step_size import log_uniform_steps
from ar_jax.mixers.protocol import Tokens, in_time_order

FORGOTTEN = 104.0  # nats: nothing is left in float32 of what decays by so much
STEP_STARTS = ("random", "constant")


class Mamba(nn.Module):
    """out = W_o (y * silu(W_z x)),   u = silu(conv(W_u x)) (arXiv:2312.00752, fig. 3 and alg. 2), for each channel of u.

    h_t = exp(d_t a) h_{t-1} + d_t u_t b_t,   y_t = c_t . h_t + skip u_t,   d_t = softplus(W_up W_down u_t + bias),

    b_t = W_b u_t and c_t = W_c u_t in R^S, the same for all channels; a = -exp(log_rate) < 0.

    Attributes:
      state_dim: S.
      width: taps of the convolution.
      expand: channels, as a multiple of embed_dim.
      step_rank: width between W_down and W_up; None takes a sixteenth of embed_dim.
      step_span: softplus(bias) starts between these two numbers, evenly in its logarithm.
      step_floor: and never below this one.
      step_start: W_up starts "random" or "constant".
      step_scale: times this and step_rank ** -1/2.
      conv_bias: the convolution has a bias.
      use_bias: W_u, W_z and W_o have biases.
      chunk_size: see `selective_scan`.
    """

    embed_dim: int
    state_dim: int = 16
    width: int = 4
    expand: float = 2
    step_rank: int | None = None
    step_span: Sequence[float] = (0.001, 0.1)
    step_floor: float = 1e-4
    step_start: str = "random"
    step_scale: float = 1.0
    conv_bias: bool = True
    use_bias: bool = False
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        """Of the state space."""
        if self.state_dim < 1 or int(self.expand * self.embed_dim) < 1:
            raise UsageError(
                f"config.model.mixer.state_dim={self.state_dim} and expand={self.expand} must give at least one state and channel."
            )
        return int(self.expand * self.embed_dim)

    def setup(self) -> None:
        """Projections, the convolution, and the state space: log_rate [C, S], skip [C]."""
        choose(dict.fromkeys(STEP_STARTS), self.step_start, "model.mixer.step_start")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rank = math.ceil(self.embed_dim / 16) if self.step_rank is None else self.step_rank
        plain = functools.partial(Dense, use_bias=False, **types)
        self.fed, self.gate = (Dense(self.channels, use_bias=self.use_bias, **types) for _ in range(2))
        self.convolution = self._convolution()
        self.step_down, self.write, self.read = plain(rank), plain(self.state_dim), plain(self.state_dim)
        bound = self.step_scale * rank**-0.5
        self.step_up = Dense(
            self.channels,
            kernel_init=between(bound) if self.step_start == "random" else nn.initializers.constant(bound),
            bias_init=log_uniform_steps(self.step_span, self.step_floor),
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
        )
        self.log_rate = self.param("log_rate", _counted, (self.channels, self.state_dim), self.param_dtype)
        self.skip = self.param("skip", nn.initializers.ones, (self.channels,), self.param_dtype)
        self.out = Dense(self.embed_dim, use_bias=self.use_bias, **types)

    @nn.nowrap
    def _convolution(self) -> SiluConvolution:
        return SiluConvolution(self.channels, self.width, self.conv_bias, self.dtype, self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Remembered:
        """See Mixer: what the convolution reaches, and [B, C, S] float32."""
        recent = self._convolution().clone(parent=None).init_state(batch_size)
        return Remembered(recent, jnp.zeros((batch_size, self.channels, self.state_dim), jnp.float32))

    def __call__(self, x: Array, tokens: Tokens, state: Remembered | None = None) -> tuple[Array, Remembered | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        before = Remembered() if state is None else state
        values, recent = self.convolution(self.fed(x), tokens, before.recent)
        y, memory = in_time_order(self._scan, values, tokens, before.memory)
        out = self.out(y * nn.silu(self.gate(x)))
        return out, None if state is None else Remembered(recent, memory)

    def _scan(
        self, values: Array, writes: Array | None, starts: Array | None, memory: Array | None
    ) -> tuple[Array, Array]:
        """See in_time_order; values [B, T, C] to y."""
        step = jax.nn.softplus(self.step_up(self.step_down(values)))
        rate = -jnp.exp(self.log_rate.astype(jnp.float32))
        if writes is not None:  # a query or padding writes nothing, and time stands still for it
            step = jnp.where(writes[..., None], step, 0)
        written = values
        if starts is not None:  # a step so long that all fades, of a value so much smaller
            long = jax.lax.stop_gradient(FORGOTTEN / -rate.max(axis=1))[None, None]
            written = jnp.where(starts[..., None], values * (step / long).astype(values.dtype), values)
            step = jnp.where(starts[..., None], long, step)
        y, memory = selective_scan(
            written,
            step,
            rate,
            self.write(values),
            self.read(values),
            initial_state=memory,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        return y + self.skip.astype(values.dtype)[None, None] * values, memory


def _counted(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """log 1 ... log S for every channel: S4D's real numbers (arXiv:2206.11893)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=jnp.float32))[None], shape).astype(dtype)
