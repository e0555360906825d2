"""Symmetric pictures, such as those of graphs: one token an entry on and above the diagonal."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout
from ar_jax.tokenizers.pixels import dequantize, quantize
from ar_jax.tokenizers.protocol import Params


@dataclasses.dataclass(frozen=True)
class Symmetric:
    """N (N + 1) / 2 tokens on a line: the diagonal (a graph's nodes), then what is above it, row by row (its edges).

    Attributes:
      shape: (N, N, 1) of the pictures.
      data_levels: their levels, which are the tokens.
    """

    shape: tuple[int, ...]
    data_levels: int

    channels = 0
    data_key = "image"

    def __post_init__(self) -> None:
        """Checks the shape before anything is traced."""
        if len(self.shape) != 3 or self.shape[0] != self.shape[1] or self.shape[2] != 1:
            raise UsageError(
                f"tokenizer 'symmetric' takes square pictures [N, N, 1], but the data has shape {self.shape}; use 'pixels'."
            )

    @property
    def vocab_size(self) -> int:
        """The number of levels."""
        return self.data_levels

    @property
    def layout(self) -> Layout:
        """One line."""
        return ((self.num_dims,),)

    @property
    def num_dims(self) -> int:
        """Entries that tell all others."""
        return self.shape[0] * (self.shape[0] + 1) // 2

    @property
    def _entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each token."""
        above, diagonal = np.triu_indices(self.shape[0], 1), np.arange(self.shape[0])
        return np.concatenate([diagonal, above[0]]), np.concatenate([diagonal, above[1]])

    def init(self, key: Array) -> Params:
        """Nothing is learned."""
        return {}

    def encode(self, params: Params, data: Array, key: Array | None = None) -> Array:
        """[B, N, N, 1] in [-1, 1] to [B, N (N + 1) / 2]."""
        rows, columns = self._entries
        return quantize(data[:, rows, columns, 0], self.data_levels)

    def decode(self, params: Params, tokens: Array) -> Array:
        """[B, N (N + 1) / 2] to [B, N, N, 1] in [-1, 1]."""
        return self._spread(dequantize(tokens, self.data_levels))

    def preview(self, params: Params, tokens: Array, known: Array) -> Array:
        """See Tokenizer; blanks are grey."""
        return self._spread(jnp.where(known, dequantize(tokens, self.data_levels), 0.0))

    def _spread(self, values: Array) -> Array:
        rows, columns = self._entries
        place = np.zeros(self.shape[:2], int)
        place[rows, columns] = place[columns, rows] = np.arange(self.num_dims)
        return values[:, place.reshape(-1)].reshape(-1, *self.shape)
