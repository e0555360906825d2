"""Vector quantization: each latent becomes the nearest of a table of learned vectors (arXiv:1711.00937)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Grid, Layout
from ar_jax.tokenizers.clusters import nearest_centroid
from ar_jax.tokenizers.quantizers.codebook import Codebook, normalized
from ar_jax.tokenizers.quantizers.protocol import Quantized


class VectorQuantizer(nn.Module):
    """The nearest vector of a Codebook, with the sizes of LlamaGen (arXiv:2406.06525) unless told otherwise.

    Attributes:
      vocab_size: vectors.
      channels: numbers in each.
      l2_norm: see Codebook.
      codebook_weight: of |sg(z) - e|^2, which pulls the vectors; with ema_decay it does not exist.
      commitment_weight: of |z - sg(e)|^2, which pulls the latents.
      entropy_weight: of the entropy of each latent's choice, minus the entropy of the average choice.
      entropy_temperature: choices are softmax(-distance^2 / temperature).
      ema_decay: see Codebook.
      revive_below: see Codebook.
      num_clusters: above 0, a latent has two codes: the cluster of its vector, a coarse label, and the vector itself (CTF,
        arXiv:2503.16194, sec. 4.1). The leaf `centroids` is made of a trained table by `python -m ar_jax.cluster`.

    Raises:
      UsageError: clusters of vectors that are still averaged, or more of them than vectors.
    """

    vocab_size: int = 16384
    channels: int = 8
    l2_norm: bool = True
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    ema_decay: float = 0.0
    revive_below: float = 0.0
    num_clusters: int = 0

    resample_channels = 0

    @property
    def in_channels(self) -> int:
        """Channels of z."""
        return self.channels

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Of each code of a latent."""
        return (self.num_clusters, self.vocab_size) if self.num_clusters else (self.vocab_size,)

    def setup(self) -> None:
        """The table, and the centres of its clusters."""
        self.codebook = Codebook(self.vocab_size, self.channels, self.l2_norm, self.ema_decay, self.revive_below)
        if self.num_clusters:
            small = nn.initializers.normal(0.02)
            self.centroids = self.param("centroids", small, (self.num_clusters, self.channels))

    @nn.nowrap
    def layout(self, grid: Grid) -> Layout:
        """See Quantizer; with clusters, an axis of two codes."""
        if not 0 <= self.num_clusters <= self.vocab_size or (self.num_clusters and self.ema_decay):
            raise UsageError(
                f"config.tokenizer.quantizer.num_clusters={self.num_clusters} must lie between 0 and vocab_size, "
                f"{self.vocab_size}, and needs ema_decay=0; `python -m ar_jax.cluster` makes clusters of a trained tokenizer."
            )
        return ((*grid, 2),) if self.num_clusters else (grid,)

    def __call__(self, z: Array, key: Array | None = None) -> Quantized:
        """See Quantizer."""
        if self.l2_norm:
            z = normalized(z)
        flat = z.reshape(len(z), -1, self.channels)
        distances = self.codebook.distances(flat)
        codes = jnp.argmin(distances, axis=-1).astype(jnp.int32)
        vectors = self.codebook(codes)
        losses = {"commitment": self.commitment_weight * jnp.mean(jnp.square(jax.lax.stop_gradient(vectors) - flat))}
        if not self.ema_decay:
            losses["codebook"] = self.codebook_weight * jnp.mean(jnp.square(vectors - jax.lax.stop_gradient(flat)))
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * entropy_loss(-distances / self.entropy_temperature)
        values = z + jax.lax.stop_gradient(vectors.reshape(z.shape) - z)
        if self.num_clusters:
            codes = jnp.stack([nearest_centroid(vectors, self.centroids), codes], axis=2).reshape(len(z), -1)
            flat = jnp.repeat(flat, 2, axis=1)
        return Quantized(values, codes, losses, flat)

    def lookup(self, codes: Array, known: Array | None = None) -> Array:
        """Codes [B, L] to values [B, L, channels], or of two codes each [B, L / 2, channels]; see Quantizer.

        Where only the cluster of a latent is known, it is the centre.
        """
        if not self.num_clusters:
            vectors = self.codebook(codes)
            return vectors if known is None else jnp.where(known[..., None], vectors, 0.0)
        coarse, fine = (codes[:, i::2] for i in range(2))
        vectors = self.codebook(fine)
        if known is None:
            return vectors
        centres = jnp.where(
            known[:, ::2, None], jnp.asarray(self.centroids)[jnp.minimum(coarse, self.num_clusters - 1)], 0.0
        )
        return jnp.where(known[:, 1::2, None], vectors, centres)


def entropy_loss(logits: Array) -> Array:
    """Mean entropy of softmax(logits) [B, L, V] minus the entropy of the mean, in nats: decided choices, all of them in use."""
    log_probs = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_probs)
    each = -(probs * log_probs).sum(axis=-1).mean()
    return each - average_code_entropy(probs.mean(axis=(0, 1)))


def average_code_entropy(average: Array) -> Array:
    """Entropy of a distribution [..., V] in nats, finite where a probability is 0."""
    return -(average * jnp.log(average + 1e-5)).sum(axis=-1)
