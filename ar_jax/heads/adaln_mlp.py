"""A residual MLP that time and condition modulate: the network of a diffusion per token (MAR, arXiv:2406.11838, sec. 4)."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.kernels.dense import Dense
from ar_jax.kernels.dispatch import constrain
from ar_jax.mixers.norms import make_norm

NUM_FREQUENCIES = 128
EPSILON = 1e-6


def sinusoid(time: Array) -> Array:
    """(cos(w time) | sin(w time)) with w from 1 down to 1/10000, geometrically: [...] to [..., 256] float32."""
    # In float32 as the official ones: at step 999 the last bit of a frequency is 6e-5 of an angle.
    frequencies = np.exp(np.float32(-np.log(10000)) * np.arange(NUM_FREQUENCIES, dtype=np.float32) / NUM_FREQUENCIES)
    angle = time[..., None].astype(jnp.float32) * frequencies.reshape(*[1] * time.ndim, -1)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _by_batch(x: Array) -> Array:
    """x [..., B, T, W], cut over devices by B, whatever the weights are cut by: there are many more rows than weights."""
    return constrain(x, (*[None] * (x.ndim - 3), "batch", None, None)) if x.ndim > 2 else x


class ResidualBlock(nn.Module):
    """x + gate f(norm(x) (1 + scale) + shift), with f = W silu(W .) and (shift | scale | gate) = W silu(context)."""

    width: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, active: Array) -> tuple[Array, None]:
        """x [..., W] is the carry of the scan over blocks; active [..., W] is silu(context), the same for all."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(Dense, kernel_init=nn.initializers.xavier_uniform(), **types)
        modulation = Dense(3 * self.width, kernel_init=nn.initializers.zeros, name="modulation", **types)
        shift, scale, gate = jnp.split(modulation(active), 3, axis=-1)
        inner = make_norm("layer", EPSILON, **types)(name="norm")(x) * (1 + scale) + shift
        inner = dense(self.width, name="down")(nn.silu(dense(self.width, name="up")(inner)))
        return _by_batch(x + gate * inner), None


class AdaLNMLP(nn.Module):
    """(x, time, condition) to an output per token, zero at first. Blocks are scanned: depth costs no compile time.

    The context of all blocks is embed_time(time) + embed_condition(condition): both can be computed before a loop over x.

    Attributes:
      out_channels: the size of an output.
      depth: residual blocks.
      width: of the blocks.
    """

    out_channels: int
    depth: int
    width: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Embeddings, blocks, and the modulated output."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        timed = functools.partial(Dense, self.width, kernel_init=nn.initializers.normal(0.02), **types)
        self.time_in, self.time_out = timed(), timed()
        self.condition = Dense(self.width, kernel_init=xavier, **types)
        self.input = Dense(self.width, kernel_init=xavier, **types)
        self.blocks = nn.scan(
            ResidualBlock, {"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth
        )(self.width, **types)
        self.norm = make_norm("plain", EPSILON, **types)()
        self.modulation = Dense(2 * self.width, kernel_init=zeros, **types)
        self.output = Dense(self.out_channels, kernel_init=zeros, **types)

    def embed_time(self, time: Array) -> Array:
        """Steps [...] to [..., W]."""
        # Steps that are drawn are on all devices; without this, so would be what they are made into.
        return _by_batch(self.time_out(nn.silu(self.time_in(_by_batch(sinusoid(time))))))

    def embed_condition(self, condition: Array) -> Array:
        """Hidden vectors [..., D] to [..., W]."""
        return self.condition(condition)

    def __call__(self, x: Array, context: Array) -> Array:
        """x [..., C] and context [..., W] to [..., out_channels], float32."""
        active = _by_batch(nn.silu(context))
        hidden, _ = self.blocks(_by_batch(self.input(x)), active)
        shift, scale = jnp.split(self.modulation(active), 2, axis=-1)
        return self.output(self.norm(hidden) * (1 + scale) + shift).astype(jnp.float32)
