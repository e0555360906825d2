"""Gated depthwise causal convolution: its state is a ring buffer of the last few tokens."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.protocol import NEVER, Tokens, take


@struct.dataclass
class Ring:
    """The last values that came, value number n at place n mod (width - 1).

    Attributes:
      values: [B, width - 1, D].
      count: int32 scalar, how many have come.
    """

    values: Array
    count: Array


class Convolution(nn.Module):
    """out_t = W_o (silu(W_g x_t) * sum_{j<width} w_j * W_v x_{t-j}), one filter w per channel (cf. arXiv:1901.10430).

    A query (a token that is not remembered) stands behind the tokens that it may read.
    """

    embed_dim: int
    width: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False

    def setup(self) -> None:
        """Projections and the filters [width, D], the present token's first."""
        if self.width < 2:
            raise UsageError(
                f"config.model.mixer.width={self.width} must be at least 2: a filter of one token mixes nothing."
            )
        dense = functools.partial(Dense, self.embed_dim, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.value, self.gate, self.out = dense(), dense(), dense()
        self.filters = self.param(
            "filters", nn.initializers.normal(self.width**-0.5), (self.width, self.embed_dim), self.param_dtype
        )

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Ring:
        """An empty ring: zeros stand before the first token."""
        return Ring(jnp.zeros((batch_size, self.width - 1, self.embed_dim), self.dtype), jnp.zeros((), jnp.int32))

    def __call__(self, x: Array, tokens: Tokens, state: Ring | None = None) -> tuple[Array, Ring | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        reach, n = self.width - 1, tokens.num_remembered
        values, filters = self.value(x), self.filters.astype(self.dtype)[:, None, None]
        if tokens.padded:
            values = jnp.where((tokens.step < NEVER)[..., None], values, 0)
        before = self.init_state(x.shape[0], 0, 0) if state is None else state
        oldest_first = (before.count + jnp.arange(reach)) % reach
        line = jnp.concatenate(
            [before.values[:, oldest_first], values[:, :n]], axis=1
        )  # remembered token i at i + reach
        mixed = sum(filters[j] * line[:, reach - j : reach - j + n] for j in range(self.width))
        if n < x.shape[1]:
            earlier = (tokens.step[:, None, :n] <= tokens.step[:, n:, None]).sum(axis=-1)  # [B or 1, queries]
            asked = filters[0] * values[:, n:] + sum(
                filters[j] * take(line, earlier + reach - j) for j in range(1, self.width)
            )
            mixed = jnp.concatenate([mixed, asked], axis=1)
        out = self.out(mixed * nn.silu(self.gate(x)))
        return out, None if state is None else _push(state, values[:, :n])


def _push(ring: Ring, values: Array) -> Ring:
    reach = ring.values.shape[1]
    last = min(reach, values.shape[1])
    place = (ring.count + values.shape[1] - last + jnp.arange(last)) % reach
    kept = ring.values.at[:, place].set(
        values[:, values.shape[1] - last :].astype(ring.values.dtype), unique_indices=True
    )
    return Ring(kept, ring.count + values.shape[1])
