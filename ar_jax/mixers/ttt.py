"""TTT-linear (arXiv:2407.04620): the memory is a linear model that is trained on the sequence while it is read."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.ttt import RESIDUALS, FastWeights, Inner, empty_weights, ttt_linear
from ar_jax.mixers.common.block_gate import angles, turned_halves
from ar_jax.mixers.common.heads import head_width
from ar_jax.mixers.protocol import Tokens, in_time_order, merge_heads, split_heads


class TTT(nn.Module):
    """out = W_o (norm(o) * gelu(W_g x)),   o_t = q_t + norm_h(q_t W_t + b_t), W_t learned by gradients (arXiv:2407.04620).

    W and b of each head start as parameters and learn, a mini-batch at a time, to predict v - k from k. A token reads
    the mean gradient of its mini-batch so far, 1 / (i + 1) plus a learned number times those of tokens 0 to i, each
    weighted by base_rate sigmoid(W_r x + b_r) / H. Queries and keys are turned by their places in the mini-batch.

    Attributes:
      num_heads: inner models.
      head_dim: H; None divides embed_dim among the heads.
      mini_batch: tokens whose gradients are taken at the same W.
      base_rate: of learning.
      residual: one of RESIDUALS, see `Inner`.
      gate: there is one.
      rope_base: of the turns; 0 has none.
      norm_epsilon: of both layer norms.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    mini_batch: int = 16
    base_rate: float = 1.0
    residual: str = "query"
    gate: bool = True
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-6
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int]:
        """Heads and the width of a head."""
        head_dim = head_width(self.embed_dim, self.num_heads, self.head_dim)
        if self.rope_base and head_dim % 2:
            raise UsageError(
                f"config.model.mixer.head_dim={head_dim} must be even to be turned; set rope_base=0.0, or another."
            )
        return self.num_heads, head_dim

    def setup(self) -> None:
        """Projections; the inner models' first weights [N, H, H] and [N, H], their norms, and what makes their rates."""
        choose(dict.fromkeys(RESIDUALS), self.residual, "model.mixer.residual")
        if self.mini_batch < 1:
            raise UsageError(f"config.model.mixer.mini_batch={self.mini_batch} must be at least 1.")
        heads, head_dim = self.dims
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = functools.partial(Dense, use_bias=False, **types)
        self.query, self.key, self.value = (plain(heads * head_dim) for _ in range(3))
        small, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        self.rate = Dense(heads, kernel_init=small, dtype=jnp.float32, param_dtype=self.param_dtype)
        self.mean_offset = self.param("mean_offset", zeros, (self.mini_batch,), self.param_dtype)
        self.weight = self.param("weight", small, (heads, head_dim, head_dim), self.param_dtype)
        self.bias = self.param("bias", zeros, (heads, head_dim), self.param_dtype)
        self.inner_scale = self.param("inner_scale", nn.initializers.ones, (heads, head_dim), self.param_dtype)
        self.inner_offset = self.param("inner_offset", zeros, (heads, head_dim), self.param_dtype)
        self.norm = nn.LayerNorm(epsilon=self.norm_epsilon, use_fast_variance=False, **types)
        if self.gate:
            self.opening = plain(heads * head_dim)
        self.out = plain(self.embed_dim)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> FastWeights:
        """See Mixer: two matrices and two vectors for each head."""
        return empty_weights(batch_size, *self.dims)

    def __call__(self, x: Array, tokens: Tokens, state: FastWeights | None = None) -> tuple[Array, FastWeights | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        projected = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        rate = self.base_rate * nn.sigmoid(self.rate(x)) / self.dims[1]
        read, after = in_time_order(self._learn, (*projected, rate), tokens, state)
        out = self.norm(merge_heads(read))
        if self.gate:
            out = out * nn.gelu(self.opening(x))
        return self.out(out), None if state is None else after

    def _learn(
        self, fed: tuple[Array, ...], writes: Array | None, starts: Array | None, state: FastWeights | None
    ) -> tuple[Array, FastWeights]:
        """See in_time_order."""
        q, k, v, write_rate = fed
        place = _places(q.shape[1], writes, starts, None if state is None else state.count) % self.mini_batch
        if self.rope_base:
            cos, sin = angles(place, q.shape[-1], self.rope_base)
            q, k = (turned_halves(a.astype(jnp.float32), cos, sin) for a in (q, k))
        mean = 1 / (1 + jnp.arange(self.mini_batch, dtype=jnp.float32)) + self.mean_offset.astype(jnp.float32)
        read_rate = jnp.broadcast_to(jnp.take(jnp.maximum(mean, 0), place)[..., None], write_rate.shape)
        weight, bias, scale, offset = (
            p.astype(jnp.float32) for p in (self.weight, self.bias, self.inner_scale, self.inner_offset)
        )
        inner = Inner(weight, bias, scale, offset, self.mini_batch, self.residual, self.norm_epsilon)
        return ttt_linear(
            q, k, v, read_rate, inner, write_rate=write_rate, writes=writes, starts=starts, initial_state=state,
            implementation=self.implementation,
        )  # fmt: skip


def _places(length: int, writes: Array | None, starts: Array | None, count: Array | None) -> Array:
    """How many tokens of its own sequence were trained on before each token, [B or 1, T] int32; count [B] came before all."""
    written = jnp.ones((1, length), jnp.int32) if writes is None else writes.astype(jnp.int32)
    before = jnp.cumsum(written, axis=1) - written
    if count is not None:
        before = before + count[:, None]
    if starts is not None:
        first = jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
        before = before - first
    return before
