"""Axial attention: every token reads the lines of the grid through its place, one axis at a time (S020)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.mixers.common.places import Places
from ar_jax.mixers.neighborhood import Neighborhood
from ar_jax.mixers.protocol import Tokens


class Axial(nn.Module):
    """y = sum_a attention_a(x), attention_a among the tokens whose places differ on axis a alone  (arXiv:1912.12180).

    A neighbourhood that is the whole of one axis and nothing of the others. Tokens without a place are read by all.

    Attributes:
      sum_axes: all axes read x, and what they give is added; otherwise each reads what the one before it gave.
      qkv_bias: queries, keys and values have a bias.
      out_bias: the last projections have one.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    sum_axes: bool = True
    qkv_bias: bool = False
    out_bias: bool = True
    grid: tuple[int, ...] = ()
    num_prefix: int = 0
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def setup(self) -> None:
        """Attention along each axis."""
        self.lines = [self._line(axis) for axis in range(len(self.grid))]

    @nn.nowrap
    def _line(self, axis: int, **given: Any) -> Neighborhood:
        fields = {
            name: getattr(self, name)
            for name in ("embed_dim", "num_heads", "head_dim", "qkv_bias", "out_bias", "grid", "num_prefix")
        }
        types = {name: getattr(self, name) for name in ("implementation", "dtype", "param_dtype")}
        return Neighborhood(**fields, **types, kernel_size=along(axis, len(self.grid)), **given)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> tuple[Places, ...]:
        """See Mixer: keys and values of all places, for each axis."""
        if not self.grid:
            raise UsageError("The mixer 'axial' reads lines of a grid; give tokens with places.")
        lines = (self._line(axis, parent=None) for axis in range(len(self.grid)))
        return tuple(line.init_state(batch_size, max_len, max_step_len) for line in lines)

    def __call__(
        self, x: Array, tokens: Tokens, state: tuple[Places, ...] | None = None
    ) -> tuple[Array, tuple[Places, ...] | None]:
        """See Mixer."""
        outs, after = list[Array](), list[Any]()
        for axis, line in enumerate(self.lines):
            out, new = line(x, tokens, None if state is None else state[axis])
            outs.append(out)
            after.append(new)
            x = x if self.sum_axes else out
        return sum(outs[1:], outs[0]) if self.sum_axes else x, None if state is None else tuple(after)

    def on_grid(self, x: Array) -> Array:
        """All places of x [B, *grid, D] at once, line by line: O(places * (sum of the axes)) pairs."""
        if self.sum_axes:
            return sum((line.on_grid(x) for line in self.lines[1:]), self.lines[0].on_grid(x))
        for line in self.lines:
            x = line.on_grid(x)
        return x


def along(axis: int, num_axes: int) -> tuple[int, ...]:
    """The kernel size of a line: the whole of one axis, a place of the others."""
    return tuple(0 if other == axis else 1 for other in range(num_axes))
