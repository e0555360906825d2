"""A table of learned vectors: nearest entries, and its update without gradients (arXiv:1711.00937, appendix A.1)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError


class Codebook(nn.Module):
    """vocab_size vectors of `channels` numbers.

    Attributes:
      l2_norm: vectors and what is compared with them are brought to unit length (arXiv:2110.04627).
      ema_decay: above 0, the vectors are no matter of gradients but running means of what they were nearest to. The leaves
        `count` and `sum` then stand beside `embedding`, and `update_codebook` gives all three anew after each step.
      revive_below: with ema_decay, vectors whose count has fallen so low are replaced by latents of the batch; see
        `update_codebook`.

    Raises:
      UsageError: values outside their ranges.
    """

    vocab_size: int
    channels: int
    l2_norm: bool = False
    ema_decay: float = 0.0
    revive_below: float = 0.0

    def setup(self) -> None:
        """The vectors and, where they are running means, what these are made of."""
        if self.vocab_size < 2 or self.channels < 1:
            raise UsageError(
                f"config.tokenizer.quantizer.vocab_size={self.vocab_size} and channels={self.channels} must be at least 2 and 1."
            )
        if not 0 <= self.ema_decay < 1 or not 0 <= self.revive_below < 1 or (self.revive_below and not self.ema_decay):
            raise UsageError(
                f"config.tokenizer.quantizer.ema_decay={self.ema_decay} and revive_below={self.revive_below} must lie in "
                "[0, 1), and revive_below needs ema_decay > 0."
            )
        self.embedding = self.param("embedding", self._start, (self.vocab_size, self.channels))
        if self.ema_decay:
            self.param("count", nn.initializers.ones, (self.vocab_size,))
            self.param("sum", lambda _: self.embedding)

    def _start(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Close to zero, so that all vectors compete for the first latents; of unit length where that counts."""
        vectors = jax.random.uniform(key, shape, jnp.float32, -1 / self.vocab_size, 1 / self.vocab_size)
        return normalized(vectors) if self.l2_norm else vectors

    @property
    def vectors(self) -> Array:
        """[vocab_size, channels] as they are compared and looked up."""
        vectors = jax.lax.stop_gradient(self.embedding) if self.ema_decay else self.embedding
        return normalized(vectors) if self.l2_norm else vectors

    def distances(self, z: Array) -> Array:
        """Squared distances of z [B, L, channels] to all vectors, [B, L, vocab_size]; exact on TPUs too, as they choose codes."""
        vectors = self.vectors
        lengths = jnp.square(z).sum(axis=-1, keepdims=True) + jnp.square(vectors).sum(axis=-1)[None, None]
        return lengths - 2 * jnp.einsum("bld,vd->blv", z, vectors, precision="highest")

    def __call__(self, codes: Array) -> Array:
        """codes [B, L] int32 to vectors [B, L, channels]."""
        return jnp.asarray(self.vectors)[codes]


def normalized(x: Array) -> Array:
    """x [..., D] at unit length; the gradient at 0 is finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def update_codebook(
    leaves: Mapping[str, Array], inputs: Array, codes: Array, key: Array, decay: float, revive_below: float = 0.0
) -> dict[str, Array]:
    """The leaves of a Codebook after a batch, as exponential moving averages of counts and sums.

    Counts are relative: 1 is an even share of the batch, N / V vectors. A vector of which the count has fallen below
    `revive_below` is replaced by one of the inputs, all different as far as they go, and starts again with an even share: so
    log(revive_below) / log(decay) steps without use are too long.

    Args:
      leaves: embedding [V, D], count [V], sum [V, D].
      inputs: [B, L, D], what was quantized.
      codes: [B, L] int32, the vectors that were nearest.
      key: chooses the inputs that replace vectors.
      decay: of the averages, per step.
      revive_below: relative count; 0 replaces nothing.

    Returns: the new leaves, by the same names.
    """
    size, width = leaves["embedding"].shape
    vectors, chosen = jax.lax.stop_gradient(inputs).reshape(-1, width), codes.reshape(-1)
    share = size / len(chosen)
    count = jax.ops.segment_sum(jnp.full(len(chosen), share), chosen, size)
    total = jax.ops.segment_sum(vectors * share, chosen, size)
    count = decay * leaves["count"] + (1 - decay) * count
    total = decay * leaves["sum"] + (1 - decay) * total
    if revive_below:
        drawn = vectors[jax.random.permutation(key, len(chosen))[jnp.arange(size) % len(chosen)]]
        unused = count < revive_below
        count, total = jnp.where(unused, 1.0, count), jnp.where(unused[:, None], drawn, total)
    return {"embedding": total / jnp.maximum(count, 1e-8)[:, None], "count": count, "sum": total}
