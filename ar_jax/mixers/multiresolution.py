"""Multi-resolution attention (MRA-2, arXiv:2207.10284): blocks read each other by their means, the nearest ones in full."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.kernels.multiresolution import MODES, multiresolution
from ar_jax.mixers.common.place_order import in_place_order
from ar_jax.mixers.protocol import NEVER, Tokens, merge_heads, split_heads


class MultiResolution(nn.Module):
    """Softmax attention, both ways, whose weights are exact in `num_blocks` pairs of blocks and means of blocks elsewhere.

    Attributes:
      num_blocks: pairs of blocks that are exact, for each example and head.
      block_size: tokens of a block, neighbours in the order of their places.
      mode: "full", or "sparse": what is not exact is not read.
      first_blocks: see `ar_jax.kernels.multiresolution`.
      diagonal_blocks: likewise.
    """

    embed_dim: int
    num_heads: int = 4
    num_blocks: int = 64
    block_size: int = 32
    mode: str = "full"
    first_blocks: int = 0
    diagonal_blocks: int = 1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    reads_peers: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    def setup(self) -> None:
        """Projections."""
        choose(dict.fromkeys(MODES), self.mode, "model.mixer.mode")
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise UsageError(
                f"config.model.mixer.num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}."
            )
        if self.block_size < 1 or self.num_blocks < 1:
            raise UsageError("config.model.mixer: block_size and num_blocks must be at least 1.")
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.query, self.key, self.value, self.out = (dense(self.embed_dim) for _ in range(4))

    @nn.nowrap
    def init_state(self, batch_size: int, max_len: int, max_step_len: int) -> tuple[()]:
        """Nothing is remembered: everything is read at once."""
        return ()

    def __call__(self, x: Array, tokens: Tokens, state: tuple[()] | None = None) -> tuple[Array, tuple[()] | None]:
        """See Mixer."""
        return self.out(in_place_order(self._mix, x, tokens)), state

    def _mix(self, x: Array, tokens: Tokens) -> Array:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        out = multiresolution(
            q,
            k,
            v,
            tokens.step < NEVER if tokens.padded else None,
            tokens.segment,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            mode=self.mode,
            first_blocks=self.first_blocks,
            diagonal_blocks=self.diagonal_blocks,
        )
        return merge_heads(out)
