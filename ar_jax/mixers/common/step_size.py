"""The step sizes of selective state spaces: how they start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError


def log_uniform_steps(span: Sequence[float], floor: float) -> Any:
    """An initialiser of biases b for which softplus(b) is between the two numbers of span, evenly in its logarithm.

    Args:
      span: the smallest and the largest step size (arXiv:2312.00752, sec. 3.6, has 0.001 and 0.1).
      floor: no step is smaller.

    Raises:
      UsageError: the span does not rise from above zero.
    """
    check_span("step_span", span)
    low, high = (float(np.log(end)) for end in span)

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high)), floor)
        return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)  # softplus's inverse

    return draw


def check_span(name: str, span: Sequence[float], zero: bool = False) -> None:
    """Raises UsageError where an option is no pair of rising numbers above (or at) zero."""
    if len(span) != 2 or not (0 if zero else 1e-30) <= span[0] <= span[1]:
        raise UsageError(
            f"config.model.mixer.{name}={tuple(span)} must be two numbers, the smaller one first, "
            f"{'not below' if zero else 'above'} zero."
        )
