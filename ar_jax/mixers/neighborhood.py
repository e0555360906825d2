"""Neighbourhood attention: every token reads the tokens in a window around its place (S193, S199)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels import neighborhood as kernel
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.step_attention import step_attention
from ar_jax.mixers.common.heads import head_width
from ar_jax.mixers.common.places import Places, empty_places, read
from ar_jax.mixers.protocol import NEVER, Tokens, merge_heads, split_heads


class Neighborhood(nn.Module):
    """o_i = sum_{j in window(i)} softmax_j(q_i . k_j / sqrt(H) + b_{j-i}) v_j  (NAT, arXiv:2204.07143; GNA, arXiv:2504.16922).

    The window is one of places, `ar_jax.kernels.neighborhood.Neighborhood`, whatever the order in which tokens come; of the
    places in it those are read whose token has come, by the rule of steps. Tokens without a place (a prefix) are read by
    all, and read one another. The fields of a window are a value for all axes, or one for each.

    Attributes:
      kernel_size: places of the window; 0 takes the whole axis.
      stride: so many neighbouring places share a window; 1 slides it, kernel_size makes blocks of it.
      dilation: the window's places are so far apart.
      causal_axes: the window reaches backwards only.
      relative_bias: b is learned, per head, for each place of a window (NAT); otherwise it is 0.
      qkv_bias: queries, keys and values have a bias.
      out_bias: the last projection has one.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    kernel_size: int | Sequence[int] = 7
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    causal_axes: bool | Sequence[bool] = False
    relative_bias: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    grid: tuple[int, ...] = ()
    num_prefix: int = 0
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int]:
        """Heads and the width of a head."""
        return self.num_heads, head_width(self.embed_dim, self.num_heads, self.head_dim)

    @property
    def windows(self) -> kernel.Neighborhood:
        """Who reads whom on the grid."""
        fields: dict[str, tuple[Any, ...]] = {}
        for name in ("kernel_size", "stride", "dilation", "causal_axes"):
            value = getattr(self, name)
            fields[name] = tuple(value) if isinstance(value, Sequence) else (value,) * len(self.grid)
            if len(fields[name]) != len(self.grid) or not self.grid:
                raise UsageError(
                    f"config.model.mixer.{name}={value!r} should be one value, or one for each axis of the grid {self.grid}."
                )
        for name, least in (("kernel_size", 0), ("stride", 1), ("dilation", 1)):
            if min(fields[name]) < least:
                raise UsageError(f"config.model.mixer.{name}={getattr(self, name)!r} must be at least {least}.")
        sizes = tuple(size or length for size, length in zip(fields["kernel_size"], self.grid, strict=True))
        if any(stride > size for stride, size in zip(fields["stride"], sizes, strict=True)):
            raise UsageError(
                f"config.model.mixer.stride={self.stride!r} must be at most kernel_size={self.kernel_size!r}: "
                "places would be read by nobody."
            )
        return kernel.Neighborhood(self.grid, sizes, fields["stride"], fields["dilation"], fields["causal_axes"])

    def setup(self) -> None:
        """Projections as matrices: [D, heads H] and back; the biases of a window."""
        heads, head_dim = self.dims
        windows = self.windows
        dense = functools.partial(Dense, use_bias=self.qkv_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value = (dense(heads * head_dim) for _ in range(3))
        self.out = Dense(self.embed_dim, use_bias=self.out_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.relative_bias:
            shape = (heads, *(2 * size - 1 for size in windows.kernel_size))
            self.bias = self.param("bias", nn.initializers.truncated_normal(0.02), shape, self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Places:
        """See Mixer: keys and values of all places."""
        self.windows  # noqa: B018  (the property checks)
        return empty_places(batch_size, self.num_prefix + math.prod(self.grid), *self.dims, self.dtype)

    def __call__(self, x: Array, tokens: Tokens, state: Places | None = None) -> tuple[Array, Places | None]:
        """See Mixer. Each token gathers the few keys that it may read."""
        q, k, v = self._heads(x)
        window, inside, offset = self._window(tokens.position)
        k, v, step, state = read(window, k, v, tokens, self.grid, self.num_prefix, state)
        out = self._attend(q, k, v, tokens.step, jnp.where(inside, step, NEVER), offset)
        return self.out(merge_heads(out)), state

    def on_grid(self, x: Array, tile: tuple[int, ...] | None = None) -> Array:
        """All places of x [B, *grid, D] at once, [B, *grid, D], block by block; see `neighborhood_attention`."""
        if self.relative_bias:  # which differs from pair to pair
            place = jnp.asarray(np.indices(self.grid).reshape(len(self.grid), -1).T[None], jnp.int32)
            flat = x.reshape(len(x), -1, x.shape[-1])
            tokens = Tokens(jnp.zeros(place.shape[:2], jnp.int32), place, place.shape[1])
            return self(flat, tokens)[0].reshape(*x.shape[:-1], self.embed_dim)
        q, k, v = (a.reshape(*x.shape[:-1], *self.dims) for a in (self.query(x), self.key(x), self.value(x)))
        out = kernel.neighborhood_attention(q, k, v, self.windows, tile=tile, implementation=self.implementation)
        return self.out(out.reshape(*x.shape[:-1], -1))

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        return q, k, v

    def _window(self, position: Array) -> tuple[Array, Array, Array]:
        """Of tokens at [B or 1, T, D]: the slots that they may read, [B or 1, T, W], which of them count, and their biases."""
        windows, batch = self.windows, position.shape[:2]
        placed = (position >= 0).all(axis=-1)
        cell, inside = jnp.zeros((*batch, 1), jnp.int32), placed[..., None]
        offset = jnp.zeros((*batch, 1), jnp.int32)
        for axis, length in enumerate(self.grid):
            group, first, last = windows.window(axis, jnp.maximum(position[..., axis], 0))
            index = (
                first[..., None] + jnp.arange(windows.reads(axis))[None, None]
            )  # [B or 1, T, reads], inside the group
            good = index <= last[..., None]
            place = group[..., None] + windows.dilation[axis] * index
            away = index - position[..., axis, None] // windows.dilation[axis] + windows.kernel_size[axis] - 1
            away = jnp.clip(away, 0, 2 * windows.kernel_size[axis] - 2)
            cell = _product(cell * length, jnp.where(good, place, 0), jnp.add)
            offset = _product(offset * (2 * windows.kernel_size[axis] - 1), away, jnp.add)
            inside = _product(inside, good, jnp.logical_and)
        prefix = jnp.broadcast_to(jnp.arange(self.num_prefix, dtype=jnp.int32)[None, None], (*batch, self.num_prefix))
        slot = jnp.concatenate([prefix, self.num_prefix + cell], axis=-1)
        return slot, jnp.concatenate([jnp.ones_like(prefix, bool), inside], axis=-1), offset

    def _attend(self, q: Array, k: Array, v: Array, step: Array, key_step: Array, offset: Array) -> Array:
        """Queries [B, T, N, H], each on its own keys [B, T, W, N, H], to [B, T, N, H]."""
        batch, length, heads, head_dim = q.shape
        bias = None
        if self.relative_bias:
            table = self.bias.astype(jnp.float32).reshape(heads, -1)
            bias = jnp.moveaxis(jnp.take(table, offset, axis=1), 0, 2)  # [B or 1, T, N, W]
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (self.num_prefix, 0)))
            bias = jnp.broadcast_to(bias, (batch, *bias.shape[1:])).reshape(batch * length, heads, 1, -1)
        out = step_attention(
            q.reshape(batch * length, 1, heads, head_dim),
            k.reshape(batch * length, -1, heads, head_dim),
            v.reshape(batch * length, -1, heads, head_dim),
            jnp.broadcast_to(step, (batch, length)).reshape(-1, 1),
            jnp.broadcast_to(key_step, (batch, *key_step.shape[1:])).reshape(batch * length, -1),
            bias=bias,
            implementation=self.implementation,
        )
        return out.reshape(batch, length, heads, head_dim)


def _product(so_far: Array, axis: Array, combine: Any) -> Array:
    """[..., M] and [..., W] to [..., M W]: what holds for each pair."""
    pairs = combine(so_far[..., :, None], axis[..., None, :])
    return pairs.reshape(*pairs.shape[:-2], -1)
