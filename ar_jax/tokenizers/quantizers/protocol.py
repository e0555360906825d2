"""What a quantizer promises: latents of an encoder to values that a decoder reads, and to codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from flax import struct
from jax import Array

from ar_jax.orders.protocol import Grid, Layout


@struct.dataclass
class Quantized:
    """What became of latents z.

    Attributes:
      values: [B, ..., channels], as z is laid out: what the decoder reads; gradients pass straight through to z.
      codes: [B, L] int32 on the slots of the layout, or None for a continuous quantizer.
      losses: scalars by name, already weighted: their sum is what the quantizer adds to the loss.
      inputs: [B, L, channels], what each code was chosen for.
    """

    values: Array
    codes: Array | None
    losses: Mapping[str, Array]
    inputs: Array


class Quantizer(Protocol):
    """A Linen module; its fields are the keys of `config.tokenizer.quantizer`.

    A discrete one also has `lookup(codes, known)`: codes [B, L] int32 to values, with zeros for what is unknown where
    known [B, L] is false. One with several scales has `resample(codes, slots)`; see Tokenizer.
    """

    vocab_size: int  # 0 for a continuous quantizer
    channels: int  # of the values
    in_channels: int  # of z
    resample_channels: int  # 0 where there is only one scale

    def layout(self, grid: Grid) -> Layout:
        """The grids that the codes of a grid of latents fill; UsageError if it does not fit."""

    def __call__(self, z: Array, key: Array | None = None) -> Quantized:
        """Latents [B, ..., in_channels] to values and codes; a continuous quantizer draws from the key if there is one."""
