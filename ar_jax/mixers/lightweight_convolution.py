"""Lightweight and dynamic convolutions (arXiv:1901.10430): filters that are softmaxes, shared by the channels of a head."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.place_order import in_place_order
from ar_jax.mixers.common.short_convolution import Ring, centered_convolution, empty_ring, short_convolution
from ar_jax.mixers.protocol import Tokens, merge_heads, split_heads


class LightweightConvolution(nn.Module):
    """out_t = W_o (sum_j softmax_j(l_h) v_{t-j} + b), v = GLU(W_v x), one filter l_h for all channels of head h.

    A dynamic convolution draws its filters from the token that reads: l_ht = W_l v_t (arXiv:1901.10430, sec. 3 and 4).

    Attributes:
      num_heads: of neighbouring channels that share a filter.
      width: of the filters.
      dynamic: the filters of a token are a projection of it.
      causal: the last tap is the present token; otherwise the filters stand around it, width // 2 taps before it.
      gated: a gated projection in front and another one behind; otherwise x is convolved as it is.
      in_proj: dynamic only: values and filters are both projections of what is convolved.
      softmax: the filters sum to one.
      renormalize: they do so at the ends of the sequence, too, where taps fall on nothing.
      filter_bias: dynamic only: the projection to the filters has a bias.
      bias: a bias is added to what is convolved.
      interleaved_heads: channel c is of head c mod num_heads, as in one of the published classes, not c // head_dim.
      ahead: not causal only: taps after the present token; None takes those that `width // 2` before it leave.
    """

    embed_dim: int
    num_heads: int = 4
    width: int = 7
    dynamic: bool = False
    causal: bool = True
    gated: bool = True
    in_proj: bool = False
    softmax: bool = True
    renormalize: bool = False
    filter_bias: bool = False
    bias: bool = False
    interleaved_heads: bool = False
    ahead: int | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def reads_peers(self) -> bool:
        """The centred form reads everything around a token."""
        return not self.causal

    @property
    def taps_ahead(self) -> int:
        """How many later tokens a filter reads where it is not causal."""
        return self.width - 1 - self.width // 2 if self.ahead is None else self.ahead

    def setup(self) -> None:
        """Projections, and the filters' logits [width, heads], the latest token's first."""
        self._check()
        dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.gated:
            self.value, self.gate, self.out = (dense(self.embed_dim, use_bias=False) for _ in range(3))
        if self.in_proj:
            self.inner = dense(self.embed_dim)
        if self.dynamic:
            self.logits = dense(self.width * self.num_heads, use_bias=self.filter_bias or self.in_proj)
        else:
            start = nn.initializers.normal(1.0)
            self.filters = self.param("filters", start, (self.width, self.num_heads), self.param_dtype)
        if self.bias:
            self.offset = self.param("offset", nn.initializers.zeros, (self.embed_dim,), self.param_dtype)

    def _check(self) -> None:
        where = "config.model.mixer"
        if self.width < 2:
            raise UsageError(f"{where}.width={self.width} must be at least 2: a filter of one token mixes nothing.")
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise UsageError(f"{where}.num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}.")
        if self.in_proj and not self.dynamic:
            raise UsageError(f"{where}.in_proj belongs to dynamic filters; set {where}.dynamic=True, or leave it out.")
        if self.ahead is not None and (self.causal or not 0 <= self.ahead < self.width):
            raise UsageError(
                f"{where}.ahead={self.ahead} must be at least 0 and less than width={self.width}, with causal=False."
            )
        if self.renormalize and not self.softmax:
            raise UsageError(f"{where}.renormalize needs filters that sum to one; set {where}.softmax=True.")

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Ring | tuple[()]:
        """See Mixer: the last width - 1 values."""
        if not self.causal:
            return ()
        return empty_ring(batch_size, self.width, self.embed_dim + self.renormalize * self.num_heads, self.dtype)

    def __call__(self, x: Array, tokens: Tokens, state: Ring | None = None) -> tuple[Array, Ring | None]:
        """See Mixer."""
        x = x.astype(self.dtype)
        if self.gated:
            x = self.value(x) * nn.sigmoid(self.gate(x))
        mixed, state = self.convolve(x, x, tokens, state)
        return self.out(mixed) if self.gated else mixed, state

    def convolve(self, x: Array, source: Array, tokens: Tokens, state: Ring | None = None) -> tuple[Array, Ring | None]:
        """The convolution of x [B, T, D] by filters that, where they are dynamic, come from the source [B, T, any]."""
        filters = self._filters(source)
        values = self._split(self.inner(x) if self.in_proj else x)
        if self.renormalize:  # what the filters give to ones is what they sum to
            values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
        flat = merge_heads(values)
        if self.causal:
            mixed, state = short_convolution(flat, filters, tokens, state)
        elif filters.ndim == 2:
            mixed = in_place_order(lambda v, there: self._centered(v, filters, there), flat, tokens)
        else:
            both = jnp.concatenate([flat, filters.reshape(*flat.shape[:2], -1)], axis=-1)
            mixed = in_place_order(self._own_centered, both, tokens)
        mixed = split_heads(mixed, self.num_heads)
        if self.renormalize:
            mixed = mixed[..., :-1] / jnp.where(mixed[..., -1:] == 0, 1, mixed[..., -1:])
        out = self._merge(mixed)
        return out + self.offset.astype(out.dtype)[None, None] if self.bias else out, state

    def _centered(self, values: Array, filters: Array, tokens: Tokens) -> Array:
        return centered_convolution(values, filters, self.taps_ahead, tokens)

    def _own_centered(self, both: Array, tokens: Tokens) -> Array:
        """Values and each token's filters side by side, [B, T, C + width heads], to [B, T, C]."""
        size = self.width * self.num_heads
        filters = both[..., -size:].reshape(*both.shape[:2], self.width, self.num_heads)
        return self._centered(both[..., :-size], filters, tokens)

    def _filters(self, source: Array) -> Array:
        """[width, heads], or [B, T, width, heads]."""
        if self.dynamic:
            logits = self.logits(source).reshape(*source.shape[:2], self.width, self.num_heads)
        else:
            logits = self.filters
        if not self.softmax:
            return logits.astype(self.dtype)
        logits = logits.astype(jnp.float32)
        if self.renormalize:
            peak = jax.lax.stop_gradient(logits.max(axis=-2, keepdims=True))
            return jnp.exp(logits - peak).astype(self.dtype)
        return nn.softmax(logits, axis=-2).astype(self.dtype)

    def _split(self, x: Array) -> Array:
        """[B, T, D] to [B, T, heads, H]."""
        if self.interleaved_heads:
            return jnp.swapaxes(x.reshape(*x.shape[:2], -1, self.num_heads), 2, 3)
        return split_heads(x, self.num_heads)

    def _merge(self, x: Array) -> Array:
        """[B, T, heads, H] to [B, T, D]."""
        return merge_heads(jnp.swapaxes(x, 2, 3) if self.interleaved_heads else x)
