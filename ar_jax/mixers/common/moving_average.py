"""The multi-dimensional damped exponential moving average of Mega (arXiv:2209.10655, sec. 3.1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.mixers.common.long_convolution import long_convolution, powers
from ar_jax.mixers.common.place_order import in_place_order
from ar_jax.mixers.common.short_convolution import empty_ring, short_convolution
from ar_jax.mixers.protocol import Tokens

AXES = {"alpha": 0.2, "delta": 0.2, "beta": 0.02, "gamma": 1.0}  # the deviations that they start with


class MovingAverage(nn.Module):
    """y_t = eta . h_t + omega x_t,   h_t = (1 - a d) h_{t-1} + a beta x_t, of N dimensions in every channel.

    a = sigmoid(alpha) is the share of what is new, d = sigmoid(delta) damps the forgetting; eta = gamma / sqrt(N).

    Attributes:
      channels: C.
      dimensions: N.
      causal: otherwise a second average of its own runs from the sequence's end to its start; both read the present token.
      truncation: so many tokens are averaged, at least 2; 0 for all.
    """

    channels: int
    dimensions: int = 16
    causal: bool = True
    truncation: int = 0
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """[1 or 2 directions, C, N] each."""
        shape = (1 if self.causal else 2, self.channels, self.dimensions)
        for name, deviation in AXES.items():
            setattr(self, name, self.param(name, _start(name, deviation), shape, self.param_dtype))
        self.omega = self.param("omega", nn.initializers.normal(1.0), (self.channels,), self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int) -> Any:
        """[B, C, N], or the last values where the average is truncated; nothing where it is not causal."""
        if not self.causal:
            return ()
        if self.truncation:
            return empty_ring(batch_size, self.truncation, self.channels, jnp.float32)
        return jnp.zeros((batch_size, self.channels, self.dimensions), jnp.float32)

    def __call__(self, x: Array, tokens: Tokens, state: Any = None) -> tuple[Array, Any]:
        """Values [B, T, C] to their averages, float32, and the state after them."""
        x = x.astype(jnp.float32)
        if self.causal:
            averages, state = self._one_way(0, x, tokens, state)
        else:
            averages = in_place_order(self._both_ways, x, tokens)
        return averages + self.omega.astype(jnp.float32)[None, None] * x, state

    def _both_ways(self, x: Array, tokens: Tokens) -> Array:
        tokens = dataclasses.replace(tokens, num_remembered=x.shape[1])
        reversed_tokens = jax.tree.map(lambda a: a[:, ::-1], tokens)
        there, _ = self._one_way(0, x, tokens, None)
        here, _ = self._one_way(1, x[:, ::-1], reversed_tokens, None)
        return there + here[:, ::-1]

    def _one_way(self, direction: int, x: Array, tokens: Tokens, state: Any) -> tuple[Array, Any]:
        alpha, delta, beta, gamma = (getattr(self, name)[direction].astype(jnp.float32) for name in AXES)
        share = nn.sigmoid(alpha)
        log_decay = jnp.log1p(-share * nn.sigmoid(delta))
        weight = share * beta * gamma * self.dimensions**-0.5
        if self.truncation:
            return short_convolution(x, powers(log_decay, weight, self.truncation), tokens, state)
        return long_convolution(x, log_decay, weight, tokens, state)


def _start(name: str, deviation: float) -> Any:
    """The published initialiser: beta alternates around 1 and -1."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        around = (-1.0) ** jnp.arange(shape[-1])[None, None] if name == "beta" else 0.0
        return nn.initializers.normal(deviation)(key, shape, dtype) + jnp.asarray(around, dtype)

    return draw
