"""Norms by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import choose
from ar_jax.mixers.common.statistics import Statistics

MOMENTUM = 0.1  # by how much a training step moves measured moments


class Twice(nn.Module):
    """An RMS norm behind another norm, each with its own scale (AiM's last one, arXiv:2408.12245)."""

    first: Callable[..., nn.Module]
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Over the last axis."""
        options: dict[str, Any] = dict(epsilon=self.epsilon, dtype=self.dtype, param_dtype=self.param_dtype)
        return nn.RMSNorm(**options, name="second")(self.first(**options, name="first")(x))


class Measured(nn.Module):
    """y = (x - m) / sqrt(s + epsilon) scale + bias, m and s each channel's mean and variance, which training measures.

    What batch normalisation is in evaluation (arXiv:1502.03167). It is the same in training here, where the moments follow
    those of the batches: those of the batch itself would tell a token of later ones.
    """

    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Over all axes but the last."""
        width, before = x.shape[-1], tuple(range(x.ndim - 1))
        kept = Statistics((2, width), _standard, "moments", name="statistics")
        mean, variance = (a.reshape((1,) * len(before) + (-1,)) for a in kept())
        scale = self.param("scale", nn.initializers.ones, (width,), self.param_dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), self.param_dtype).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        scale, bias = (a.reshape(mean.shape) for a in (scale, bias))
        out = (wide - mean) * jax.lax.rsqrt(variance + self.epsilon) * scale + bias
        seen = jnp.stack([wide.mean(axis=before), wide.var(axis=before)])
        return kept.moves(MOMENTUM * (seen - kept()), out.astype(self.dtype or x.dtype))


def _standard(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jnp.stack([jnp.zeros(shape[1:], dtype), jnp.ones(shape[1:], dtype)])


# The variance is that of the differences from the mean, not a difference of two large means: a step slower, and exact.
_layer = functools.partial(nn.LayerNorm, use_fast_variance=False)
NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": nn.RMSNorm,
    "layer": _layer,
    "plain": functools.partial(_layer, use_bias=False, use_scale=False),  # without parameters, for adaLN
    "rms_twice": functools.partial(Twice, nn.RMSNorm),
    "layer_rms": functools.partial(Twice, _layer),
    "batch": Measured,
}


def make_norm(kind: str, epsilon: float, dtype: Any, param_dtype: Any) -> Callable[..., Any]:
    """A constructor of the norm: a key of NORMS, over the last axis, with so much added to the variance."""
    norm = choose(NORMS, kind, "model.norm")
    return functools.partial(norm, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype)
