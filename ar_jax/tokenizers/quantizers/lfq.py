"""Lookup-free quantization: the signs of the channels are the code (arXiv:2310.05737)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Grid, Layout
from ar_jax.tokenizers.quantizers.protocol import Quantized
from ar_jax.tokenizers.quantizers.vq import average_code_entropy


class LookupFreeQuantizer(nn.Module):
    """sign(z): `channels` bits, hence 2^channels codes, and no table.

    Attributes:
      channels: bits, at most 30.
      commitment_weight: of |z - sign(z)|^2.
      entropy_weight: of the entropy of each latent's choice, minus the entropy of the average choice (their eq. 7).
      entropy_temperature: a bit is chosen by sigmoid(4 z / temperature), a softmax of minus squared distances.
      entropy_bits: the average's entropy is that of so many bits jointly, groups of them as if independent.
    """

    channels: int = 18
    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    entropy_temperature: float = 0.01
    entropy_bits: int = 9

    resample_channels = 0

    @property
    def vocab_size(self) -> int:
        """All patterns of bits."""
        return 2**self.channels

    @property
    def in_channels(self) -> int:
        """Channels of z."""
        return self.channels

    @nn.nowrap
    def layout(self, grid: Grid) -> Layout:
        """See Quantizer."""
        if not 1 <= self.channels <= 30:
            raise UsageError(f"config.tokenizer.quantizer.channels={self.channels} must lie between 1 and 30.")
        return (grid,)

    def __call__(self, z: Array, key: Array | None = None) -> Quantized:
        """See Quantizer; values are -1 or 1."""
        signs = jnp.where(z > 0, 1.0, -1.0)
        flat = z.reshape(len(z), -1, self.channels)
        codes = ((flat > 0) * self._bases[None, None]).sum(axis=-1).astype(jnp.int32)
        losses = {"commitment": self.commitment_weight * jnp.mean(jnp.square(z - signs))}
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * self._entropy(4 * flat / self.entropy_temperature)
        return Quantized(z + jax.lax.stop_gradient(signs - z), codes, losses, flat)

    def lookup(self, codes: Array, known: Array | None = None) -> Array:
        """Codes [B, L] to values [B, L, channels]; see Quantizer."""
        values = jnp.where(codes[..., None] // self._bases[None, None] % 2 == 1, 1.0, -1.0)
        return values if known is None else jnp.where(known[..., None], values, 0.0)

    @property
    def _bases(self) -> np.ndarray:
        return 2 ** np.arange(self.channels, dtype=np.int32)

    def _entropy(self, logits: Array) -> Array:
        """Mean entropy minus entropy of the mean, in nats, of bits with logits [B, L, channels]."""
        log_one, log_zero = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        each = -(jnp.exp(log_one) * log_one + jnp.exp(log_zero) * log_zero).sum(axis=-1).mean()
        average = jnp.zeros(())
        for start in range(0, self.channels, self.entropy_bits):
            one, zero = (a[..., start : start + self.entropy_bits] for a in (log_one, log_zero))
            patterns = np.arange(2 ** one.shape[-1])[:, None] >> np.arange(one.shape[-1]) & 1  # [codes, bits]
            joint = jnp.einsum("bln,cn->blc", one, patterns) + jnp.einsum("bln,cn->blc", zero, 1 - patterns)
            average += average_code_entropy(jnp.exp(joint).mean(axis=(0, 1)))
        return each - average
