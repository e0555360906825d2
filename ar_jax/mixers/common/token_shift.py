"""RWKV's token shift: each projection reads a mixture of the present token and the one before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.short_convolution import Ring, short_convolution
from ar_jax.mixers.protocol import Tokens

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
}


def to_the_one_before(x: Array, tokens: Tokens, before: Ring | None) -> tuple[Array, Ring | None]:
    """x_{t-1} - x_t, where zeros stand in front of a sequence and of each segment, and the state after."""
    earlier, after = short_convolution(x, jnp.asarray([[0.0], [1.0]], x.dtype), tokens, before)
    return earlier - x, after


class LowRank(nn.Module):
    """W_2 act(W_1 x) + b, where W_1 starts as zeros.

    Attributes:
      rank: of it.
      features: of the output.
      activation: a key of ACTIVATIONS.
      bias_init: how b starts; None has none.
      out_dtype: of W_2's product and of b; None takes dtype.
    """

    rank: int
    features: int
    activation: str = "tanh"
    bias_init: Any = None
    dtype: jnp.dtype = jnp.float32
    out_dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] to [..., features]."""
        down = Dense(
            self.rank, use_bias=False, kernel_init=nn.initializers.zeros, dtype=self.dtype,
            param_dtype=self.param_dtype, name="down",
        )  # fmt: skip
        up = Dense(
            self.features, use_bias=self.bias_init is not None, kernel_init=nn.initializers.orthogonal(0.1),
            bias_init=self.bias_init or nn.initializers.zeros, dtype=self.out_dtype or self.dtype,
            param_dtype=self.param_dtype, name="up",
        )  # fmt: skip
        return up(ACTIVATIONS[self.activation](down(x)))


def starting_at(values: Any) -> Any:
    """An initialiser that gives these numbers."""
    fixed = np.asarray(values, np.float32)
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(fixed.reshape(shape), dtype)


def ramp(size: int, power: float = 1.0) -> np.ndarray:
    """(n / (size - 1))^power for n < size."""
    return (np.arange(size) / max(size - 1, 1)) ** power


def shift_share(size: int, power: float) -> np.ndarray:
    """How much of the token before a projection starts to read, channel by channel: from all of it to nothing."""
    return 1 - (np.arange(size) / size) ** power
