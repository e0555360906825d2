"""MesaNet (arXiv:2506.05233): what each query reads is the best linear map that the keys and values so far allow."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.mesa import STARTS, MesaMemory, mesa_attention
from ar_jax.mixers.common.head_gate import GATES, gated
from ar_jax.mixers.common.heads import head_width, unit
from ar_jax.mixers.common.memory import Remembered, fading
from ar_jax.mixers.common.silu_convolution import SiluConvolution
from ar_jax.mixers.protocol import Tokens, in_time_order, merge_heads, split_heads


class Mesa(nn.Module):
    """out = W_o (norm(o) gate(W_g x)),   o_t = V_t^T (K_t + diag(ridge))^-1 q_t (arXiv:2506.05233).

    K_t and V_t are fading sums of beta k k^T and beta k v^T, with v = W_v x, q and k = silu(conv(W x)) over their lengths,
    beta = sigmoid(W_b x + b) and a decay of sigmoid(W_a x + a), and ridge = softplus(..) + ridge_floor for each channel.

    Attributes:
      num_heads: of the memory.
      head_dim: H; None divides embed_dim among the heads.
      num_iterations: of conjugate gradients, the same in training and in generation; None solves exactly.
      start: of the iterations, one of STARTS.
      ridge_floor: the ridge is larger than this; it starts at 1.
      width: taps of the convolution.
      conv_bias: it has a bias.
      gate: of the output, a key of GATES.
      norm_epsilon: of the output's RMS norm, over each head.
      chunk_size: see `mesa_attention`.
    """

    embed_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    num_iterations: int | None = 30
    start: str = "diagonal"
    ridge_floor: float = 0.25
    width: int = 4
    conv_bias: bool = False
    gate: str = "none"
    norm_epsilon: float = 1e-5
    chunk_size: int | None = None
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def dims(self) -> tuple[int, int]:
        """Heads and the width of a head."""
        return self.num_heads, head_width(self.embed_dim, self.num_heads, self.head_dim)

    def setup(self) -> None:
        """Projections, the convolution over queries and keys, the ridge [N, H], and the norm."""
        self._check()
        heads, head_dim = self.dims
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = functools.partial(Dense, use_bias=False, **types)
        exact = functools.partial(Dense, dtype=jnp.float32, param_dtype=self.param_dtype)
        self.query, self.key, self.value = (plain(heads * head_dim) for _ in range(3))
        self.convolution = self._convolution()
        self.beta, self.decay = exact(heads), exact(heads)
        begin = nn.initializers.constant(math.log(math.expm1(1.0 - self.ridge_floor)))  # softplus(begin) = 1 - floor
        self.ridge = self.param("ridge", begin, (heads, head_dim), self.param_dtype)
        if self.gate != "none":
            self.opening = plain(heads * head_dim)
        self.norm = nn.RMSNorm(epsilon=self.norm_epsilon, **types)
        self.out = plain(self.embed_dim)

    def _check(self) -> None:
        choose(GATES, self.gate, "model.mixer.gate")
        choose(dict.fromkeys(STARTS), self.start, "model.mixer.start")
        if not 0 <= self.ridge_floor < 1:
            raise UsageError(
                f"config.model.mixer.ridge_floor={self.ridge_floor} must lie in [0, 1), where the ridge starts."
            )
        if self.num_iterations is not None and self.num_iterations < 1:
            raise UsageError(
                f"config.model.mixer.num_iterations={self.num_iterations} must be at least 1; None solves exactly."
            )

    @nn.nowrap
    def _convolution(self) -> SiluConvolution:
        heads, head_dim = self.dims
        return SiluConvolution(2 * heads * head_dim, self.width, self.conv_bias, self.dtype, self.param_dtype)

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> Remembered:
        """See Mixer: what the convolution reaches, and the memory."""
        heads, head_dim = self.dims
        matrix = jnp.zeros((batch_size, heads, head_dim, head_dim), jnp.float32)
        return Remembered(self._convolution().clone(parent=None).init_state(batch_size), MesaMemory(matrix, matrix))

    def __call__(self, x: Array, tokens: Tokens, state: Remembered | None = None) -> tuple[Array, Remembered | None]:
        """See Mixer. Tokens of one step read each other in the order they are fed."""
        before = Remembered() if state is None else state
        joined, recent = self.convolution(jnp.concatenate([self.query(x), self.key(x)], axis=-1), tokens, before.recent)
        q, k = (unit(split_heads(a, self.num_heads)).astype(self.dtype) for a in jnp.split(joined, 2, axis=-1))
        fed = (
            q,
            k,
            split_heads(self.value(x), self.num_heads),
            nn.sigmoid(self.beta(x)),
            nn.log_sigmoid(self.decay(x)),
        )
        read, memory = in_time_order(self._remember, fed, tokens, before.memory)
        gate = None if self.gate == "none" else split_heads(self.opening(x), self.num_heads)
        out = self.out(merge_heads(gated(self.gate, self.norm(read), gate)))
        return out, None if state is None else Remembered(recent, memory)

    def _remember(
        self, fed: tuple[Array, ...], writes: Array | None, starts: Array | None, memory: MesaMemory | None
    ) -> tuple[Array, MesaMemory]:
        """See in_time_order."""
        q, k, v, beta, log_decay = fed
        if writes is not None:  # a query or padding writes nothing
            beta = jnp.where(writes[..., None], beta, 0)
        log_decay = fading(log_decay, writes, starts)
        return mesa_attention(
            q, k, v, beta, jax.nn.softplus(self.ridge.astype(jnp.float32)) + self.ridge_floor,
            log_decay=log_decay, initial_state=memory, num_iterations=self.num_iterations, start=self.start,
            chunk_size=self.chunk_size, implementation=self.implementation,
        )  # fmt: skip
