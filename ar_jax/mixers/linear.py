"""Linear attention with a feature map and a decay: its state has a constant size."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.linear_attention import bidirectional_linear_attention, linear_attention
from ar_jax.mixers.common.feature_maps import FEATURE_MAPS, LOG_NORMAL_FIT, matched_moments, num_features
from ar_jax.mixers.common.head_gate import GATES, gated
from ar_jax.mixers.common.heads import head_width
from ar_jax.mixers.common.memory import fading, with_floor
from ar_jax.mixers.common.place_order import written_before_read
from ar_jax.mixers.common.short_convolution import Ring, empty_ring
from ar_jax.mixers.common.silu_convolution import SiluConvolution
from ar_jax.mixers.common.single_head import Head, attend
from ar_jax.mixers.common.statistics import Statistics
from ar_jax.mixers.norms import NORMS, make_norm
from ar_jax.mixers.positions import rotate
from ar_jax.mixers.protocol import NEVER, State, Tokens, in_time_order, merge_heads, split_heads

DECAYS = ("none", "fixed", "slopes", "learned", "channel")
MEASURED = 0.01  # by how much a training step moves measured spreads towards what it measures


@struct.dataclass
class LinearState:
    """What linear attention remembers.

    Attributes:
      memory: [B, N, features, E] float32, one column more with normalize: the sum of the keys.
      recent: the last values that the short filters reach; None without them.
      block: keys and values of the last tokens, for the heads of each example; None without blocks.
    """

    memory: Array
    recent: Ring | None
    block: Ring | None


class Linear(nn.Module):
    """Linear attention (arXiv:2006.16236): S_t = a_t S_{t-1} + phi(k_t) v_t^T, o_t = S_t^T phi(q_t), normalised or not.

    Attributes:
      num_kv_heads: key and value heads, a divisor of num_heads; None takes num_heads. Each query head has a memory.
      head_dim: width of a head's queries and keys; None takes embed_dim / num_heads.
      value_dim: width of a head's values; None takes head_dim.
      feature_map: phi, one of FEATURE_MAPS. "exp" is exp(alpha q) and exp(beta k), alpha and beta such that weights spread
        as softmax attention's do (arXiv:2311.13541); what that takes is measured in training: std of q and of k.
      log_normal_fit: for "exp", the line by which alpha and beta are found; see `matched_moments`, and `fit_log_normal` of
        analysis/concentration.py for other widths of heads than some 64.
      qk_norm: in front of it, q and k are normalised per head by one of NORMS, or "none".
      query_scale: factor of queries, behind that norm; None takes 1 / sqrt(head_dim). "exp" has no use for it.
      rope_base: queries and keys are turned by their places; 0 turns nothing.
      short_width: taps of a causal convolution with silu behind the projections of q, k and v; 0 has none.
      decay: what a is. "none" is 1. "fixed" is 1 - 2^(-5 - head), retention (arXiv:2307.08621). "slopes" is
        exp(-8 (1 - depth) head / num_heads), lightning attention (arXiv:2401.04658). "learned" is f^(1 / decay_divisor) per
        head, f = sigmoid(w x_t + b), and "channel" that per head and channel of its keys (GLA, arXiv:2312.06635).
      depth: for "slopes", how far up the network this is: the layer, counted from 0, over the number of layers.
      decay_rank: rank of the projection to the decays of channels; 0 projects in one.
      decay_divisor: the power's.
      decay_floor: f is decay_floor + (1 - decay_floor) sigmoid(w x_t + b) (HGRN, arXiv:2311.04823), b = 0 with tied_keys.
      tied_keys: k_t = 1 - a_t, where decays are per channel; phi is for the queries only (HGRN2, arXiv:2404.07904).
      normalize: divide by phi(q_t) . sum_j phi(k_j) + epsilon.
      epsilon: None adds nothing, but keeps that sum from zero.
      block_size: what is read is averaged with what softmax attention reads inside blocks of so many tokens, with the same
        queries, keys and values (LLN+Diag, arXiv:2311.13541); 0 has no blocks.
      out_norm: of what is read, one of NORMS or "none"; None takes "rms" unless normalize.
      norm_heads: each head is normalised by itself, all with one scale; otherwise all together.
      norm_epsilon: of both norms.
      out_gate: what is read, normalised, is multiplied by this function of W_g x: a key of GATES.
      qkv_bias: queries, keys and values have a bias.
      out_bias: the last projection has one.
      causal: otherwise all tokens read all others.
    """

    embed_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    feature_map: str = "elu"
    log_normal_fit: tuple[float, float] = LOG_NORMAL_FIT
    qk_norm: str = "none"
    query_scale: float | None = None
    rope_base: float = 0.0
    short_width: int = 0
    decay: str = "none"
    depth: float = 0.0
    decay_rank: int = 16
    decay_divisor: float = 16.0
    decay_floor: float = 0.0
    tied_keys: bool = False
    normalize: bool = True
    epsilon: float | None = None
    block_size: int = 0
    out_norm: str | None = None
    norm_heads: bool = True
    norm_epsilon: float = 1e-6
    out_gate: str = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    causal: bool = True
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def reads_peers(self) -> bool:
        """See Mixer."""
        return not self.causal

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Query heads, key heads, the width of a head's keys and of its values."""
        head_dim = head_width(self.embed_dim, self.num_heads, self.head_dim)
        shared = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if shared < 1 or self.num_heads % shared:
            raise UsageError(
                f"num_kv_heads={shared} does not divide num_heads={self.num_heads}; use one of its divisors."
            )
        return self.num_heads, shared, head_dim, self.value_dim or head_dim

    @nn.nowrap
    def _check(self) -> None:
        tables: dict[str, Any] = {"feature_map": FEATURE_MAPS, "decay": dict.fromkeys(DECAYS), "out_gate": GATES}
        tables |= dict.fromkeys(("qk_norm", "out_norm"), NORMS | {"none": None})
        for key, table in tables.items():
            if key != "out_norm" or self.out_norm is not None:
                choose(table, getattr(self, key), f"model.mixer.{key}")
        head_dim = self.dims[2]
        if self.rope_base and head_dim % 2:
            raise UsageError(f"rope_base={self.rope_base} turns pairs, but head_dim={head_dim} is odd; set it to 0.")
        if not self.causal and (self.decay != "none" or self.short_width):
            raise UsageError("causal=False has no order in which to decay; set decay='none' and short_width=0.")
        if self.decay == "channel" and num_features(self.feature_map, head_dim) != head_dim:
            raise UsageError(
                f"feature_map={self.feature_map!r} makes features that are no channels; set another decay."
            )
        if self.tied_keys and self.decay != "channel":
            raise UsageError(f"tied_keys takes keys from decays of channels; set decay='channel', not {self.decay!r}.")
        if self.block_size and (not self.normalize or self.tied_keys):
            raise UsageError(
                "block_size takes the mean of two averages of values; set normalize=True and tied_keys=False."
            )
        if not 0 <= self.decay_floor < 1:
            raise UsageError(f"config.model.mixer.decay_floor={self.decay_floor} must lie in [0, 1).")

    @property
    def norm_kind(self) -> str:
        """Of what is read."""
        return self.out_norm or ("none" if self.normalize else "rms")

    def setup(self) -> None:
        """Projections as matrices, [D, heads H] and back, norms, gates and decays."""
        self._check()
        heads, shared, head_dim, value_dim = self.dims
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(Dense, use_bias=self.qkv_bias, **types)
        self.query, self.value = dense(heads * head_dim), dense(shared * value_dim)
        if not self.tied_keys:
            self.key = dense(shared * head_dim)
        self.out = Dense(self.embed_dim, use_bias=self.out_bias, **types)
        if self.qk_norm != "none":
            norm = make_norm(self.qk_norm, self.norm_epsilon, **types)
            self.query_norm, self.key_norm = norm(), norm()
        if self.short_width:
            self.short = SiluConvolution(self._widths[-1], self.short_width, use_bias=False, **types)
        if self.decay == "learned":
            self.gate = nn.Dense(heads, dtype=jnp.float32, param_dtype=self.param_dtype)
        if self.decay == "channel":
            if self.decay_rank:
                self.gate_down = Dense(self.decay_rank, use_bias=False, **types)
            exact: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
            self.gate = nn.Dense(shared * head_dim, use_bias=not self.tied_keys, **exact)
        if self.feature_map == "exp":
            self.statistics = Statistics((2,), nn.initializers.zeros, "log_std")
        if self.out_gate != "none":
            self.out_gates = Dense(heads * value_dim, use_bias=False, **types)
        if self.norm_kind != "none":
            self.norm = make_norm(self.norm_kind, self.norm_epsilon, **types)()

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Where queries, keys and values end that stand side by side."""
        heads, shared, head_dim, value_dim = self.dims
        keys = 0 if self.tied_keys else shared * head_dim
        return heads * head_dim, heads * head_dim + keys, heads * head_dim + keys + shared * value_dim

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> LinearState | tuple[()]:
        """See Mixer: a matrix for each head, whatever the length."""
        if not self.causal:
            return ()
        heads, _, head_dim, value_dim = self.dims
        features = num_features(self.feature_map, head_dim)
        memory = jnp.zeros((batch_size, heads, features, value_dim + self.normalize), jnp.float32)
        recent = block = None
        if self.short_width:
            short = SiluConvolution(self._widths[-1], self.short_width, dtype=self.dtype, parent=None)
            recent = short.init_state(batch_size)
        if self.block_size:
            block = empty_ring(batch_size * heads, self.block_size, head_dim + value_dim + 1, self.dtype)
        return LinearState(memory, recent, block)

    def __call__(self, x: Array, tokens: Tokens, state: State | None = None) -> tuple[Array, State | None]:
        """See Mixer. Causal: tokens of one step read each other in the order they are fed."""
        before = state if isinstance(state, LinearState) else LinearState(None, None, None)  # type: ignore[arg-type]
        parts, recent = self._projected(x, tokens, before.recent)
        q, k, v, log_decay = self._heads(x, parts, tokens)
        fed = (*self._features(q, k, tokens), v, log_decay)
        if self.causal:
            out, memory = in_time_order(self._attend, fed, tokens, before.memory)
        else:
            out, memory = self._both_ways(fed, tokens), None
        block = None
        if self.block_size:
            near, block = self._in_blocks(q, k, v, tokens, before.block)
            out = (out + near) / 2
        after = LinearState(memory, recent, block) if isinstance(state, LinearState) else state
        return self._finish(out, x), after

    def _projected(self, x: Array, tokens: Tokens, recent: Ring | None) -> tuple[list[Array], Ring | None]:
        """Queries, keys (none where they are tied) and values [B, T, heads H], convolved."""
        parts = [self.query(x), *([] if self.tied_keys else [self.key(x)]), self.value(x)]
        if self.short_width:
            mixed, recent = self.short(jnp.concatenate(parts, axis=-1), tokens, recent)
            parts = jnp.split(mixed, sorted({*self._widths[:2]}), axis=-1)
        return parts, recent

    def _heads(self, x: Array, parts: list[Array], tokens: Tokens) -> tuple[Array, Array, Array, Array | None]:
        """Queries, keys and values, [B, T, N, H], and log decays where they depend on the token."""
        heads, shared, _, _ = self.dims
        q, v = split_heads(parts[0], heads), split_heads(parts[-1], shared)
        log_decay: Any = self._log_decay(x)
        k = -jnp.expm1(log_decay).astype(self.dtype) if self.tied_keys else split_heads(parts[1], shared)
        if self.qk_norm != "none":
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rope_base:
            q, k = (rotate(a, tokens.position, self.rope_base) for a in (q, k))
        each = heads // shared
        if each > 1:
            k, v = (jnp.repeat(a, each, axis=2) for a in (k, v))
            log_decay = jnp.repeat(log_decay, each, axis=2) if self.decay == "channel" else log_decay
        return q, k, v, log_decay

    def _features(self, q: Array, k: Array, tokens: Tokens) -> tuple[Array, Array]:
        """phi of queries and keys, [B, T, N, features]."""
        phi = FEATURE_MAPS[self.feature_map]
        if self.feature_map == "exp":
            q, k = self._matched(q, k, tokens)
            return phi(q).astype(self.dtype), phi(k).astype(self.dtype)
        scale = self.dims[2] ** -0.5 if self.query_scale is None else self.query_scale
        return phi(q * scale), k if self.tied_keys else phi(k)

    def _in_blocks(
        self, q: Array, k: Array, v: Array, tokens: Tokens, before: Ring | None
    ) -> tuple[Array, Ring | None]:
        """What softmax attention reads inside blocks, [B, T, N, E]: each head is a sequence of its own."""
        heads = self.num_heads
        own = jax.tree.map(lambda a: jnp.repeat(a, heads, axis=0) if len(a) > 1 else a, tokens)
        q, k, v = (jnp.swapaxes(a, 1, 2).reshape(-1, a.shape[1], a.shape[3]) for a in (q, k, v))
        head = Head("softmax", self.block_size, self.causal, lambda distance: jnp.zeros(distance.shape, jnp.float32))
        out, _, block = attend(head, q, k, v, own, before)
        return jnp.swapaxes(out.reshape(-1, heads, *out.shape[1:]), 1, 2), block

    def _matched(self, q: Array, k: Array, tokens: Tokens) -> tuple[Array, Array]:
        """alpha q, less its largest channel, and beta k, float32 [B, T, N, H]; what is measured moves with training."""
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        log_std = self.statistics()
        there = (tokens.step < NEVER)[..., None, None]
        measured = jnp.stack([_log_std(jax.lax.stop_gradient(a), there) for a in (q, k)])
        q = self.statistics.moves(MEASURED * (measured - log_std), q)
        alpha, beta = matched_moments(jnp.exp(log_std[0]), jnp.exp(log_std[1]), self.log_normal_fit)
        q = alpha * q
        return q - jax.lax.stop_gradient(q.max(axis=-1, keepdims=True)), beta * k

    def _log_decay(self, x: Array) -> Array | None:
        """[B, T, N] or [B, T, K, H] float32 nats that depend on the token, or None."""
        if self.decay not in ("learned", "channel"):
            return None
        low = self.gate_down(x) if self.decay == "channel" and self.decay_rank else x
        log_decay = jax.nn.log_sigmoid(self.gate(low).astype(jnp.float32))
        log_decay = with_floor(log_decay, self.decay_floor) / self.decay_divisor
        return split_heads(log_decay, self.dims[1]) if self.decay == "channel" else log_decay

    def _attend(
        self, fed: tuple[Array, ...], writes: Array | None, starts: Array | None, memory: Array | None
    ) -> tuple[Array, Array]:
        """See in_time_order; to [B, T, N, E]."""
        q, k, v, log_decay = fed
        if self.decay in ("fixed", "slopes"):
            log_decay = jnp.asarray(fixed_log_decay(self.decay, self.num_heads, self.depth))
            if writes is not None or starts is not None:
                log_decay = jnp.broadcast_to(log_decay[None, None], q.shape[:3])
        if writes is not None:  # a query or padding writes nothing
            k = jnp.where(writes[..., None, None], k, 0)
        log_decay = fading(log_decay, writes, starts, q.shape[:3])
        return linear_attention(
            q,
            k,
            v,
            log_decay=log_decay,
            initial_state=memory,
            normalize=self.normalize,
            epsilon=self.epsilon,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )

    def _both_ways(self, fed: tuple[Array, Array, Array, Array | None], tokens: Tokens) -> Array:
        """What tokens read that all read all others of their segment, [B, T, N, E]."""
        q, k, v, _ = fed
        if tokens.segment is None:
            there = jnp.broadcast_to(tokens.step < NEVER, q.shape[:2]) if tokens.padded else None
            return bidirectional_linear_attention(
                q, k, v, normalize=self.normalize, epsilon=self.epsilon, key_mask=there
            )
        again = (*(jnp.concatenate([a, a], axis=1) for a in (q, k, v)), None)
        return in_time_order(self._attend, again, written_before_read(tokens), None)[0][:, q.shape[1] :]

    def _finish(self, out: Array, x: Array) -> Array:
        """Norm, gate and last projection of what was read, [B, T, N, E]."""
        if self.norm_kind != "none" and self.norm_heads:
            out = self.norm(out)
        out = merge_heads(out).astype(self.dtype)
        if self.norm_kind != "none" and not self.norm_heads:
            out = self.norm(out)
        return self.out(gated(self.out_gate, out, None if self.out_gate == "none" else self.out_gates(x)))


def fixed_log_decay(kind: str, num_heads: int, depth: float = 0.0) -> np.ndarray:
    """Nats per token of each head, [N] float32, for the decays "fixed" and "slopes"; see Linear."""
    head = np.arange(num_heads)
    nats = np.log1p(-(2.0 ** (-5 - head))) if kind == "fixed" else -8 / num_heads * (1 - depth) * head
    return nats.astype(np.float32)


def _log_std(a: Array, there: Array) -> Array:
    """The logarithm of the standard deviation of a [B, T, N, H] over the tokens that are there, []."""
    there = jnp.broadcast_to(there, a.shape)
    count = jnp.maximum(there.sum(), 1)
    mean = jnp.where(there, a, 0).sum() / count
    return 0.5 * jnp.log(jnp.where(there, jnp.square(a - mean), 0).sum() / count + 1e-12)
