"""What a head promises: a distribution over tokens for every hidden vector."""

from __future__ import annotations

from typing import ClassVar, Protocol

from flax import struct
from jax import Array
from jax.typing import ArrayLike

from ar_jax.heads.noise import Noise


@struct.dataclass
class Sampling:
    """How tokens are drawn. All values are traced, so none of them compiles anew; None leaves a filter out.

    Attributes:
      temperature: divides the logits, or scales the noise of continuous tokens; 0 takes the likeliest token, or the
        mean of a drawn component.
      top_k: keep the k likeliest tokens.
      top_p: keep the likeliest tokens up to this total probability (arXiv:1904.09751).
      min_p: keep tokens at least this fraction as likely as the likeliest (arXiv:2407.01082).
      confidence_temperature: scales the noise by which an adaptive order chooses what it keeps, where that is not the
        temperature; then it is what a schedule of temperatures lowers.
    """

    temperature: ArrayLike = 1.0
    top_k: ArrayLike | None = None
    top_p: ArrayLike | None = None
    min_p: ArrayLike | None = None
    confidence_temperature: ArrayLike | None = None


class Head(Protocol):
    """p(token | hidden vector). A Linen module whose methods are called through `apply`."""

    has_likelihood: ClassVar[bool]  # log_prob exists

    def loss(
        self, hidden: Array, target: Array, key: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Array:
        """What training minimises, in nats per token where that exists: hidden [B, T, D], target [B, T, ...] to [B, T]."""

    def log_prob(self, hidden: Array, target: Array) -> Array:
        """Exact log-likelihood (density) in nats, [B, T].

        Raises:
          UsageError: the head has none.
        """

    def sample(
        self,
        hidden: Array,
        noise: Noise,
        settings: Sampling,
        unguided: Array | None = None,
        guidance_scale: Array | float = 1.0,
    ) -> Array:
        """Draws tokens [B, T, ...].

        Args:
          hidden: [B, T, D].
          noise: all that is random about the draw.
          settings: temperature and filters.
          unguided: [B, T, D], the hidden vectors without the condition; None draws without guidance.
          guidance_scale: 1 is the conditional distribution, 0 the unconditional one.
        """
