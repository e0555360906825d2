"""HyperZZW: convolutions with hyper-kernels that are multiplied by what they convolve (S043, arXiv:2401.17948)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.hyper_kernel import HyperKernel, line_coordinates
from ar_jax.mixers.common.line import Line, empty_line, line_index, present, running_sum, stands_behind
from ar_jax.mixers.common.long_convolution import STEPWISE, convolve
from ar_jax.mixers.common.short_convolution import Ring, empty_ring, short_convolution
from ar_jax.mixers.protocol import Tokens, take

gelu = functools.partial(nn.gelu, approximate=False)


@struct.dataclass
class HyperState:
    """What is remembered.

    Attributes:
      line: all that came: each token's weight of the kernel, and what is convolved with it.
      total: [B, D] float32, the sum of the tokens.
      recent: for each local kernel what it reaches.
    """

    line: Line
    total: Array
    recent: tuple[Ring, ...]


class RecursiveGatedUnit(nn.Module):
    """y = W_y (gelu(norm(k * W_q W_v x)) + p), k = W_k x: a gated unit within another (arXiv:2401.17948).

    Attributes:
      features: D.
      axes: over which norm gives mean 0 and variance 1.
      grid: the places that have a p; none has without.
    """

    features: int
    axes: tuple[int, ...] = (-1,)
    grid: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] to [..., D]."""
        uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(Dense, self.features, kernel_init=uniform, **types)
        key, value = dense(name="key")(x), dense(name="value")(x)
        gated = gelu(standardize(key * dense(name="query")(value), self.axes))
        if self.grid:
            place = self.param("place", nn.initializers.zeros, (1, *self.grid, 1), self.param_dtype)
            gated = gated + place.astype(gated.dtype)
        return dense(name="out")(gated)


