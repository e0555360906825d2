"""A learned tokenizer of images: an encoder, a quantizer and a decoder, whatever they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Grid, Layout
from ar_jax.tokenizers.protocol import Params
from ar_jax.tokenizers.quantizers.codebook import update_codebook
from ar_jax.tokenizers.quantizers.protocol import Quantized


@struct.dataclass
class Reconstruction:
    """Images that went through the tokenizer, and what training needs to know of it.

    Attributes:
      images: [B, H, W, C], in [-1, 1] up to the network's errors: they are not clipped.
      features: what the decoder's last layer reads; see `LearnedTokenizer.decode_last`.
      losses: scalars by name, already weighted: their sum is the quantizer's part of the loss.
      codes: [B, L] int32, or None for continuous latents.
      z: [B, L, D], what was quantized.
    """

    images: Array
    features: Array
    losses: Mapping[str, Array]
    codes: Array | None
    z: Array


class Network(nn.Module):
    """Encoder, quantizer and decoder under one tree of parameters.

    Attributes:
      encoder: images [B, H, W, C] to z [B, ..., quantizer.in_channels].
      quantizer: see `ar_jax.tokenizers.quantizers`.
      decoder: two methods, `features` of values [B, ..., quantizer.channels], and `last` of features, to images.
    """

    encoder: Any
    quantizer: Any
    decoder: Any

    def quantize(self, images: Array, key: Array | None = None) -> Quantized:
        """Images to latents and their quantization."""
        return self.quantizer(self.encoder(images), key)

    def encode(self, images: Array) -> Array:
        """Images to z, not yet quantized."""
        return self.encoder(images)

    def lookup(self, codes: Array, known: Array | None = None) -> Array:
        """Codes to values; see Quantizer."""
        return self.quantizer.lookup(codes, known)

    def resample(self, codes: Array, slots: np.ndarray) -> Array:
        """See `MultiScaleQuantizer.resample`."""
        return self.quantizer.resample(codes, slots)

    def features(self, values: Array) -> Array:
        """Values to the last layer's input."""
        return self.decoder.features(values)

    def last(self, features: Array) -> Array:
        """The decoder's last layer."""
        return self.decoder.last(features)

    def decode(self, values: Array) -> Array:
        """Values to images."""
        return self.last(self.features(values))

    def __call__(self, images: Array) -> Array:
        """The way of an image through all parts, which makes their parameters."""
        return self.decode(self.quantize(images).values)


