"""Norms by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import choose


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


# The variance is that of the differences from the mean, not a difference of two large means: a step slower, and exact.
_layer = functools.partial(nn.LayerNorm, use_fast_variance=False)
NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": nn.RMSNorm,
    "layer": _layer,
    "plain": functools.partial(_layer, use_bias=False, use_scale=False),  # without parameters, for adaLN
    "rms_twice": functools.partial(Twice, nn.RMSNorm),
    "layer_rms": functools.partial(Twice, _layer),
}


def make_norm(kind: str, epsilon: float, dtype: Any, param_dtype: Any) -> Callable[..., Any]:
    """A constructor of the norm: a key of NORMS, over the last axis, with so much added to the variance."""
    norm = choose(NORMS, kind, "model.norm")
    return functools.partial(norm, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype)
