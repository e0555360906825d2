"""RWKV's time mixing: linear attention with a decay per channel and a bonus (RWKV-6), and a generalised delta rule (RWKV-7)."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.delta_attention import dplr_attention
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.mixers.common.heads import HeadNorm, head_width, unit
from ar_jax.mixers.common.memory import FORGOTTEN, Remembered, fading
from ar_jax.mixers.common.short_convolution import empty_ring
from ar_jax.mixers.common.silu_convolution import between
from ar_jax.mixers.common.token_shift import (
    LowRank,
    ramp,
    shift_share,
    starting_at,
    to_the_one_before,
)
from ar_jax.mixers.protocol import Carried, Tokens, in_time_order, merge_heads, split_heads


def _dims(mixer: Any) -> tuple[int, int, int]:
    """Heads, and the widths of keys and of values."""
    head_dim = head_width(mixer.embed_dim, mixer.num_heads, mixer.head_dim)
    return mixer.num_heads, head_dim, mixer.value_head_dim or head_dim


def _init_state(mixer: Any, batch_size: int) -> Remembered:
    recent = empty_ring(batch_size, 2, mixer.embed_dim, mixer.dtype)
    return Remembered(recent, jnp.zeros((batch_size, *_dims(mixer)), jnp.float32))


class RWKV6(nn.Module):
    """out = W_o (norm(o) silu(W_g x^g)),   S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T (Finch, arXiv:2404.05892, sec. 4).

    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t; each of r, w, k, v, g reads a mixture of its own of the token and the one before,

    x^i_t = x_t + (x_{t-1} - x_t) (share_i + W_i tanh(V_i (x_t + (x_{t-1} - x_t) share))),   w_t = W_2 tanh(W_1 x^w_t) + bias

    Attributes:
      num_heads: of the memory.
      head_dim: H; None divides embed_dim among the heads.
      value_head_dim: E; None takes H.
      mix_rank: of V_i.
      decay_rank: of W_1.
      norm_epsilon: of the layer norm of each head.
      chunk_size: see `linear_attention`.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    value_head_dim: int | None = None
    mix_rank: int = 32
    decay_rank: int = 64
    norm_epsilon: float = 64e-5
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    def setup(self) -> None:
        """Shares [D] and [5, D], projections, the bonus [N, H], and the norm; they start as in the published first layer."""
        heads, head_dim, value_dim = _dims(self)
        keys, dim = heads * head_dim, self.embed_dim
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = functools.partial(Dense, use_bias=False, **types)
        rank = self.mix_rank
        self.share = self.param("share", starting_at(shift_share(dim, 1.0)), (dim,), self.param_dtype)
        shares = starting_at([shift_share(dim, power) for power in (0.5, 1.0, 1.0, 1.0, 0.5)])
        self.shares = self.param("shares", shares, (5, dim), self.param_dtype)
        self.mix_down = plain(5 * rank, kernel_init=nn.initializers.zeros)
        self.mix_up = self.param("mix_up", between(0.01), (5, rank, dim), self.param_dtype)
        self.receptance, self.key = plain(keys), plain(keys)
        self.value, self.gate = plain(heads * value_dim), plain(heads * value_dim)
        slow = starting_at(-6 + 5 * ramp(keys, 0.7))
        self.decay = LowRank(self.decay_rank, keys, "tanh", slow, self.dtype, jnp.float32, self.param_dtype)
        zigzag = starting_at(((np.arange(keys) + 1) % 3 - 1) * 0.1)
        self.bonus = self.param("bonus", zigzag, (heads, head_dim), self.param_dtype)
        self.norm = HeadNorm(self.norm_epsilon, **types)
        self.out = plain(dim)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Remembered:
        """See Mixer: the last token, and the memory."""
        return _init_state(self, batch_size)

    def __call__(self, x: Array, tokens: Tokens, state: Remembered | None = None) -> tuple[Array, Remembered | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        x = x.astype(self.dtype)
        before = Remembered() if state is None else state
        back, recent = to_the_one_before(x, tokens, before.recent)
        r, w, k, v, g = self._mixtures(x, back)
        log_decay = -jnp.exp(self.decay(w))
        projected = (self.receptance(r), self.key(k), self.value(v), log_decay)
        read, memory = in_time_order(
            self._remember, tuple(split_heads(a, self.num_heads) for a in projected), tokens, before.memory
        )
        out = self.out(merge_heads(self.norm(read)) * nn.silu(self.gate(g)))
        return out, None if state is None else Remembered(recent, memory)

    def _mixtures(self, x: Array, back: Array) -> tuple[Array, ...]:
        """x^i [B, T, D], for r, w, k, v and g."""
        low = jnp.tanh(self.mix_down(x + back * self.share.astype(x.dtype)[None, None]))
        low = low.reshape(*x.shape[:2], 5, -1)
        share = jnp.einsum("btir,ird->ibtd", low, self.mix_up.astype(x.dtype))
        share = share + self.shares.astype(x.dtype)[:, None, None]
        return tuple(x + back * share[i] for i in range(5))

    def _remember(
        self, fed: tuple[Array, ...], writes: Array | None, starts: Array | None, memory: Array | None
    ) -> tuple[Array, Array]:
        """See in_time_order."""
        r, k, v, log_decay = fed
        if writes is not None:  # a query or padding writes nothing
            k = jnp.where(writes[..., None, None], k, 0)
        log_decay = fading(log_decay, writes, None)
        if starts is not None:
            # In front of each token one that only forgets: a token reads the memory before its own decay.
            forget = jnp.broadcast_to(jnp.where(starts[..., None, None], FORGOTTEN, 0.0), log_decay.shape)
            r, k, v = (_after(jnp.zeros_like(a), a) for a in (r, k, v))
            log_decay = _after(forget, log_decay)
        out, memory = linear_attention(
            r, k, v, log_decay=log_decay, bonus=self.bonus, initial_state=memory,
            chunk_size=self.chunk_size, implementation=self.implementation,
        )  # fmt: skip
        return out if starts is None else out[:, 1::2], memory


def _after(first: Array, second: Array) -> Array:
    """[B, T, ...] twice to [B, 2 T, ...], by turns."""
    return jnp.stack([first, second], axis=2).reshape(first.shape[0], -1, *first.shape[2:])


class RWKV7(nn.Module):
    """out = W_o ((norm(o) + (r . (rho k)) v) g),   o_t = S_t^T r_t (Goose, arXiv:2503.14456, sec. 4).

    S_t = (diag(exp(-e^(-1/2) sigmoid(w_t))) - (a_t c_t) c_t^T) S_{t-1} + k_t v_t^T

    with c = kappa k / |kappa k| the key under which something is removed, a = sigmoid(..) how much of it, and k (1 + (a - 1)
    alpha) in place of k from there on. w, a and g are of low rank; all read mixtures x_t + (x_{t-1} - x_t) share_i.

    Attributes:
      num_heads: of the memory.
      head_dim: H; None divides embed_dim among the heads.
      value_head_dim: E; None takes H.
      decay_rank: of w; None takes the published rule, about 2.5 sqrt(D).
      rate_rank: of a; None likewise.
      gate_rank: of g; None takes about 5 sqrt(D).
      value_residual: values are a mixture with those of the first layer, v + (v_1 - v) sigmoid(..), which a decoder hands
        from layer to layer. (The first layer has that share's parameters, too, and does not read them.)
      value_rank: of that mixture; None takes about 1.7 sqrt(D).
      norm_epsilon: of the layer norm of each head; None takes 1e-5 H.
      chunk_size: see `dplr_attention`.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    value_head_dim: int | None = None
    decay_rank: int | None = None
    rate_rank: int | None = None
    gate_rank: int | None = None
    value_residual: bool = False
    value_rank: int | None = None
    norm_epsilon: float | None = None
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    def setup(self) -> None:
        """Shares [6, D], projections, kappa, alpha and rho, and the norm; they start as in the published first layer."""
        heads, head_dim, value_dim = _dims(self)
        keys, values, dim = heads * head_dim, heads * value_dim, self.embed_dim
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = functools.partial(Dense, use_bias=False, **types)
        shares = starting_at([shift_share(dim, power) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)])
        self.shares = self.param("shares", shares, (6, dim), self.param_dtype)
        orthogonal = nn.initializers.orthogonal
        self.receptance = plain(keys, kernel_init=orthogonal())
        self.key = plain(keys, kernel_init=orthogonal(0.1))
        self.value = plain(values, kernel_init=orthogonal())
        self.out = plain(dim, kernel_init=nn.initializers.zeros)
        wave = 2 * ramp(head_dim) - 1
        zigzag, rise = np.tile(wave * np.abs(wave), heads), ramp(keys) - 0.5
        low = functools.partial(LowRank, dtype=self.dtype, out_dtype=jnp.float32, param_dtype=self.param_dtype)
        slow = starting_at(-5.5 + 6 * ramp(keys) + 2.5 * zigzag)
        self.decay = low(self._rank(self.decay_rank, 2.5), keys, "tanh", slow)
        rates = starting_at(-0.19 + 0.3 * zigzag + 0.4 * rise)
        self.rate = low(self._rank(self.rate_rank, 2.5), keys, "identity", rates)
        self.gate = LowRank(self._rank(self.gate_rank, 5.0, wide=True), values, "sigmoid", None, **types)
        if self.value_residual:
            first = starting_at(0.73 - 0.4 * (ramp(values) - 0.5))
            self.first_share = low(self._rank(self.value_rank, 1.7), values, "identity", first)
        self.kappa = self.param("kappa", starting_at(0.71 - 0.1 * rise), (heads, head_dim), self.param_dtype)
        self.alpha = self.param("alpha", nn.initializers.constant(1.02), (heads, head_dim), self.param_dtype)
        self.rho = self.param("rho", nn.initializers.constant(-0.04), (heads, head_dim), self.param_dtype)
        self.norm = HeadNorm(1e-5 * head_dim if self.norm_epsilon is None else self.norm_epsilon, **types)

    @nn.nowrap
    def _rank(self, rank: int | None, slope: float, wide: bool = False) -> int:
        """The published rule: a multiple of 32, and more of it for heads of more than 64 channels."""
        factor = 1 if wide else _dims(self)[1] / 64
        return rank or max(32, round(slope * math.sqrt(self.embed_dim) * factor / 32) * 32)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Remembered:
        """See Mixer: the last token, and the memory."""
        return _init_state(self, batch_size)

    @nn.nowrap
    def init_shared(self, batch_size: int, length: int) -> tuple[Array, Array] | None:
        """See Mixer: with value_residual the first layer's values, [B, T, N E], and whether there has been a layer."""
        heads, _, value_dim = _dims(self)
        none = jnp.zeros((batch_size, length, heads * value_dim), self.dtype), jnp.zeros((), bool)
        return none if self.value_residual else None

    def __call__(
        self, x: Array, tokens: Tokens, state: Remembered | Carried | None = None
    ) -> tuple[Array, Remembered | Carried | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed; a query reads itself, by rho."""
        if not isinstance(state, Carried):
            out, _, after = self.read(x, tokens, state)
            return out, after
        first, there = state.shared
        out, own, after = self.read(x, tokens, state.state, first, there)
        return out, Carried(after, (jnp.where(there, first, own), jnp.ones_like(there)))

    def read(
        self,
        x: Array,
        tokens: Tokens,
        state: Remembered | None = None,
        first_values: Array | None = None,
        there: Array | bool = True,
    ) -> tuple[Array, Array, Remembered | None]:
        """As a layer among others.

        Args:
          x: [B, T, D].
          tokens: when and where they are.
          state: what was remembered before; None for a whole sequence.
          first_values: [B, T, N E], what the first layer's `read` gave; with value_residual.
          there: [] bool, whether they are there: not in the first layer.

        Returns:
          [B, T, D], the values [B, T, N E] as they were projected, and the state after.

        Raises:
          UsageError: value_residual without first_values, or the other way round.
        """
        if self.value_residual != (first_values is not None):
            raise UsageError(
                f"config.model.mixer.value_residual={self.value_residual} and first_values belong together; only "
                "config.model.kind='decoder' hands values from layer to layer: choose it, or leave value_residual out."
            )
        x = x.astype(self.dtype)
        before = Remembered() if state is None else state
        back, recent = to_the_one_before(x, tokens, before.recent)
        x_r, x_w, x_k, x_v, x_a, x_g = (x + back * share[None, None] for share in self.shares.astype(x.dtype))
        values = own = self.value(x_v)
        if first_values is not None:
            share = nn.sigmoid(self.first_share(x_v)).astype(x.dtype)
            values = jnp.where(there, own + (first_values - own) * share, own)
        log_decay = -math.exp(-0.5) * nn.sigmoid(self.decay(x_w))
        parts = (self.receptance(x_r), self.key(x_k), values, nn.sigmoid(self.rate(x_a)), log_decay)
        r, k, v, rate, log_decay = (split_heads(a, self.num_heads) for a in parts)
        kappa, alpha, rho = (p.astype(jnp.float32)[None, None] for p in (self.kappa, self.alpha, self.rho))
        removed = unit(k.astype(jnp.float32) * kappa)
        k = (k.astype(jnp.float32) * (1 + (rate - 1) * alpha)).astype(self.dtype)
        fed = (r, k, v, -removed.astype(self.dtype), (removed * rate).astype(self.dtype), log_decay)
        remembered, memory = in_time_order(self._remember, fed, tokens, before.memory)
        bonus = (r.astype(jnp.float32) * k.astype(jnp.float32) * rho).sum(axis=-1, keepdims=True).astype(self.dtype)
        out = self.out(merge_heads(self.norm(remembered) + bonus * v) * self.gate(x_g))
        return out, own, None if state is None else Remembered(recent, memory)

    def _remember(
        self, fed: tuple[Array, ...], writes: Array | None, starts: Array | None, memory: Array | None
    ) -> tuple[Array, Array]:
        """See in_time_order."""
        r, k, v, a, b, log_decay = fed
        if writes is not None:  # a query or padding writes and removes nothing
            k, a = (jnp.where(writes[..., None, None], s, 0) for s in (k, a))
        if starts is not None:  # there is nothing to remove
            a = jnp.where(starts[..., None, None], 0, a)
        log_decay = fading(log_decay, writes, starts)
        return dplr_attention(
            r, k, v, a, b, log_decay=log_decay, initial_state=memory,
            chunk_size=self.chunk_size, implementation=self.implementation,
        )  # fmt: skip
