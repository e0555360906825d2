"""MD-TPE: positions told by sums that fade along each axis of the grid (LightNet, S192)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.places import Places, empty_places, raster, read
from ar_jax.mixers.protocol import NEVER, Tokens, merge_heads, split_heads


class Toeplitz(nn.Module):
    """y = sum_a W_a norm(sum_{m<=n} c_a r_a^(n-m) x_m), m and n along axis a, the other coordinates alike (arXiv:2405.21022).

    A Toeplitz matrix along each axis, of one factor r in (0, 1) per head and one c per channel; a layer of it tells a
    model without positions where tokens are, in any number of dimensions. Of the places of a line those count whose token
    has come, by the rule of steps. Tokens without a place neither read nor are read.

    Attributes:
      num_heads: channels are dealt to them in equal parts.
    """

    embed_dim: int
    num_heads: int = 4
    grid: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    @nn.nowrap
    def _check(self) -> None:
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise UsageError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; use one of its divisors."
            )
        if not self.grid:
            raise UsageError("The mixer 'toeplitz' sums along the lines of a grid; give tokens with places.")

    def setup(self) -> None:
        """For each axis: factors, a norm and a projection."""
        self._check()
        axes = range(len(self.grid))
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.out = [Dense(self.embed_dim, use_bias=False, **types) for _ in axes]
        self.norm = [nn.RMSNorm(**types) for _ in axes]
        draw = nn.initializers.normal(1.0)
        self.decay = self.param("decay", draw, (len(self.grid), self.num_heads), self.param_dtype)
        self.amount = self.param("amount", draw, (len(self.grid), self.embed_dim), self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Places:
        """See Mixer: what stands at each place."""
        self._check()
        head_dim = self.embed_dim // self.num_heads
        places = empty_places(batch_size, math.prod(self.grid), self.num_heads, head_dim, self.dtype)
        return dataclasses.replace(
            places, k=places.k[..., :0]
        )  # there are no keys: who is read follows from the places

    def __call__(self, x: Array, tokens: Tokens, state: Places | None = None) -> tuple[Array, Places | None]:
        """See Mixer."""
        total, before = jnp.zeros_like(x), state
        v = split_heads(x.astype(self.dtype), self.num_heads)
        for axis, length in enumerate(self.grid):
            place = jnp.maximum(tokens.position, 0)
            along = jnp.arange(length, dtype=jnp.int32)[None, None]
            line = raster(place.at[..., axis].set(0), self.grid)[..., None]
            line += raster(jnp.zeros_like(place).at[..., axis].set(1), self.grid)[..., None] * along
            _, values, step, state = read(line, v[..., :0], v, tokens, self.grid, 0, before)
            away = place[..., axis, None] - along  # [B or 1, T, L]
            placed = (tokens.position >= 0).all(axis=-1, keepdims=True)
            seen = placed & (away >= 0) & (step < NEVER) & (step <= tokens.step[..., None])
            log_decay = jax.nn.log_sigmoid(self.decay[axis].astype(jnp.float32))[None, None, None]
            weights = jnp.exp(jnp.where(seen, away, 0)[..., None] * log_decay) * seen[..., None]  # [B or 1, T, L, N]
            weights = jnp.broadcast_to(weights, (len(x), *weights.shape[1:])).astype(self.dtype)
            summed = merge_heads(jnp.einsum("btln,btlnh->btnh", weights, values))
            scaled = summed * self.amount[axis].astype(self.dtype)[None, None]
            total += self.out[axis](self.norm[axis](scaled))
        return total, state

    def on_grid(self, x: Array) -> Array:
        """All places of x [B, *grid, D] at once, by one recurrence along each axis: O(places) of them."""
        total, shape = jnp.zeros_like(x), (*x.shape[:-1], self.num_heads, -1)
        for axis in range(len(self.grid)):
            decay = jax.nn.sigmoid(self.decay[axis].astype(jnp.float32)).astype(self.dtype)
            factor = jnp.broadcast_to(decay.reshape((1,) * (x.ndim - 1) + (-1, 1)), x.reshape(shape).shape)
            _, summed = jax.lax.associative_scan(_one_after_the_other, (factor, x.reshape(shape)), axis=1 + axis)
            scaled = summed.reshape(x.shape) * self.amount[axis].astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
            total += self.out[axis](self.norm[axis](scaled))
        return total


def _one_after_the_other(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
    """Of s -> a s + b, twice."""
    return first[0] * then[0], then[0] * first[1] + then[1]
