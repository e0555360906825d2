"""Mamba-2 (arXiv:2405.21060): a selective state space whose rate is one number per head, computed as linear attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.kernels.log_linear import empty_levels, log_linear_attention
from ar_jax.mixers.common.gated_norm import GatedNorm
from ar_jax.mixers.common.memory import Remembered, fading
from ar_jax.mixers.common.silu_convolution import SiluConvolution
from ar_jax.mixers.common.step_size import check_span, log_uniform_steps
from ar_jax.mixers.protocol import Tokens, in_time_order, merge_heads, split_heads


class Mamba2(nn.Module):
    """out = W_o norm(y silu(W_z x)),   (u, b, c) = silu(conv(W_f x)) (arXiv:2405.21060, sec. 7), for each head of u.

    H_t = exp(d_t a) H_{t-1} + d_t b_t u_t^T,   y_t = H_t^T c_t + skip u_t,   d_t = softplus(W_d x_t + bias),

    a = -exp(log_rate) < 0, b_t and c_t in R^S shared by the heads of a group, and norm is an RMS norm of each group.

    Attributes:
      state_dim: S.
      head_dim: channels of a head.
      num_groups: groups of neighbouring heads.
      width: taps of the convolution.
      expand: inner channels, as a multiple of embed_dim.
      ssm_dim: so many of them are the state space's, and the others a gated MLP's, silu(W_1 x) * W_2 x, which stands in
        front in W_o; None gives it all.
      norm: there is a norm; otherwise y is gated only.
      norm_first: norm(y) silu(W_z x).
      norm_epsilon: of the norm.
      rate_span: -a starts evenly between these two numbers.
      step_span: softplus(bias) starts between these two numbers, evenly in its logarithm.
      step_floor: and never below this one.
      step_limits: d_t stays between them; None leaves it.
      skip_per_channel: skip is a number per channel, not per head.
      num_levels: there is a memory for each power of two of the past, read with softplus(level_weight W_l x) per level
        (log-linear Mamba-2, arXiv:2506.04761): so many levels serve 2^(num_levels - 1) tokens. None has one memory.
      conv_bias: the convolution has a bias.
      use_bias: all projections have biases.
      chunk_size: see `linear_attention`, or `log_linear_attention`.
    """

    embed_dim: int
    state_dim: int = 128
    head_dim: int = 64
    num_groups: int = 1
    width: int = 4
    expand: float = 2
    ssm_dim: int | None = None
    norm: bool = True
    norm_first: bool = False
    norm_epsilon: float = 1e-5
    rate_span: Sequence[float] = (1.0, 16.0)
    step_span: Sequence[float] = (0.001, 0.1)
    step_floor: float = 1e-4
    step_limits: Sequence[float] | None = None
    skip_per_channel: bool = False
    num_levels: int | None = None
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
        return int(self.expand * self.embed_dim) if self.ssm_dim is None else self.ssm_dim

    @property
    def num_heads(self) -> int:
        """Of the state space."""
        return self.channels // self.head_dim

    def setup(self) -> None:
        """Projections, the convolution, the norm, and the state space: log_rate [N], skip [N] or [C]."""
        self._check()
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(Dense, use_bias=self.use_bias, **types)
        spare = int(self.expand * self.embed_dim) - self.channels
        if spare:
            self.mlp_gate, self.mlp = dense(spare), dense(spare)
        self.gate, self.fed = dense(self.channels), dense(self._convolution().channels)
        self.step = Dense(self.num_heads, use_bias=self.use_bias, dtype=jnp.float32, param_dtype=self.param_dtype)
        self.convolution = self._convolution()
        start = log_uniform_steps(self.step_span, self.step_floor)
        self.step_bias = self.param("step_bias", start, (self.num_heads,), self.param_dtype)
        self.log_rate = self.param("log_rate", self._start_rates, (self.num_heads,), self.param_dtype)
        count = self.channels if self.skip_per_channel else self.num_heads
        self.skip = self.param("skip", nn.initializers.ones, (count,), self.param_dtype)
        if self.num_levels is not None:
            self.levels = Dense(
                self.num_heads * self.num_levels,
                use_bias=self.use_bias,
                dtype=jnp.float32,
                param_dtype=self.param_dtype,
            )
            size = (self.num_heads, self.num_levels)
            self.level_weight = self.param("level_weight", nn.initializers.ones, size, self.param_dtype)
        if self.norm:
            self.gated_norm = GatedNorm(self.num_groups, self.norm_first, self.norm_epsilon, **types)
        self.out = dense(self.embed_dim)

    @nn.nowrap
    def _check(self) -> None:
        where = "config.model.mixer."
        inner = self.expand * self.embed_dim
        if min(self.state_dim, self.head_dim, self.num_groups) < 1 or inner != int(inner):
            raise UsageError(
                f"{where}state_dim={self.state_dim}, head_dim={self.head_dim} and num_groups={self.num_groups} must be at least "
                f"1, and expand={self.expand} times embed_dim={self.embed_dim} a whole number."
            )
        if not 0 < self.channels <= inner or self.channels % self.head_dim:
            raise UsageError(
                f"{where}head_dim={self.head_dim} must divide the state space's {self.channels} channels, which are at most "
                f"expand * embed_dim = {int(inner)}; set head_dim or ssm_dim."
            )
        if self.num_heads % self.num_groups:
            raise UsageError(f"{where}num_groups={self.num_groups} does not divide the {self.num_heads} heads.")
        if self.num_levels is not None and self.num_levels < 2:
            raise UsageError(f"{where}num_levels={self.num_levels} must be at least 2, or None.")
        check_span("rate_span", self.rate_span)
        if self.step_limits is not None:
            check_span("step_limits", self.step_limits, zero=True)

    def _start_rates(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, *self.rate_span)).astype(dtype)

    @nn.nowrap
    def _convolution(self) -> SiluConvolution:
        channels = self.channels + 2 * self.num_groups * self.state_dim
        return SiluConvolution(channels, self.width, self.conv_bias, self.dtype, self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Remembered:
        """See Mixer: what the convolution reaches, and [B, N, S, H] float32, or so much for each level that max_len needs."""
        self._check()
        recent = self._convolution().clone(parent=None).init_state(batch_size)
        if self.num_levels is not None:
            levels = min(max(max_len - 1, 1).bit_length(), self.num_levels - 1)
            tree = empty_levels(batch_size, self.num_heads, levels, self.state_dim, self.head_dim)
            return Remembered(recent, tree)
        size = (batch_size, self.num_heads, self.state_dim, self.head_dim)
        return Remembered(recent, jnp.zeros(size, jnp.float32))

    def __call__(self, x: Array, tokens: Tokens, state: Remembered | None = None) -> tuple[Array, Remembered | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        before = Remembered() if state is None else state
        values, recent = self.convolution(self.fed(x), tokens, before.recent)
        step = jax.nn.softplus(self.step(x) + self.step_bias.astype(jnp.float32)[None, None])
        if self.step_limits is not None and tuple(self.step_limits) != (0, math.inf):
            step = jnp.clip(step, *self.step_limits)
        fed = (values, step) if self.num_levels is None else (values, step, self._level_scales(x))
        y, memory = in_time_order(self._scan, fed, tokens, before.memory)
        gate = self.gate(x)
        y = self.gated_norm(y, gate) if self.norm else y * nn.silu(gate)
        if self.channels < int(self.expand * self.embed_dim):
            y = jnp.concatenate([nn.silu(self.mlp_gate(x)) * self.mlp(x), y], axis=-1)
        return self.out(y), None if state is None else Remembered(recent, memory)

    def _level_scales(self, x: Array) -> Array:
        """[B, T, N, L]."""
        served = 2 ** ((self.num_levels or 1) - 1)
        if x.shape[1] > served:
            raise UsageError(
                f"config.model.mixer.num_levels={self.num_levels} serve {served} tokens; for {x.shape[1]} set it to "
                f"{(x.shape[1] - 1).bit_length() + 1}."
            )
        raw = split_heads(self.levels(x), self.num_heads)
        return jax.nn.softplus(self.level_weight.astype(jnp.float32)[None, None] * raw)

    def _scan(
        self, fed: tuple[Array, ...], writes: Array | None, starts: Array | None, memory: Any
    ) -> tuple[Array, Any]:
        """See in_time_order; values of the convolution, steps [B, T, N], and scales of levels, to y [B, T, C]."""
        values, step, *scales = fed
        if writes is not None:  # a query or padding writes nothing, and time stands still for it
            step = jnp.where(writes[..., None], step, 0)
        log_decay = -step * jnp.exp(self.log_rate.astype(jnp.float32))[None, None]
        if not scales:
            log_decay = fading(log_decay, None, starts)
        shared = self.num_groups * self.state_dim
        u, b, c = jnp.split(values, [self.channels, self.channels + shared], axis=-1)
        b, c = (jnp.repeat(split_heads(s, self.num_groups), self.num_heads // self.num_groups, axis=2) for s in (b, c))
        u = split_heads(u, self.num_heads).astype(jnp.float32)
        options: dict[str, Any] = {
            "initial_state": memory,
            "chunk_size": self.chunk_size,
            "implementation": self.implementation,
        }
        written = (u * step[..., None]).astype(values.dtype)
        if scales:
            y, memory = log_linear_attention(
                c, b, written, *scales, log_decay=log_decay, writes=writes, starts=starts, **options
            )
        else:
            y, memory = linear_attention(c, b, written, log_decay=log_decay, **options)
        skip = self.skip.astype(jnp.float32).reshape(1, 1, self.num_heads, -1)
        return merge_heads(y.astype(jnp.float32) + skip * u).astype(values.dtype), memory
