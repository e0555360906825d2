"""Attention free transformer (arXiv:2105.14103): values weighed by keys and learned position biases, channel by channel."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.line import Line, empty_line, line_index, present, running_sum
from ar_jax.mixers.common.place_order import in_place_order, total
from ar_jax.mixers.common.short_convolution import Ring, centered_convolution, empty_ring, short_convolution
from ar_jax.mixers.protocol import Tokens

VARIANTS = ("full", "local", "conv", "simple")
LIMIT = 50.0  # nats: float32 adds a million of exp(LIMIT), and what is so much smaller would leave nothing in a sum


@struct.dataclass
class Sums:
    """What AFT remembers where far tokens have no bias.

    Attributes:
      total: [B, 2 C] float32, the sums of exp(k) v and of exp(k).
      near: the last of their terms; None where there is no bias.
    """

    total: Array
    near: Ring | None


class AFT(nn.Module):
    """y_t = W_o (sigmoid(q_t) sum_s exp(k_s + w_ts) v_s / sum_s exp(k_s + w_ts)), all products channel by channel.

    Attributes:
      variant: w is a learned number for each pair of places ("full"), for those less than `window` apart, 0 beyond
        ("local"), for each distance below `window` and each head ("conv"), or 0 ("simple").
      causal: the sums go over earlier tokens and the present one; otherwise over all.
      hidden_dim: width of q, k and v; None takes embed_dim.
      window: of the variants "local" and "conv".
      num_heads: conv only: of neighbouring channels that share a filter.
      filter_norm: conv only: w = gain (w' - mean(w')) / std(w') + offset, of each filter (sec. 3.4).
      bias_rank: full only: w_ts = a_t . b_s with so many factors; None learns the matrix itself.
      use_bias: the projections have biases.
      num_rows: the places that there are.
    """

    embed_dim: int
    num_rows: int = 0
    variant: str = "simple"
    causal: bool = True
    hidden_dim: int | None = None
    window: int = 8
    num_heads: int = 4
    filter_norm: bool = True
    bias_rank: int | None = None
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def reads_peers(self) -> bool:
        """The form for whole sequences reads everything."""
        return not self.causal

    @property
    def width(self) -> int:
        """Of q, k and v."""
        return self.hidden_dim or self.embed_dim

    def setup(self) -> None:
        """Projections, and the variant's position biases."""
        choose(dict.fromkeys(VARIANTS), self.variant, "model.mixer.variant")
        if self.variant in ("local", "conv") and self.window < 2:
            raise UsageError(f"config.model.mixer.window={self.window} must be at least 2; variant 'simple' has none.")
        if self.variant == "conv" and self.width % self.num_heads:
            raise UsageError(f"num_heads={self.num_heads} does not divide hidden_dim={self.width}.")
        dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value = (dense(self.width) for _ in range(3))
        self.out = dense(self.embed_dim)
        for name, shape in self._tables().items():
            start = nn.initializers.zeros if len(shape) == 1 else nn.initializers.normal(0.02)
            setattr(self, name, self.param(name, start, shape, self.param_dtype))

    def _tables(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that are position biases; taps stand with the latest token's first."""
        rows, taps = self.num_rows, self.window if self.causal else 2 * self.window - 1
        if self.variant == "full":
            if self.bias_rank is None:
                return {"bias": (rows, rows)}
            return {"query_factor": (rows, self.bias_rank), "key_factor": (rows, self.bias_rank)}
        if self.variant == "conv":
            learned = ("gain", "offset") if self.filter_norm else ()
            return {"bias": (taps, self.num_heads), **dict.fromkeys(learned, (self.num_heads,))}
        return {"bias": (rows, taps)} if self.variant == "local" else {}

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Any:
        """See Mixer: sums, with the last `window - 1` terms where there are biases; all terms for variant "full"."""
        if not self.causal:
            return ()
        size = 2 * self.width
        if self.variant == "full":
            return empty_line(batch_size, max_len, size, jnp.float32)
        near = None if self.variant == "simple" else empty_ring(batch_size, self.window, size, jnp.float32)
        return Sums(jnp.zeros((batch_size, size), jnp.float32), near)

    def __call__(self, x: Array, tokens: Tokens, state: Any = None) -> tuple[Array, Any]:
        """See Mixer. Tokens of one step read each other in the order they are fed; a query reads itself, too."""
        weight = jnp.exp(jnp.clip(self.key(x).astype(jnp.float32), -LIMIT, LIMIT))
        terms = present(jnp.concatenate([weight * self.value(x).astype(jnp.float32), weight], axis=-1), tokens)
        if not self.causal:
            sums = in_place_order(self._of_whole, terms, tokens)
        elif self.variant == "full":
            sums, state = self._of_all_before(terms, tokens, state)
        else:
            sums, state = self._of_far_and_near(terms, tokens, state)
        above, below = jnp.split(sums, 2, axis=-1)
        read = above / jnp.where(below == 0, 1, below)
        return self.out((nn.sigmoid(self.query(x).astype(jnp.float32)) * read).astype(self.dtype)), state

    def _of_far_and_near(self, terms: Array, tokens: Tokens, state: Sums | None) -> tuple[Array, Sums | None]:
        """Sums over the past [B, T, 2 C]: of all terms, and the near ones' biases on top."""
        sums, after = running_sum(terms, tokens, None if state is None else state.total)
        if self.variant == "simple":
            return sums, None if after is None else Sums(after, None)
        before = None if state is None else state.near
        filters = self._filters(line_index(tokens, 0 if before is None else before.count))
        more, near = short_convolution(terms, filters, tokens, before)
        return sums + more, None if after is None else Sums(after, near)

    def _of_all_before(self, terms: Array, tokens: Tokens, state: Line | None) -> tuple[Array, Line | None]:
        """Sums over the past [B, T, 2 C] with a bias for each pair."""
        n, count = tokens.num_remembered, 0 if state is None else state.count
        index = line_index(tokens, count)
        if state is None:
            keys, key_index = terms[:, :n], index[:, :n]
        else:
            state = state.append(terms[:, :n])
            keys, key_index = state.values, jnp.arange(state.values.shape[1], dtype=jnp.int32)[None]
        past = key_index[:, None, :] < index[:, :, None]
        if tokens.segment is not None:
            past &= tokens.segment[:, None, :n] == tokens.segment[:, :, None]
        weights = jnp.where(past, jnp.exp(self._pairs(index, key_index)), 0)
        own = jnp.exp(self._pairs(index[..., None], index[..., None])[..., 0])
        return _weighted(weights, keys) + own * terms, state

    def _of_whole(self, terms: Array, tokens: Tokens) -> Array:
        """Sums over a whole sequence in the order of its places, [B, T, 2 C]."""
        row = jnp.asarray(tokens.row)
        if self.variant == "full":
            weights = jnp.exp(self._pairs(row, row))
            if tokens.segment is not None:
                weights = jnp.where(tokens.segment[:, None, :] == tokens.segment[:, :, None], weights, 0)
            return _weighted(weights, terms)
        sums = total(terms, tokens)
        if self.variant == "simple":
            return jnp.broadcast_to(sums, terms.shape)
        return sums + centered_convolution(terms, self._filters(row), self.window - 1, tokens)

    def _pairs(self, query: Array, key: Array) -> Array:
        """w of places [..., T] and [..., S], [..., T, S] float32; the last row serves places beyond it."""
        query, key = (jnp.minimum(a, self.num_rows - 1) for a in (query, key))
        if self.bias_rank is None:
            return self.bias.astype(jnp.float32)[query[..., :, None], key[..., None, :]]
        a, b = (factor.astype(jnp.float32) for factor in (self.query_factor, self.key_factor))
        return jnp.einsum("...tr,...sr->...ts", a[query], b[key])

    def _filters(self, row: Array) -> Array:
        """exp(w) - 1 of the taps: [taps, heads of both halves], or [B or 1, T, taps, 1] for tokens at these rows."""
        bias = self.bias.astype(jnp.float32)
        if self.variant == "local":
            return jnp.expm1(bias[jnp.minimum(row, self.num_rows - 1)])[..., None]
        if self.filter_norm:
            spread = jnp.sqrt(bias.var(axis=0, keepdims=True) + 1e-6)
            bias = self.gain[None] * (bias - bias.mean(axis=0, keepdims=True)) / spread + self.offset[None]
        return jnp.expm1(jnp.concatenate([bias, bias], axis=-1))


def _weighted(weights: Array, terms: Array) -> Array:
    """sum_s weights_ts terms_s of weights [B or 1, T, S] and terms [B, S, C]."""
    if len(weights) == 1:
        return jnp.einsum("ts,bsc->btc", weights[0], terms)
    return jnp.einsum("bts,bsc->btc", weights, terms)