class HyperZZW(nn.Module):
    """out = W_o [y_1, y_2, y_3, y_1 sigmoid(y_1), f, local ...], each y the convolution of a branch by a kernel that is gated by x.

    y_t = sum_{l<=t} (W_l * x_l) * v_{t-l}, with a hyper-kernel W as long as the sequence; v is f = norm(g(W * x) + g'(x)) of
    two recursive gated units, norm(V x), and norm(x sigmoid(w * m^2)), m_t the mean of the tokens up to t and w a
    hyper-kernel over channels. The term of l is the product of tokens l and t - l, so nothing later is read. The local
    branches are gelu(norm(C sum_{j<width} k_tj * (V x)_{t-j})), k_t a hyper-kernel whose context is m_t.

    As published, less what needs a grid (see `ar_jax.models.vision.terminator`); means are of the past, where there they are
    of the image, and norms are over channels. The network around it has no residuals: `config.model.residual="none"`.

    Attributes:
      local_widths: taps of the local kernels.
      hidden_dim: of the slow nets; see HyperKernel.
      num_layers: of the slow nets.
      frequency: of the slow nets.
      num_rows: the global kernel's coordinates run from -1 to 1 over so many tokens.
    """

    embed_dim: int
    local_widths: Sequence[int] = (3, 7)
    hidden_dim: int = 16
    num_layers: int = 1
    frequency: float = 1.0
    num_rows: int = 0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @nn.nowrap
    def _check(self) -> None:
        if min(self.local_widths, default=2) < 2:
            raise UsageError(
                f"config.model.mixer.local_widths={tuple(self.local_widths)} must be at least 2: one tap mixes nothing."
            )
        for name in ("hidden_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise UsageError(f"config.model.mixer.{name}={getattr(self, name)} must be at least 1.")

    def setup(self) -> None:
        """Slow nets, gated units and projections."""
        self._check()
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        net = functools.partial(
            HyperKernel,
            hidden_dim=self.hidden_dim,
            num_layers=self.num_layers,
            frequency=self.frequency,
            param_dtype=self.param_dtype,
        )
        dense = functools.partial(Dense, self.embed_dim, kernel_init=nn.initializers.he_normal(), **types)
        self.kernel = net(self.embed_dim, max(self.num_rows, 2))
        self.channel_kernel = net(1, self.embed_dim)
        self.local_kernels = [net(self.embed_dim, width, context=True) for width in self.local_widths]
        self.gated_unit, self.gated_kernel_unit = (RecursiveGatedUnit(self.embed_dim, **types) for _ in range(2))
        self.mix, self.out = dense(), dense()
        self.local_mix = [dense() for _ in self.local_widths]
        self.local_shift = self.param("local_shift", nn.initializers.zeros, (len(self.local_widths),), self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> HyperState:
        """See Mixer: four numbers a channel for each token, and what local kernels reach."""
        self._check()
        rings = tuple(empty_ring(batch_size, width, self.embed_dim, self.dtype) for width in self.local_widths)
        line = empty_line(batch_size, max_len, 4 * self.embed_dim, jnp.float32)
        return HyperState(line, jnp.zeros((batch_size, self.embed_dim)), rings)

    def __call__(self, x: Array, tokens: Tokens, state: HyperState | None = None) -> tuple[Array, HyperState | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        x = present(x.astype(self.dtype), tokens)
        index = line_index(tokens, 0 if state is None else state.line.count)
        total, after = running_sum(x.astype(jnp.float32), tokens, None if state is None else state.total)
        mean = total / (index + 1)[..., None].astype(jnp.float32)
        weight = self.kernel(line_coordinates(index, self.kernel.size), index)
        weighted = weight.astype(x.dtype) * x
        fast = standardize(self.gated_kernel_unit(weighted) + self.gated_unit(x))
        mixed = standardize(self.mix(x))
        channels = jnp.arange(self.embed_dim)
        own = self.channel_kernel(line_coordinates(channels, self.embed_dim), channels)[:, 0]
        noticed = standardize(x * nn.sigmoid(own[None, None] * jnp.square(mean)).astype(x.dtype))
        values = jnp.concatenate([fast, mixed, noticed], axis=-1)
        far, line = _far(weighted, values, tokens, index, None if state is None else state.line)
        first = far[..., : self.embed_dim]
        branches, recent = [far.astype(x.dtype), (nn.sigmoid(first) * first).astype(x.dtype), fast], []
        for i, (width, kernel) in enumerate(zip(self.local_widths, self.local_kernels, strict=True)):
            taps = jnp.arange(width)
            filters = kernel(line_coordinates(taps, width), taps, mean[..., None, :])
            read, ring = short_convolution(mixed, filters, tokens, None if state is None else state.recent[i])
            shift = self.local_shift[i].astype(x.dtype)
            branches.append(gelu(standardize(self.local_mix[i](read))) + shift)
            recent.append(ring)
        out = self.out(jnp.concatenate(branches, axis=-1))
        if state is None or line is None or after is None:
            return out, None
        return out, HyperState(line, after, tuple(ring for ring in recent if ring is not None))


def standardize(x: Array, axes: tuple[int, ...] = (-1,)) -> Array:
    """Of mean 0 and variance 1 over these axes."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=axes, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=axes, keepdims=True) + 1e-5)).astype(x.dtype)


def _far(
    weighted: Array, values: Array, tokens: Tokens, index: Array, before: Line | None
) -> tuple[Array, Line | None]:
    """y_t = sum_{l<=t} k_l v_{t-l} with the k and v of the tokens of a segment, by their places in it.

    Whole sequences by Fourier transforms: O(T log T); one more token: O(T).

    Args:
      weighted: k, [B, T, D], as fed.
      values: v, [B, T, 3 D].
      tokens: when they are.
      index: [B or 1, T], their places; see `line_index`.
      before: the line before them; None for a whole sequence.

    Returns:
      [B, T, 3 D] float32, and the line with these.
    """
    weighted, values = (present(a.astype(jnp.float32), tokens) for a in (weighted, values))
    n, copies = tokens.num_remembered, values.shape[-1] // weighted.shape[-1]
    fed = jnp.concatenate([weighted, values], axis=-1)
    line = None if before is None else before.append(fed[:, :n])
    known = fed[:, :n] if line is None else line.values
    keys, known_values = jnp.tile(known[..., : weighted.shape[-1]], copies), known[..., weighted.shape[-1] :]
    place = jnp.arange(n)[None]
    if n < fed.shape[1]:
        behind = stands_behind(tokens)
        place = jnp.concatenate([jnp.broadcast_to(place, (len(behind), n)), behind], axis=1)
    start = jnp.zeros_like(index) if tokens.segment is None else jnp.broadcast_to(place - index, index.shape)
    if tokens.segment is not None:
        inner = _by_lag(keys, known_values, start, index)
    elif line is not None and fed.shape[1] <= STEPWISE:
        inner = _at_places(keys, known_values, index)
    else:
        rest = (jnp.arange(known.shape[1]) > 0)[None, :, None]  # the first is no part of any inner term
        length = known.shape[1] + 1
        padded = [jnp.pad(jnp.where(rest, a, 0), ((0, 0), (0, 1), (0, 0))) for a in (keys, known_values)]
        inner = take(jax.vmap(_convolve_one)(*padded), jnp.minimum(index, length - 1))
    # The outer terms are those of the token itself, which a query has, too, though nobody remembers it.
    own = jnp.tile(weighted, copies)
    first_key, first_value = (
        (take(a, jnp.maximum(start, 0)) for a in (keys, known_values)) if n or line else (own, values)
    )
    outer = first_key * values + own * first_value
    return inner + jnp.where((index > 0)[..., None], outer, own * values), line


def _convolve_one(key: Array, values: Array) -> Array:
    return convolve(values[None], key)[0]


def _at_places(keys: Array, values: Array, index: Array) -> Array:
    """sum_{0<l<t} k_l v_{t-l} for few places t [B or 1, T] of one sequence, [B, T, C]."""
    lag = jnp.arange(keys.shape[1])[None, None]
    away = index[..., None] - lag  # [B or 1, T, S]
    there = ((lag > 0) & (away > 0))[..., None]
    flat = take(values, jnp.maximum(away, 0).reshape(len(away), -1))
    return jnp.einsum("bsc,btsc->btc", keys, jnp.where(there, flat.reshape(len(values), *away.shape[1:], -1), 0))


def _by_lag(keys: Array, values: Array, start: Array, index: Array) -> Array:
    """The same of several sequences behind one another, of which a token's own begins at `start`: O(T^2), in little memory."""

    def add(total: Array, lag: Array) -> tuple[Array, None]:
        there = (lag < index)[..., None]
        key = take(keys, jnp.clip(start + lag, 0, keys.shape[1] - 1))
        value = take(values, jnp.clip(start + index - lag, 0, keys.shape[1] - 1))
        return total + jnp.where(there, key * value, 0), None

    zero = jnp.zeros((len(keys), index.shape[1], keys.shape[2]))
    return jax.lax.scan(add, zero, jnp.arange(1, keys.shape[1]))[0]
