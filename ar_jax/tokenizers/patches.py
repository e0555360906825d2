"""Continuous tokens: the pixels of a square patch as one vector."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout
from ar_jax.tokenizers.protocol import Params


@dataclasses.dataclass(frozen=True)
class Patches:
    """Each patch_size x patch_size patch is a token of patch_size^2 C numbers in [-1, 1].

    Attributes:
      shape: (H, W, C) of the images.
      patch_size: it must divide H and W.
    """

    shape: tuple[int, ...]
    patch_size: int = 2

    vocab_size = 0
    data_key = "image"

    def __post_init__(self) -> None:
        """Checks the options before anything is traced."""
        if (
            len(self.shape) != 3
            or self.patch_size < 1
            or self.shape[0] % self.patch_size
            or self.shape[1] % self.patch_size
        ):
            raise UsageError(
                f"config.tokenizer.patch_size={self.patch_size} must divide the sides of the images, {self.shape}."
            )

    @property
    def channels(self) -> int:
        """Numbers in a token."""
        return self.patch_size**2 * self.shape[2]

    @property
    def layout(self) -> Layout:
        """One grid of patches."""
        return ((self.shape[0] // self.patch_size, self.shape[1] // self.patch_size),)

    @property
    def num_dims(self) -> int:
        """Pixels times channels."""
        return int(np.prod(self.shape))

    def init(self, key: Array) -> Params:
        """Nothing is learned."""
        return {}

    def encode(self, params: Params, data: Array, key: Array | None = None) -> Array:
        """[B, H, W, C] to [B, patches, channels]."""
        return patches(data, self.patch_size)

    def decode(self, params: Params, tokens: Array) -> Array:
        """[B, patches, channels] to [B, H, W, C]."""
        (rows, cols), p = self.layout[0], self.patch_size
        return tokens.reshape(-1, rows, cols, p, p, self.shape[2]).swapaxes(2, 3).reshape(-1, *self.shape)

    def preview(self, params: Params, tokens: Array, known: Array) -> Array:
        """See Tokenizer; blanks are grey."""
        return self.decode(params, jnp.where(known[..., None], tokens, 0.0))


def patches(images: Array, side: int) -> Array:
    """Images [B, H, W, C] as a raster of patches of side x side pixels, [B, H W / side^2, side^2 C]."""
    batch, height, width, channels = images.shape
    cut = images.reshape(batch, height // side, side, width // side, side, channels)
    return cut.swapaxes(2, 3).reshape(batch, height * width // side**2, side**2 * channels)
