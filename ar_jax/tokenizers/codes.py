"""Tokens that come from elsewhere: data that is tokens already, from a tokenizer that is not here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout
from ar_jax.tokenizers.protocol import Params


@dataclasses.dataclass(frozen=True)
class Codes:
    """Tokens as they are: for token shards where no tokenizer is wanted in memory, and for networks alone.

    Attributes:
      grids: the grids that the tokens fill, from coarse to fine, such as ((16, 16),).
      vocab_size: tokens are whole numbers below this; 0 where they are vectors.
      channels: the size of these vectors; 0 for whole numbers.
    """

    grids: Sequence[Sequence[int]]
    vocab_size: int = 0
    channels: int = 0

    data_key = "tokens"

    def __post_init__(self) -> None:
        """Checks the options before anything is traced."""
        if not self.grids or any(side < 1 for grid in self.grids for side in grid):
            raise UsageError(
                f"config.tokenizer.grids={self.grids!r} must name grids of positive sides, as ((16, 16),)."
            )
        if (self.vocab_size > 0) == (self.channels > 0):
            raise UsageError(
                f"config.tokenizer.vocab_size={self.vocab_size} and channels={self.channels}: set one of them, the other 0."
            )

    @property
    def layout(self) -> Layout:
        """The grids."""
        return tuple(tuple(int(side) for side in grid) for grid in self.grids)

    @property
    def num_dims(self) -> int:
        """Numbers in all tokens."""
        return sum(math.prod(grid) for grid in self.layout) * max(self.channels, 1)

    def init(self, key: Array) -> Params:
        """Nothing is learned."""
        return {}

    def encode(self, params: Params, data: Array, key: Array | None = None) -> Array:
        """Tokens are tokens."""
        return data

    def decode(self, params: Params, tokens: Array) -> Array:
        """Tokens are tokens."""
        return tokens

    def preview(self, params: Params, tokens: Array, known: Array) -> Array:
        """See Tokenizer; blanks are zeros."""
        return jnp.where(known.reshape(*known.shape, *[1] * (tokens.ndim - 2)), tokens, 0)
