"""Hrrformer (arXiv:2305.19534): keys and values bound into one vector, and unbound by queries."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.kernels.dense import Dense
from ar_jax.mixers.common.place_order import total
from ar_jax.mixers.protocol import NEVER, Tokens, merge_heads, split_heads


class Hrrformer(nn.Module):
    """out_t = W_o (w_t v_t), w = softmax over time of cos(v_t, v'_t), v'_t = q_t^-1 * sum_s k_s * v_s (arXiv:2305.19534).

    `*` is circular convolution over a head's channels, `^-1` the index's sign reversed: a product and a conjugate of
    Fourier transforms. It reads a whole sequence, in no order. Cost: O(T H log H).

    Attributes:
      binds_padding: padding is bound with the rest, though it has no weight, as the published code has it.
    """

    embed_dim: int
    num_heads: int = 4
    binds_padding: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    def setup(self) -> None:
        """Projections as matrices: [D, D] each."""
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise UsageError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}.")
        dense = functools.partial(Dense, self.embed_dim, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value, self.out = (dense() for _ in range(4))

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> tuple[()]:
        """See Mixer: nothing is remembered."""
        return ()

    def __call__(self, x: Array, tokens: Tokens, state: tuple[()] | None = None) -> tuple[Array, tuple[()] | None]:
        """See Mixer."""
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        there = (tokens.step < NEVER)[..., None, None] if tokens.padded else None
        spectra = (jnp.fft.rfft(a.astype(jnp.float32), axis=-1) for a in (q, k, v))
        q_spectrum, k_spectrum, v_spectrum = spectra
        bound = k_spectrum * v_spectrum  # [B, T, N, H / 2 + 1]
        if there is not None and not self.binds_padding:
            bound = jnp.where(there, bound, 0)
        unbound = jnp.fft.irfft(q_spectrum.conj() * total(bound, tokens), n=v.shape[-1], axis=-1)
        weight = jnp.exp(_cosine(v.astype(jnp.float32), unbound))[..., None]
        if there is not None:
            weight = jnp.where(there, weight, 0)
        share = weight / total(weight, tokens)
        return self.out(merge_heads(share.astype(v.dtype) * v)), state


def _cosine(a: Array, b: Array) -> Array:
    """The cosine of the angle between vectors [..., H]; 0 where one has no length."""
    squares = jnp.square(a).sum(axis=-1) * jnp.square(b).sum(axis=-1)
    return (a * b).sum(axis=-1) * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))
