"""Attention whose weights are refined to a fixed point (SELF-Transformer, S076, arXiv:2507.13569)."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.step_attention import step_attention
from ar_jax.mixers.common.fixed_point import fixed_point
from ar_jax.mixers.protocol import NEVER, Tokens, merge_heads, split_heads


class FixedPointAttention(nn.Module):
    """z = softmax(q(x + z) k(x + z)^T / sqrt(H)) v(x) W_o, iterated from z = 0 until it is met (arXiv:2507.13569).

    What is mixed, v(x), stays; how it is mixed is refined, by the same weights in every iteration. An example takes as many
    iterations as it needs, and its gradient is that of the fixed point, not of the iterations: memory is a layer's, however
    many there are; see `fixed_point`. It reads a whole sequence both ways, in no order. Cost: O(T^2 H) an iteration.
    What takes part in the iteration follows the paper's abstract, which gives no equation.

    Attributes:
      tolerance: an example is done where its z moves by less than so much of its length.
      max_iterations: and at the latest after so many; 1 is softmax attention.
      residual: whether x is added to z; otherwise queries and keys are those of z alone, which starts from x.
      damping: z moves by so much of the way in an iteration; less than 1 finds fixed points that the full way runs past.
    """

    embed_dim: int
    num_heads: int = 4
    tolerance: float = 1e-4
    max_iterations: int = 32
    residual: bool = True
    damping: float = 1.0
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    def setup(self) -> None:
        """Projections as matrices: [D, D] each."""
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise UsageError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}.")
        if self.tolerance <= 0 or self.max_iterations < 1 or not 0 < self.damping <= 1:
            raise UsageError(
                f"config.model.mixer: tolerance={self.tolerance} must be above 0, max_iterations={self.max_iterations} at "
                f"least 1, and damping={self.damping} in (0, 1]."
            )
        dense = functools.partial(Dense, self.embed_dim, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value, self.out = (dense() for _ in range(4))

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> tuple[()]:
        """See Mixer: nothing is remembered."""
        return ()

    def __call__(self, x: Array, tokens: Tokens, state: tuple[()] | None = None) -> tuple[Array, tuple[()] | None]:
        """See Mixer."""
        return self.solve(x, tokens)[0], state

    def solve(self, x: Array, tokens: Tokens) -> tuple[Array, Array]:
        """The fixed point, [B, T, D], and [B] int32, the iterations that each example took."""
        there = tokens.step < NEVER
        theta: dict[str, Any] = {"step": jnp.where(there, 0, NEVER), "segment": tokens.segment}
        theta["input"] = x if self.residual else None
        theta["value"] = split_heads(self.value(x), self.num_heads)
        update = functools.partial(_update, self.num_heads, self.damping, self.implementation)
        query, key = (split_heads(project(x), self.num_heads) for project in (self.query, self.key))
        # The first iteration is the projections' own, and makes their parameters.
        first = self.out(merge_heads(_attend(theta, query, key, self.implementation)))
        first = jnp.where(there[..., None], first, 0)
        if self.max_iterations == 1:
            return first, jnp.ones(len(x), jnp.int32)
        for name in ("query", "key", "out"):
            theta[name] = self.variables["params"][name]["kernel"].astype(self.dtype)
        z, count = fixed_point(update, theta, first, self.tolerance, self.max_iterations - 1)
        return z, 1 + count


def _attend(theta: Any, query: Array, key: Array, implementation: str | None) -> Array:
    """[B, T, N, H]."""
    step, segment = theta["step"], theta["segment"]
    return step_attention(
        query, key, theta["value"], step, step,
        query_segment=segment, key_segment=segment, implementation=implementation,
    )  # fmt: skip


def _update(num_heads: int, damping: float, implementation: str | None, theta: Any, z: Array) -> Array:
    """One iteration; padding stays zero, so that it does not count."""
    read = z if theta["input"] is None else theta["input"] + z
    query, key = (split_heads(read @ theta[name], num_heads) for name in ("query", "key"))
    new = merge_heads(_attend(theta, query, key, implementation)) @ theta["out"]
    new = jnp.where((theta["step"] < NEVER)[..., None], new, 0)
    return z + damping * (new - z)
