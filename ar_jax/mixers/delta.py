"""Delta rules: a memory that reads what it holds under a key before it writes there, with one decay, one per channel, or none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.delta_attention import delta_attention
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.head_gate import GATES, gated
from ar_jax.mixers.common.heads import head_width, unit
from ar_jax.mixers.common.memory import Remembered, fading
from ar_jax.mixers.common.short_convolution import Ring
from ar_jax.mixers.common.silu_convolution import SiluConvolution
from ar_jax.mixers.common.step_size import log_uniform_steps
from ar_jax.mixers.protocol import Tokens, in_time_order, merge_heads, split_heads

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,
    "elu": lambda x: nn.elu(x) + 1,
    "identity": lambda x: x,
}
DECAYS = ("none", "head", "channel")
NORMS: dict[str, Callable[[Array], Array]] = {"l2": unit, "sum": lambda x: x / x.sum(axis=-1, keepdims=True)}


class Delta(nn.Module):
    """out = W_o (norm(o) gate(W_g x)),   o_t = S_t^T q_t / sqrt(H), where q, k, v = silu(conv(W x)) and |q| = |k| = 1.

    S_t = a_t S_{t-1} + beta_t k_t (v_t - (a_t S_{t-1})^T k_t)^T,   beta = sigmoid(W_b x)

    Without decay it is DeltaNet (arXiv:2406.06484); with a_t = exp(-exp(log_rate) softplus(W_a x + bias)) per head, gated
    DeltaNet (arXiv:2412.06464); with several writes behind one decay, DeltaProduct (arXiv:2502.10297); with a decay per
    channel of the key, from a projection of low rank, Kimi delta attention (arXiv:2510.26692).

    Attributes:
      num_heads: of queries and keys.
      head_dim: H; None divides embed_dim among the heads.
      num_value_heads: a multiple of num_heads; neighbouring ones share queries and keys. None has as many.
      value_head_dim: E; None takes H.
      decay: one of DECAYS.
      decay_rank: of the projection to the decays per channel; None takes E.
      lower_bound: decays per channel are exp(lower_bound sigmoid(exp(log_rate) (W_a x + bias))); None bounds them by 0 only.
      num_writes: keys and values of a token, written one after the other.
      activation: of queries and keys, a key of ACTIVATIONS.
      qk_norm: a key of NORMS.
      learn_beta: otherwise beta = 1.
      allow_negative_eigenvalues: twice as much is written, so that a state may turn round (arXiv:2411.12537).
      width: taps of the convolution; 0 has none.
      conv_bias: it has a bias.
      gate: of the output, a key of GATES.
      gate_rank: rank of the projection to the gate, which then has a bias; None is a whole matrix.
      norm_epsilon: of the output's RMS norm, over each head.
      chunk_size: see `delta_attention`.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    num_value_heads: int | None = None
    value_head_dim: int | None = None
    decay: str = "head"
    decay_rank: int | None = None
    lower_bound: float | None = None
    num_writes: int = 1
    activation: str = "silu"
    qk_norm: str = "l2"
    learn_beta: bool = True
    allow_negative_eigenvalues: bool = False
    width: int = 4
    conv_bias: bool = False
    gate: str = "silu"
    gate_rank: int | None = None
    norm_epsilon: float = 1e-5
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Heads of keys and of values, and their widths."""
        head_dim = head_width(self.embed_dim, self.num_heads, self.head_dim)
        value_heads = self.num_value_heads or self.num_heads
        if value_heads % self.num_heads:
            raise UsageError(
                f"config.model.mixer.num_value_heads={value_heads} must be a multiple of num_heads={self.num_heads}."
            )
        return self.num_heads, value_heads, head_dim, self.value_head_dim or head_dim

    def setup(self) -> None:
        """Projections, the convolution over queries, keys and values, the decay's numbers, and the norm."""
        self._check()
        heads, value_heads, head_dim, value_dim = self.dims
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = functools.partial(Dense, use_bias=False, **types)
        exact = functools.partial(Dense, use_bias=False, dtype=jnp.float32, param_dtype=self.param_dtype)
        self.query, self.key = plain(heads * head_dim), plain(self.num_writes * heads * head_dim)
        self.value, self.out = plain(self.num_writes * value_heads * value_dim), plain(self.embed_dim)
        if self.width:
            self.convolution = self._convolution()
        if self.learn_beta:
            self.beta = exact(self.num_writes * value_heads)
        if self.decay != "none":
            channels = head_dim if self.decay == "channel" else 1
            if self.decay == "channel":
                self.decay_down = plain(self.decay_rank or value_dim)
            self.decay_up = exact(value_heads * channels)
            start = log_uniform_steps((0.001, 0.1), 1e-4)
            self.decay_bias = self.param("decay_bias", start, (value_heads * channels,), self.param_dtype)
            self.log_rate = self.param("log_rate", self._start_rates, (value_heads,), self.param_dtype)
        if self.gate != "none":
            if self.gate_rank is not None:
                self.gate_down = plain(self.gate_rank)
            self.gate_up = Dense(value_heads * value_dim, use_bias=self.gate_rank is not None, **types)
        self.norm = nn.RMSNorm(epsilon=self.norm_epsilon, **types)

    def _check(self) -> None:
        where = "config.model.mixer"
        choose(dict.fromkeys(DECAYS), self.decay, "model.mixer.decay")
        choose(ACTIVATIONS, self.activation, "model.mixer.activation")
        choose(NORMS, self.qk_norm, "model.mixer.qk_norm")
        choose(GATES, self.gate, "model.mixer.gate")
        if self.num_writes < 1:
            raise UsageError(f"{where}.num_writes={self.num_writes} must be at least 1.")
        if self.lower_bound is not None and (self.lower_bound >= 0 or self.decay != "channel"):
            raise UsageError(
                f"{where}.lower_bound={self.lower_bound} must be below 0, in nats, and belongs to decay='channel'."
            )

    def _start_rates(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Evenly up to 16; those of channels are at least 1, and exp(0) where a bound takes their place."""
        if self.lower_bound is not None:
            return jnp.zeros(shape, dtype)
        low = 1.0 if self.decay == "channel" else 1e-4
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, low, 16.0)).astype(dtype)

    @nn.nowrap
    def _convolution(self) -> SiluConvolution:
        heads, value_heads, head_dim, value_dim = self.dims
        channels = heads * head_dim * (1 + self.num_writes) + self.num_writes * value_heads * value_dim
        return SiluConvolution(channels, self.width, self.conv_bias, self.dtype, self.param_dtype, activate=False)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Remembered:
        """See Mixer: what the convolution reaches, and the memory."""
        _, value_heads, head_dim, value_dim = self.dims
        recent = self._convolution().clone(parent=None).init_state(batch_size) if self.width else None
        return Remembered(recent, jnp.zeros((batch_size, value_heads, head_dim, value_dim), jnp.float32))

    def __call__(self, x: Array, tokens: Tokens, state: Remembered | None = None) -> tuple[Array, Remembered | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        before = Remembered() if state is None else state
        q, k, v, recent = self._queries_keys_values(x, tokens, before.recent)
        fed = (q, k, v, self._betas(x), self._log_decay(x))
        read, memory = in_time_order(self._remember, fed, tokens, before.memory)
        gate = None if self.gate == "none" else self._gate(x)
        out = self.out(merge_heads(gated(self.gate, self.norm(read), gate)))
        return out, None if state is None else Remembered(recent, memory)

    def _queries_keys_values(
        self, x: Array, tokens: Tokens, recent: Ring | None
    ) -> tuple[Array, Array, Array, Ring | None]:
        """q [B, T, value heads, H], k [B, T, writes, value heads, H], v likewise, and what the convolution reaches after."""
        heads, value_heads, head_dim, _ = self.dims
        joined = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        if self.width:
            joined, recent = self.convolution(joined, tokens, recent)
        keys = heads * head_dim
        q, k, v = jnp.split(joined, [keys, keys * (1 + self.num_writes)], axis=-1)

        def normal(a: Array) -> Array:
            a = ACTIVATIONS[self.activation](a).astype(jnp.float32).reshape(*x.shape[:2], -1, heads, head_dim)
            return jnp.repeat(NORMS[self.qk_norm](a), value_heads // heads, axis=3).astype(self.dtype)

        q = (normal(q) * head_dim**-0.5)[:, :, 0]
        return q, normal(k), nn.silu(v).reshape(*x.shape[:2], self.num_writes, value_heads, -1), recent

    def _betas(self, x: Array) -> Array:
        """[B, T, writes, value heads] float32."""
        shape = (*x.shape[:2], self.num_writes, self.dims[1])
        beta = nn.sigmoid(self.beta(x)).reshape(shape) if self.learn_beta else jnp.ones(shape, jnp.float32)
        return 2 * beta if self.allow_negative_eigenvalues else beta

    def _log_decay(self, x: Array) -> Array | None:
        """[B, T, value heads] or [B, T, value heads, H] nats, or None."""
        if self.decay == "none":
            return None
        rate = jnp.exp(self.log_rate.astype(jnp.float32))[None, None]
        raw = self.decay_up(self.decay_down(x) if self.decay == "channel" else x)
        raw = raw + self.decay_bias.astype(jnp.float32)[None, None]
        if self.decay == "head":
            return -rate * jax.nn.softplus(raw)
        raw, rate = split_heads(raw, self.dims[1]), rate[..., None]
        if self.lower_bound is not None:
            return self.lower_bound * nn.sigmoid(rate * raw)
        return -rate * jax.nn.softplus(raw)

    def _gate(self, x: Array) -> Array:
        """[B, T, value heads, E]."""
        return split_heads(self.gate_up(x if self.gate_rank is None else self.gate_down(x)), self.dims[1])

    def _remember(
        self, fed: tuple[Any, ...], writes: Array | None, starts: Array | None, memory: Array | None
    ) -> tuple[Array, Array]:
        """See in_time_order."""
        q, k, v, beta, log_decay = fed
        if writes is not None:  # a query or padding writes nothing
            beta = jnp.where(writes[..., None, None], beta, 0)
        log_decay = fading(log_decay, writes, starts, q.shape[:3])
        return delta_product(
            q, k, v, beta, log_decay=log_decay, initial_state=memory,
            chunk_size=self.chunk_size, implementation=self.implementation,
        )  # fmt: skip


def delta_product(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    *,
    log_decay: Array | None = None,
    initial_state: Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Several delta rules a token, behind one decay (arXiv:2502.10297): a product of as many generalised Householder matrices.

    S_t = H_tm .. H_t1 exp(log_decay_t) S_{t-1} + what is written, H_tj = I - beta_tj k_tj k_tj^T;   o_t = S_t^T q_t

    Args:
      q: [B, T, N, H], with its scale applied.
      k: [B, T, M, N, H], in the order they are written.
      v: [B, T, M, N, E].
      beta: [B, T, M, N].
      log_decay: [B, T, N] or [B, T, N, H], in nats per token; None does not decay.
      initial_state: [B, N, H, E]; zeros if None.
      chunk_size: see `delta_attention`.
      implementation: see `delta_attention`.

    Returns:
      o [B, T, N, E] and the memory after the last token, [B, N, H, E] float32.

    Raises:
      ValueError: as `delta_attention` does.
    """
    count = k.shape[2]

    def alone(a: Array, at: int) -> Array:
        """[B, T, ...] to [B, T M, ...], zero for all writes of a token but one."""
        empty = jnp.zeros((*a.shape[:2], count, *a.shape[2:]), a.dtype)
        return empty.at[:, :, at].set(a).reshape(a.shape[0], -1, *a.shape[2:])

    if count > 1:  # the decay comes before the first write, the query reads behind the last
        q, log_decay = alone(q, count - 1), None if log_decay is None else alone(log_decay, 0)
    k, v, beta = (a.reshape(a.shape[0], -1, *a.shape[3:]) for a in (k, v, beta))
    out, state = delta_attention(
        q, k, v, beta, log_decay=log_decay, initial_state=initial_state,
        chunk_size=chunk_size, implementation=implementation,
    )  # fmt: skip
    return out[:, count - 1 :: count], state
