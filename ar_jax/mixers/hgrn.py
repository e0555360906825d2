"""HGRN (arXiv:2311.04823): a recurrence of single numbers whose forget gates have a floor."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.selective_scan import selective_scan
from ar_jax.mixers.common.gated_norm import GatedNorm
from ar_jax.mixers.common.memory import Remembered, fading, with_floor
from ar_jax.mixers.common.short_convolution import empty_ring, short_convolution
from ar_jax.mixers.protocol import Tokens, in_time_order

LEAST_DECAY = 1e-15  # nats: a decay by no more is none in float32, and may be divided by


class HGRN(nn.Module):
    """out = W_o (rms(h_t) * silu(W_g x_t)),   h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t)      (arXiv:2311.04823).

    f_t = floor + (1 - floor) sigmoid(W_f x_t), in each channel for itself. The paper's floors rise from layer to layer, so
    that upper ones remember for longer.

    Attributes:
      hidden_dim: channels of the memory; None takes embed_dim.
      decay_floor: the least f.
      short_width: taps of a causal convolution of W_i x and W_f x; 0 has none.
      norm_epsilon: of the norm.
    """

    embed_dim: int
    hidden_dim: int | None = None
    decay_floor: float = 0.0
    short_width: int = 0
    norm_epsilon: float = 1e-5
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        """Of the memory."""
        return self.hidden_dim or self.embed_dim

    def setup(self) -> None:
        """Projections as matrices, [D, C] and back, and the norm."""
        if not 0 <= self.decay_floor < 1:
            raise UsageError(f"config.model.mixer.decay_floor={self.decay_floor} must lie in [0, 1).")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = functools.partial(Dense, use_bias=False, **types)
        self.value, self.forget, self.gate = (plain(self.channels) for _ in range(3))
        self.out = plain(self.embed_dim)
        self.norm = GatedNorm(norm_first=True, epsilon=self.norm_epsilon, **types)
        if self.short_width:
            start = nn.initializers.normal(self.short_width**-0.5)
            self.short = self.param("short", start, (self.short_width, 2 * self.channels), self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Remembered:
        """See Mixer."""
        recent = empty_ring(batch_size, self.short_width, 2 * self.channels, self.dtype) if self.short_width else None
        return Remembered(recent, jnp.zeros((batch_size, self.channels), jnp.float32))

    def __call__(self, x: Array, tokens: Tokens, state: Remembered | None = None) -> tuple[Array, Remembered | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        values, forget = self.value(x), self.forget(x)
        recent = None
        if self.short_width:
            pair = jnp.concatenate([values, forget], axis=-1)
            pair, recent = short_convolution(pair, self.short, tokens, None if state is None else state.recent)
            values, forget = jnp.split(pair, 2, axis=-1)
        log_forget = jax.nn.log_sigmoid(forget.astype(jnp.float32))
        log_forget = with_floor(log_forget, self.decay_floor)
        written = -jnp.expm1(log_forget) * nn.silu(values.astype(jnp.float32))
        before = None if state is None else state.memory
        read, memory = in_time_order(self._remember, (written, log_forget), tokens, before)
        out = self.out(self.norm(read, self.gate(x)))
        return out, None if state is None else Remembered(recent, memory)

    def _remember(
        self, fed: tuple[Array, Array], writes: Array | None, starts: Array | None, memory: Array | None
    ) -> tuple[Array, Array]:
        """See in_time_order."""
        written, log_decay = fed
        if writes is not None:  # a query or padding writes nothing
            written = jnp.where(writes[..., None], written, 0)
        log_decay = fading(log_decay, writes, starts)
        return gated_sum(written, log_decay, memory, chunk_size=self.chunk_size, implementation=self.implementation)


def gated_sum(
    values: Array,
    log_decay: Array,
    before: Array | None = None,
    *,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """h_t = exp(log_decay_t) h_{t-1} + values_t in each channel: a selective scan whose steps are the decays.

    Args:
      values: [B, T, C] float32.
      log_decay: [B, T, C] float32 nats, <= 0.
      before: [B, C] float32, the memory before the first token; zeros if None.
      chunk_size: see `selective_scan`.
      implementation: see `selective_scan`.

    Returns:
      h [B, T, C], and the last one [B, C].
    """
    delta = jnp.maximum(-log_decay, LEAST_DECAY)
    ones = jnp.ones((*values.shape[:2], 1), jnp.float32)
    out, after = selective_scan(
        values / delta,
        delta,
        -jnp.ones((values.shape[-1], 1), jnp.float32),
        ones,
        ones,
        initial_state=None if before is None else before[..., None],
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return out, after[..., 0]