@dataclasses.dataclass(frozen=True, eq=False)
class LearnedTokenizer:
    """Latents on a grid as tokens: their codes or, with a continuous quantizer, the latents themselves.

    Attributes:
      shape: (H, W, C) of the images.
      network: see Network.
      grid: of the latents.
      last_layer: the name of the decoder's last kernel among the parameters.
      image_range: the numbers that stand for black and white in the network.
      patch_size: so many latents along each axis make one continuous token, channel by channel (MAR).
      latent_scale: factor of continuous tokens, which brings them to a unit variance (MAR, arXiv:2406.11838: 0.2325).
    """

    shape: tuple[int, ...]
    network: Network
    grid: Grid
    last_layer: str
    image_range: tuple[float, float] = (-1.0, 1.0)
    patch_size: int = 1
    latent_scale: float = 1.0

    data_key = "image"

    def __post_init__(self) -> None:
        """Checks the options before anything is traced."""
        self.network.quantizer.layout(self.grid)
        patched = self.patch_size != 1
        if self.patch_size < 1 or any(side % self.patch_size for side in self.grid) or (patched and self.vocab_size):
            raise UsageError(
                f"config.tokenizer.patch_size={self.patch_size} must divide the grid of latents, {self.grid}, and is for "
                "continuous ones (quantizer 'kl') only."
            )
        if self.latent_scale <= 0:
            raise UsageError(f"config.tokenizer.latent_scale={self.latent_scale} must be above 0.")

    @property
    def vocab_size(self) -> int:
        """Codes; 0 if the tokens are continuous."""
        return self.network.quantizer.vocab_size

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """See Tokenizer."""
        return getattr(self.network.quantizer, "vocab_sizes", (self.vocab_size,))

    @property
    def channels(self) -> int:
        """Numbers in a continuous token."""
        return 0 if self.vocab_size else self.network.quantizer.channels * self.patch_size ** len(self.grid)

    @property
    def layout(self) -> Layout:
        """The grids of the tokens."""
        return self.network.quantizer.layout(tuple(side // self.patch_size for side in self.grid))

    @property
    def num_dims(self) -> int:
        """Pixels times channels."""
        return int(np.prod(self.shape))

    @property
    def resample_channels(self) -> int:
        """See Tokenizer."""
        return self.network.quantizer.resample_channels

    @property
    def vector_channels(self) -> int:
        """See Tokenizer; 0 where tokens are continuous, or several of them add up to one latent."""
        latents = int(np.prod([side // self.patch_size for side in self.grid]))
        alone = sum(int(np.prod(grid)) for grid in self.layout) == latents and not self.resample_channels
        return self.network.quantizer.channels if self.vocab_size and alone else 0

    def vectors(self, params: Params, tokens: Array) -> Array:
        """See Tokenizer; the entries of the codebook."""
        return self._apply(params, "lookup", tokens)

    @property
    def gradient_free(self) -> tuple[str, ...]:
        """Names of the parameters that gradients must leave alone, since `update_codebook` gives them."""
        averaged = getattr(self.network.quantizer, "ema_decay", 0.0) > 0
        return tuple(f"quantizer/codebook/{leaf}" for leaf in ("embedding", "count", "sum") if averaged)

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        made, variables = self.network.init_with_output(key, jnp.zeros((1, *self.shape)))
        if made.shape[1:] != self.shape:
            raise UsageError(
                f"The tokenizer's decoder makes images of {made.shape[1:]}, but the data has {self.shape}; give its levels and "
                "config.tokenizer.patch_size the same factor."
            )
        return variables["params"]

    def encode(self, params: Params, data: Array, key: Array | None = None) -> Array:
        """Images to tokens; see Tokenizer.

        Args:
          params: of the network.
          data: [B, H, W, C] in [-1, 1].
          key: draws continuous tokens from their posterior; without it they are its mean.
        """
        quantized = self._apply(params, "quantize", self._into_range(data), key)
        return quantized.codes if self.vocab_size else self._patchify(quantized.values * self.latent_scale)

    def decode(self, params: Params, tokens: Array) -> Array:
        """Tokens to images [B, H, W, C] in [-1, 1]; see Tokenizer."""
        return self._images(params, self._values(params, tokens))

    def preview(self, params: Params, tokens: Array, known: Array) -> Array:
        """See Tokenizer; latents that are not known are zeros."""
        return self._images(params, self._values(params, tokens, known))

    def resample(self, params: Params, values: Array, slots: np.ndarray) -> Array:
        """See Tokenizer; codes [B, L] to [B, n, resample_channels]."""
        return self._apply(params, "resample", values, slots)

    def reconstruct(
        self, params: Params, images: Array, key: Array | None = None, train: bool = True
    ) -> Reconstruction:
        """Images through the whole network, differentiably.

        Args:
          params: of the network.
          images: [B, H, W, C] in [-1, 1].
          key: draws continuous latents from their posterior while training.
          train: False takes the mean instead.
        """
        quantized = self._apply(params, "quantize", self._into_range(images), key if train else None)
        features = self.decode_features(params, quantized.values)
        made = self.decode_last(params, features)
        return Reconstruction(made, features, quantized.losses, quantized.codes, quantized.inputs)

    def decode_features(self, params: Params, values: Array) -> Array:
        """Quantized latents to what the decoder's last layer reads."""
        return self._apply(params, "features", values)

    def decode_last(self, params: Params, features: Array) -> Array:
        """The last layer: features to images, unclipped. Cheap to differentiate by the parameter `last_layer` alone."""
        low, high = self.image_range
        return (self._apply(params, "last", features) - low) * (2 / (high - low)) - 1

    def update_codebook(self, params: Params, reconstruction: Reconstruction, key: Array) -> dict[str, Array]:
        """New values of the parameters `gradient_free` after a batch, by name; none if gradients train all.

        Args:
          params: those that made the reconstruction.
          reconstruction: of the batch.
          key: chooses what replaces codes that have died.
        """
        if not self.gradient_free or reconstruction.codes is None:
            return {}
        quantizer = self.network.quantizer
        leaves = params["quantizer"]["codebook"]
        decay, floor = quantizer.ema_decay, quantizer.revive_below
        new = update_codebook(leaves, reconstruction.z, reconstruction.codes, key, decay, floor)
        return {f"quantizer/codebook/{name}": leaf for name, leaf in new.items()}

    def _apply(self, params: Params, method: str, *args: Any) -> Any:
        return self.network.apply({"params": params}, *args, method=method)

    def _into_range(self, images: Array) -> Array:
        low, high = self.image_range
        return (images + 1) * ((high - low) / 2) + low

    def _images(self, params: Params, values: Array) -> Array:
        return jnp.clip(self.decode_last(params, self.decode_features(params, values)), -1.0, 1.0)

    def _values(self, params: Params, tokens: Array, known: Array | None = None) -> Array:
        """What the decoder reads, [B, *grid, channels]."""
        if self.vocab_size:
            values = self._apply(params, "lookup", tokens, known)
        else:
            tokens = tokens if known is None else jnp.where(known[..., None], tokens, 0.0)
            values = self._unpatchify(tokens) / self.latent_scale
        return values.reshape(len(tokens), *self.grid, -1)

    def _patchify(self, values: Array) -> Array:
        """Latents [B, *grid, C] to tokens [B, L, C p p], all of a channel together."""
        if self.patch_size == 1:
            return values.reshape(len(values), -1, self.channels)
        p, (rows, cols) = self.patch_size, self.layout[0]
        patches = values.reshape(len(values), rows, p, cols, p, -1)
        return patches.transpose(0, 1, 3, 5, 2, 4).reshape(len(values), rows * cols, self.channels)

    def _unpatchify(self, tokens: Array) -> Array:
        if self.patch_size == 1:
            return tokens
        p, (rows, cols) = self.patch_size, self.layout[0]
        patches = tokens.reshape(len(tokens), rows, cols, -1, p, p)
        return patches.transpose(0, 1, 4, 2, 5, 3).reshape(len(tokens), *self.grid, -1)
