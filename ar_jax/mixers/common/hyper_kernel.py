"""Hyper-kernels: the weights of a convolution as a function of their coordinates (HyperZZW's slow net, arXiv:2401.17948)."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.kernels.dense import Dense

GAMMA = 6.0  # frequencies of the first layer are drawn from a Gamma distribution of this shape, of layer i of GAMMA / (i + 1)


class HyperKernel(nn.Module):
    """W(c) = O h_L,  h_0 = s_0(c),  h_i = s_i(c) * (L_i h_{i-1} + b_i) + p(c),  s_i(c) = sin(A_i c + a_i).

    With a context x the kernel depends on it: h_i becomes (alpha_i sg(h_i) + beta_i h_i / |h_i|) * (F_i u + f_i), with
    u = gelu(G R x), sg without gradient, and |.| over the kernel's coordinates.

    Attributes:
      features: channels of the kernel.
      size: coordinates of the kernel that have a p, and by whose root the kernel is divided at first.
      num_axes: numbers of a coordinate.
      hidden_dim: of h.
      num_layers: L.
      frequency: of s, in turns from -1 to 1, over 2 pi times the draw.
      context: the kernel depends on one.
    """

    features: int
    size: int
    num_axes: int = 1
    hidden_dim: int = 16
    num_layers: int = 1
    frequency: float = 1.0
    context: bool = False
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Layers, all float32: coordinates are told apart by their last bits."""
        dense = functools.partial(Dense, param_dtype=self.param_dtype)
        uniform, ones = nn.initializers.variance_scaling(1.0, "fan_in", "uniform"), nn.initializers.ones
        layers = range(self.num_layers)
        self.waves = [
            dense(self.hidden_dim, kernel_init=functools.partial(_frequencies, GAMMA / (i + 1), self.frequency))
            for i in range(self.num_layers + 1)
        ]
        self.layers = [dense(self.hidden_dim, kernel_init=uniform, bias_init=ones) for _ in layers]
        small = nn.initializers.variance_scaling(1 / self.size, "fan_in", "uniform")
        self.out = dense(self.features, kernel_init=small)
        self.place = self.param("place", nn.initializers.zeros, (self.size,), self.param_dtype)
        if self.context:
            self.reduce, self.mix = dense(self.hidden_dim), dense(self.hidden_dim)
            self.gates = [dense(self.hidden_dim, kernel_init=uniform, bias_init=ones) for _ in layers]
            shape = (self.num_layers, self.hidden_dim)
            self.alpha = self.param("alpha", ones, shape, self.param_dtype)
            self.beta = self.param("beta", nn.initializers.constant(0.1), shape, self.param_dtype)

    def __call__(self, coordinates: Array, index: Array, context: Array | None = None) -> Array:
        """The kernel at coordinates.

        Args:
          coordinates: [..., K, num_axes] float32, those of the kernel from -1 to 1.
          index: [..., K] int32, their numbers; p is that of the last one behind it.
          context: [..., 1 or K, C] with axes in front that broadcast with theirs.

        Returns:
          [..., K, features] float32.
        """
        place = self.place.astype(jnp.float32)[jnp.minimum(index, self.size - 1)][..., None]
        hidden, gates = jnp.sin(self.waves[0](coordinates)), None
        if context is not None:
            gates = nn.gelu(self.mix(self.reduce(context.astype(jnp.float32))), approximate=False)
            shape = (*jnp.broadcast_shapes(hidden.shape[:-2], gates.shape[:-2]), *hidden.shape[-2:])
            hidden, place = (_as_many(a, len(shape)) for a in (hidden, place))
        for i, layer in enumerate(self.layers):
            wave = _as_many(jnp.sin(self.waves[i + 1](coordinates)), hidden.ndim)
            hidden = wave * layer(hidden) + place
            if gates is None:
                continue
            norm = jnp.sqrt(jnp.maximum(jnp.square(hidden).sum(axis=-2, keepdims=True), 1e-24))
            own = (1,) * (hidden.ndim - 1) + (-1,)
            kept = (
                self.alpha[i].reshape(own) * jax.lax.stop_gradient(hidden) + self.beta[i].reshape(own) * hidden / norm
            )
            hidden = kept * self.gates[i](gates)
        return self.out(hidden)


def line_coordinates(index: Array, size: int) -> Array:
    """Numbers [...] of a line of so many places as coordinates [..., 1] from -1 to 1."""
    return (2 * index.astype(jnp.float32) / max(size - 1, 1) - 1)[..., None]


def _as_many(a: Array, axes: int) -> Array:
    return a.reshape((1,) * (axes - a.ndim) + a.shape)


def _frequencies(shape: float, frequency: float, key: Array, size: Any, dtype: Any = jnp.float32) -> Array:
    """Uniform numbers as of a linear layer, times 2 pi frequency times a draw of Gamma(shape, 1)."""
    uniform_key, gamma_key = jax.random.split(key)
    bound = 1 / math.sqrt(size[0])
    plain = jax.random.uniform(uniform_key, size, jnp.float32, -bound, bound)
    return (2 * math.pi * frequency * jax.random.gamma(gamma_key, shape, size) * plain).astype(dtype)
