"""Multi-scale residual quantization: coarse grids of codes first, finer ones for what they leave (VAR, arXiv:2404.02905)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Grid, Layout
from ar_jax.tokenizers.quantizers.codebook import Codebook
from ar_jax.tokenizers.quantizers.protocol import Quantized
from ar_jax.tokenizers.resampling import area_matrix, band_cutoffs, bicubic_matrix, low_pass, resize


class MultiScaleQuantizer(nn.Module):
    """f is approached scale by scale (their algorithms 1 and 2), all scales sharing one Codebook.

    codes_k = nearest(area(f - f_hat, side_k));   f_hat += phi_k(bicubic(codebook[codes_k], side))

    With frequency bands (FR-VAE of NFIG, S034, arXiv:2503.07076, sec. 3.1), scale k approaches what lies in the bands 1..k
    of f, and leaves what is above them to finer scales: codes_k = nearest(area(low_pass_k(f) - f_hat, side_k)).

    Attributes:
      vocab_size: vectors.
      channels: numbers in each.
      patch_nums: the side of each scale's grid; the last must be the side of the latents.
      num_phi: convolutions phi that the scales share by their depth; 0 has one for each scale.
      phi_ratio: phi(h) = (1 - ratio) h + ratio conv(h).
      frequency_bands: scales stand for bands of frequency, with cutoffs by `band_cutoffs`.
      codebook_weight: of |sg(f) - f_hat|^2, averaged over the scales.
      commitment_weight: of |f - sg(f_hat)|^2, averaged over the scales.
      ema_decay: see Codebook.
      revive_below: see Codebook.
    """

    vocab_size: int = 4096
    channels: int = 32
    patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    num_phi: int = 4
    phi_ratio: float = 0.5
    frequency_bands: bool = False
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    ema_decay: float = 0.0
    revive_below: float = 0.0

    @property
    def in_channels(self) -> int:
        """Channels of z."""
        return self.channels

    @property
    def resample_channels(self) -> int:
        """Of what `resample` gives."""
        return self.channels

    @property
    def used_phi(self) -> list[int]:
        """The convolutions that some scale takes: with few scales, not all of them."""
        num_scales = len(self.patch_nums)
        return sorted({_phi_index(scale, num_scales, self.num_phi or num_scales) for scale in range(num_scales)})

    def setup(self) -> None:
        """The table and the convolutions."""
        self.codebook = Codebook(
            self.vocab_size, self.channels, ema_decay=self.ema_decay, revive_below=self.revive_below
        )
        self.phi = [nn.Conv(self.channels, (3, 3)) for _ in range(self.num_phi or len(self.patch_nums))]

    @nn.nowrap
    def layout(self, grid: Grid) -> Layout:
        """One grid for each scale."""
        sides = tuple(self.patch_nums)
        if grid != (sides[-1],) * 2 or min(sides) < 1 or list(sides) != sorted(sides) or self.num_phi < 0:
            raise UsageError(
                f"config.tokenizer.quantizer.patch_nums={sides} must rise to the side of square latents, but they are {grid}."
            )
        return tuple((side, side) for side in sides)

    def __call__(self, z: Array, key: Array | None = None) -> Quantized:
        """See Quantizer."""
        target = jax.lax.stop_gradient(z)
        cutoffs = band_cutoffs(self.patch_nums) if self.frequency_bands else None
        total, codes, inputs = jnp.zeros_like(z), [], []
        commitment = codebook = jnp.zeros(())
        for scale, side in enumerate(self.patch_nums):
            aim = target if cutoffs is None else low_pass(target, cutoffs[scale])
            rest = jax.lax.stop_gradient(aim - total)
            inputs.append(area(rest, side).reshape(len(z), -1, self.channels))
            codes.append(jnp.argmin(self.codebook.distances(inputs[-1]), axis=-1).astype(jnp.int32))
            total = total + self.residual(scale, codes[-1])
            commitment += jnp.mean(jnp.square(jax.lax.stop_gradient(total) - z))
            codebook += jnp.mean(jnp.square(total - target))
        losses = {
            "commitment": self.commitment_weight * commitment / len(self.patch_nums),
            "codebook": self.codebook_weight * codebook / len(self.patch_nums),
        }
        values = z + jax.lax.stop_gradient(total - z)
        return Quantized(values, jnp.concatenate(codes, axis=1), losses, jnp.concatenate(inputs, axis=1))

    def lookup(self, codes: Array, known: Array | None = None) -> Array:
        """Codes [B, L] to values [B, side, side, channels]; see Quantizer."""
        return self.totals(codes, len(self.patch_nums), known)[-1]

    def totals(self, codes: Array, count: int, known: Array | None = None) -> list[Array]:
        """What the first 0, 1, .. count scales sum up to, each [B, side, side, channels]."""
        side = self.patch_nums[-1]
        totals, start = [jnp.zeros((len(codes), side, side, self.channels))], 0
        for scale, size in enumerate(s * s for s in self.patch_nums[:count]):
            here = slice(start, start + size)
            residual = self.residual(scale, codes[:, here], None if known is None else known[:, here])
            totals.append(totals[-1] + residual)
            start += size
        return totals

    def residual(self, scale: int, codes: Array, known: Array | None = None) -> Array:
        """What the codes [B, side_k^2] of one scale add, [B, side, side, channels]; an unknown scale adds nothing."""
        side, full = self.patch_nums[scale], self.patch_nums[-1]
        values = self.codebook(codes)
        if known is not None:
            values = jnp.where(known[..., None], values, 0.0)
        values = values.reshape(-1, side, side, self.channels)
        if side != full:
            values = resize(values, bicubic_matrix(side, full))
        phi = self.phi[_phi_index(scale, len(self.patch_nums), len(self.phi))]
        values = values * (1 - self.phi_ratio) + phi(values) * self.phi_ratio
        return values if known is None else jnp.where(known.any(axis=1)[:, None, None, None], values, 0.0)

    def resample(self, codes: Array, slots: np.ndarray) -> Array:
        """What is known of each slot's place before its own scale: the sum of all coarser ones, averaged to its grid.

        Args:
          codes: [B, L] int32 on all slots; those of no coarser scale than a slot's do not matter.
          slots: [n], the slots; only the scales that they need are computed.

        Returns: [B, n, channels], zeros for the first scale.
        """
        ends = np.cumsum([side * side for side in self.patch_nums])
        scales = np.searchsorted(ends, slots, side="right")
        totals = self.totals(codes, int(scales.max(initial=0)))
        needed = np.unique(scales)
        grids = [area(totals[s], self.patch_nums[s]).reshape(len(codes), -1, self.channels) for s in needed]
        sizes = np.asarray(self.patch_nums)[needed] ** 2
        before = np.cumsum(sizes) - sizes  # where each needed scale starts among them
        starts = np.concatenate([[0], ends])[scales]
        places = np.asarray(slots) - starts + before[np.searchsorted(needed, scales)]
        values = jnp.concatenate(grids, axis=1)
        return values if np.array_equal(places, np.arange(values.shape[1])) else values[:, places]


def area(x: Array, side: int) -> Array:
    """Squares [B, H, H, C] averaged to [B, side, side, C]."""
    return x if side == x.shape[1] else resize(x, area_matrix(x.shape[1], side))


@functools.cache
def _phi_index(scale: int, num_scales: int, num_phi: int) -> int:
    """The phi whose tick is nearest to the depth scale / (num_scales - 1); float64, as it decides a tie."""
    margin = 1 / (3 if num_phi == 4 else 2) / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return int(np.argmin(np.abs(ticks - scale / max(num_scales - 1, 1))))
