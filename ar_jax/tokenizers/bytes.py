"""Bytes of a text as tokens."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout
from ar_jax.tokenizers.protocol import Params


@dataclasses.dataclass(frozen=True)
class Bytes:
    """256 tokens on a line.

    Attributes:
      shape: (length,) of the texts.
    """

    shape: tuple[int, ...]

    vocab_size = 256
    channels = 0
    data_key = "text"

    def __post_init__(self) -> None:
        """Checks the options before anything is traced."""
        if len(self.shape) != 1:
            raise UsageError(
                f"tokenizer 'bytes' takes text [length], but the data has shape {self.shape}; use tokenizer 'pixels' for images."
            )

    @property
    def layout(self) -> Layout:
        """One line."""
        return (self.shape,)

    @property
    def num_dims(self) -> int:
        """Bytes in a text."""
        return self.shape[0]

    def init(self, key: Array) -> Params:
        """Nothing is learned."""
        return {}

    def encode(self, params: Params, data: Array, key: Array | None = None) -> Array:
        """[B, length] bytes to int32."""
        return data.astype(jnp.int32)

    def decode(self, params: Params, tokens: Array) -> Array:
        """[B, length] int32 to uint8."""
        return tokens.astype(jnp.uint8)

    def preview(self, params: Params, tokens: Array, known: Array) -> Array:
        """See Tokenizer; blanks are spaces."""
        return jnp.where(known, tokens, ord(" ")).astype(jnp.uint8)
