"""Norms by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from ar_jax.config import choose

# The variance is that of the differences from the mean, not a difference of two large means: a step slower, and exact.
_layer = functools.partial(nn.LayerNorm, use_fast_variance=False)
NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": nn.RMSNorm,
    "layer": _layer,
    "plain": functools.partial(_layer, use_bias=False, use_scale=False),  # without parameters, for adaLN
}


def make_norm(kind: str, epsilon: float, dtype: Any, param_dtype: Any) -> Callable[..., Any]:
    """A constructor of the norm: a key of NORMS, over the last axis, with so much added to the variance."""
    norm = choose(NORMS, kind, "model.norm")
    return functools.partial(norm, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype)
