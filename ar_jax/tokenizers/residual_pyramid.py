"""Residual pyramid: VAR's multi-scale residual codes (S023, arXiv:2404.02905, algorithms 1 and 2) with nothing to learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout
from ar_jax.tokenizers.pixels import dequantize, quantize
from ar_jax.tokenizers.protocol import Params
from ar_jax.tokenizers.resampling import area_matrix, band_cutoffs, bicubic_matrix, low_pass, resize

SPAN = 2.0  # residuals of values in [-1, 1] lie in [-SPAN, SPAN], but for what the bicubic interpolation overshoots


@dataclasses.dataclass(frozen=True)
class ResidualPyramid:
    """Each scale says what the coarser ones have left over, as grey levels; the sum of all scales is the image.

    codes_k = round(area(x - x_hat, side_k));   x_hat += bicubic(codes_k, side)

    The latents of VAR are the pixels here, its codebook is `levels` numbers that lie evenly on [-2, 2], and there are no
    convolutions. With the default levels images come back exactly, but for pixels whose residual leaves that range. The
    likelihood of all tokens is a lower bound of the image's, as many tokens give the same image.

    Attributes:
      shape: (H, W, C) of the images, H = W.
      data_levels: grey levels of the data.
      sides: the side of each grid; the last must be H.
      levels: of a residual; 0 takes 2 data_levels + 1, which lie a little closer to one another than the data's.
      frequency_bands: scale k tells what lies in the frequency bands 1..k of x in place of x (NFIG, S034, arXiv:2503.07076);
        see `MultiScaleQuantizer`.

    Raises:
      UsageError: sides that do not rise to the side of the images, or fewer than two levels.
    """

    shape: tuple[int, ...]
    data_levels: int
    sides: Sequence[int] = (1, 2, 4, 8)
    levels: int = 0
    frequency_bands: bool = False

    channels = 0
    data_key = "image"

    def __post_init__(self) -> None:
        """Checks the options before anything is traced."""
        sides = list(self.sides)
        square = len(self.shape) == 3 and self.shape[0] == self.shape[1]
        if not square or sides != sorted(set(sides)) or not sides or sides[0] < 1 or sides[-1] != self.shape[0]:
            raise UsageError(
                f"config.tokenizer.sides={tuple(sides)} must rise to the side of square images, but theirs are {self.shape}."
            )
        if self.vocab_size < 2:
            raise UsageError(f"config.tokenizer.levels={self.levels} must be at least 2, or 0 for enough of them.")

    @property
    def vocab_size(self) -> int:
        """The number of values of a residual."""
        return self.levels or 2 * self.data_levels + 1

    @property
    def resample_channels(self) -> int:
        """Of what `resample` gives: those of the image."""
        return self.shape[2]

    @property
    def layout(self) -> Layout:
        """One grid per side, with an axis for channels where there are several."""
        last = self.shape[2:] if self.shape[2] > 1 else ()
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
        total, codes = jnp.zeros_like(data), []
        for side, cutoff in zip(self.sides, band_cutoffs(self.sides), strict=True):
            aim = low_pass(data, cutoff) if self.frequency_bands else data
            rest = resize(aim - total, area_matrix(self.shape[0], side))
            codes.append(quantize(rest / SPAN, self.vocab_size).reshape(len(data), -1))
            total = total + self._enlarged(self._values(codes[-1]), side)  # what the decoder will know
        return jnp.concatenate(codes, axis=1)

    def decode(self, params: Params, tokens: Array) -> Array:
        """[B, sum of all grids] to [B, H, W, C], of the data's grey levels."""
        return dequantize(quantize(list(self._totals(self._values(tokens)))[-1], self.data_levels), self.data_levels)

    def preview(self, params: Params, tokens: Array, known: Array) -> Array:
        """See Tokenizer; cells that are not known add nothing."""
        return jnp.clip(list(self._totals(jnp.where(known, self._values(tokens), 0.0)))[-1], -1.0, 1.0)

    def resample(self, params: Params, values: Array, slots: np.ndarray) -> Array:
        """What is known of each slot's place before its own scale: the sum of all coarser ones, averaged to its grid.

        Args:
          params: not used.
          values: [B, L] int32 tokens on all slots; those of no coarser scale than a slot's do not matter.
          slots: [n], the slots.

        Returns: [B, n, C], zeros for the first scale.
        """
        cells = np.asarray(slots) // self.shape[2]
        ends = np.cumsum(np.square(self.sides))
        needed = int(np.searchsorted(ends, cells.max(initial=0), side="right")) + 1
        totals = zip(self.sides[:needed], self._totals(self._values(values)), strict=False)  # the coarser scales only
        grids = [resize(total, area_matrix(self.shape[0], side)) for side, total in totals]
        return jnp.concatenate([grid.reshape(len(values), -1, self.shape[2]) for grid in grids], axis=1)[:, cells]

    def _totals(self, values: Array) -> Iterator[Array]:
        """What the first 0, 1, .. scales sum up to, each [B, H, W, C], made as they are asked for."""
        total, start = jnp.zeros((len(values), *self.shape)), 0
        yield total
        for side in self.sides:
            size = side * side * self.shape[2]
            total = total + self._enlarged(values[:, start : start + size], side)
            yield total
            start += size

    def _enlarged(self, values: Array, side: int) -> Array:
        """A scale's residuals [B, side side C] as an image [B, H, W, C]."""
        small = values.reshape(-1, side, side, self.shape[2])
        return small if side == self.shape[0] else resize(small, bicubic_matrix(side, self.shape[0]))

    def _values(self, tokens: Array) -> Array:
        """Residuals, float32 in [-SPAN, SPAN]."""
        return dequantize(tokens, self.vocab_size) * SPAN
