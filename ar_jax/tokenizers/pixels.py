"""One token a grey level: of each pixel and channel, or of each cell of a pyramid of shrunken images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout
from ar_jax.tokenizers.protocol import Params
from ar_jax.tokenizers.resampling import area_matrix


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Each channel of each pixel is a token of `levels` values that lie evenly on [-1, 1]; exact if the data has as many.

    Attributes:
      shape: (H, W, C) of the images, or (T, H, W, C) of videos.
      data_levels: grey levels of the data.
      levels: grey levels of the tokens; 0 takes the data's.
      depth: each value is written with so many digits, a token each, the greatest first: the smallest base that has room for
        all levels is the vocabulary. With 1 it is a token itself.
    """

    shape: tuple[int, ...]
    data_levels: int
    levels: int = 0
    depth: int = 1

    channels = 0

    def __post_init__(self) -> None:
        """Checks the options before anything is traced."""
        if len(self.shape) not in (3, 4):
            raise UsageError(
                f"tokenizer 'pixels' takes images [H, W, C] or videos [T, H, W, C], but the data has shape {self.shape}; "
                "use tokenizer 'bytes' for text."
            )
        if self.num_levels < 2 or self.depth < 1:
            raise UsageError(
                f"config.tokenizer.levels={self.levels} must be at least 2, or 0 for the data's {self.data_levels}, "
                f"and depth={self.depth} at least 1."
            )

    @property
    def data_key(self) -> str:
        """See Tokenizer."""
        return "video" if len(self.shape) == 4 else "image"

    @property
    def num_levels(self) -> int:
        """The number of grey levels."""
        return self.levels or self.data_levels

    @property
    def vocab_size(self) -> int:
        """The number of grey levels, or the base of their digits."""
        return next(base for base in range(2, self.num_levels + 1) if base**self.depth >= self.num_levels)

    @property
    def layout(self) -> Layout:
        """One grid: of frames, rows and columns, of channels where there are several, and of digits where there are several."""
        return ((*(self.shape if self.shape[-1] > 1 else self.shape[:-1]), *((self.depth,) * (self.depth > 1))),)

    @property
    def num_dims(self) -> int:
        """Pixels times channels."""
        return int(np.prod(self.shape))

    def init(self, key: Array) -> Params:
        """Nothing is learned."""
        return {}

    def encode(self, params: Params, data: Array, key: Array | None = None) -> Array:
        """[B, H, W, C] in [-1, 1] to [B, H W C depth], and videos likewise."""
        values = quantize(data.reshape(len(data), -1), self.num_levels)
        return (values[..., None] // self._places[None, None] % self.vocab_size).reshape(len(data), -1)

    def decode(self, params: Params, tokens: Array) -> Array:
        """[B, H W C depth] to [B, H, W, C] in [-1, 1], and videos likewise."""
        values = (tokens.reshape(len(tokens), -1, self.depth) * self._places[None, None]).sum(axis=2)
        return dequantize(jnp.minimum(values, self.num_levels - 1), self.num_levels).reshape(-1, *self.shape)

    def preview(self, params: Params, tokens: Array, known: Array) -> Array:
        """See Tokenizer; blanks are grey, and digits that are not known in the middle."""
        shown = self.decode(params, jnp.where(known, tokens, self.vocab_size // 2))
        return jnp.where(known[:, :: self.depth].reshape(shown.shape), shown, 0.0)

    @property
    def vector_channels(self) -> int:
        """A grey level is its own vector; a digit has none."""
        return int(self.depth == 1)

    def vectors(self, params: Params, tokens: Array) -> Array:
        """See Tokenizer."""
        return dequantize(tokens, self.vocab_size)[..., None]

    @property
    def _places(self) -> np.ndarray:
        """[depth] int32, what each digit counts."""
        return (self.vocab_size ** np.arange(self.depth)[::-1]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class PixelPyramid:
    """The image and smaller ones made from it by averaging, coarse to fine, each cell a token (VAR's steps, S023, on pixels).

    The likelihood of all tokens is a lower bound of the image's: the coarse tokens are functions of the finest grid.

    Attributes:
      shape: (H, W, C) of the images, H = W.
      data_levels: grey levels of the data.
      sides: the side of each grid; the last must be H.
      levels: grey levels of the tokens; 0 takes the data's.
    """

    shape: tuple[int, ...]
    data_levels: int
    sides: Sequence[int] = (1, 2, 4, 8)
    levels: int = 0

    channels = 0
    data_key = "image"

    def __post_init__(self) -> None:
        """Checks the options before anything is traced."""
        sides = tuple(self.sides)
        if (
            len(self.shape) != 3
            or self.shape[0] != self.shape[1]
            or sides[-1] != self.shape[0]
            or list(sides) != sorted(set(sides))
            or sides[0] < 1
        ):
            raise UsageError(
                f"config.tokenizer.sides={sides} must rise to the side of a square image, but the data has shape {self.shape}."
            )

    @property
    def vocab_size(self) -> int:
        """The number of grey levels."""
        return self.levels or self.data_levels

    @property
    def layout(self) -> Layout:
        """One grid per side, with an axis for channels where there are several."""
        last = self.shape[2:] if self.shape[-1] > 1 else ()
        return tuple((side, side, *last) for side in self.sides)

    @property
    def num_dims(self) -> int:
        """Pixels times channels of the image itself."""
        return int(np.prod(self.shape))

    def init(self, key: Array) -> Params:
        """Nothing is learned."""
        return {}

    def encode(self, params: Params, data: Array, key: Array | None = None) -> Array:
        """[B, H, W, C] in [-1, 1] to [B, sum of all grids]."""
        scales = []
        for side in self.sides:
            pool = jnp.asarray(area_matrix(self.shape[0], side))
            small = jnp.einsum("sh,bhwc,tw->bstc", pool, data, pool)
            scales.append(quantize(small.reshape(len(data), -1), self.vocab_size))
        return jnp.concatenate(scales, axis=1)

    def decode(self, params: Params, tokens: Array) -> Array:
        """The finest grid alone is the image, [B, H, W, C]."""
        return dequantize(tokens[:, -self.num_dims :], self.vocab_size).reshape(-1, *self.shape)

    def preview(self, params: Params, tokens: Array, known: Array) -> Array:
        """See Tokenizer; the finest known cell that covers a pixel is shown, grey where there is none."""
        values, shown, start = dequantize(tokens, self.vocab_size), jnp.zeros((len(tokens), *self.shape)), 0
        for side, grid in zip(self.sides, self.layout, strict=True):
            size = int(np.prod(grid))
            value, seen = (a[:, start : start + size].reshape(-1, side, side, self.shape[2]) for a in (values, known))
            cover = np.arange(self.shape[0]) * side // self.shape[0]
            shown = jnp.where(seen[:, cover][:, :, cover], value[:, cover][:, :, cover], shown)
            start += size
        return shown


def quantize(values: Array, levels: int) -> Array:
    """[-1, 1] to int32 0..levels - 1."""
    return jnp.clip(jnp.round((values + 1) * 0.5 * (levels - 1)), 0, levels - 1).astype(jnp.int32)


def dequantize(tokens: Array, levels: int) -> Array:
    """0..levels - 1 to float32 [-1, 1]."""
    return tokens.astype(jnp.float32) * (2 / (levels - 1)) - 1
